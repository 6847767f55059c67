"""linear against fp64: epilogues, shapes, dtypes, strides, errors, compile."""

import pytest
import torch
from matmul_cases import (
    DTYPES,
    EPILOGUE_SHAPES,
    GATES,
    REAL_SHAPES,
    activations,
    check_epilogue,
    epilogues,
    inside_nan,
)
from test_int8_matmul import BAD_EPILOGUES

from fastinfer.ops import linear
from fastinfer.ops.layout import interleave_gate_up, split_gate_up


def make(m, n, k, dtype, device):
    x = activations(m, k, dtype=dtype, device=device)
    return x, (torch.randn(n, k, device=device) / max(k, 1) ** 0.5).to(dtype)


def check(m, n, k, activation, dtype, device):
    x, w = make(m, n, k, dtype, device)
    for bias, residual in epilogues(m, n, activation, dtype, device):
        out = linear(x, w, bias, residual, activation)
        check_epilogue(out, x, w.double(), bias, residual, activation, halves=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", *GATES])
@pytest.mark.parametrize(("m", "n", "k"), [*EPILOGUE_SHAPES, (8, 1040, 30)])
def test_epilogues_match_fp64(m, n, k, activation, dtype, device, native, poisoned):
    check(m, n, k, activation, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(3, 33, 30), (70, 1, 64), (2, 100, 1), (4, 0, 8)])
def test_odd_sizes_match_fp64(m, n, k, dtype, device, native, poisoned):
    check(m, n, k, "none", dtype, device)


# few rows on compute capability 9.0 have a kernel of their own: ragged N, units of K that no warp count divides, splits of K
DECODE_SHAPES = [
    (1, 1, 32),
    (3, 17, 96),
    (1, 48, 2048),
    (8, 272, 896),
    (9, 61, 416),
    (16, 1040, 1024),
    (16, 4099, 4096),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 2048), (8, 272, 896), (16, 1040, 1024), (3, 8448, 256)])
def test_few_gated_rows_match_fp64(m, n, k, dtype, device, native, poisoned):
    for activation in GATES:
        check(m, n, k, activation, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*DECODE_SHAPES, (12, 33, 14336)])
def test_few_rows_match_fp64(m, n, k, dtype, device, native, poisoned):
    check(m, n, k, "none", dtype, device)


@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES[:3])
def test_matches_fp64_on_real_shapes(m, n, k, device, native, poisoned):
    check(m, n, k, "silu_mul", torch.bfloat16, device)


def test_no_columns_of_x_leave_the_bias(device, native):
    bias = torch.randn(16, device=device)
    x, w = torch.zeros(2, 0, device=device), torch.zeros(16, 0, device=device)
    assert torch.equal(linear(x, w, bias), bias.expand(2, 16))


def test_is_the_gated_block_of_a_model(device, native):
    """Two linears, one op."""
    x, gate = make(5, 48, 64, torch.float32, device)
    _, up = make(5, 48, 64, torch.float32, device)
    expected = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    torch.testing.assert_close(linear(x, torch.cat((gate, up)), activation="silu_mul"), expected)


@pytest.mark.parametrize("shape", [(8,), (48, 64), (16, 3, 5), (0, 4)])
def test_split_undoes_interleave(shape, device):
    gate, up = torch.randn(shape, device=device), torch.randn(shape, device=device)
    merged = interleave_gate_up(gate, up)
    assert merged.shape == (2 * shape[0], *shape[1:])
    for whole, half in zip((gate, up), split_gate_up(merged), strict=True):
        assert torch.equal(whole, half)


def test_interleaves_in_eights():
    merged = interleave_gate_up(torch.arange(16), 100 + torch.arange(16))
    assert merged.tolist() == [*range(8), *range(100, 108), *range(8, 16), *range(108, 116)]


@pytest.mark.parametrize(("gate", "up"), [((12, 4), (12, 4)), ((8, 4), (8, 5)), ((), ())])
def test_interleave_names_what_does_not_fit(gate, up):
    with pytest.raises(ValueError, match="gate and up must have one shape"):
        interleave_gate_up(torch.zeros(gate), torch.zeros(up))
    with pytest.raises(ValueError, match="merged must have rows in multiples of 16"):
        split_gate_up(torch.zeros(24, 2))


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [72, 96])  # for torch, and for the kernel for few rows
@pytest.mark.parametrize("m", [1, 5, 40])
def test_reads_strided_x_and_nothing_around_it(m, k, dtype, activation, device, native):
    x, w = make(m, 48, k, dtype, device)
    out = linear(inside_nan(x), w, activation=activation)
    torch.testing.assert_close(out, linear(x, w, activation=activation))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_keeps_leading_dimensions(dtype, device, native):
    x, w = make(6, 48, 64, dtype, device)
    residual = torch.randn(6, 24, device=device).to(dtype)
    expected = linear(x, w, None, residual, "gelu_mul")
    for three in (x.view(2, 3, 64), inside_nan(x).unflatten(0, (2, 3))):
        out = linear(three, w, None, residual.view(2, 3, 24), "gelu_mul")
        torch.testing.assert_close(out.view(6, 24), expected)
    assert linear(x[0], w, residual=residual.view(-1)[:48]).shape == (48,)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_nan_stays_where_it_is(dtype, device, native):
    x, w = make(4, 32, 64, dtype, device)
    x[1, 5] = float("nan")
    for activation in GATES:
        out = linear(x, w, activation=activation)
        assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("activation", GATES)
def test_large_gates_saturate(activation, device, native):
    """Far out a gate is the identity or zero; nothing overflows on the way."""
    x = torch.tensor([[300.0], [30.0], [-30.0], [-300.0]], device=device)
    out = linear(x, torch.ones(16, 1, device=device), activation=activation)
    expected = (x.clamp(min=0) * x).expand(4, 8)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-9)


BAD = [
    *BAD_EPILOGUES,
    ("x", TypeError, lambda a: a | {"x": a["x"].long()}),
    ("x", ValueError, lambda a: a | {"x": a["x"][:, :-1]}),
    ("x", ValueError, lambda a: a | {"x": a["x"].sum()}),
    ("w", TypeError, lambda a: a | {"w": a["w"].double()}),
    ("w", TypeError, lambda a: a | {"w": a["w"][0]}),
    ("w", ValueError, lambda a: a | {"w": a["w"].T.contiguous().T}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"][:-1]}),
    ("bias", ValueError, lambda a: a | {"bias": a["bias"].double()}),
    ("activation", ValueError, lambda a: a | {"w": a["w"][:24], "bias": None, "activation": "silu_mul"}),
]


def good_arguments(device):
    x, w = make(3, 32, 64, torch.float32, device)
    bias, residual = torch.randn(32, device=device), torch.randn(3, 32, device=device)
    return {"x": x, "w": w, "bias": bias, "residual": residual, "activation": "none"}


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    with pytest.raises(error, match=rf"linear: .*\b{name}\b"):
        linear(**spoil(good_arguments(device)))


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    with pytest.raises(RuntimeError, match=rf"linear: .*\b{name}\b"):
        torch.ops.fastinfer.linear(*spoil(good_arguments(device)).values())


@pytest.mark.parametrize("activation", ["none", "silu_mul"])
def test_opcheck(activation, device, native):
    x, w = make(3, 32, 64, torch.float32, device)
    residual = torch.randn(3, 32 if activation == "none" else 16, device=device)
    torch.library.opcheck(torch.ops.fastinfer.linear.default, (x, w, None, residual, activation))
    torch.library.opcheck(torch.ops.fastinfer.linear.default, (x, w, None, None, activation))
