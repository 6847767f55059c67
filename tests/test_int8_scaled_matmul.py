"""int8_scaled_matmul: the integer stage exact, scales and bias in fp32, NaN rows, errors, compile."""

import importlib

import pytest
import tolerance
import torch
from matmul_cases import (
    DTYPES,
    EPILOGUE_SHAPES,
    GATES,
    REAL_SHAPES,
    ROWS_COLUMNS,
    TILE_SHAPES,
    epilogues,
    inside_nan,
)
from test_int8_matmul import BAD_EPILOGUES, good_arguments, make
from test_int8_matmul import layouts as layouts_of

from fastinfer.ops import int8_quantize, int8_scaled_matmul
from fastinfer.ops.layout import ROW, TILE_W8A8, convert

op = importlib.import_module("fastinfer.ops.int8_scaled_matmul")


def layouts(w):
    return layouts_of(w, "w8a8")


def check(x, w, w_scale, bias):
    exact = op.reference(x, w, w_scale, bias, dtype=torch.float64)
    plain = op.reference(x, w, w_scale, bias)
    for layout, packed in layouts(w):
        tolerance.assert_within(int8_scaled_matmul(x, packed, w_scale, bias, layout=layout), exact, plain)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", *GATES])
@pytest.mark.parametrize(("m", "n", "k"), EPILOGUE_SHAPES)
def test_epilogues_match_fp64(m, n, k, activation, dtype, device, native, poisoned):
    x, w, w_scale, _ = make(m, n, k, dtype, device)
    for bias, residual in epilogues(m, n, activation, dtype, device):
        args = w_scale, bias, residual, activation
        exact, plain = op.reference(x, w, *args, dtype=torch.float64), op.reference(x, w, *args)
        for layout, packed in layouts(w):
            tolerance.assert_within(int8_scaled_matmul(x, packed, *args, layout), exact, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu_mul"])
@pytest.mark.parametrize(("m", "n", "k"), [*EPILOGUE_SHAPES, (5, 32, 30), (70, 16, 100)])
def test_int8_x_gives_the_bits_of_float_x(m, n, k, activation, dtype, device, native, poisoned):
    x, w, w_scale, bias = make(m, n, k, dtype, device)
    if m > 1:
        x[1, 0] = float("nan")
    q, x_scale = int8_quantize(x)
    for layout, packed in layouts(w):
        args = packed, w_scale, bias, None, activation, layout
        whole, given = int8_scaled_matmul(x, *args), int8_scaled_matmul(q, *args, x_scale, dtype)
        torch.testing.assert_close(given, whole, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [2, 9, 70])
def test_int8_x_keeps_leading_dimensions_and_strides(m, out_dtype, device, native):
    x, w, w_scale, _ = make(m, 48, 72, torch.float32, device)
    q, x_scale = int8_quantize(x)
    strided = q.T.contiguous().T
    out = int8_scaled_matmul(strided.unsqueeze(0), w, w_scale, x_scale=x_scale.unsqueeze(0), out_dtype=out_dtype)
    assert out.shape == (1, m, 48) and out.dtype == out_dtype
    assert torch.equal(out[0], int8_scaled_matmul(q, w, w_scale, x_scale=x_scale, out_dtype=out_dtype))


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
        out = int8_scaled_matmul(x, packed, torch.ones(n, device=device), layout=layout)
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


@pytest.mark.parametrize("m", [2, 9, 70])
def test_a_gated_row_does_not_depend_on_its_batch(m, device, native):
    x, w, w_scale, bias = make(m, 64, 128, torch.float32, device)
    args = w, w_scale, bias, None, "gelu_tanh_mul"
    alone = torch.cat([int8_scaled_matmul(row, *args) for row in x.split(1)])
    assert torch.equal(int8_scaled_matmul(x, *args), alone)


def quantised(a):
    q, x_scale = int8_quantize(a["x"])
    return a | {"x": q, "x_scale": x_scale, "out_dtype": torch.float32}


BAD = [
    *BAD_EPILOGUES,
    ("x", TypeError, lambda a: a | {"x": a["x"].int()}),
    ("w_scale", ValueError, lambda a: a | {"w_scale": a["w_scale"][1:]}),
    ("layout", ValueError, lambda a: a | {"layout": "tiles"}),
    ("x_scale", ValueError, lambda a: a | {"x_scale": a["x"][:, 0].contiguous()}),
    ("out_dtype", ValueError, lambda a: a | {"out_dtype": torch.float32}),
    ("x_scale", ValueError, lambda a: quantised(a) | {"x_scale": None}),
    ("x_scale", ValueError, lambda a: quantised(a) | {"x_scale": quantised(a)["x_scale"][1:]}),
    ("x_scale", ValueError, lambda a: quantised(a) | {"x_scale": quantised(a)["x_scale"].double()}),
    ("x_scale", ValueError, lambda a: quantised(a) | {"x_scale": quantised(a)["x_scale"].repeat_interleave(2)[::2]}),
    ("out_dtype", TypeError, lambda a: quantised(a) | {"out_dtype": None}),
    ("out_dtype", TypeError, lambda a: quantised(a) | {"out_dtype": torch.float64}),
    ("residual", ValueError, lambda a: quantised(a) | {"out_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    arguments = spoil(good_arguments(device) | {"bias": None})
    with pytest.raises(error, match=rf"int8_scaled_matmul: .*\b{name}\b"):
        int8_scaled_matmul(**arguments)


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    arguments = spoil(good_arguments(device) | {"bias": None, "x_scale": None, "out_dtype": None})
    with pytest.raises(RuntimeError, match=rf"int8_scaled_matmul: .*\b{name}\b"):
        torch.ops.fastinfer.int8_scaled_matmul(*arguments.values())


def test_refuses_more_columns_than_int32_sums_hold(device):
    wide = torch.zeros(1, op.MAX_K + 1, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="w must have at most"):
        int8_scaled_matmul(torch.zeros(1, op.MAX_K + 1, device=device), wide, torch.ones(1, device=device))


@pytest.mark.parametrize("given", [False, True])
def test_opcheck(given, device, native):
    x, w, w_scale, bias = make(3, 32, 64, torch.float32, device)
    q, x_scale = int8_quantize(x)
    rest = bias, torch.randn(3, 16, device=device), "silu_mul", ROW
    args = (q, w, w_scale, *rest, x_scale, torch.float32) if given else (x, w, w_scale, *rest, None, None)
    torch.library.opcheck(torch.ops.fastinfer.int8_scaled_matmul.default, args)


def test_the_tile_layout_names_a_weight_that_it_cannot_take(device, tiles):
    x, w, w_scale, bias = make(3, 32, 128, torch.bfloat16, device)
    packed = torch.cat((w.new_zeros(4), convert(w, ROW, TILE_W8A8).view(-1)))[4:].view(32, 128)
    with pytest.raises(RuntimeError, match="w must start on a 16-byte boundary"):
        int8_scaled_matmul(x, packed, w_scale, bias, layout=TILE_W8A8)
    with pytest.raises(RuntimeError, match="K in multiples of 128, got N = 32, K = 0"):
        int8_scaled_matmul(x[:, :0], w[:, :0].contiguous(), w_scale, bias, layout=TILE_W8A8)
