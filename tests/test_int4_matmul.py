"""int4_matmul against fp64: shapes, groups, scale dtypes, layouts, strides, errors, compile."""

import importlib

import pytest
import torch
from matmul_cases import (
    DTYPES,
    EPILOGUE_SHAPES,
    GATES,
    REAL_SHAPES,
    ROWS_COLUMNS,
    TILE_SHAPES,
    activations,
    check_epilogue,
    check_float_matmul,
    epilogues,
    inside_nan,
    layouts,
)
from test_int8_matmul import BAD_EPILOGUES

from fastinfer.ops import int4_matmul
from fastinfer.ops.layout import ROW, TILE_W4A16, convert

op = importlib.import_module("fastinfer.ops.int4_matmul")


def make(m, n, k, g, dtype, device, bias=True, scale_dtype=torch.float16):
    w = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
    w_scale = (torch.rand(n, k // g, device=device) * 0.05 + 1e-3).to(scale_dtype)
    w_zero = (torch.rand(n, k // g, device=device) * 15).to(scale_dtype)
    b = torch.randn(n, device=device).to(dtype) if bias else None
    return activations(m, k, dtype=dtype, device=device), w, w_scale, w_zero, b


def check(x, w, w_scale, w_zero, bias):
    weight = op.dequantize(w, w_scale, w_zero, dtype=torch.float64)
    k = 2 * w.shape[1]
    for layout in layouts("w4a16", w, k, w_scale.dtype):  # the tile layout takes 16-bit scales
        packed = [convert(t, ROW, layout) for t in (w, w_scale, w_zero)]
        check_float_matmul(int4_matmul(x, *packed, bias, layout=layout), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "g"), [(32, 32), (96, 32), (64, 64), (320, 64), (128, 128), (384, 128)])
@pytest.mark.parametrize(("m", "n"), ROWS_COLUMNS)
def test_matches_fp64(m, n, k, g, dtype, device, native, poisoned):
    check(*make(m, n, k, g, dtype, device))


@pytest.mark.parametrize("g", [32, 128])
@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES)
def test_matches_fp64_on_real_shapes(m, n, k, g, device, native, poisoned):
    check(*make(m, n, k, g, torch.bfloat16, device, bias=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("g", [32, 128])
@pytest.mark.parametrize("activation", ["none", *GATES])
@pytest.mark.parametrize(("m", "n", "k"), [*EPILOGUE_SHAPES])
def test_epilogues_match_fp64(m, n, k, activation, g, dtype, device, native, poisoned):
    x, *packed, _ = make(m, n, k, g, dtype, device)
    weight = op.dequantize(*packed, dtype=torch.float64)
    for layout in layouts("w4a16", packed[0], k, packed[1].dtype):
        laid_out = [convert(t, ROW, layout) for t in packed]
        for bias, residual in epilogues(m, n, activation, dtype, device):
            out = int4_matmul(x, *laid_out, bias, residual, activation, layout)
            check_epilogue(out, x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), TILE_SHAPES)
def test_tile_layout_matches_fp64(m, n, k, g, scale_dtype, dtype, device, tiles, poisoned):
    x, w, w_scale, w_zero, bias = make(m, n, k, g, dtype, device, scale_dtype=scale_dtype)
    packed = [convert(t, ROW, TILE_W4A16) for t in (w, w_scale, w_zero)]
    weight = op.dequantize(w, w_scale, w_zero, dtype=torch.float64)
    check_float_matmul(int4_matmul(x, *packed, bias, layout=TILE_W4A16), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("m", [1, 16, 40, 200])
def test_tile_layout_takes_zero_points_far_from_the_range(m, dtype, device, tiles):
    x, w, w_scale, w_zero, bias = make(m, 64, 256, 64, dtype, device)
    w_zero = (torch.rand_like(w_zero) - 0.5) * 600
    packed = [convert(t, ROW, TILE_W4A16) for t in (w, w_scale, w_zero)]
    weight = op.dequantize(w, w_scale, w_zero, dtype=torch.float64)
    check_float_matmul(int4_matmul(x, *packed, bias, layout=TILE_W4A16), x, weight, bias)


@pytest.mark.parametrize("m", [1, 16, 40, 200])
def test_tile_layout_repeats_bit_for_bit(m, device, tiles):
    x, *packed, bias = make(m, 512, 4096, 128, torch.bfloat16, device)
    packed = [convert(t, ROW, TILE_W4A16) for t in packed]
    first = int4_matmul(x, *packed, bias, layout=TILE_W4A16)
    assert all(torch.equal(first, int4_matmul(x, *packed, bias, layout=TILE_W4A16)) for _ in range(1000))


@pytest.mark.parametrize("scale_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 4, 20])
def test_takes_scales_in_every_float(m, scale_dtype, device, native):
    check(*make(m, 40, 128, 64, torch.float16, device, scale_dtype=scale_dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_reads_strided_x_and_nothing_around_it(m, dtype, device, native):
    x, *packed, bias = make(m, 50, 96, 32, dtype, device)
    assert torch.equal(int4_matmul(inside_nan(x), *packed, bias), int4_matmul(x, *packed, bias))


def test_keeps_leading_dimensions(device, native):
    x, *packed, bias = make(6, 48, 64, 64, torch.float32, device)
    assert torch.equal(int4_matmul(x.view(2, 3, 64), *packed, bias).view(6, 48), int4_matmul(x, *packed, bias))


def test_repeats_bit_for_bit(device, native):
    x, *packed, bias = make(40, 300, 256, 64, torch.bfloat16, device)
    first = int4_matmul(x, *packed, bias)
    assert all(torch.equal(first, int4_matmul(x, *packed, bias)) for _ in range(20))


@pytest.mark.parametrize("m", [1, 4, 40])
def test_one_signed_groups_with_outliers_do_not_cancel(m, device, native):
    """Zero points far from the middle: s·Σqx − s·z·Σx would lose digits that the dequantised weight has."""
    from fastinfer.quantize import quantize_int4

    weight = torch.rand(48, 256, device=device) * (torch.rand(48, 256, device=device) < 0.1)
    packed = quantize_int4(weight, 64, "rtn")[:3]
    x = torch.randn(m, 256, device=device) + 3
    x[:, 7] = 1000
    check(x, *packed, None)


@pytest.mark.parametrize("k", [96, 384])
def test_on_the_cpu_a_row_is_the_same_bits_in_every_batch(k, native, device):
    if device != "cpu":
        pytest.skip("on a GPU, kernels for few and many rows differ")
    x, *packed, bias = make(40, 70, k, 32, torch.float32, device)
    alone = torch.cat([int4_matmul(row, *packed, bias) for row in x.split(1)])
    assert torch.equal(int4_matmul(x, *packed, bias), alone)


def test_unpack_undoes_pack():
    q = torch.randint(0, 16, (37, 64), dtype=torch.int8)
    assert torch.equal(op.unpack(op.pack(q)), q)
    assert op.pack(torch.tensor([[3, 10]])).view(torch.uint8).item() == 3 + 10 * 16


BAD = [
    ("x", TypeError, lambda a: a | {"x": a["x"].int()}),
    ("x", ValueError, lambda a: a | {"x": a["x"][:, :-2]}),
    ("w", TypeError, lambda a: a | {"w": a["w"].view(torch.uint8)}),
    ("w_scale", TypeError, lambda a: a | {"w_scale": a["w_scale"].double()}),
    ("w_scale", ValueError, lambda a: a | {"w_scale": a["w_scale"][:, :1], "w_zero": a["w_zero"][:, :1]}),
    ("w_zero", TypeError, lambda a: a | {"w_zero": a["w_zero"].float()}),
    ("w_zero", ValueError, lambda a: a | {"w_zero": a["w_zero"][1:]}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"][:-1]}),
    ("layout", ValueError, lambda a: a | {"layout": "tiles"}),
    *BAD_EPILOGUES,
]


def good_arguments(device):
    names = ("x", "w", "w_scale", "w_zero", "bias")
    good = dict(zip(names, make(3, 32, 256, 128, torch.float32, device), strict=True))
    return good | {"residual": torch.randn(3, 32, device=device), "activation": "none", "layout": ROW}


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    with pytest.raises(error, match=rf"int4_matmul: .*\b{name}\b"):
        int4_matmul(**spoil(good_arguments(device)))


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    with pytest.raises(RuntimeError, match=rf"int4_matmul: .*\b{name}\b"):
        torch.ops.fastinfer.int4_matmul(*spoil(good_arguments(device)).values())


@pytest.mark.parametrize("activation", ["none", "gelu_mul"])
def test_opcheck(activation, device, native):
    residual = torch.randn(3, 32 if activation == "none" else 16, device=device)
    args = (*make(3, 32, 64, 32, torch.float32, device), residual, activation, ROW)
    torch.library.opcheck(torch.ops.fastinfer.int4_matmul.default, args)
