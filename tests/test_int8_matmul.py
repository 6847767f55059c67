"""int8_matmul against fp64: shapes, dtypes, layouts, strides, errors, compile."""

import importlib

import matmul_cases
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
)

from fastinfer.ops import int8_matmul
from fastinfer.ops.layout import ROW, convert

op = importlib.import_module("fastinfer.ops.int8_matmul")


def make(m, n, k, dtype, device, bias=True):
    w = torch.randint(-128, 128, (n, k), dtype=torch.int8, device=device)
    w_scale = torch.rand(n, device=device) * 0.01 + 1e-4
    b = torch.randn(n, device=device).to(dtype) if bias else None
    return activations(m, k, dtype=dtype, device=device), w, w_scale, b


def layouts(w, kind="w8a16"):
    """The layouts that kernels for w's device take, with w in each."""
    names = matmul_cases.layouts(kind, w, w.shape[1], torch.bfloat16)
    return [(name, convert(w, ROW, name)) for name in names]


def check(x, w, w_scale, bias):
    weight = op.dequantize(w, w_scale, dtype=torch.float64)
    for layout, packed in layouts(w):
        check_float_matmul(int8_matmul(x, packed, w_scale, bias, layout=layout), x, weight, bias)


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


def check_epilogues(m, n, k, activation, dtype, device):
    x, w, w_scale, _ = make(m, n, k, dtype, device)
    weight = op.dequantize(w, w_scale, dtype=torch.float64)
    for bias, residual in epilogues(m, n, activation, dtype, device):
        for layout, packed in layouts(w):
            out = int8_matmul(x, packed, w_scale, bias, residual, activation, layout)
            check_epilogue(out, x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", *GATES])
@pytest.mark.parametrize(("m", "n", "k"), EPILOGUE_SHAPES)
def test_epilogues_match_fp64(m, n, k, activation, dtype, device, native, poisoned):
    check_epilogues(m, n, k, activation, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 30), (70, 1, 64)])
def test_a_residual_of_odd_size_matches_fp64(m, n, k, dtype, device, native, poisoned):
    check_epilogues(m, n, k, "none", dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 5, 40])
def test_reads_strided_x_and_nothing_around_it(m, dtype, device, native):
    x, w, w_scale, bias = make(m, 50, 72, dtype, device)
    assert torch.equal(int8_matmul(inside_nan(x), w, w_scale, bias), int8_matmul(x, w, w_scale, bias))


def test_keeps_leading_dimensions(device, native):
    x, w, w_scale, bias = make(6, 48, 64, torch.float32, device)
    out = int8_matmul(x.view(2, 3, 64), w, w_scale, bias)
    assert torch.equal(out.view(6, 48), int8_matmul(x, w, w_scale, bias))
    assert int8_matmul(x[0], w, w_scale).shape == (48,)


def test_takes_a_float32_bias_beside_16_bit_x(device, native):
    x, w, w_scale, bias = make(3, 48, 64, torch.bfloat16, device)
    check(x, w, w_scale, bias.float())


@pytest.mark.parametrize("m", [1, 8, 64])
def test_a_row_does_not_depend_on_its_batch_beyond_rounding(m, device, native):
    x, w, w_scale, bias = make(m, 64, 128, torch.float32, device)
    alone = torch.cat([int8_matmul(row, w, w_scale, bias) for row in x.split(1)])
    torch.testing.assert_close(int8_matmul(x, w, w_scale, bias), alone, rtol=1e-5, atol=1e-5)


def test_repeats_bit_for_bit(device, native):
    x, w, w_scale, bias = make(40, 300, 256, torch.bfloat16, device)
    first = int8_matmul(x, w, w_scale, bias)
    assert all(torch.equal(first, int8_matmul(x, w, w_scale, bias)) for _ in range(20))


def test_nan_and_infinity_come_through(device, native):
    x, w, w_scale, _ = make(4, 32, 64, torch.float32, device)
    w[:, 5] = 1
    x[1, 5], x[2, 5] = float("nan"), float("inf")
    out = int8_matmul(x, w, w_scale)
    assert out[1].isnan().all() and out[2].isinf().all() and out[[0, 3]].isfinite().all()


BAD_EPILOGUES = [
    ("activation", ValueError, lambda a: a | {"activation": "relu"}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"][:, :-1]}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"][:-1]}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"].double()}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"].T.contiguous().T}),
    ("residual", ValueError, lambda a: a | {"activation": "silu_mul"}),
]
BAD = [
    ("x", TypeError, lambda a: a | {"x": a["x"].long()}),
    ("x", ValueError, lambda a: a | {"x": a["x"][:, :-1]}),
    ("x", ValueError, lambda a: a | {"x": a["x"].sum()}),
    ("w", TypeError, lambda a: a | {"w": a["w"].float()}),
    ("w", TypeError, lambda a: a | {"w": a["w"][0]}),
    ("w_scale", ValueError, lambda a: a | {"w_scale": a["w_scale"][:-1]}),
    ("w_scale", ValueError, lambda a: a | {"w_scale": a["w_scale"].half()}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"][:-1]}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"].double()}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"].repeat_interleave(2)[::2]}),
    ("w", ValueError, lambda a: a | {"w": a["w"].T.contiguous().T}),
    ("w_scale", ValueError, lambda a: a | {"w_scale": a["w_scale"].repeat_interleave(2)[::2]}),
    ("layout", ValueError, lambda a: a | {"layout": "tiles"}),
    *BAD_EPILOGUES,
]


def good_arguments(device):
    names = ("x", "w", "w_scale", "bias")
    good = dict(zip(names, make(3, 32, 64, torch.float32, device), strict=True))
    return good | {"residual": torch.randn(3, 32, device=device), "activation": "none", "layout": ROW}


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    with pytest.raises(error, match=rf"int8_matmul: .*\b{name}\b"):
        int8_matmul(**spoil(good_arguments(device)))


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    with pytest.raises(RuntimeError, match=rf"int8_matmul: .*\b{name}\b"):
        torch.ops.fastinfer.int8_matmul(*spoil(good_arguments(device)).values())


@pytest.mark.parametrize("activation", GATES)
def test_gates_take_rows_in_sixteens(activation, device, native):
    x, w, w_scale, _ = make(3, 24, 64, torch.float32, device)
    with pytest.raises(ValueError, match=f"int8_matmul: activation '{activation}' needs .* multiples of 16, got 24"):
        int8_matmul(x, w, w_scale, activation=activation)
    with pytest.raises(RuntimeError, match=f"int8_matmul: activation '{activation}' needs .* multiples of 16, got 24"):
        torch.ops.fastinfer.int8_matmul(x, w, w_scale, None, None, activation, ROW)


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_opcheck(activation, device, native):
    residual = torch.randn(3, 32 if activation == "none" else 16, device=device)
    args = (*make(3, 32, 64, torch.float32, device), residual, activation, ROW)
    torch.library.opcheck(torch.ops.fastinfer.int8_matmul.default, args)
