"""patch on many architectures: the patched model is the original with dequantised weights, and unpatch undoes it."""

import copy

import pytest
import torch
from architectures import ALL, DECODERS, ENCODER_DECODERS, ENCODERS, build, inputs, logits

import fastinfer
from fastinfer.modules import Int8Embedding, QuantizedLinear

pytestmark = pytest.mark.models


def fake_quantized(original, patched):
    """The original's float modules with the weights that the patched model multiplies by: what it has to equal."""
    model = copy.deepcopy(original)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for path, module in patched.named_modules():
            if isinstance(module, QuantizedLinear):
                weight = module.dequantize()
                target = modules[path].weight
                target.copy_(weight if isinstance(modules[path], torch.nn.Linear) else weight.T)
            elif isinstance(module, Int8Embedding):
                rows = module(torch.arange(module.num_embeddings)) / module.factor
                modules[path].weight.copy_(rows)
    return model


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ALL)
def test_patched_equals_the_original_with_dequantised_weights(name, weights):
    original = build(name)
    patched = fastinfer.patch(copy.deepcopy(original), weights, activations="keep" if weights == "int8" else None)
    expected = logits(fake_quantized(original, patched), inputs(name))
    assert relative(logits(patched, inputs(name)), expected) < 2e-5


@pytest.mark.parametrize("name", ALL)
def test_error_stays_within_the_quantisers_bound(name):
    """int8 weights err by at most half a step in 127; what that does to logits is a small multiple of it."""
    original = build(name)
    patched = fastinfer.patch(copy.deepcopy(original), "int8", activations="keep")
    assert all(row.error < 1 / 127 for row in fastinfer.report(patched).replaced)
    assert relative(logits(patched, inputs(name)), logits(original, inputs(name))) < 0.06


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_take_int8_activations_by_default(name):
    original = build(name)
    patched = fastinfer.patch(copy.deepcopy(original))
    assert {m.activations for m in patched.modules() if isinstance(m, fastinfer.Int8Linear)} == {"int8"}
    assert relative(logits(patched, inputs(name)), logits(original, inputs(name))) < 0.15


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generate(name):
    original = build(name)
    patched = fastinfer.patch(copy.deepcopy(original))
    assert {m.activations for m in patched.modules() if isinstance(m, fastinfer.Int8Linear)} == {"keep"}
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = fake_quantized(original, patched)
    assert torch.equal(patched.generate(**given, **how), expected.generate(**given, **how))
    beams = how | {"num_beams": 3}
    assert torch.equal(patched.generate(**given, **beams), expected.generate(**given, **beams))


@pytest.mark.parametrize("name", DECODERS)
def test_left_padded_equals_alone(name):
    patched = fastinfer.patch(build(name))
    ids = inputs(name, batch=1)["input_ids"]
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], 1)
    batch = torch.cat([padded, inputs(name, batch=1, length=14)["input_ids"]])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    alone = patched.generate(ids, attention_mask=torch.ones_like(ids), output_logits=True, **how)
    together = patched.generate(batch, attention_mask=mask, output_logits=True, **how)
    for one, both in zip(alone.logits, together.logits, strict=True):
        assert relative(both[0], one[0]) < 1e-4
    assert torch.equal(together.sequences[0, 14:], alone.sequences[0, 9:])


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ALL)
def test_unpatch_is_bit_exact(name, weights):
    model = build(name)
    modules = dict(model.named_modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = logits(model, inputs(name))
    fastinfer.unpatch(fastinfer.patch(model, weights))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(module is modules[path] for path, module in model.named_modules())
    assert torch.equal(logits(model, inputs(name)), expected)


@pytest.mark.parametrize("name", ALL)
def test_state_dict_round_trip(name):
    patched = fastinfer.patch(build(name))
    expected = logits(patched, inputs(name))
    state = {k: v.clone() for k, v in patched.state_dict().items()}
    patched.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
    assert not torch.equal(logits(patched, inputs(name)), expected)
    patched.load_state_dict(state)
    assert torch.equal(logits(patched, inputs(name)), expected)


def test_every_big_weight_is_accounted_for():
    """Fused experts are named as left, by bytes, and nothing is missing from the report."""
    model = build("mixtral")
    report = fastinfer.patch(model, dry_run=True)
    experts = [s for s in report.skipped if "experts" in s.reason]
    assert experts and all(s.bytes > 0 for s in experts)
    matrices = {id(p): p.nbytes for p in model.parameters() if p.dim() > 1}
    listed = sum(r.bytes_before for r in report.replaced) + sum(s.bytes for s in report.skipped)
    assert listed == sum(matrices.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "t5"])
def test_16_bit_models(name, dtype):
    original = build(name, dtype)
    patched = fastinfer.patch(copy.deepcopy(original), activations="keep")
    out = logits(patched, inputs(name))
    assert out.dtype == dtype
    assert relative(out.float(), logits(original, inputs(name)).float()) < 0.1
