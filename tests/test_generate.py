"""generate of a patched model: transformers' tokens, from our loop."""

import copy
import gc
import pickle
import threading
import time
import weakref

import pytest
import torch
from architectures import DECODERS, build
from generating import PROMPT, Replays, late, long, prompts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)

import fastinfer
from fastinfer.generation.cache import KVCache
from fastinfer.generation.loop import CACHE_NAME
from fastinfer.generation.support import call_refusal

pytestmark = pytest.mark.models


@pytest.fixture(params=["at once", "late"])
def pace(request, monkeypatch):
    """Tokens that the host sees at once, as on the CPU, or one step late with captured steps, as on a GPU."""
    if request.param == "late":
        late(monkeypatch)


@pytest.fixture
def pair(monkeypatch, pace):
    """A model, and the same one with our loop."""
    model = long(monkeypatch, "llama")
    return model, patched(model)


def patched(model, **options):
    return fastinfer.patch(copy.deepcopy(model), "keep", **options)


def engine(model):
    return vars(model)["_fastinfer"].engine


def both(pair, rows=1, padded=False, **options):
    """What both models generate. The second has to do it in our loop."""
    given = prompts(rows, padded)
    theirs = pair[0].generate(**given, **copy.copy(options))
    ours = pair[1].generate(**given, **copy.copy(options))
    assert fastinfer.report(pair[1]).last_generate == "fused"
    return theirs, ours


def same(pair, **options):
    theirs, ours = both(pair, **options)
    assert torch.equal(theirs, ours)
    return ours


# ---- greedy ---------------------------------------------------------------------------------------------------------


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


# ---- when it ends ---------------------------------------------------------------------------------------------------


def made(pair, rows=3):
    return pair[0].generate(**prompts(rows), max_new_tokens=30)[:, PROMPT:]


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


def letters():
    """A tokenizer whose token i is the letter chr(33 + i)."""
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(131)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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


class Streamer:
    def __init__(self, fail_at=None):
        self.events, self.fail_at = [], fail_at

    def put(self, value):
        self.events.append(value.tolist())
        if len(self.events) == self.fail_at:
            raise OSError("the client is gone")

    def end(self):
        self.events.append("end")


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


# ---- what is returned -----------------------------------------------------------------------------------------------


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


# ---- sampling -------------------------------------------------------------------------------------------------------


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


# ---- what our loop does not serve -----------------------------------------------------------------------------------

REFUSED = {
    "beams": ({"num_beams": 2}, "beam search"),
    "lookup": ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "static": ({"cache_implementation": "static"}, "cache_implementation"),
    "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_calls_for_transformers_loop(pair, case):
    options, reason = REFUSED[case]
    given = prompts(1)
    theirs = pair[0].generate(**given, max_new_tokens=6, **options)
    ours = pair[1].generate(**given, max_new_tokens=6, **options)
    if isinstance(theirs, dict):
        theirs, ours = theirs.sequences, ours.sequences
    assert torch.equal(theirs, ours)
    report = fastinfer.report(pair[1])
    assert reason in report.last_generate and reason in str(report)
    same(pair, max_new_tokens=3)


def test_their_caches_assistants_and_masks(pair):
    from transformers import DynamicCache

    model, ours = pair
    given = prompts(2)
    want = model.generate(**given, max_new_tokens=6)
    cache = DynamicCache(config=model.config)
    assert torch.equal(ours.generate(**given, max_new_tokens=6, **{CACHE_NAME: cache}), want)
    assert "KVCache" in fastinfer.report(ours).last_generate and cache.get_seq_length() == PROMPT + 5
    holes = given["attention_mask"].clone()
    holes[0, 4] = 0
    ours.generate(given["input_ids"], attention_mask=holes, max_new_tokens=6)
    assert "holes" in fastinfer.report(ours).last_generate
    assert torch.equal(
        ours.generate(**prompts(1), assistant_model=copy.deepcopy(model), max_new_tokens=6),
        model.generate(**prompts(1), max_new_tokens=6),
    )
    assert "assistant_model" in fastinfer.report(ours).last_generate
    embeds = model.get_input_embeddings()(given["input_ids"])
    assert torch.equal(
        ours.generate(inputs_embeds=embeds, max_new_tokens=6), model.generate(inputs_embeds=embeds, max_new_tokens=6)
    )
    assert "inputs_embeds" in fastinfer.report(ours).last_generate


def test_a_custom_generate_of_the_users_is_called(pair):
    def theirs(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids + 1

    given = prompts(1)
    assert torch.equal(pair[1].generate(**given, custom_generate=theirs), given["input_ids"] + 1)
    assert "custom_generate" in fastinfer.report(pair[1]).last_generate


def test_train_mode_and_hooks(pair):
    given = prompts(1)
    pair[1].train()
    pair[1].generate(**given, max_new_tokens=3)
    assert "train mode" in fastinfer.report(pair[1]).last_generate
    pair[1].eval()
    same(pair, max_new_tokens=3)
    handle = pair[1].model.layers[0].register_forward_hook(lambda *args: None)
    pair[1].generate(**given, max_new_tokens=3)
    assert "hook" in fastinfer.report(pair[1]).last_generate
    handle.remove()
    same(pair, max_new_tokens=3)


def test_positional_arguments(pair):
    config = copy.deepcopy(pair[0].generation_config)
    config.max_new_tokens = 5
    ids = prompts(1)["input_ids"]
    assert torch.equal(pair[0].generate(ids, config), pair[1].generate(ids, config))
    assert fastinfer.report(pair[1]).last_generate == "fused"


def test_inference_mode_around_it(pair):
    want = pair[0].generate(**prompts(2), max_new_tokens=5)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(pair[1].generate(**prompts(2), max_new_tokens=5), want)
    same(pair, rows=2, max_new_tokens=5)


def test_prompts_in_chunks(pair):
    same(pair, rows=2, padded=True, prefill_chunk_size=4, max_new_tokens=12)


def test_inside_a_pipeline(pair):
    from transformers import pipeline

    texts = [
        pipeline("text-generation", model=model, tokenizer=letters())("quite a text", max_new_tokens=9, do_sample=False)
        for model in pair
    ]
    assert texts[0] == texts[1]
    assert fastinfer.report(pair[1]).last_generate == "fused"


def test_arguments_that_a_callable_would_lose(pair):
    """Calls whose arguments transformers hands to its own decoding methods only are left alone."""
    for options, reason in (
        ({"synced_gpus": True}, "synced_gpus"),
        ({"position_ids": torch.zeros(1, 1)}, "position_ids"),
        ({"token_healing": True}, "token_healing"),
        ({"dola_layers": "low"}, "dola_layers"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive"),
        ({"num_beams": 3}, "beam"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "beam"),
    ):
        assert reason in call_refusal(pair[1], options)
    for options in ({}, {"synced_gpus": False}, {"num_beams": 1, "do_sample": True}, {"num_return_sequences": 2}):
        assert not call_refusal(pair[1], options)


# ---- errors ---------------------------------------------------------------------------------------------------------


def failing(error, result):
    """A criterion or processor that raises at its third call."""
    calls = []

    def call(input_ids, scores):
        calls.append(scores)
        if len(calls) == 3:
            raise error
        return result(input_ids, scores)

    return call


@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["streamer", "stopping_criteria", "logits_processor", "step"])
def test_the_model_works_after_an_error(pair, place, error, monkeypatch):
    same(pair, max_new_tokens=20)
    options = {
        "streamer": {"streamer": Streamer(fail_at=4)},
        "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([failing(error, lambda ids, scores: False)])},
        "logits_processor": {"logits_processor": LogitsProcessorList([failing(error, lambda ids, scores: scores)])},
        "step": {},
    }[place]
    with monkeypatch.context() as patch:
        if place == "step":
            steps, own = [], type(engine(pair[1]).step).__call__

            def fail(self, ids, cache):
                steps.append(own(self, ids, cache))
                if len(steps) == 5:
                    raise error
                return steps[-1]

            patch.setattr(type(engine(pair[1]).step), "__call__", fail)
        with pytest.raises(OSError if place == "streamer" else type(error)):
            pair[1].generate(**prompts(1), max_new_tokens=20, **options)
    same(pair, max_new_tokens=20)
    same(pair, rows=3, padded=True, max_new_tokens=20)


def test_without_memory_for_the_cache_transformers_loop_decodes(pair, monkeypatch):
    same(pair, max_new_tokens=20)

    def fail(*args):
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr("fastinfer.generation.cache.KVCacheLayer.lazy_initialization", fail)
        want = pair[0].generate(**prompts(2), max_new_tokens=20)
        assert torch.equal(pair[1].generate(**prompts(2), max_new_tokens=20), want)
        assert "out of memory" in fastinfer.report(pair[1]).last_generate
        with pytest.raises(torch.OutOfMemoryError):
            pair[1].generate(**prompts(2), max_new_tokens=20, **{CACHE_NAME: KVCache()})
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):  # its tokens have been streamed
        patch.setattr("fastinfer.generation.loop.Loop._next", fail)
        pair[1].generate(**prompts(1), max_new_tokens=20, streamer=Streamer())
    same(pair, rows=2, max_new_tokens=20)


def test_generating_inside_a_streamer(pair):
    """The inner call goes to transformers' loop; the outer one is not disturbed."""
    inner = []

    class Nested(Streamer):
        def put(self, value):
            super().put(value)
            inner.append(pair[1].generate(**prompts(1), max_new_tokens=4))

    want = pair[0].generate(**prompts(1), max_new_tokens=8)
    assert torch.equal(pair[1].generate(**prompts(1), max_new_tokens=8, streamer=Nested()), want)
    assert all(torch.equal(tokens, want[:, : PROMPT + 4]) for tokens in inner) and len(inner) == 9
    assert fastinfer.report(pair[1]).last_generate == "fused"


def test_two_threads_and_two_models(pair):
    """Calls on one model take turns; a second model is independent."""
    ours, other = pair[1], patched(pair[0])
    want = {rows: pair[0].generate(**prompts(rows), max_new_tokens=25) for rows in (1, 2)}
    wrong = []

    def work(model, rows):
        for _ in range(4):
            if not torch.equal(model.generate(**prompts(rows), max_new_tokens=25), want[rows]):
                wrong.append((model, rows))

    threads = [threading.Thread(target=work, args=(model, rows)) for model in (ours, ours, other) for rows in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- captured steps -------------------------------------------------------------------------------------------------


@pytest.fixture
def captured(monkeypatch):
    late(monkeypatch)
    model = long(monkeypatch, "llama")
    return model, patched(model)


def test_steps_are_captured_once_and_reused(captured):
    for padded in (False, True):
        before = Replays.recorded
        for count in (20, 30, 10):
            same(captured, rows=2, padded=padded, max_new_tokens=count)
        assert Replays.recorded == before + 1
    same(captured, rows=2, max_new_tokens=20)
    same(captured, rows=2, padded=True, max_new_tokens=20)
    assert Replays.recorded == 2, "padding at the same address"
    same(captured, rows=3, max_new_tokens=20)
    assert Replays.recorded == 3, "another number of rows"
    same(captured, rows=3, max_new_tokens=20, repetition_penalty=1.2)
    assert Replays.recorded == 4, "other settings"


def test_a_step_does_the_same_each_time(captured, monkeypatch):
    """A replay's operations, with their tensors and numbers, are those of the first: all that changes is on the device."""
    monkeypatch.setattr(Replays, "strict", True)
    same(captured, rows=2, padded=True, max_new_tokens=30)
    same(captured, rows=2, padded=True, max_new_tokens=30, eos_token_id=2)
    same(captured, rows=1, max_new_tokens=30, repetition_penalty=1.2, no_repeat_ngram_size=3)
    captured[1].generate(**prompts(2), do_sample=True, repetition_penalty=1.2, top_p=0.9, max_new_tokens=30)


def test_capacity_in_buckets(captured):
    ours = captured[1]
    same(captured, max_new_tokens=20)
    first = engine(ours).sessions[1, "keep"]
    assert first.cache.capacity == 256
    same(captured, max_new_tokens=100)
    assert engine(ours).sessions[1, "keep"] is first
    ours.generate(**prompts(1), max_length=300, eos_token_id=int(made(captured, 1)[0, 5]))
    second = engine(ours).sessions[1, "keep"]
    assert second.cache.capacity == 512
    same(captured, max_new_tokens=20)
    assert engine(ours).sessions[1, "keep"] is second, "one with more room serves too"


def test_what_is_dropped_is_freed(monkeypatch):
    """At once: the collector might come gigabytes later."""
    model = long(monkeypatch, "llama")
    ours = patched(model)
    gc.disable()
    try:
        ours.generate(**prompts(1), max_new_tokens=4)
        first = weakref.ref(engine(ours).sessions[1, "keep"])
        ours.generate(**prompts(1), max_length=300, eos_token_id=int(model.generate(**prompts(1))[0, PROMPT]))
        second = weakref.ref(engine(ours).sessions[1, "keep"])
        assert first() is None and second() is not None
        fastinfer.unpatch(ours)
        assert second() is None
    finally:
        gc.enable()


def test_few_sessions_and_steps_stay(captured):
    from fastinfer.generation.engine import SESSIONS
    from fastinfer.generation.session import STEPS

    ours = captured[1]
    for rows in range(1, SESSIONS + 3):
        same(captured, rows=rows, max_new_tokens=4)
    assert [rows for rows, _ in engine(ours).sessions] == list(range(3, SESSIONS + 3))
    for i in range(STEPS + 2):
        ours.generate(**prompts(4), do_sample=True, top_k=3 + i, max_new_tokens=4)
    assert len(engine(ours).sessions[4, "keep"].steps) == STEPS


def test_weights_that_move_are_captured_anew(captured):
    same(captured, max_new_tokens=20)
    for model in captured:
        with torch.no_grad():
            weight = model.model.layers[0].mlp.down_proj.weight
            weight.data = -weight.data.clone()
    same(captured, max_new_tokens=20)
    for model in captured:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(-0.5)
    same(captured, max_new_tokens=20)


# ---- the patch ------------------------------------------------------------------------------------------------------


def test_copies_and_pickles_decode_for_themselves(pair):
    want = same(pair, rows=2, max_new_tokens=15)
    for other in (copy.deepcopy(pair[1]), pickle.loads(pickle.dumps(pair[1]))):
        assert engine(other) is not engine(pair[1]) and engine(other).model is other
        with torch.no_grad():
            pair[1].lm_head.weight.neg_()
        assert torch.equal(other.generate(**prompts(2), max_new_tokens=15), want)
        assert fastinfer.report(other).last_generate == "fused"
        with torch.no_grad():
            pair[1].lm_head.weight.neg_()


def test_unpatching_gives_generate_back(pair):
    want = same(pair, max_new_tokens=5)
    fastinfer.unpatch(pair[1])
    assert "generate" not in vars(pair[1])
    assert torch.equal(pair[1].generate(**prompts(1), max_new_tokens=5), want)


def test_a_generate_of_the_instances_stays(monkeypatch):
    model = long(monkeypatch, "llama")
    model.generate = lambda *args, **kwargs: "mine"
    ours = fastinfer.patch(model, "int8")
    assert ours.generate() == "mine" and "generate of its own" in str(fastinfer.report(ours))
    fastinfer.unpatch(model)
    assert model.generate() == "mine"


def test_quantised_models_decode_in_our_loop(monkeypatch, pace):
    model = long(monkeypatch, "llama")
    for weights in ("int8", "int4"):
        ours = fastinfer.patch(copy.deepcopy(model), weights, activations="keep" if weights == "int8" else None)
        tokens = ours.generate(**prompts(3, True), max_new_tokens=30)
        assert fastinfer.report(ours).last_generate == "fused"
        want = type(ours).generate(ours, **prompts(3, True), max_new_tokens=30)
        assert torch.equal(tokens, want)


def test_a_cache_that_no_step_reads():
    """kv_cache has no effect on a model without a fused step: a note, or an error where strict."""
    model = build("t5")
    with pytest.raises(fastinfer.PatchError, match="kv_cache='int8' has no effect"):
        fastinfer.patch(model, kv_cache="int8", strict=True)
    assert "kv_cache='int8' has no effect" in str(fastinfer.report(fastinfer.patch(model, kv_cache="int8")))


def test_encoder_decoders_say_why_not():
    ours = fastinfer.patch(build("t5"))
    ours.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    assert "encoder–decoder" in str(fastinfer.report(ours))
