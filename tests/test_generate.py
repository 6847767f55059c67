"""generate of a patched model: transformers' tokens, from our loop."""

import copy
import time

import pytest
import torch
from architectures import DECODERS
from generating import PROMPT, Streamer, both, letters, long, made, patched, prompts, same
from transformers import (
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastinfer
from fastinfer.generation.cache import KVCache
from fastinfer.generation.loop import CACHE_NAME

pytestmark = pytest.mark.models


# ---- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_are_transformers(name, rows, padded, monkeypatch):
    if name == "mixtral":
        pytest.skip("its experts are not fused")
    model = long(monkeypatch, name)
    ours = same((model, patched(model)), rows=rows, padded=padded, max_new_tokens=200)
    assert ours.shape == (rows, PROMPT + 200)


@pytest.mark.parametrize("padded", [False, True])
def test_steps_one_behind_give_the_same_tokens(padded, pair):
    for _ in range(3):
        same(pair, rows=3, padded=padded, max_new_tokens=60)


def test_a_model_of_experts_goes_to_transformers_loop(monkeypatch):
    model = long(monkeypatch, "mixtral")
    try:
        ours = fastinfer.patch(copy.deepcopy(model))
    except fastinfer.PatchError:
        pytest.skip("not patched at all")
    assert "fused" in fastinfer.report(ours).decode_step
    ours.generate(**prompts(1), max_new_tokens=3)


# ---- when it ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_eos_lists_and_padding(pair, rows):
    tokens = made(pair, rows)
    eos = [int(tokens[row, 3 + 7 * row]) for row in range(rows)]
    for ids in (eos[0], eos):
        ours = same(pair, rows=rows, eos_token_id=ids, max_new_tokens=30)
        assert rows == 1 or (ours == 0).any()
        same(pair, rows=rows, eos_token_id=ids, pad_token_id=7, max_new_tokens=30)


def test_the_first_token_may_end_it(pair):
    tokens = made(pair, 1)
    assert same(pair, eos_token_id=int(tokens[0, 0]), max_new_tokens=9).shape[1] == PROMPT + 1


@pytest.mark.parametrize("options", [{"max_new_tokens": 1}, {"max_length": PROMPT + 2}, {"max_length": PROMPT + 1}])
def test_lengths(pair, options):
    same(pair, rows=2, **options)


def test_min_new_tokens(pair):
    eos = made(pair)[0, 2].item()
    short = same(pair, eos_token_id=eos, max_new_tokens=30)
    longer = same(pair, eos_token_id=eos, min_new_tokens=12, max_new_tokens=30)
    assert longer.shape[1] >= PROMPT + 12 > short.shape[1]
    same(pair, rows=3, eos_token_id=eos, min_new_tokens=12, max_new_tokens=30)


@pytest.mark.parametrize("rows", [1, 3])
def test_stop_strings(pair, rows):
    tokens = made(pair, rows)
    words = [chr(33 + int(tokens[row, 2 + 5 * row])) + chr(33 + int(tokens[row, 3 + 5 * row])) for row in range(rows)]
    for extra in ({}, {"eos_token_id": 2}):
        ours = same(pair, rows=rows, stop_strings=words, tokenizer=letters(), max_new_tokens=30, **extra)
        assert ours.shape[1] < PROMPT + 30


def test_stop_strings_in_a_configuration(pair):
    word = chr(33 + int(made(pair)[0, 3]))
    config = copy.deepcopy(pair[0].generation_config)
    config.stop_strings, config.max_new_tokens = word, 30
    assert same(pair, generation_config=config, tokenizer=letters()).shape[1] == PROMPT + 4
    assert config.stop_strings == word
    for model in pair:
        model.generation_config.stop_strings = word
    same(pair, tokenizer=letters(), max_new_tokens=30)
    with pytest.raises(ValueError, match="tokenizer"):
        pair[1].generate(**prompts(1), max_new_tokens=30)


def test_max_time(pair):
    assert same(pair, max_time=0.0, max_new_tokens=30).shape[1] == PROMPT + 1
    started = time.perf_counter()
    ours = pair[1].generate(**prompts(1), max_time=0.05, max_new_tokens=240)
    assert ours.shape[1] > PROMPT and time.perf_counter() - started < 30


class Criterion(StoppingCriteria):
    """Finishes row r at length `ends[r]`, and remembers what it was called with."""

    def __init__(self, *ends):
        self.ends, self.calls = torch.tensor(ends), []

    def __call__(self, input_ids, scores, **kwargs):
        self.calls.append((input_ids.clone(), None if scores is None else len(scores)))
        return input_ids.shape[1] >= self.ends[: len(input_ids)]


@pytest.mark.parametrize("extra", [{}, {"eos_token_id": 2}, {"eos_token_id": 2, "min_new_tokens": 3}])
@pytest.mark.parametrize("rows", [1, 3])
def test_criteria_of_users(pair, rows, extra):
    """Rows finish independently; what a criterion sees is what transformers' loop shows it, call for call."""
    seen = []
    for model in pair:
        criterion = Criterion(PROMPT + 12, PROMPT + 4, PROMPT + 7)
        given = prompts(rows, padded=True)
        ids = model.generate(**given, stopping_criteria=StoppingCriteriaList([criterion]), max_new_tokens=30, **extra)
        seen.append((ids, criterion.calls))
    (theirs, their_calls), (ours, our_calls) = seen
    assert torch.equal(theirs, ours) and ours.shape[1] == PROMPT + 12
    assert len(their_calls) == len(our_calls)
    for (a, scores_a), (b, scores_b) in zip(their_calls, our_calls, strict=True):
        assert torch.equal(a, b) and scores_a == scores_b
    assert fastinfer.report(pair[1]).last_generate == "fused"


@pytest.mark.parametrize("column", [2, 5])
def test_an_eos_right_behind_the_end_of_another_row(pair, column):
    """The device has finished a row already when the host tells it of another one."""
    tokens = made(pair)
    eos = int(tokens[0, column])
    at = tokens[0].tolist().index(eos)
    criteria = StoppingCriteriaList([Criterion(PROMPT + 99, PROMPT + at, PROMPT + 99)])
    ours = same(pair, rows=3, eos_token_id=eos, stopping_criteria=criteria, max_new_tokens=30)[:, PROMPT:]
    assert ours[0, at] == eos and not ours[0, at + 1 :].any() and not ours[1, at:].any()


@pytest.mark.parametrize("stop", [False, True])
def test_streamers(pair, stop):
    extra = {"eos_token_id": int(made(pair, 1)[0, 6])} if stop else {}
    events = []
    for model in pair:
        streamer = Streamer()
        model.generate(**prompts(1), streamer=streamer, max_new_tokens=12, **extra)
        events.append(streamer.events)
    assert events[0] == events[1]
    assert len(events[1]) < 10 if stop else len(events[1]) == 14
    assert fastinfer.report(pair[1]).last_generate == "fused"


# ---- what is returned ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
def test_dictionaries(pair, rows):
    eos = int(made(pair, rows)[0, 4])
    for asked in ({"output_scores": True}, {"output_logits": True}, {"output_scores": True, "output_logits": True}, {}):
        theirs, ours = both(
            pair,
            rows=rows,
            max_new_tokens=12,
            eos_token_id=eos,
            repetition_penalty=1.1,
            return_dict_in_generate=True,
            **asked,
        )
        assert type(theirs) is type(ours) and torch.equal(theirs.sequences, ours.sequences)
        for name in ("scores", "logits"):
            a, b = getattr(theirs, name), getattr(ours, name)
            assert (a is None) == (b is None) == (f"output_{name}" not in asked)
            for x, y in zip(a or (), b or (), strict=True):
                torch.testing.assert_close(x, y, rtol=2e-4, atol=2e-4)
        cache = ours[CACHE_NAME]
        assert isinstance(cache, KVCache) and cache.filled == theirs[CACHE_NAME].get_seq_length()
        for ours_layer, theirs_layer in zip(cache.layers, theirs[CACHE_NAME].layers, strict=True):
            torch.testing.assert_close(ours_layer.keys, theirs_layer.keys, rtol=2e-4, atol=2e-4)
            torch.testing.assert_close(ours_layer.values, theirs_layer.values, rtol=2e-4, atol=2e-4)


def test_a_returned_cache_is_the_callers(pair):
    given, options = prompts(1), {"max_new_tokens": 9, "return_dict_in_generate": True}
    theirs, ours = both(pair, **options)
    cache = ours[CACHE_NAME]
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    pair[1].generate(input_ids=given["input_ids"].flip(1), **options)
    pair[1].generate(input_ids=given["input_ids"].flip(1), max_new_tokens=9)
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    more = [
        model.generate(out.sequences, max_new_tokens=20, **{CACHE_NAME: out[CACHE_NAME]})
        for model, out in ((pair[0], theirs), (pair[1], ours))
    ]
    assert torch.equal(*more) and cache.filled == PROMPT + 9 + 20 - 1
    assert fastinfer.report(pair[1]).last_generate == "fused"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["keep", "int8"])
def test_caches_of_callers(pair, kind, padded):
    """A conversation on one cache gives what one without a cache, each turn from the start, would."""
    given, cache = prompts(2, padded), KVCache(kind=kind)
    ids, mask = given["input_ids"], given["attention_mask"]
    for turn in range(3):
        ours = pair[1].generate(ids, attention_mask=mask, max_new_tokens=6, **{CACHE_NAME: cache})
        assert fastinfer.report(pair[1]).last_generate == "fused"
        assert cache.filled == ours.shape[1] - 1
        if kind == "keep":
            assert torch.equal(pair[0].generate(ids, attention_mask=mask, max_new_tokens=6), ours)
        ids = torch.cat([ours, torch.full((2, 3), 5 + turn)], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)


def test_an_int8_cache(pair):
    ours = patched(pair[0], kv_cache="int8")
    out = ours.generate(**prompts(2), max_new_tokens=5, return_dict_in_generate=True)
    assert fastinfer.report(ours).last_generate == "fused"
    assert {layer.k_cache.dtype for layer in out[CACHE_NAME].layers} == {torch.int8}
    with pytest.raises(ValueError, match="kv_cache must be"):
        fastinfer.patch(copy.deepcopy(pair[0]), "keep", kv_cache="int4")
