"""The fused decode step: equal to the model's own forward, or refused with a reason; and what users do to its model."""

import copy
import pickle
import weakref

import pytest
import torch
import transformers as t
from architectures import ALL, GROUPED, SMALL, build
from merged_cases import replaced
from torch import nn

import fastinfer
from fastinfer import ops
from fastinfer.errors import Unfusable
from fastinfer.generation import proof
from fastinfer.generation.cache import KVCache
from fastinfer.generation.step import DecodeStep
from fastinfer.modules import Int8Embedding
from fastinfer.ops.layout import PANEL16, ROW, TILE_W8A8, TILE_W8A16
from fastinfer.patching import RECORD

pytestmark = pytest.mark.models

MORE = {
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**GROUPED)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**GROUPED, sliding_window=8, query_pre_attn_scalar=16)),
    "phi": lambda: t.PhiForCausalLM(t.PhiConfig(**SMALL)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)),
    "gpt_neox sequential": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, use_parallel_residual=False)),
    "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**SMALL, num_key_value_heads=2)),
    "stablelm parallel": lambda: t.StableLmForCausalLM(
        t.StableLmConfig(**SMALL, num_key_value_heads=2, use_parallel_residual=True)
    ),
    "granite": lambda: t.GraniteForCausalLM(
        t.GraniteConfig(
            **SMALL,
            num_key_value_heads=2,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            residual_multiplier=0.5,
            attention_multiplier=0.3,
        )
    ),
    "olmo2": lambda: t.Olmo2ForCausalLM(t.Olmo2Config(**SMALL, num_key_value_heads=2)),
    "olmo3": lambda: t.Olmo3ForCausalLM(t.Olmo3Config(**SMALL, num_key_value_heads=2, sliding_window=8)),
    "smollm3": lambda: t.SmolLM3ForCausalLM(t.SmolLM3Config(**SMALL, num_key_value_heads=2, no_rope_layers=[1, 0])),
    "falcon": lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, multi_query=True)),
    "starcoder2": lambda: t.Starcoder2ForCausalLM(t.Starcoder2Config(**SMALL, num_key_value_heads=2, sliding_window=8)),
    "llama3 rope": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(
            **GROUPED,
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "rope_theta": 1e4,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        )
    ),
}
FUSED = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "gpt2", "opt", *MORE]
REFUSED = {
    "mixtral": (ALL["mixtral"], "mixture of experts"),
    "t5": (ALL["t5"], "encoder–decoder"),
    "cohere": (lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, num_key_value_heads=2)), "interleaved"),
    "bloom": (
        lambda: t.BloomForCausalLM(t.BloomConfig(vocab_size=131, hidden_size=64, n_layer=2, n_head=4)),
        "neither a rotation nor a table of positions",
    ),
    "falcon alibi": (lambda: t.FalconForCausalLM(t.FalconConfig(**SMALL, alibi=True)), "ALiBi"),
    "dynamic rope": (
        lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**GROUPED, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
        ),
        "changes with the length",
    ),
    "post norm": (
        lambda: t.OPTForCausalLM(t.OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False)),
        "norms behind its sums",
    ),
    "mamba": (
        lambda: t.MambaForCausalLM(t.MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=2)),
        "no stack of decoder layers",
    ),
}


def model_of(name: str, dtype: torch.dtype = torch.float32):
    if name in MORE:
        ALL.setdefault(name, MORE[name])
    return build(name, dtype)


def step_of(model) -> DecodeStep:
    return vars(model)[RECORD].step


def run_both(step: DecodeStep, model, padding=(0, 4), prompt=10, counts=(1, 1, 16, 2), kind="keep"):
    """Logits of the step, which alone writes its cache, and of the model on a cache of its own; token by token."""
    ids = torch.randint(3, 131, (len(padding), prompt + sum(counts)), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, n in enumerate(padding):
        mask[row, :n] = 0
    ours, own = KVCache(kind=kind), KVCache(kind=kind)
    with torch.no_grad():
        for cache in (ours, own):
            cache.set_padding(mask[:, :prompt])
            proof._forward(model, ids[:, :prompt], mask[:, :prompt], cache)
        at, got, want = prompt, [], []
        for count in counts:
            new = ids[:, at : at + count]
            ours.reserve(at + count)
            got.append(step(new, ours))
            ours.lengths.add_(count)
            ours.advance(count)
            want.append(proof._forward(model, new, mask[:, : at + count], own))
            at += count
    return torch.cat(got, 1), torch.cat(want, 1)


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


# --- kept weights


def storages(*linears):
    return len({linear.weight.untyped_storage().data_ptr() for linear in linears})


def test_kept_weights_share_a_buffer_and_come_back():
    model = model_of("llama")
    before, bytes_before = copy.deepcopy(model.state_dict()), sum(p.nbytes for p in model.parameters())
    parameters = dict(model.named_parameters())
    fastinfer.patch(model, "keep", merge=True)
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    assert (
        storages(attention.q_proj, attention.k_proj, attention.v_proj) == 1
        and storages(mlp.gate_proj, mlp.up_proj) == 1
    )
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(held.values()) == bytes_before
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert fastinfer.report(model).backend.startswith(("cpu", "reference")) and not fastinfer.report(model).replaced
    fastinfer.unpatch(model)
    assert storages(attention.q_proj, attention.k_proj, attention.v_proj) == 3
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].is_contiguous() for k, v in before.items())


@pytest.mark.parametrize("merge", [True, False])
def test_conv1d_weights_are_turned_and_turned_back(merge):
    model = model_of("gpt2")
    before = copy.deepcopy(model.state_dict())
    fastinfer.patch(model, "keep", merge=merge)
    for module in (model.transformer.h[0].attn.c_attn, model.transformer.h[0].mlp.c_proj):
        assert module.weight.T.is_contiguous() is merge
    fastinfer.unpatch(model)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].is_contiguous() for k, v in before.items())


def test_a_kept_model_can_be_saved(tmp_path):
    model = model_of("qwen2")
    expected = model(torch.arange(3, 9)[None]).logits
    fastinfer.patch(model, "keep", merge=True)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(again(torch.arange(3, 9)[None]).logits, expected)


def test_keep_is_patched_once():
    model = fastinfer.patch(model_of("llama"), "keep")
    with pytest.raises(fastinfer.PatchError, match="patched already"):
        fastinfer.patch(model, "int8")


# --- what users do


def check(model, tolerance=1e-4):
    step = step_of(model)
    assert step.stale() is None
    got, want = run_both(step, model)
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.abs().max().item())


def loaded(model):
    model.load_state_dict({k: v.clone() * (1.1 if v.is_floating_point() else 1) for k, v in model.state_dict().items()})
    return model


CHANGES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "bfloat16 and back": lambda m: m.to(torch.bfloat16).float(),
    "cloned": lambda m: m._apply(lambda tensor: tensor.clone()),
    "assigned": lambda m: m.load_state_dict(m.state_dict(), assign=True) and m,
    "loaded": loaded,
    "a copy of a copy": lambda m: copy.deepcopy(copy.deepcopy(m)),
}


@pytest.mark.parametrize("weights", ["keep", "int8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_follows(name, weights, change):
    model = fastinfer.patch(model_of(name), weights, merge=True)
    changed = change(model)
    check(changed)
    check(model)
    for linears in step_of(changed).decoder.linears():
        assert len(linears.linears) == 1 or linears.merged or linears.siblings
    if not (weights == "int8" and change in (loaded, CHANGES["assigned"])):
        fastinfer.unpatch(changed)
        assert all(p.is_contiguous() for p in changed.parameters())


def test_moved_weights_count_an_epoch():
    model = fastinfer.patch(model_of("llama"), "keep", merge=True)
    step = step_of(model)
    epoch = step.epoch
    assert step.stale() is None and step.epoch == epoch
    model._apply(lambda tensor: tensor.clone())
    assert step.stale() is None and step.epoch == epoch + 1
    assert step.stale() is None and step.epoch == epoch + 1


def test_what_is_moved_away_is_not_kept_alive():
    model = fastinfer.patch(model_of("llama"), "keep", merge=True)
    memory = weakref.ref(model.model.layers[0].self_attn.q_proj.weight.untyped_storage())
    buffer = weakref.ref(model.model.rotary_emb.inv_freq)
    model._apply(lambda tensor: tensor.clone())
    assert memory() is None and buffer() is None


STALE = {
    "hook": (lambda m: m.model.layers[0].register_forward_hook(lambda *a: None), "has hooks"),
    "pre-hook": (lambda m: m.model.norm.register_forward_pre_hook(lambda *a: None), "has hooks"),
    "module": (
        lambda m: setattr(m.model.layers[0].mlp, "up_proj", replaced(m.model.layers[0].mlp.up_proj)),
        "exchanged",
    ),
    "train mode": (lambda m: m.model.layers[1].train(), "in train mode"),
    "forward": (lambda m: setattr(m.model.layers[1].mlp, "forward", print), "mlp was replaced"),
    "layers": (lambda m: m.model.layers.append(copy.deepcopy(m.model.layers[0])), "exchanged"),
}


@pytest.mark.parametrize("what", STALE)
def test_stale(what):
    change, reason = STALE[what]
    model = fastinfer.patch(model_of("llama"), "int8", merge=True)
    assert step_of(model).stale() is None
    change(model)
    assert reason in step_of(model).stale()


def test_stale_under_autocast_and_a_global_hook():
    step = step_of(fastinfer.patch(model_of("llama"), "keep"))
    with torch.autocast("cpu", torch.bfloat16):
        assert step.stale() == "autocast is on"
    handle = nn.modules.module.register_module_forward_hook(lambda *a: None)
    assert "hook on all modules" in step.stale()
    handle.remove()
    assert step.stale() is None


def test_follows_another_attention():
    """transformers' sdpa, up to 5.17, leaves Gemma 2's softcap out; newer ones refuse it."""
    model = fastinfer.patch(model_of("gemma2"), "keep")
    model.set_attn_implementation("eager")
    check(model)
    assert step_of(model).decoder.layers[0].attention.softcap == 50.0


def test_lora_makes_it_stale_and_goes_again():
    peft = pytest.importorskip("peft")
    model = fastinfer.patch(model_of("llama"), "keep", merge=True)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=4)).eval()
    assert "exchanged" in step_of(model).stale()
    lora.unload()
    check(model)


def test_a_model_with_hooks_is_not_proven():
    model, calls = model_of("llama"), []
    model.model.layers[0].register_forward_hook(lambda *a: calls.append(1))
    fastinfer.patch(model, "int8")
    assert "has hooks" in fastinfer.report(model).decode_step and not calls


def test_dry_run_foretells():
    assert fastinfer.patch(model_of("llama"), "keep", dry_run=True).decode_step == "fused, 2 layers"
    assert fastinfer.patch(build("bert"), "int8", dry_run=True).decode_step == ""


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
    assert torch.equal(embedding.look_up(ids), embedding(ids))
    assert (embedding._places() is not None) is (rows == 48 and layout in (TILE_W8A16, TILE_W8A8))
    assert torch.equal(copy.deepcopy(embedding).look_up(ids), embedding(ids))
