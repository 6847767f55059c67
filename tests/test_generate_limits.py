"""What our loop leaves to transformers', and what stays after errors."""

import copy
import threading

import pytest
import torch
from generating import PROMPT, Streamer, engine, letters, long, patched, prompts, same
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

import fastinfer
from fastinfer.generation.cache import KVCache
from fastinfer.generation.loop import CACHE_NAME
from fastinfer.generation.support import call_refusal

pytestmark = pytest.mark.models


# ---- what our loop does not serve ------------------------------------------------------------------------------------


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


# ---- errors ----------------------------------------------------------------------------------------------------------


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


class Ends(StoppingCriteria):
    """Finishes each row at a length of its own."""

    def __init__(self, *ends):
        self.ends = torch.tensor(ends)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


@pytest.mark.parametrize("most", [1 << 20, 10**12])
def test_no_room_is_made_for_a_limit_that_is_none(pair, most):
    """Where another criterion ends it, max_new_tokens may be any number."""
    ends, given = StoppingCriteriaList([Ends(PROMPT + 4)]), prompts(1)
    want, ours = (model.generate(**given, max_new_tokens=most, stopping_criteria=ends) for model in pair)
    assert torch.equal(want, ours) and ours.shape[1] == PROMPT + 4
    assert "in advance" in fastinfer.report(pair[1]).last_generate


def test_a_cpu_without_memory_for_the_cache_too(pair, monkeypatch):
    def fail(*args):
        torch.empty(1 << 60, dtype=torch.int8)

    monkeypatch.setattr("fastinfer.generation.cache.KVCacheLayer.lazy_initialization", fail)
    want, ours = (model.generate(**prompts(2), max_new_tokens=20) for model in pair)
    assert torch.equal(want, ours) and "out of memory" in fastinfer.report(pair[1]).last_generate


@pytest.mark.parametrize("padded", [False, True])
def test_a_conversation_up_to_the_models_limit(padded, monkeypatch):
    """What is in the cache counts once, where the whole text is given again."""
    model = long(monkeypatch, "gpt2")
    given, cache, ours = prompts(2, padded), KVCache(), patched(model)
    ids, mask = given["input_ids"], given["attention_mask"]
    for turn in range(3):
        ids = ours.generate(ids, attention_mask=mask, max_new_tokens=70, **{CACHE_NAME: cache})
        assert fastinfer.report(ours).last_generate == "fused"
        ids = torch.cat([ids, torch.full((2, 3), 5 + turn)], 1)
        mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
    assert engine(ours).sessions[2, "keep"].cache.capacity == 256


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
