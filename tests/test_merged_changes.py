"""Merged linears under what users do to models: moves, copies, other weights, hooks, adapters, undo."""

import copy
import pickle

import pytest
import torch
from architectures import ENCODERS, build, inputs, logits
from merged_cases import GATED, assert_merged, both, replaced, siblings_of
from torch import nn

import fastinfer
from fastinfer.modules import QuantizedLinear
from fastinfer.modules.siblings import PAIR
from fastinfer.rules import merging

pytestmark = pytest.mark.models

# --- what users do to models

CHANGES = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half and back": lambda m: m.half().float(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "a copy moved": lambda m: copy.deepcopy(m).to(torch.bfloat16),
    "cloned": lambda m: m._apply(lambda t: t.clone()),
}


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_merged_again_after(name, weights, change):
    apart, merged = (change(m) for m in both(name, weights))
    expected, got = logits(apart, inputs(name)), logits(merged, inputs(name))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4 if got.dtype == torch.float32 else 0.3)
    assert_merged(merged)
    fastinfer.unpatch(merged)
    assert not siblings_of(merged)


def test_a_copy_is_independent():
    _, merged = both("llama")
    expected, other = logits(merged, inputs("llama")), copy.deepcopy(merged)
    assert not {id(s) for s in siblings_of(merged)} & {id(s) for s in siblings_of(other)}
    for parameter in other.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(merged, inputs("llama")), expected)
    assert not torch.equal(logits(other, inputs("llama")), expected)


def test_a_linear_copied_alone_works():
    _, merged = both("llama")
    for linear in (merged.model.layers[0].mlp.up_proj, merged.model.layers[0].self_attn.k_proj):
        x = torch.randn(2, 64)
        assert torch.equal(copy.deepcopy(linear)(x), linear(x))


def set_weight(linear, how):
    state = linear.state_dict()
    if how == "parameter":
        linear.weight = nn.Parameter(state["weight"].flip(0), requires_grad=False)
    elif how == "load":
        linear.load_state_dict(state | {"weight": state["weight"].flip(0)})
    else:
        linear.use_layout("row") if linear.layout != PAIR else linear.stand_alone()
        linear.use_layout("row")
        linear.weight.data = state["weight"].flip(0)


def override_forward(linear):
    linear.forward = lambda x: -type(linear).forward(linear, x)


MEDDLING = {
    "other parameter": lambda m, n: set_weight(getattr(m, n), "parameter"),
    "loaded alone": lambda m, n: set_weight(getattr(m, n), "load"),
    "other data": lambda m, n: set_weight(getattr(m, n), "data"),
    "replaced": lambda m, n: setattr(m, n, replaced(getattr(m, n))),
    "moved alone": lambda m, n: getattr(m, n).to(torch.bfloat16),
    "moved and back": lambda m, n: getattr(m, n).to(torch.bfloat16).float(),
    "hooked": lambda m, n: getattr(m, n).register_forward_hook(lambda module, args, out: out * 1.5),
    "input hooked": lambda m, n: getattr(m, n).register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
    "its forward": lambda m, n: override_forward(getattr(m, n)),
}


@pytest.mark.parametrize("meddle", MEDDLING.values(), ids=MEDDLING)
@pytest.mark.parametrize("child", ["self_attn.q_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
def test_meddling_with_one_linear(child, meddle):
    block, name = child.split(".")
    models = both("llama")
    expected = logits(models[1], inputs("llama"))
    results = []
    for model in models:
        meddle(getattr(model.model.layers[1], block), name)
        results.append([logits(model, inputs("llama")) for _ in range(3)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)
    same = meddle in (MEDDLING["replaced"], MEDDLING["moved and back"], MEDDLING["moved alone"])
    assert same or not torch.allclose(results[1][0], expected, atol=1e-3)


def test_another_activation_is_used():
    models = both("llama")
    for model in models:
        model.model.layers[0].mlp.act_fn = nn.ReLU()
    one, other = (logits(model, inputs("llama")) for model in models)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


def test_global_hooks_see_every_linear():
    _, merged = both("llama")
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    logits(merged, inputs("llama"))
    handle.remove()
    assert all(m in seen for m in merged.modules() if isinstance(m, QuantizedLinear))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_lora_above(name, matmuls):
    peft = pytest.importorskip("peft")
    targets = ["query", "value"] if name == "bert" else ["q_proj", "v_proj", "gate_proj"]
    found = []
    for model in both(name, activations="keep"):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config).eval()
        matmuls.clear()
        wrapped(**inputs(name)).logits.square().sum().backward()
        grads = [p.grad for n, p in wrapped.named_parameters() if "lora_" in n]
        found.append([logits(wrapped, inputs(name)), *grads])
        fastinfer.unpatch(model)
        found[-1].append(logits(wrapped, inputs(name)))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_accelerate_hooks_around_the_patch():
    accelerate = pytest.importorskip("accelerate")
    for when in ("before", "after"):
        model, other = build("llama"), build("llama")
        devices = {name: "cpu" for name, _ in model.named_children()}
        if when == "before":
            accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
        fastinfer.patch(model, merge=True)
        expected = logits(fastinfer.patch(other, merge=True), inputs("llama"))
        if when == "after":
            accelerate.dispatch_model(model, devices, main_device="cpu", force_hooks=True)
        torch.testing.assert_close(logits(model, inputs("llama")), expected, rtol=1e-4, atol=1e-4)
        fastinfer.unpatch(model)
        assert torch.equal(logits(model, inputs("llama")), logits(build("llama"), inputs("llama")))


def test_offloading_after_patching():
    accelerate = pytest.importorskip("accelerate")
    apart, merged = both("llama")
    accelerate.cpu_offload(merged, execution_device="cpu")
    assert_merged(merged, False)
    torch.testing.assert_close(logits(merged, inputs("llama")), logits(apart, inputs("llama")))


# --- undo, refusals, reports


@pytest.mark.parametrize("name", [*ENCODERS, *GATED])
def test_unpatch_leaves_nothing(name):
    model = build(name)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    storages = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()}
    fastinfer.unpatch(fastinfer.patch(model, merge=True))
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()} == storages


def test_biases_stay_the_users_parameters():
    model = build("bert")
    bias = model.bert.encoder.layer[0].attention.self.key.bias
    fastinfer.patch(model, merge=True, activations="keep")
    before = logits(model, inputs("bert"))
    assert model.bert.encoder.layer[0].attention.self.key.bias is bias
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.bias.add_(1)  # as an optimizer does
    assert not torch.equal(logits(model, inputs("bert")), before)
    fastinfer.unpatch(model)
    assert model.bert.encoder.layer[0].attention.self.key.bias is bias


STEPS = [(merging, "build", 3), (merging, "why_unproven", 2), (fastinfer.modules.siblings.Siblings, "_join", 2)]


@pytest.mark.parametrize("interrupt", [MemoryError("full"), KeyboardInterrupt()], ids=["MemoryError", "interrupt"])
@pytest.mark.parametrize(("owner", "name", "count"), STEPS)
def test_a_failure_while_merging_restores_the_model(monkeypatch, owner, name, count, interrupt):
    model, calls, original = build("qwen2"), [], getattr(owner, name)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}

    def fail_late(*args):
        calls.append(args)
        if len(calls) == count:
            raise interrupt
        return original(*args)

    monkeypatch.setattr(owner, name, fail_late)
    with pytest.raises(type(interrupt)):
        fastinfer.patch(model, merge=True)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in model.parameters())


def test_an_unproven_merge_is_dropped_with_its_reason(monkeypatch, matmuls):
    monkeypatch.setattr(merging, "why_unproven", lambda *args: "it differs")
    apart, merged = both("llama")
    report = fastinfer.report(merged)
    assert not report.merged and {row.reason for row in report.apart} == {"it differs"} and "it differs" in str(report)
    assert torch.equal(logits(merged, inputs("llama")), logits(apart, inputs("llama")))
    assert not siblings_of(merged)


def test_report_and_dry_run():
    foretold = fastinfer.patch(build("llama"), merge=True, dry_run=True)
    report = fastinfer.report(fastinfer.patch(build("llama"), merge=True))
    assert foretold.merged == report.merged and len(report.merged) == 4
    assert "merged: model.layers.{0–1}.self_attn" in str(report) and "q_proj, k_proj, v_proj" in str(report)
    assert "gate_proj, up_proj (silu_mul)" in str(report)
    apart = fastinfer.report(fastinfer.patch(build("llama"), merge=False))
    assert not apart.merged and not apart.apart


def test_only_what_becomes_the_same_is_merged():
    model = fastinfer.patch(build("llama"), {"*.up_proj": "int4", "*.q_proj": "int4", "*": "int8"}, merge=True)
    report = fastinfer.report(model)
    assert {str(row) for row in report.merged} == {"k_proj, v_proj"}
    assert {row.reason for row in report.apart} == {"they become different kinds"}
    kept = fastinfer.report(fastinfer.patch(build("llama"), {"*.up_proj": "keep", "*": "int8"}, merge=True))
    assert "up_proj stays as it is" in {row.reason for row in kept.apart}
