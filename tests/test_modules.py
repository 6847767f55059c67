"""Quantised modules: construction, state dict, moves, copies, gradients, autocast."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastinfer.modules import Int4Linear, Int8Embedding, Int8Linear, StateDictError
from fastinfer.ops.int4_matmul import unpack
from fastinfer.ops.layout import ROW, convert, gather_rows

KINDS = {
    "int8": lambda m: Int8Linear.from_float(m),
    "int8-activations": lambda m: Int8Linear.from_float(m, activations="int8"),
    "int4": lambda m: Int4Linear.from_float(m, group_size=32),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def linear(n=50, k=64, bias=True, dtype=torch.float32):
    return nn.Linear(k, n, bias).to(dtype).eval()


@torch.no_grad()
def test_stands_for_a_linear(make):
    old = linear()
    new = make(old)
    assert isinstance(new, nn.Linear)
    assert (new.in_features, new.out_features) == (64, 50)
    assert new.bias is old.bias and new.weight.dtype == torch.int8 and not new.weight.requires_grad
    assert new.dequantize().shape == old.weight.shape
    error = (new.dequantize() - old.weight).norm() / old.weight.norm()
    assert error.item() == pytest.approx(new.weight_error, rel=1e-3)
    x = torch.randn(3, 7, 64)
    expected = nn.functional.linear(x, new.dequantize(), old.bias)
    assert ((new(x) - expected).norm() / expected.norm()).item() < 0.02
    assert not new.training and "in_features=64" in repr(new)


def test_takes_a_conv1d():
    old = Conv1D(50, 64).eval()
    new = Int8Linear.from_float(old)
    assert (new.in_features, new.out_features) == (64, 50)
    torch.testing.assert_close(new.dequantize(), old.weight.T, atol=old.weight.abs().max().item() / 200, rtol=0)


def test_state_dict_is_canonical_and_plain(make):
    new = make(linear())
    canonical = new.state_dict()
    new.use_layout(ROW)
    for key, tensor in new.state_dict().items():
        assert torch.equal(canonical[key], tensor) and type(tensor) is torch.Tensor
    assert set(canonical) >= {"weight", "bias", "weight_scale"}


def test_state_dict_loads_into_another_module(make):
    one, other = make(linear()), make(linear())
    x = torch.randn(4, 64)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_survives_a_round_trip_through_safetensors(make, assign, tmp_path):
    from safetensors.torch import load_file, save_file

    one, other = make(linear()), make(linear())
    save_file(one.state_dict(), tmp_path / "x.safetensors")
    other.load_state_dict(load_file(tmp_path / "x.safetensors"), assign=assign)
    x = torch.randn(4, 64)
    assert torch.equal(one(x), other(x))


SPOILED = {
    "float weight": lambda s: s | {"weight": s["weight"].float()},
    "short weight": lambda s: s | {"weight": s["weight"][1:]},
    "half scale": lambda s: s | {"weight_scale": s["weight_scale"].double()},
    "nan scale": lambda s: s | {"weight_scale": s["weight_scale"] * float("nan")},
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_a_corrupted_state_dict_changes_nothing(make, spoil):
    module = make(linear())
    x = torch.randn(4, 64)
    expected = module(x)
    with pytest.raises(StateDictError, match=r"state_dict\['weight(_scale)?'\]"):
        module.load_state_dict(spoil(module.state_dict()))
    assert torch.equal(module(x), expected)


def test_dtype_moves_leave_scales_alone(make):
    module = make(linear())
    scale, before = module.weight_scale.clone(), module.dequantize()
    module.to(torch.bfloat16)
    assert module.weight_scale.dtype == scale.dtype and torch.equal(module.weight_scale, scale)
    assert module.weight.dtype == torch.int8 and module.bias.dtype == torch.bfloat16
    assert module.compute_dtype == torch.bfloat16 and module.dequantize().dtype == torch.bfloat16
    assert torch.equal(module.dequantize(torch.float32), before)
    assert module(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.float()
    assert module.compute_dtype == torch.float32


def test_deepcopy_is_independent(make):
    module = make(linear())
    x = torch.randn(4, 64)
    other = copy.deepcopy(module)
    assert torch.equal(module(x), other(x))
    other.weight.data.zero_()
    other.use_layout(ROW)
    assert not torch.equal(module(x), other(x))


def test_meta_module_loads_with_assign(make):
    module = make(linear())
    state, x = module.state_dict(), torch.randn(4, 64)
    empty = copy.deepcopy(module).to("meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), module(x))


def test_gradients_reach_input_and_bias(make):
    module = make(linear())
    x = torch.randn(5, 3, 64, requires_grad=True)
    grad = torch.randn(5, 3, 50)
    module(x).backward(grad)
    reference = x.detach().clone().requires_grad_()
    bias = module.bias.detach().clone().requires_grad_()
    nn.functional.linear(reference, module.dequantize().detach(), bias).backward(grad)
    torch.testing.assert_close(x.grad, reference.grad)
    torch.testing.assert_close(module.bias.grad, bias.grad)
    assert module.weight.grad is None


def test_gradient_of_a_vector(make):
    module, x = make(linear()), torch.randn(64, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.shape == (64,) and torch.equal(module.bias.grad, torch.ones(50))


def test_type_must_not_turn_codes_into_floats(make):
    module, x = make(linear()), torch.randn(2, 64)
    expected = module(x)
    with pytest.raises(TypeError, match="cannot change its dtype"):
        module.type(torch.float32)
    assert torch.equal(module(x), expected)


def test_autocast_gives_its_dtype(make):
    module, x = make(linear()), torch.randn(2, 64)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert module(x).dtype == torch.bfloat16


def test_an_integer_input_is_named(make):
    with pytest.raises(TypeError, match="x must be float32"):
        make(linear())(torch.ones(2, 64, dtype=torch.long))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind):
    module = KINDS[kind](linear()).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for m in (1, 4):
        x = torch.randn(m, 64)
        assert torch.equal(compiled(x), module(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_exports_in_the_order_its_weight_is_in(kind, strict):
    new, x = KINDS[kind](linear()), torch.randn(3, 64)
    copied = copy.deepcopy(new)
    for module in (new, copied):
        program = torch.export.export(nn.Sequential(module), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), new(x))


@pytest.mark.parametrize("strict", [True, False])
@torch.no_grad()
def test_an_embedding_exports_too(strict):
    head, ids = Int8Linear.from_float(linear(40, 64, bias=False)), torch.randint(0, 40, (2, 5))
    new = Int8Embedding(head.weight, head.weight_scale, like=torch.float32, layout=head.layout)
    torch.testing.assert_close(torch.export.export(new, (ids,), strict=strict).module()(ids), new(ids))


@pytest.mark.parametrize(("n", "k"), [(16, 4), (37, 24), (1, 8), (15, 12), (64, 640)])
def test_layouts_are_bijections_that_keep_shape(n, k):
    for tensor in (torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.randn(n, k).half()):
        panel = convert(tensor, "row", "panel16")
        assert panel.shape == tensor.shape and panel.dtype == tensor.dtype
        assert torch.equal(convert(panel, "panel16", "row"), tensor)


def test_panel16_is_what_layouts_md_says():
    w = torch.randint(-128, 128, (40, 24), dtype=torch.int8)
    flat = convert(w, "row", "panel16").view(-1)
    for n, k in [(0, 0), (5, 3), (15, 23), (16, 4), (31, 9)]:
        assert flat[n // 16 * 16 * 24 + k // 4 * 64 + n % 16 * 4 + k % 4] == w[n, k]
    assert torch.equal(flat[32 * 24 :], w[32:].flatten())


# Where the layouts put q(n, k), as csrc/LAYOUTS.md says: a piece of 16 bytes, and nibble or byte in it.
TILE_PLACES = {
    "tile_w4a16": lambda n, k, row: (
        n // 16 * 16 * row + k // 64 * 1024 + (n % 8 * 4 + k % 8 // 2) * 32 + k % 64 // 16 * 8,
        4 * (k % 2) + 2 * (k % 16 // 8) + n % 16 // 8,
    ),
    "tile_w8a16": lambda n, k, row: (
        n // 16 * 16 * row + k // 32 * 512 + (n % 8 * 4 + k % 8 // 2) * 16 + k % 32 // 16 * 8,
        4 * (k % 16 // 8) + 2 * (k % 2) + n % 16 // 8,
    ),
    "tile_w8a8": lambda n, k, row: (
        n // 16 * 16 * row + k // 128 * 2048 + n % 16 // 8 * 1024 + k % 128 // 16 * 128 + n % 8 * 16,
        k % 16,
    ),
}


@pytest.mark.parametrize("n", [48, 49, 63])
@pytest.mark.parametrize("layout", TILE_PLACES)
def test_tile_layouts_are_what_layouts_md_says(layout, n):
    int4 = layout == "tile_w4a16"
    w = torch.randint(-128, 128, (n, 128 if int4 else 256), dtype=torch.int8)
    tiles = convert(w, "row", layout)
    assert tiles.shape == w.shape and torch.equal(convert(tiles, layout, "row"), w)
    flat, rows = (unpack(tiles).view(-1), unpack(w)) if int4 else (tiles.view(-1), w)
    for n, k in [(0, 0), (5, 3), (15, 23), (16, 40), (31, 255), (47, 130), (9, 77)]:
        assert flat[sum(TILE_PLACES[layout](n, k, 256))] == rows[n, k]
    assert torch.equal(tiles[48:], w[48:])


@pytest.mark.parametrize("layout", TILE_PLACES)
@pytest.mark.parametrize("n", [16, 17, 31, 1003])
def test_tile_layouts_are_bijections_of_any_number_of_rows(n, layout):
    tensors = [torch.randint(-128, 128, (n, 128), dtype=torch.int8)]
    if layout == "tile_w4a16":
        tensors += [torch.randn(n, groups).to(dtype) for groups in (1, 6) for dtype in (torch.half, torch.bfloat16)]
    for tensor in tensors:
        tiles = convert(tensor, "row", layout)
        assert tiles.shape == tensor.shape and tiles.dtype == tensor.dtype and tiles.is_contiguous()
        assert torch.equal(convert(tiles, layout, "row"), tensor)
        assert torch.equal(tiles[: n // 16 * 16], convert(tensor[: n // 16 * 16], "row", layout))


@pytest.mark.parametrize("n", [48, 50])
def test_tile_scales_are_what_layouts_md_says(n):
    scale = torch.randn(n, 5)
    flat = convert(scale, "row", "tile_w4a16").view(-1)
    for n, group in [(0, 0), (5, 3), (15, 4), (16, 1), (47, 2)]:
        assert flat[n // 16 * 16 * 5 + group * 16 + n % 8 * 2 + n % 16 // 8] == scale[n, group]
    assert torch.equal(flat[48 * 5 :], scale[48:].flatten())


def test_tile_layouts_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="16 rows or more"):
        convert(torch.zeros(15, 128, dtype=torch.int8), "row", "tile_w8a16")
    with pytest.raises(ValueError, match="columns in multiples of 128"):
        convert(torch.zeros(32, 96, dtype=torch.int8), "row", "tile_w8a8")


@pytest.mark.parametrize("n", [48, 49, 63])
@pytest.mark.parametrize("layout", ["row", "panel16", "tile_w8a16", "tile_w8a8"])
def test_gather_rows(layout, n):
    w = torch.randint(-128, 128, (n, 256), dtype=torch.int8)
    packed = convert(w, "row", layout)
    assert torch.equal(gather_rows(packed, torch.arange(n), layout), w)
    for ids in (torch.tensor([[0, 39, 31], [n - 1, 5, 16]]), torch.tensor(n - 1), torch.zeros(0, 3, dtype=torch.int32)):
        assert torch.equal(gather_rows(packed, ids, layout), w[ids.long()])


def test_a_gpu_with_tile_kernels_reads_any_number_of_rows_in_tiles(monkeypatch):
    from fastinfer.ops import layout

    monkeypatch.setattr(layout._native, "backend", lambda device: "native")
    monkeypatch.setattr(layout, "_has_tile_kernels", lambda index: index == 0)
    gpu = torch.device("cuda", 0)
    for kind in ("w4a16", "w8a16"):
        for n in (16, 17, 1003, 50257):
            assert layout.native_layout(gpu, kind, n, 768, torch.bfloat16) == f"tile_{kind}"
        for n, k, dtype in [
            (15, 768, torch.half),
            (0, 768, torch.half),
            (17, 96, torch.half),
            (17, 768, torch.float32),
        ]:
            assert layout.native_layout(gpu, kind, n, k, dtype) == "row"
    assert layout.native_layout(torch.device("cuda", 1), "w4a16", 17, 768, torch.bfloat16) == "row"


@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_embedding_and_head_share_one_weight(factor):
    head = Int8Linear.from_float(linear(100, 64, bias=False))
    embedding = Int8Embedding(
        head.weight, head.weight_scale, like=torch.bfloat16, layout=head.layout, padding_idx=0, factor=factor
    )
    both = nn.ModuleDict({"embedding": embedding, "head": head})
    ids = torch.tensor([[3, 99, 17]])
    expected = head.dequantize().bfloat16()[ids] * factor
    for model in (both, copy.deepcopy(both), copy.deepcopy(both).to(torch.float32)):
        assert model["embedding"].weight is model["head"].weight
        assert model["embedding"].layout == model["head"].layout
        torch.testing.assert_close(model["embedding"](ids).bfloat16(), expected, rtol=1e-2, atol=1e-3)
    state = both.state_dict()
    assert torch.equal(state["embedding.weight"], state["head.weight"])
    both.load_state_dict(state)
    torch.testing.assert_close(both["embedding"](ids), expected, rtol=1e-2, atol=1e-3)


def test_embedding_is_a_plain_mapping_of_tensors():
    head = Int8Linear.from_float(linear(32, 64, bias=False))
    embedding = Int8Embedding(head.weight, head.weight_scale, like=torch.float32, layout=head.layout)
    assert isinstance(embedding, nn.Embedding)
    assert set(embedding.state_dict()) == {"weight", "weight_scale"}


def test_a_weight_replaced_alone_goes_with_scales_in_another_order(device):
    """As accelerate's cpu_offload does: the weight comes from the state dict, the buffers stay."""
    head = Int4Linear.from_float(linear(64, 256)).to(device)
    x = torch.randn(3, 256, device=device)
    expected = head(x)
    head.weight = nn.Parameter(head.state_dict()["weight"], requires_grad=False)
    assert head.layout == ROW
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.dequantize(), copy.deepcopy(head).dequantize())


def test_a_conversion_that_fails_leaves_the_module_as_it_was(monkeypatch):
    from fastinfer.modules import quantized

    head = Int4Linear.from_float(linear(64, 256))
    before, layout, calls = head.dequantize(), head.layout, []

    def fail_at_the_third(t, source, target):
        calls.append(t)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("simulated")
        return convert(t, source, target)

    monkeypatch.setattr(quantized, "convert", fail_at_the_third)
    with pytest.raises(torch.OutOfMemoryError):
        head.use_layout("tile_w4a16")
    monkeypatch.undo()
    assert head.layout == layout and torch.equal(head.dequantize(), before)
