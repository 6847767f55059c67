"""Recorded calls of encoders: what is replayed, and what never is."""

import threading

import pytest
import torch
from architectures import ENCODERS, inputs
from graph_cases import call, graphs_of, patched, recorded, replays
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fastinfer
from fastinfer.modules import capture, graphed

pytestmark = pytest.mark.models


# --- what is replayed


@pytest.mark.parametrize("name", ENCODERS)
def test_replays_from_the_third_call_on(recording, name):
    given, plain = inputs(name), patched(name, graphs=False)
    model = patched(name)
    for expected in (0, 0, 1, 2):
        ids = torch.randint(3, 131, given["input_ids"].shape)
        actual, wanted = call(model, given | {"input_ids": ids}), call(plain, given | {"input_ids": ids})
        assert torch.allclose(actual.logits, wanted.logits, atol=1e-2) and type(actual) is type(wanted)
        assert actual.keys() == wanted.keys() and replays(model) == expected
    assert "CUDA graphs: 1 kinds of calls recorded" in str(fastinfer.report(model))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_any_mask(recording, implementation):
    model, plain = patched(), patched(graphs=False)
    model.set_attn_implementation(implementation)
    plain.set_attn_implementation(implementation)
    for _ in range(3):
        call(model)
    for lengths in ((9, 9), (9, 4), (1, 1), (0, 9)):
        mask = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
        for side in (mask, mask.flip(1)):
            given = inputs("bert") | {"attention_mask": side}
            assert torch.allclose(call(model, given).logits, call(plain, given).logits, atol=1e-2, equal_nan=True)
    assert replays(model) == 9


def test_additive_masks_are_made_once(recording):
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            count[func] = count.get(func, 0) + 1
            return func(*args, **(kwargs or {}))

    model, made = recorded(weights="keep"), []
    for replayed in (True, False):
        count: dict = {}
        with torch.no_grad(), Counting():
            if replayed:
                next(iter(graphs_of(model).graphs.values())).replay()
            else:
                type(model).forward(model, **inputs("bert") | {"attention_mask": torch.ones(2, 9).tril().long()})
        made.append(count.get(torch.ops.aten.where.self, 0))
    assert made == [0, 2]


def test_a_model_that_takes_no_additive_mask_gets_its_own(recording, monkeypatch):
    ignored = {
        "attention_mask": torch.ones(2, 9, dtype=torch.long)
    }  # right for the mask at hand, wrong for one of holes
    wrong = lambda work: graphed.partial(work.func, *work.args, **work.keywords | ignored)  # noqa: E731
    monkeypatch.setattr(graphed, "with_additive_mask", wrong)
    model, plain = recorded(), patched(graphs=False)
    assert not graphs_of(model).additive
    given = inputs("bert") | {"attention_mask": torch.ones(2, 9).tril().long()}
    assert torch.allclose(call(model, given).logits, call(plain, given).logits, atol=1e-2) and replays(model) == 2


def test_results_belong_to_the_caller(recording):
    model = recorded()
    first = call(model).logits
    kept = first.clone()
    call(model, inputs("bert") | {"input_ids": torch.full((2, 9), 5)})
    assert torch.equal(first, kept)
    with torch.inference_mode():
        call(model).logits.zero_()
    assert torch.equal(call(model).logits, kept) and replays(model) == 5


@pytest.mark.parametrize(
    "flags", [{"output_hidden_states": True}, {"return_dict": False}, {"output_attentions": False}]
)
def test_flags_have_graphs_of_their_own(recording, flags):
    model, plain = recorded(), patched(graphs=False)
    results = [call(model, **flags) for _ in range(4)]
    wanted = call(plain, **flags)
    assert replays(model) > 0
    for result in results:
        leaves, structure = tree_flatten(result)
        assert structure == tree_flatten(wanted)[1]
        assert all(map(torch.equal, leaves, tree_flatten(wanted)[0]))


def test_one_tensor_as_two_arguments_is_two_inputs(recording):
    model, plain = patched(), patched(graphs=False)
    ids = inputs("bert")["input_ids"]
    one, two = {"input_ids": ids, "labels": ids}, {"input_ids": ids, "labels": ids.flip(1)}
    for given in (one, one, two, one):
        assert torch.equal(call(model, given).loss, call(plain, given).loss)
    assert replays(model) == 2


def test_strided_and_positional_inputs(recording):
    model, plain = patched(), patched(graphs=False)
    wide = torch.randint(3, 131, (2, 18))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(wide[:, ::2]).logits, plain(wide[:, ::2]).logits)
        assert torch.equal(model(wide[:, 1::2]).logits, plain(wide[:, 1::2]).logits)
    assert replays(model) == 2


def test_threads(recording):
    model, plain = recorded(), patched(graphs=False)
    given = [inputs("bert") | {"input_ids": torch.randint(3, 131, (2, 9))} for _ in range(4)]
    wanted = [call(plain, each).logits for each in given]
    wrong = []

    def work(i):
        wrong.extend(i for _ in range(10) if not torch.equal(call(model, given[i]).logits, wanted[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and replays(model) == 41


# --- what is not


def test_least_recently_used_goes(recording, monkeypatch):
    monkeypatch.setattr(graphed, "MAX_GRAPHS", 2)
    model = patched()
    for length in (4, 4, 5, 5, 4, 6, 6):
        call(model, {"input_ids": torch.ones(1, length, dtype=torch.long)})
    assert [key[1][1] for key in graphs_of(model).graphs] == [(1, 4), (1, 6)]
    assert graphs_of(model).patience == 4  # the one that went had not paid
    for _ in range(4):
        assert (1, 7) not in [key[1][1] for key in graphs_of(model).graphs]
        call(model, {"input_ids": torch.ones(1, 7, dtype=torch.long)})
    assert [key[1][1] for key in graphs_of(model).graphs] == [(1, 6), (1, 7)]


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16), Watching],
    ids=["gradients", "autocast", "a mode that watches"],
)
def test_not_in(recording, context):
    model = patched()
    for _ in range(4):
        with torch.no_grad(), context():
            model(**inputs("bert"))
    assert not graphs_of(model).graphs


def test_not_under_vmap(recording):
    model, ids = patched(graphs=True, merge=False), inputs("bert")["input_ids"]
    graphs = graphs_of(model)
    graphs.module = nn.Identity().eval()
    with torch.no_grad():
        for _ in range(4):
            torch.func.vmap(lambda x: graphs(torch.clone, (x,), {}))(ids)
    assert not graphs.graphs


@pytest.mark.parametrize(
    "more", [{"input_ids": torch.ones(1, 65, dtype=torch.long)}, {"extra": {}}], ids=["large", "a dict"]
)
def test_not_with(recording, monkeypatch, more):
    monkeypatch.setattr(graphed, "MAX_TOKENS", 64)
    graphs = graphs_of(patched())
    with torch.no_grad():
        for _ in range(4):
            graphs(lambda **given: given["input_ids"] + 0, (), {"input_ids": torch.ones(1, 4)} | more)
    assert not graphs.graphs


def test_not_without_a_recorder():
    model = patched()
    for _ in range(4):
        call(model)
    assert not graphs_of(model).graphs and "calls are recorded as they repeat" in str(fastinfer.report(model))


@pytest.mark.parametrize("name, options", [("llama", {}), ("t5", {}), ("bert", {"graphs": False})])
def test_not_where_tokens_depend_on_earlier_calls_or_not_asked_for(recording, name, options):
    model = patched(name, **options)
    assert "forward" not in vars(model) and fastinfer.report(model).graphs == []


# --- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestCUDA:
    def test_masks(self):
        model, plain = patched(graphs=True).cuda().half(), patched(graphs=False).cuda().half()
        for i, length in enumerate((9, 9, 4, 1, 9, 7)):
            mask = (torch.arange(9) < torch.tensor([9, length])[:, None]).long()
            given = {name: t.cuda() for name, t in (inputs("bert") | {"attention_mask": mask}).items()}
            assert torch.allclose(call(model, given).logits, call(plain, given).logits, atol=2e-2), i
        assert len(graphs_of(model).graphs) == 1

    def test_a_failed_capture_leaves_no_trace(self):
        recorder = capture.CUDARecorder(torch.device("cuda", torch.cuda.current_device()))
        x = torch.ones(4, device="cuda")
        before = torch.cuda.current_stream()
        with pytest.raises(capture.CaptureError):
            recorder.record(lambda: (torch.rand(4, device="cuda") + x).sum().item())
        assert torch.cuda.current_stream() == before
        assert torch.rand(4, device="cuda").sum().item() > 0
        replay, result = recorder.record(lambda: x + torch.rand(4, device="cuda"))
        with recorder.ordered():
            replay()
        assert result.min().item() >= 1

    def test_streams(self):
        model, plain = patched().cuda(), patched(graphs=False).cuda()
        given = [{"input_ids": torch.randint(3, 131, (2, 9), device="cuda")} for _ in range(8)]
        wanted = [call(plain, each).logits for each in given]
        for each in given[:3]:
            call(model, each)
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in given], []
        for stream, each in zip(streams, given):
            with torch.cuda.stream(stream):
                results.append(call(model, each).logits)
        torch.cuda.synchronize()
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(results, wanted))
