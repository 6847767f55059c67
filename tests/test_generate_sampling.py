"""Sampling in our loop: transformers' distribution, and its processors."""

import pytest
import torch
from generating import PROMPT, prompts, same
from transformers import LogitsProcessor, LogitsProcessorList, set_seed

import fastinfer

pytestmark = pytest.mark.models


def test_sampling_is_reproducible(pair):
    options = {"do_sample": True, "max_new_tokens": 20, "num_return_sequences": 3, "top_k": 50}
    runs = []
    for seed in (1, 1, 2):
        set_seed(seed)
        runs.append(pair[1].generate(**prompts(1), **options))
    assert fastinfer.report(pair[1]).last_generate == "fused"
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len({tuple(row.tolist()) for row in runs[0]}) == 3
    following = pair[1].generate(**prompts(1), **options)
    assert not torch.equal(following, runs[2])


class Shift(LogitsProcessor):
    """One that ops.sample does not know."""

    def __call__(self, input_ids, scores):
        return scores + 0.5 * (torch.arange(scores.shape[-1]) % 2)


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 0},
        {"top_k": 6, "temperature": 3.0},
        {"top_p": 0.7, "temperature": 4.0, "top_k": 0},
        {"min_p": 0.1, "temperature": 4.0, "top_k": 0, "repetition_penalty": 1.5},
        {"typical_p": 0.8, "temperature": 4.0, "top_k": 0},
    ],
)
def test_samples_have_transformers_distribution(pair, settings, custom):
    """The second token after one that is fixed, so that a captured step draws it: its frequencies in 4,000 rows."""
    rows = 4000
    extra = {"logits_processor": LogitsProcessorList([Shift()])} if custom else {}
    given = prompts(1)
    options = {"do_sample": True, **settings}
    scores = (
        pair[0]
        .generate(**given, **options, **extra, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
        .scores[0]
    )
    probabilities = scores[0].softmax(-1).double()
    ours = pair[1].generate(**given, **options, **extra, max_new_tokens=2, num_return_sequences=rows)
    assert fastinfer.report(pair[1]).last_generate == "fused"
    check_frequencies(ours[:, PROMPT], probabilities)
    first = ours[:, PROMPT].mode().values
    after = ours[ours[:, PROMPT] == first]
    prompt = after[:1, : PROMPT + 1]
    scores = (
        pair[0]
        .generate(prompt, **options, **extra, max_new_tokens=1, return_dict_in_generate=True, output_scores=True)
        .scores[0]
    )
    check_frequencies(after[:, -1], scores[0].softmax(-1).double())


def check_frequencies(tokens, probabilities):
    """Pearson's statistic against its mean and deviation, of tokens that are expected five times at least."""
    count = len(tokens)
    observed = torch.bincount(tokens, minlength=len(probabilities)).double()
    assert (observed[probabilities == 0] == 0).all()
    often = probabilities * count >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = count * torch.cat([probabilities[often], probabilities[~often].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = max(1, len(expected) - 1)
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


@pytest.mark.parametrize("rows", [1, 3])
def test_processors_in_greedy_search(pair, rows):
    same(pair, rows=rows, padded=True, repetition_penalty=1.3, max_new_tokens=40)
    same(pair, rows=rows, padded=True, repetition_penalty=1.3, no_repeat_ngram_size=2, max_new_tokens=40)
    same(pair, rows=rows, logits_processor=LogitsProcessorList([Shift()]), max_new_tokens=40)
    same(pair, rows=rows, prefix_allowed_tokens_fn=lambda row, ids: [int(ids[-1] + 1) % 131, 7], max_new_tokens=40)
    same(pair, rows=rows, bad_words_ids=[[5], [7, 9]], suppress_tokens=[11, 12], max_new_tokens=40)


class Grammar(LogitsProcessor):
    """Takes a token in at each call, and breaks when one comes after the end."""

    def __init__(self, end, prompt):
        self.end, self.seen = end, prompt

    def __call__(self, input_ids, scores):
        new = input_ids[0, self.seen :].tolist()
        assert len(new) <= 1 and self.end not in new
        self.seen += len(new)
        return scores


def test_processors_of_users_are_called_as_by_transformers(pair):
    """A grammar that has come to its end gets no token that the host has computed ahead."""
    end = int(pair[0].generate(**prompts(1), max_new_tokens=7)[0, -1])

    def allowed(row, ids):
        assert end not in ids[PROMPT:]
        return list(range(131))

    counts = []
    for model in pair:
        grammar = Grammar(end, PROMPT)
        options = {"eos_token_id": end, "max_new_tokens": 20}
        model.generate(**prompts(1), logits_processor=LogitsProcessorList([grammar]), **options)
        model.generate(**prompts(1), prefix_allowed_tokens_fn=allowed, **options)
        counts.append(grammar.seen)
    assert counts[0] == counts[1] and fastinfer.report(pair[1]).last_generate == "fused"
