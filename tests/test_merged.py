"""Merged linears: the same results as apart, from one copy of the weights."""

import threading

import pytest
import torch
from architectures import ALL, DECODERS, ENCODER_DECODERS, inputs, logits
from merged_cases import GATED, UNMERGED, assert_merged, both, siblings_of

import fastinfer
from fastinfer.modules import QuantizedLinear
from fastinfer.ops.layout import LAYOUTS, convert, interleave_gate_up, split_gate_up

pytestmark = pytest.mark.models

# --- results


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ALL)
def test_same_logits_as_apart(name, weights):
    apart, merged = both(name, weights)
    assert bool(fastinfer.report(merged).merged) is (name not in UNMERGED)
    expected, got = logits(apart, inputs(name)), logits(merged, inputs(name))
    if name in GATED:  # the gated product is rounded once
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, expected)
    assert all(s.ready() and s.misses == 0 for s in siblings_of(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3", "t5"])
def test_16_bits(name, dtype):
    apart, merged = both(name, dtype=dtype, activations="keep")
    expected, got = logits(apart, inputs(name)).float(), logits(merged, inputs(name)).float()
    assert ((got - expected).norm() / expected.norm()).item() < (0.02 if name in GATED else 1e-9)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_generate(name):
    apart, merged = both(name)
    given = {k: v for k, v in inputs(name).items() if k != "decoder_input_ids"}
    for how in ({}, {"num_beams": 3}):
        expected, got = (m.generate(**given, max_new_tokens=6, do_sample=False, **how) for m in (apart, merged))
        assert torch.equal(got, expected)


def test_a_layer_takes_four_matmuls(matmuls):
    _, merged = both("llama")
    matmuls.clear()
    logits(merged, inputs("llama"))
    assert matmuls == [64 + 32 + 32, 64, 2 * 96, 64] * 2 + [131]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_in_inference_mode_and_under_autocast(name, matmuls):
    apart, merged = both(name, activations="keep")
    for context in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            expected = apart(**inputs(name)).logits
            matmuls.clear()
            got = merged(**inputs(name)).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 if got.dtype == torch.float32 else 0.3)
        assert len(matmuls) < sum(isinstance(m, QuantizedLinear) for m in merged.modules())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradients(name, weights):
    found = []
    for model in both(name, weights):
        embedded = model.get_input_embeddings()(inputs(name)["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.square().sum().backward()
        biases = [m.bias.grad for m in model.modules() if isinstance(m, QuantizedLinear) and m.bias is not None]
        found.append([embedded.grad, *biases])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


def test_gradient_checkpointing_in_train_mode():
    found = []
    for model in both("llama"):
        model.gradient_checkpointing_enable()
        model.train()(**inputs("llama")).logits.square().sum().backward()
        found.append(model.model.embed_tokens.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_compile_has_no_graph_break_and_merges(name, weights, matmuls):
    _, merged = both(name, weights)
    expected = logits(merged, inputs(name))
    torch._dynamo.reset()
    graphs = []

    def backend(graph, example):
        graphs.append(
            sum("matmul" in str(node.target) and "fastinfer" in str(node.target) for node in graph.graph.nodes)
        )
        return graph

    compiled = torch.compile(merged, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits(compiled, inputs(name)), expected)
    linears = sum(isinstance(m, QuantizedLinear) for m in merged.modules())
    assert graphs[0] == linears - (6 if name == "llama" else 4)
    merged.load_state_dict({k: torch.zeros_like(v) for k, v in merged.state_dict().items()})
    assert not torch.equal(logits(compiled, inputs(name)), expected)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_compile_with_gradients(name):
    found = []
    for model in both(name, activations="keep"):
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        embedded = model.get_input_embeddings()(inputs(name)["input_ids"]).detach().requires_grad_()
        compiled(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("strict", [True, False])
def test_export_takes_the_linears_apart(strict):
    _, merged = both("llama")
    given = inputs("llama") | {"use_cache": False}
    with torch.no_grad():
        program = torch.export.export(merged, (), given, strict=strict)
        torch.testing.assert_close(program.module()(**given).logits, logits(merged, inputs("llama")))


def test_threads_share_a_model():
    _, merged = both("llama")
    given = [{"input_ids": torch.full((1, 5 + i), 7 + i)} for i in range(4)]
    expected, wrong = [logits(merged, each) for each in given], []

    def work(i):
        for _ in range(20):
            if not torch.equal(logits(merged, given[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_merged(merged)
    assert not any(s._rounds for s in siblings_of(merged))


# --- one copy, each linear itself


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bert", "llama", "gemma3"])
def test_one_copy_in_memory(name, weights):
    _, merged = both(name, weights)
    tensors = [*merged.parameters(), *merged.buffers()]
    tensors += [getattr(s.whole, n) for s in siblings_of(merged) for n in ("weight", *s.whole.scales)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == fastinfer.report(merged).bytes_after


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_each_linear_alone_is_what_it_was(name, weights):
    apart, merged = both(name, weights)
    for (path, one), (_, other) in zip(apart.named_modules(), merged.named_modules(), strict=True):
        if isinstance(one, QuantizedLinear):
            x = torch.randn(3, one.in_features)
            assert torch.equal(one(x), other(x)), path
            assert torch.equal(one.dequantize(), other.dequantize()) and one.packed_bytes() == other.packed_bytes()


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_state_dicts_are_the_same_and_load_both_ways(name, weights, tmp_path):
    from safetensors.torch import load_file, save_file

    apart, merged = both(name, weights)
    state = {k: v.clone() for k, v in merged.state_dict().items()}
    assert list(state) == list(apart.state_dict())
    assert all(torch.equal(state[k], v) for k, v in apart.state_dict().items())
    save_file({k: v for k, v in state.items() if "decoder" not in k}, tmp_path / "x.safetensors")
    saved = load_file(tmp_path / "x.safetensors")
    expected = logits(merged, inputs(name))
    for model in (apart, merged):
        for assign in (False, True):
            model.load_state_dict({k: torch.zeros_like(v) for k, v in state.items()})
            assert not torch.allclose(logits(model, inputs(name)), expected)
            model.load_state_dict(saved, strict=False, assign=assign)
            model.load_state_dict({k: v for k, v in state.items() if k not in saved}, strict=False)
            torch.testing.assert_close(logits(model, inputs(name)), expected, rtol=1e-4, atol=1e-4)
            assert all(torch.equal(saved[k], state[k]) for k in saved)  # the caller's tensors are not touched
    assert_merged(merged)


def test_rows_in_row_order_are_slices_too(monkeypatch, tmp_path):
    """As on a GPU without tile kernels: state dicts hold views of one buffer."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("fastinfer.modules.linear.native_layout", lambda *args: "row")
    apart, merged = both("llama")
    save_file(merged.state_dict(), tmp_path / "x.safetensors")
    saved = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(saved[k], v) for k, v in apart.state_dict().items())
    torch.testing.assert_close(logits(merged, inputs("llama")), logits(apart, inputs("llama")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_of_sixteen_rows_keep_every_layout(layout):
    parts = [torch.randint(-128, 128, (n, 256), dtype=torch.int8) for n in (64, 16, 48)]
    scales = [torch.randn(len(part), 4) for part in parts]
    for pieces in (parts, scales if layout not in ("tile_w8a16", "tile_w8a8") else parts):
        whole = convert(torch.cat(pieces), "row", layout)
        assert torch.equal(whole, torch.cat([convert(piece, "row", layout) for piece in pieces]))


def test_gate_and_up_take_turns_in_eights():
    gate, up = torch.randn(2, 32, 5)
    merged = interleave_gate_up(gate, up)
    assert torch.equal(merged[8:16], up[:8]) and torch.equal(merged[16:24], gate[8:16])
    assert all(map(torch.equal, split_gate_up(merged), (gate, up)))
    assert torch.equal(interleave_gate_up(gate[:, 0], up[:, 0]), merged[:, 0])
