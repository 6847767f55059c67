"""Tile layouts of weights with rows that fill no tile, which a kernel of their own multiplies."""

import importlib

import pytest
import tolerance
import torch
from matmul_cases import DTYPES, TAIL_SHAPES, check_epilogue, epilogues
from test_int4_matmul import make as make_int4
from test_int8_matmul import make as make_int8

from fastinfer.ops import int4_matmul, int8_matmul, int8_quantize, int8_scaled_matmul
from fastinfer.ops.layout import ROW, TILE_W4A16, TILE_W8A8, TILE_W8A16, convert

int4, int8, scaled = (
    importlib.import_module(f"fastinfer.ops.{name}") for name in ("int4_matmul", "int8_matmul", "int8_scaled_matmul")
)


def in_tiles(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [convert(t, ROW, TILE_W4A16) for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), TAIL_SHAPES)
def test_int4_matches_fp64(m, n, k, g, scale_dtype, dtype, device, tiles, poisoned):
    x, *packed, _ = make_int4(m, n, k, g, dtype, device, scale_dtype=scale_dtype)
    weight, laid_out = int4.dequantize(*packed, dtype=torch.float64), in_tiles(*packed)
    for bias, residual in epilogues(m, n, "none", dtype, device):
        out = int4_matmul(x, *laid_out, bias, residual, layout=TILE_W4A16)
        check_epilogue(out, x, weight, bias, residual, "none")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_int4_takes_zero_points_far_from_the_range(dtype, device, tiles):
    x, w, w_scale, w_zero, _ = make_int4(5, 31, 256, 64, dtype, device)
    w_zero = (torch.rand_like(w_zero) - 0.5) * 600
    weight = int4.dequantize(w, w_scale, w_zero, dtype=torch.float64)
    out = int4_matmul(x, *in_tiles(w, w_scale, w_zero), layout=TILE_W4A16)
    check_epilogue(out, x, weight, None, None, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), TAIL_SHAPES)
def test_int8_matches_fp64(m, n, k, dtype, device, tiles, poisoned):
    x, w, w_scale, _ = make_int8(m, n, k, dtype, device)
    weight, laid_out = int8.dequantize(w, w_scale, dtype=torch.float64), convert(w, ROW, TILE_W8A16)
    for bias, residual in epilogues(m, n, "none", dtype, device):
        out = int8_matmul(x, laid_out, w_scale, bias, residual, layout=TILE_W8A16)
        check_epilogue(out, x, weight, bias, residual, "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), TAIL_SHAPES)
def test_int8_activations_match_fp64(m, n, k, dtype, device, tiles, poisoned):
    x, w, w_scale, _ = make_int8(m, n, k, dtype, device)
    laid_out = convert(w, ROW, TILE_W8A8)
    for bias, residual in epilogues(m, n, "none", dtype, device):
        out = int8_scaled_matmul(x, laid_out, w_scale, bias, residual, layout=TILE_W8A8)
        exact = scaled.reference(x, w, w_scale, bias, residual, dtype=torch.float64)
        tolerance.assert_within(out, exact, scaled.reference(x, w, w_scale, bias, residual))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), TAIL_SHAPES)
def test_int8_activations_give_the_bits_of_the_row_layout(m, n, k, dtype, device, tiles, poisoned):
    x, w, w_scale, bias = make_int8(m, n, k, dtype, device)
    q, x_scale = int8_quantize(x)
    for b in (None, bias):
        row = int8_scaled_matmul(q, w, w_scale, b, x_scale=x_scale, out_dtype=dtype)
        laid_out = convert(w, ROW, TILE_W8A8)
        out = int8_scaled_matmul(q, laid_out, w_scale, b, layout=TILE_W8A8, x_scale=x_scale, out_dtype=dtype)
        assert torch.equal(out, row)


@pytest.mark.parametrize("m", [1, 16, 200])
def test_repeats_bit_for_bit(m, device, tiles):
    x, *packed, bias = make_int4(m, 31, 4096, 128, torch.bfloat16, device)
    packed = in_tiles(*packed)
    first = int4_matmul(x, *packed, bias, layout=TILE_W4A16)
    assert all(torch.equal(first, int4_matmul(x, *packed, bias, layout=TILE_W4A16)) for _ in range(200))


def test_fewer_rows_than_a_tile_are_refused(device, tiles):
    x, w, w_scale, _ = make_int8(3, 15, 128, torch.bfloat16, device)
    with pytest.raises(RuntimeError, match=r"int8_matmul: layout .* needs N of at least 16"):
        torch.ops.fastinfer.int8_matmul(x, w, w_scale, None, None, "none", TILE_W8A16)
