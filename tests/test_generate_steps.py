"""Steps that are captured and reused, and generate as a part of a patch."""

import contextlib
import copy
import gc
import pickle
import threading
import time
import weakref
from unittest.mock import Mock

import pytest
import torch
from architectures import build
from generating import PROMPT, LateMail, Replays, engine, late, long, made, patched, prompts, same

import fastinfer
from fastinfer.generation import engine as engines
from fastinfer.generation.graphs import CUDAGraphs, Step
from fastinfer.modules.capture import CaptureError, CUDARecorder

pytestmark = pytest.mark.models


# ---- captured steps --------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", ["keep", "int8"])
def test_a_cache_grows_while_it_decodes(monkeypatch, kind):
    """A large max_length is no reason to take the memory for all of it; captured steps follow the cache."""
    late(monkeypatch)
    monkeypatch.setattr(engines, "ROOM", 8)
    model = long(monkeypatch, "llama", positions=4096)
    ours = fastinfer.patch(copy.deepcopy(model), "keep", kv_cache=kind)
    before = Replays.recorded
    out = ours.generate(**prompts(2, padded=True), max_new_tokens=530)
    session = engine(ours).sessions[2, kind]
    assert session.cache.capacity == 1024 and Replays.recorded == before + 3, "256, 512, 1024"
    if kind == "keep":
        assert torch.equal(out, model.generate(**prompts(2, padded=True), max_new_tokens=530))
    again = ours.generate(**prompts(2, padded=True), max_new_tokens=530)
    assert torch.equal(again, out) and engine(ours).sessions[2, kind] is session


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


# ---- the patch -------------------------------------------------------------------------------------------------------


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


def test_a_step_that_cannot_be_captured_runs_as_it_is():
    class Refuses:
        def warm(self, work):
            return work()

        def record(self, work):
            raise CaptureError("no capture here")

    runs = []
    step = Step(lambda x: runs.append(x) or len(runs), Refuses())
    assert step(1) == 1
    with pytest.warns(UserWarning, match="no capture here"):
        assert step(1) == 2
    assert step(1) == 3 and runs == [1, 1, 1]


def test_a_call_waits_for_the_one_before_whatever_its_rows(monkeypatch):
    """Steps of all sessions share their memory; the one too many of a call may still run when the next call begins."""
    model, events = patched(long(monkeypatch, "llama")), []

    class Noted(LateMail):
        def open(self):
            events.append(("open", self))

        def close(self):
            events.append(("close", self))

    monkeypatch.setitem(engines.BACKENDS, "cpu", engines.Backend(Noted, Replays))
    for rows in (1, 2, 1):
        model.generate(**prompts(rows), max_new_tokens=4)
    assert [what for what, _ in events] == ["close", "open", "close", "open", "close"]
    assert all(opened is closed for (_, closed), (_, opened) in zip(events[::2], events[1::2], strict=False))


def test_steps_and_encoders_are_not_captured_at_once(monkeypatch):
    """torch fails where a second capture begins in another thread."""
    inside, most = [], []

    @contextlib.contextmanager
    def capture(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        yield
        inside.pop()

    fakes = {"graph": capture, "device": lambda device: contextlib.nullcontext()}
    for name in ("graph", "device", "CUDAGraph", "Stream", "Event", "graph_pool_handle", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, fakes.get(name, Mock))
    recorders = [CUDAGraphs(torch.device("cuda", 0)), CUDARecorder(torch.device("cuda", 0))]
    threads = [threading.Thread(target=recorder.record, args=(lambda: None,)) for recorder in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1]
