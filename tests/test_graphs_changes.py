"""Recorded calls of encoders: what ends them, what cannot be recorded, and all that goes on working."""

import copy
import inspect
import pickle

import pytest
import torch
from architectures import build
from graph_cases import Closures, call, graphs_of, patched, recorded, replays
from torch import nn
from torch.utils._pytree import tree_flatten

import fastinfer
from fastinfer.modules import capture, graphed

pytestmark = pytest.mark.models


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
