"""int8_scaled_matmul: the integer stage exact, scales and bias in fp32, NaN rows, errors, compile."""

import importlib

import pytest
import tolerance
import torch
from matmul_cases import DTYPES, REAL_SHAPES, ROWS_COLUMNS, TILE_SHAPES, inside_nan
from test_int8_matmul import layouts as layouts_of
from test_int8_matmul import make

from fastinfer.ops import int8_scaled_matmul
from fastinfer.ops.layout import ROW

op = importlib.import_module("fastinfer.ops.int8_scaled_matmul")


def layouts(w):
    return layouts_of(w, "w8a8")


def check(x, w, w_scale, bias):
    exact = op.reference(x, w, w_scale, bias, dtype=torch.float64)
    plain = op.reference(x, w, w_scale, bias)
    for layout, packed in layouts(w):
        tolerance.assert_within(int8_scaled_matmul(x, packed, w_scale, bias, layout), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 4, 30, 64, 100, 384])
@pytest.mark.parametrize(("m", "n"), ROWS_COLUMNS)
def test_matches_fp64(m, n, k, dtype, device, native, poisoned):
    check(*make(m, n, k, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), TILE_SHAPES)
def test_matches_fp64_on_tile_shapes(m, n, k, dtype, device, native, poisoned):
    check(*make(m, n, k, dtype, device))


@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES)
def test_matches_fp64_on_real_shapes(m, n, k, device, native, poisoned):
    check(*make(m, n, k, torch.bfloat16, device, bias=False))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 40, 64), (7, 33, 100), (50, 130, 384), (64, 16, 1030), (5, 64, 256), (90, 80, 384)]
)
def test_integer_stage_is_exact(m, n, k, device, native):
    """Whole x with maximum 127 has scale 1, so the output is the sum of integer products itself."""
    x = torch.randint(-127, 128, (m, k), device=device).float()
    x[:, 0] = 127
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    expected = (x.double() @ w.double().T).float()
    assert expected.abs().max() < 2**24
    for layout, packed in layouts(w):
        out = int8_scaled_matmul(x, packed, torch.ones(n, device=device), None, layout)
        assert torch.equal(out, expected)


def test_extreme_values_do_not_saturate(device, native):
    for sign in (1, -1):
        x = torch.full((5, 512), 127.0 * sign, device=device)
        w = torch.full((32, 512), -128, dtype=torch.int8, device=device)
        out = int8_scaled_matmul(x, w, torch.ones(32, device=device))
        assert torch.equal(out, torch.full_like(out, -128 * 127.0 * sign * 512))


def test_rounds_halves_to_even(device, native):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.0]], device=device)
    out = int8_scaled_matmul(x, torch.eye(8, dtype=torch.int8, device=device), torch.ones(8, device=device))
    assert out.tolist() == [[127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0, 0.0]]


def test_zero_rows_give_the_bias(device, native):
    x, w, w_scale, bias = make(4, 32, 64, torch.float32, device)
    x[2] = 0
    out = int8_scaled_matmul(x, w, w_scale, bias)
    assert torch.equal(out[2], bias) and not torch.equal(out[1], bias)


def test_tiny_rows_survive(device, native):
    x, w, w_scale, _ = make(2, 32, 64, torch.float32, device)
    check(x * 1e-30, w, w_scale, None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 33, 71])
def test_a_row_with_nan_or_infinity_is_nan_alone(bad, column, device, native):
    x, w, w_scale, bias = make(4, 32, 72, torch.float32, device)
    x[1, column] = bad
    out = int8_scaled_matmul(x, w, w_scale, bias)
    assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_reads_strided_x_and_nothing_around_it(m, dtype, device, native):
    x, w, w_scale, bias = make(m, 50, 72, dtype, device)
    assert torch.equal(int8_scaled_matmul(inside_nan(x), w, w_scale, bias), int8_scaled_matmul(x, w, w_scale, bias))


@pytest.mark.parametrize("m", [2, 9, 70])
def test_a_row_does_not_depend_on_its_batch(m, device, native):
    x, w, w_scale, bias = make(m, 64, 128, torch.float32, device)
    alone = torch.cat([int8_scaled_matmul(row, w, w_scale, bias) for row in x.split(1)])
    assert torch.equal(int8_scaled_matmul(x, w, w_scale, bias), alone)


def test_names_the_bad_argument(device):
    x, w, w_scale, bias = make(3, 32, 64, torch.float32, device)
    with pytest.raises(TypeError, match=r"int8_scaled_matmul: x must be float32.* got int32 \[3, 64\]"):
        int8_scaled_matmul(x.int(), w, w_scale, bias)
    with pytest.raises(ValueError, match="int8_scaled_matmul: w_scale"):
        int8_scaled_matmul(x, w, w_scale[1:], bias)
    wide = torch.zeros(1, op.MAX_K + 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="w must have at most"):
        int8_scaled_matmul(torch.zeros(1, op.MAX_K + 1, device=device), wide, w_scale[:1])


def test_opcheck(device, native):
    args = (*make(3, 32, 64, torch.float32, device), ROW)
    torch.library.opcheck(torch.ops.fastinfer.int8_scaled_matmul.default, args)
