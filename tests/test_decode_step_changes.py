"""Models with a fused decode step under what users do: merged float weights, moves, copies, hooks, adapters, undo."""

import copy
import pickle
import weakref

import pytest
import torch
from architectures import build
from decode_cases import check, model_of, step_of
from merged_cases import replaced
from torch import nn

import fastinfer

pytestmark = pytest.mark.models

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


def test_follows_the_number_of_layers():
    model = fastinfer.patch(model_of("llama"), "keep")
    model.config.num_hidden_layers = 1
    check(model)
    assert len(step_of(model).decoder.layers) == 1 and step_of(model).epoch == 1


def set_all(model, kind, name, value):
    for module in model.modules():
        if type(module).__name__.endswith(kind):
            setattr(module, name, value)


SETTINGS = {
    "scaling": ("llama", lambda m: set_all(m, "Attention", "scaling", 0.05)),
    "epsilon": ("llama", lambda m: set_all(m, "RMSNorm", "variance_epsilon", 2.0)),
    "angles written": ("llama", lambda m: m.model.rotary_emb.inv_freq.mul_(0.5)),
    "angles scaled": ("llama", lambda m: setattr(m.model.rotary_emb, "attention_scaling", 1.5)),
    "softcap of logits": ("gemma2", lambda m: setattr(m.config, "final_logit_softcapping", 2.0)),
    "factor of residuals": ("granite", lambda m: set_all(m, "DecoderLayer", "residual_multiplier", 0.3)),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_follows_settings(what):
    name, change = SETTINGS[what]
    model = fastinfer.patch(model_of(name), "keep")
    change(model)
    check(model)
    assert step_of(model).stale() is None and step_of(model).epoch == 1


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
