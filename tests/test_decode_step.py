"""The fused decode step: equal to the model's own forward, or refused with a reason."""

import pytest
import torch
import transformers as t
from architectures import GROUPED
from decode_cases import FUSED, REFUSED, model_of, run_both, step_of
from torch import nn

import fastinfer
from fastinfer import ops
from fastinfer.errors import Unfusable
from fastinfer.generation import proof
from fastinfer.generation.cache import KVCache
from fastinfer.generation.step import DecodeStep, _factors, _operands
from fastinfer.modules import Int8Embedding
from fastinfer.ops.layout import PANEL16, ROW, TILE_W8A8, TILE_W8A16
from fastinfer.patching import RECORD

pytestmark = pytest.mark.models

# --- equal to the model's own


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("weights", ["keep", "int8", "int4"])
@pytest.mark.parametrize("name", FUSED)
def test_same_logits(name, weights, merge):
    model = model_of(name)
    method = {"method": "rtn"} if weights == "int4" else {}
    fastinfer.patch(model, weights, merge=merge, **method)
    assert fastinfer.report(model).decode_step == f"fused, {model.config.num_hidden_layers} layers"
    got, want = run_both(step_of(model), model)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_logits_in_16_bits(name, dtype):
    model = fastinfer.patch(model_of(name, dtype), "int8")
    assert fastinfer.report(model).step_fused
    got, want = run_both(step_of(model), model)
    assert got.dtype == dtype and proof._error(got, want) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("merge", [True, False])
def test_int8_activations(merge):
    model = fastinfer.patch(model_of("llama"), "int8", activations="int8", merge=merge)
    got, want = run_both(step_of(model), model)
    assert proof._error(got, want) < 0.02


def test_int8_cache():
    model = fastinfer.patch(model_of("gemma3"), "keep")
    got, want = run_both(step_of(model), model, kind="int8")
    assert proof._error(got, want) < 0.05


def test_no_padding_and_one_row():
    model = fastinfer.patch(model_of("mistral"), "keep")
    got, want = run_both(step_of(model), model, padding=(0,), counts=(3, 1))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


# --- refused, with the reason


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(name):
    build_model, reason = REFUSED[name]
    model = build_model().eval()
    with pytest.raises(Unfusable, match=reason):
        DecodeStep.of(model)
    report = fastinfer.patch(model, "int8", dry_run=True)
    assert not report.step_fused and report.decode_step.startswith("not fused: ") and report.decode_step in str(report)
    with pytest.raises(fastinfer.PatchError, match=f"replaces nothing.*{reason}"):
        fastinfer.patch(model, "keep")
    assert RECORD not in vars(model)


def add(parent: str, name: str, what):
    def change(model):
        setattr(model.get_submodule(parent), name, what() if callable(what) else what)

    return change


LAYER = "model.layers.1"
UNKNOWN = {
    "module": (add(f"{LAYER}.self_attn", "gate", lambda: nn.Linear(64, 64)), "has a gate"),
    "norm": (add(LAYER, "extra_norm", lambda: nn.LayerNorm(64)), "extra_norm.*no arrangement"),
    "sinks": (add(f"{LAYER}.self_attn", "sinks", lambda: nn.Parameter(torch.zeros(4))), "has a tensor sinks"),
    "factor": (add(f"{LAYER}.mlp", "down_multiplier", 0.5), "has a factor down_multiplier = 0.5"),
    "factor of the model": (add("model", "embed_scale", 8.0), "model has a factor embed_scale = 8"),
    "not causal": (add(f"{LAYER}.self_attn", "is_causal", False), "is not causal"),
    "other layer's keys": (add(f"{LAYER}.self_attn", "layer_idx", 0), "keeps its keys under layer 0"),
    "activation": (add(f"{LAYER}.mlp", "act_fn", lambda: nn.Mish()), "Mish, is none"),
    "forward": (add(f"{LAYER}.mlp", "forward", lambda: print), "forward of .*mlp was replaced"),
    "layer types": (lambda model: setattr(model.config, "layer_types", 3), "cannot be read"),
    "a module of the model": (add("", "adapter", lambda: nn.Linear(64, 64)), "has a adapter"),
    "another norm": (
        add(LAYER, "input_layernorm", lambda: nn.GroupNorm(4, 64)),
        "neither an RMS norm nor|cannot be tried",
    ),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_the_rule_does_not_know_is_refused(what):
    change, reason = UNKNOWN[what]
    model = model_of("llama")
    change(model)
    with pytest.raises(Unfusable, match=reason):
        DecodeStep.of(model)


# --- proof


def exchange(linears: list, i: int) -> None:
    linears[i], linears[i + 1] = linears[i + 1], linears[i]


LIES = {
    "rotation dropped": lambda step: [setattr(one.attention, "rotation", None) for one in step.decoder.layers],
    "window off by one": lambda step: [
        setattr(one.attention, "window", one.attention.window + 1) for one in step.decoder.layers
    ],
    "scale": lambda step: [setattr(one.attention, "scale", 1.1 * one.attention.scale) for one in step.decoder.layers],
    "keys and values exchanged": lambda step: exchange(step.decoder.layers[0].attention.qkv.linears, 1),
    "gate and up exchanged": lambda step: exchange(step.decoder.layers[0].feedforward.up.linears, 0),
    "side by side": lambda step: [setattr(one, "parallel", True) for one in step.decoder.layers],
    "another activation": lambda step: setattr(step.decoder.layers[0].feedforward.up, "activation", "gelu"),
    "norm's offset": lambda step: setattr(step.decoder.norm, "offset", 1.0),
    "logits": lambda step: setattr(step.decoder, "softcap", 5.0),
}


@pytest.mark.parametrize("what", LIES)
def test_proof_sees_a_lie(what):
    step = DecodeStep.of(model_of("mistral"))
    assert step.prove() is None
    LIES[what](step)
    assert "differ from the model's own" in step.prove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proof_goes_past_a_window_that_is_longer_than_its_prompt(dtype):
    config = t.MistralConfig(**GROUPED, sliding_window=45)
    step = DecodeStep.of(t.MistralForCausalLM(config).eval().to(dtype))
    assert step.prove() is None
    LIES["window off by one"](step)
    assert "past a window of 46" in step.prove()


def test_an_unproven_step_is_dropped_with_its_reason(monkeypatch):
    monkeypatch.setattr(proof, "prove", lambda step: "it lies")
    model = model_of("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(fastinfer.PatchError, match="it lies"):
        fastinfer.patch(model, "keep", merge=True)
    assert RECORD not in vars(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(before)
    report = fastinfer.report(fastinfer.patch(model, "int8"))
    assert report.decode_step == "not fused: it lies" and "decode step: not fused: it lies" in str(report)
    assert step_of(model) is None


def test_an_interrupted_patch_restores_the_model(monkeypatch):
    def interrupted(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "prove", interrupted)
    model = model_of("gpt2")
    with pytest.raises(KeyboardInterrupt):
        fastinfer.patch(model, "keep", merge=True)
    assert RECORD not in vars(model) and all(p.is_contiguous() for p in model.parameters())


def test_proof_leaves_the_model_as_it_was():
    model = model_of("llama").train()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    step = DecodeStep.of(model)
    assert step.prove() is None
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert "train mode" in step.stale()
    model.eval()
    assert step.stale() is None


# --- the step's own contract


def test_writes_its_positions_and_leaves_the_lengths():
    model = fastinfer.patch(model_of("llama"), "keep")
    cache = KVCache()
    ids = torch.arange(3, 13).view(2, 5)
    proof._forward(model, ids, torch.ones_like(ids), cache)
    cache.reserve(8)
    before = [layer.k_cache.clone() for layer in cache.layers]
    logits = step_of(model)(ids[:, :2], cache)
    assert logits.shape == (2, 2, 131) and not logits.requires_grad
    assert cache.filled == 5 and cache.lengths.tolist() == [5, 5]
    for layer, old in zip(cache.layers, before, strict=True):
        changed = (layer.k_cache != old).any(-1).any(1).any(0).nonzero().flatten()
        assert set(changed[changed < 7].tolist()) == {5, 6}


@pytest.mark.parametrize("shape", [(2,), (2, 0), (2, 17), (1, 2, 1)])
def test_bad_ids(shape):
    model = fastinfer.patch(model_of("llama"), "keep")
    cache = KVCache()
    ids = torch.arange(3, 13).view(2, 5)
    proof._forward(model, ids, torch.ones_like(ids), cache)
    with pytest.raises(ValueError, match="ids must be"):
        step_of(model)(torch.ones(shape, dtype=torch.int64), cache)


def test_learned_positions_tell_their_limit():
    assert step_of(fastinfer.patch(model_of("gpt2"), "keep")).limit == 64
    assert step_of(fastinfer.patch(model_of("opt"), "keep")).limit == 64
    assert step_of(fastinfer.patch(model_of("llama"), "keep")).limit is None


QUANTIZED = ["rms_norm", "int8_matmul", "kv_attention", "int8_matmul", "rms_norm", "int8_matmul", "int8_matmul"]
KEPT = ["linear" if name == "int8_matmul" else name for name in QUANTIZED]
APART = ["rms_norm", *3 * ["linear"], "kv_attention", "linear", "rms_norm", *3 * ["linear"]]


@pytest.mark.parametrize(
    ("name", "weights", "merge", "expected"),
    [
        ("llama", "int8", True, QUANTIZED),
        ("llama", "keep", True, KEPT),
        ("llama", "keep", False, APART),
        ("phi3", "keep", False, KEPT),
    ],
)
def test_fewest_launches(monkeypatch, name, weights, merge, expected):
    """Per layer: two norms, merged QKV, attention, output, gate with up, down; and the last norm with the head."""
    model = fastinfer.patch(model_of(name), weights, merge=merge)
    calls = []
    for op_name in ("int8_matmul", "linear", "kv_attention", "rms_norm"):
        op = getattr(ops, op_name)
        monkeypatch.setattr(ops, op_name, lambda *a, op=op, n=op_name, **k: calls.append(n) or op(*a, **k))
    ids = torch.arange(3, 13).view(2, 5)
    cache = KVCache()
    proof._forward(model, ids, torch.ones_like(ids), cache)
    cache.reserve(8)
    calls.clear()
    step_of(model)(ids[:, :1], cache)
    assert calls == 2 * expected + ["rms_norm", expected[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [ROW, PANEL16, TILE_W8A16, TILE_W8A8])
@pytest.mark.parametrize("rows", [48, 131])
def test_an_embedding_is_looked_up_alike_in_every_layout(rows, layout, dtype):
    codes, scale = torch.randint(-127, 128, (rows, 256), dtype=torch.int8), torch.rand(rows)
    embedding = Int8Embedding(nn.Parameter(codes, requires_grad=False), scale, like=dtype, factor=5.66)
    embedding.use_layout(layout)
    ids = torch.randint(0, rows, (2, 7))
    ids[0, 0] = rows - 1
    factor, outer = _factors(embedding, 1.0)
    assert outer == 1.0 and torch.equal(ops.embed(ids, factor=factor, **_operands(embedding))[0], embedding(ids))
