"""Recorded calls of encoders: what is replayed, what never is, what ends it. On the CPU a closure stands in for a graph."""

import contextlib
import copy
import inspect
import pickle
import threading

import pytest
import torch
from architectures import ENCODERS, build, inputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import fastinfer
from fastinfer.modules import capture, graphed

pytestmark = pytest.mark.models


class Closures:
    """Records work as a closure that runs it again and writes its results where the first ones are, as a graph does."""

    def __init__(self, device):
        self.device, self.replays, self.recorded = device, 0, 0

    def record(self, work):
        try:
            result = work()
        except Exception as error:
            raise capture.CaptureError(str(error)) from error
        self.recorded += 1

        def replay():
            self.replays += 1
            for own, new in zip(tree_flatten(result)[0], tree_flatten(work())[0]):
                if isinstance(own, torch.Tensor):
                    own.copy_(new)

        return replay, result

    def ordered(self):
        return contextlib.nullcontext()

    def finish(self):
        pass


@pytest.fixture
def recording(monkeypatch):
    monkeypatch.setitem(capture.RECORDERS, "cpu", Closures)


def graphs_of(model):
    return vars(model)["_fastinfer"].graphed[0][1]


def replays(model):
    """Replays that callers got the results of; those that prove a recording are not counted."""
    return sum(graph.replays for graph in graphs_of(model).graphs.values())


def patched(name="bert", **options):
    return fastinfer.patch(build(name), **options)


@torch.inference_mode()
def call(model, given=None, **more):
    return model(**(given or inputs("bert")), **more)


def recorded(**options):
    """A patched model, one of whose calls is replayed."""
    model = patched(**options)
    for _ in range(3):
        call(model)
    assert replays(model) == 1 and len(graphs_of(model).graphs) == 1
    return model


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


# --- what ends it


def exchange_parameter(model):
    model.bert.encoder.layer[0].output.LayerNorm.weight = nn.Parameter(torch.full((64,), 2.0))


def exchange_data(model):
    model.bert.encoder.layer[0].output.LayerNorm.bias.data = torch.ones(64)


def exchange_module(model):
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]


def exchange_buffer(model):
    model.bert.embeddings.token_type_ids = torch.ones_like(model.bert.embeddings.token_type_ids)


def drop_layer(model):
    del model.bert.encoder.layer[1]


def change_attribute(model):
    model.bert.encoder.layer[0].output.LayerNorm.eps = 0.5


def change_config(model):
    model.config.output_hidden_states = True


def add_hook(model):
    model.bert.encoder.layer[0].register_forward_hook(lambda module, args, output: output * 2)


def train_a_part(model):
    model.bert.encoder.layer[0].output.train()
    model.bert.encoder.layer[0].output.dropout.p = 1.0


def load_assigned(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["bert.encoder.layer.0.output.LayerNorm.bias"] += 1
    model.load_state_dict(state, assign=True)


CHANGES = [
    exchange_parameter,
    exchange_data,
    exchange_module,
    exchange_buffer,
    drop_layer,
    change_attribute,
    change_config,
    add_hook,
    train_a_part,
    load_assigned,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_drops_the_graphs(recording, change):
    model, plain = recorded(), patched(graphs=False)
    before = call(model)
    change(model)
    change(plain)
    for _ in range(6):
        actual, wanted = call(model), call(plain)
        assert actual.keys() == wanted.keys() and torch.equal(actual.logits, wanted.logits)
    assert len(actual) != len(before) or not torch.equal(actual.logits, before.logits)
    assert len(graphs_of(model).graphs) == (change not in (add_hook, train_a_part))
    assert not graphs_of(model).reason


def test_loading_in_place_keeps_them(recording):
    model = recorded(weights="keep")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["bert.encoder.layer.0.output.LayerNorm.bias"] += 1
    before = call(model).logits
    model.load_state_dict(state)
    assert not torch.equal(call(model).logits, before) and replays(model) == 3


@pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu"), lambda m: m.half()])
def test_moving_frees_them_at_once(recording, move):
    model = recorded()
    move(model)
    graphs = graphs_of(model)
    assert not graphs.graphs and graphs.recorder is None and graphs.snapshot is None
    for _ in range(3):
        call(model)
    assert len(graphs.graphs) == 1


def test_train_mode_and_back(recording):
    model = recorded()
    wanted = call(model).logits
    model.train()
    call(model)
    model.eval()
    assert torch.equal(call(model).logits, wanted)


def test_transformers_recorders_of_outputs_are_no_hooks(recording):
    model = recorded()
    call(model, output_hidden_states=True)  # puts them in, to stay
    for _ in range(6):
        call(model)
    assert len(graphs_of(model).graphs) == 1 and replays(model) == 2


@pytest.mark.parametrize(
    "fail, reason",
    [
        (lambda self, work: (_ for _ in ()).throw(capture.CaptureError("a sync\nand more")), "a sync"),
        (lambda self, work: (lambda: None, tree_zeros(work())), "a replay returned something else than the call"),
        (lambda self, work: (work, (work(), 1)), "it returns something else when recorded"),
        (lambda self, work: (work, object()), "it returns a object that a graph would not make anew"),
    ],
)
def test_what_cannot_be_recorded_runs_as_it_is(recording, monkeypatch, fail, reason):
    monkeypatch.setattr(Closures, "record", fail)
    model, plain = patched(), patched(graphs=False)
    for _ in range(4):
        assert torch.equal(call(model).logits, call(plain).logits)
    assert fastinfer.report(model).graphs[0].reason == reason
    assert f"CUDA graphs: not recorded: {reason}" in str(fastinfer.report(model))


def tree_zeros(result):
    for leaf in tree_flatten(result)[0]:
        leaf.zero_()
    return result


def test_inputs_written_and_attributes_changed_by_a_call(recording):
    graphs = graphs_of(patched())
    with torch.no_grad():
        for _ in range(3):
            graphs(lambda x: x.add_(1), (torch.zeros(2),), {})
    assert graphs.reason == "it writes to its inputs"
    graphs = graphs_of(patched())
    with torch.no_grad():
        for _ in range(3):
            graphs(lambda x, module=graphs.module: setattr(module, "count", object()) or x + 1, (torch.zeros(2),), {})
    assert graphs.reason == "it changes its own attributes when called"


# --- beside everything else


def test_unpatch(recording):
    model = build("bert")
    attributes, wanted = set(vars(model)), call(model).logits
    fastinfer.patch(model)
    for _ in range(3):
        call(model)
    graphs = graphs_of(model)
    fastinfer.unpatch(model)
    assert set(vars(model)) == attributes and torch.equal(call(model).logits, wanted) and not graphs.graphs


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_has_graphs_of_its_own(recording, copied):
    model = recorded()
    other = copied(model)
    assert graphs_of(other) is not graphs_of(model) and graphs_of(other).module is other
    assert vars(other)["forward"].args == (other, graphs_of(other)) and not graphs_of(other).graphs
    with torch.no_grad():
        other.bert.encoder.layer[0].output.LayerNorm.weight.mul_(2)
    for _ in range(3):
        assert not torch.equal(call(other).logits, call(model).logits)
    assert replays(other) == 1
    fastinfer.unpatch(other)
    assert "forward" not in vars(other)


def test_a_model_of_kept_weights(recording):
    model = build("bert")
    wanted = call(model).logits
    fastinfer.patch(model, "keep")
    for _ in range(3):
        assert torch.equal(call(model).logits, wanted)
    assert replays(model) == 1
    with pytest.raises(fastinfer.PatchError, match="patched already"):
        fastinfer.patch(model)
    fastinfer.unpatch(model)
    assert "_fastinfer" not in vars(model)
    with pytest.raises(fastinfer.PatchError, match="replaces nothing"):
        fastinfer.patch(model, "keep", graphs=False)


def test_an_encoder_inside_of_something(recording):
    outer = nn.Sequential(build("bert"), nn.Identity()).eval()
    fastinfer.patch(outer)
    for _ in range(3):
        call(outer[0])
    assert fastinfer.report(outer).graphs[0].path == "0" and replays(outer) == 1


def test_a_forward_of_the_users_own_is_left(recording):
    model = build("bert")
    model.forward = lambda **given: 1
    fastinfer.patch(model)
    assert model() == 1
    assert fastinfer.report(model).graphs[0].reason == "its forward was replaced on the instance"


def test_signature_and_compile(recording):
    model, wanted = patched(), patched(graphs=False)
    assert inspect.signature(model.forward) == inspect.signature(wanted.forward)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        assert torch.allclose(call(compiled).logits, call(wanted).logits, atol=1e-5)
    assert not graphs_of(model).graphs


@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerate(recording, when):
    hooks = pytest.importorskip("accelerate.hooks")
    model, plain = build("bert"), patched(graphs=False)
    hook = hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
    if when == "before":
        hooks.add_hook_to_module(model, hook)
    fastinfer.patch(model)
    if when == "after":
        hooks.add_hook_to_module(model, hook)
    for _ in range(3):
        assert torch.equal(call(model).logits, call(plain).logits)
    assert replays(model) == 1
    fastinfer.unpatch(model)
    assert "_apply" not in vars(model)
    assert not any(isinstance(value, graphed.GraphedForward) for value in vars(model).values())
    assert call(model).logits.shape == (2, 9, 131)


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
