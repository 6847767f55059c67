"""Cases of the Triton kernels. test_triton.py runs this file in a process of its own."""

import importlib
import warnings

import pytest
import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import test_kv_attention as attention_cases
import tolerance
import torch
from matmul_cases import DTYPES, GATES, activations, check_epilogue, check_float_matmul, epilogues

from fastinfer import _native, ops

SCALED = importlib.import_module("fastinfer.ops.int8_scaled_matmul")
QUANTIZE = importlib.import_module("fastinfer.ops.int8_quantize")
NORM = importlib.import_module("fastinfer.ops.rms_norm")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(0, 32, 64), (1, 17, 64), (3, 48, 96), (16, 33, 160), (17, 70, 96), (40, 65, 128)]


def kernel(op):
    return getattr(importlib.import_module(f"fastinfer.kernels.{op}"), op)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 20, 30)])
def test_int8_matmul(m, n, k, dtype):
    x, w, w_scale, bias = int8_cases.make(m, n, k, dtype, DEVICE)
    weight = int8_cases.op.dequantize(w, w_scale, dtype=torch.float64)
    check_float_matmul(kernel("int8_matmul")(x, w, w_scale, bias), x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (5, 20, 30)])
def test_int8_scaled_matmul(m, n, k, dtype):
    args = int8_cases.make(m, n, k, dtype, DEVICE)
    out = kernel("int8_scaled_matmul")(*args)
    tolerance.assert_within(out, SCALED.reference(*args, dtype=torch.float64), SCALED.reference(*args))


@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(m, n) for m, n, _ in SHAPES])
def test_int4_matmul(m, n, g, dtype):
    x, *packed, bias = int4_cases.make(m, n, 2 * g, g, dtype, DEVICE)
    weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
    check_float_matmul(kernel("int4_matmul")(x, *packed, bias), x, weight, bias)


EPILOGUES = pytest.mark.parametrize(
    ("m", "n", "activation"), [(3, 33, "none"), *((m, n, gate) for gate in GATES for m, n in ((1, 16), (18, 144)))]
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EPILOGUES
def test_int8_matmul_epilogues(m, n, activation, dtype):
    x, w, w_scale, _ = int8_cases.make(m, n, 96, dtype, DEVICE)
    weight = int8_cases.op.dequantize(w, w_scale, dtype=torch.float64)
    for bias, residual in epilogues(m, n, activation, dtype, DEVICE):
        out = kernel("int8_matmul")(x, w, w_scale, bias, residual, activation)
        check_epilogue(out, x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EPILOGUES
def test_int4_matmul_epilogues(m, n, activation, dtype):
    x, *packed, _ = int4_cases.make(m, n, 96, 32, dtype, DEVICE)
    weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
    for bias, residual in epilogues(m, n, activation, dtype, DEVICE):
        out = kernel("int4_matmul")(x, *packed, bias, residual, activation)
        check_epilogue(out, x, weight, bias, residual, activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EPILOGUES
def test_int8_scaled_matmul_epilogues(m, n, activation, dtype):
    x, w, w_scale, _ = int8_cases.make(m, n, 96, dtype, DEVICE)
    q, x_scale = kernel("int8_quantize")(x)
    for bias, residual in epilogues(m, n, activation, dtype, DEVICE):
        args = w, w_scale, bias, residual, activation
        out = kernel("int8_scaled_matmul")(x, *args)
        tolerance.assert_within(out, SCALED.reference(x, *args, dtype=torch.float64), SCALED.reference(x, *args))
        given = kernel("int8_scaled_matmul")(q, *args, x_scale=x_scale, out_dtype=dtype)
        assert torch.equal(out, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 30, 1024, 2500])
def test_int8_quantize(k, dtype):
    x, weight = activations(5, k, dtype=dtype, device=DEVICE), torch.rand(k, device=DEVICE) + 0.5
    x[1], x[2, 0], x[3, 0] = 0, float("nan"), float("inf")
    for norm_weight in (None, weight.to(dtype), weight):
        q, x_scale = kernel("int8_quantize")(x, norm_weight, 1e-5)
        expected = QUANTIZE.reference(x, norm_weight, 1e-5)
        if DEVICE == "cpu" and dtype == torch.bfloat16 and norm_weight is not None:
            assert (q.int() - expected[0].int()).abs().max() <= 2  # the interpreter cuts to bf16 instead of rounding
            torch.testing.assert_close(x_scale, expected[1], rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)
            continue
        assert torch.equal(q, expected[0])
        torch.testing.assert_close(x_scale, expected[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 30, 1024, 2500])
def test_rms_norm(k, dtype, offset):
    x, residual = (activations(5, k, dtype=dtype, device=DEVICE) for _ in range(2))
    weight = torch.rand(k, device=DEVICE) + 0.5
    x[1], residual[1], x[2, 0] = 0, 0, float("nan")
    cut = 2 * torch.finfo(dtype).eps if DEVICE == "cpu" and dtype == torch.bfloat16 else 0  # as above
    for given in (None, weight.to(dtype), weight):
        for added in (None, residual):
            out, expected = (f(x, given, 1e-5, added, offset) for f in (kernel("rms_norm"), NORM.reference))
            torch.testing.assert_close(out, expected, rtol=2 * cut, atol=cut, equal_nan=True)


@pytest.mark.parametrize("kind", attention_cases.KINDS, ids=str)
@pytest.mark.parametrize(
    ("t", "heads", "more"),
    [
        (1, (4, 2, 64), {"window": 40, "softcap": 3.0}),
        (3, (7, 1, 80), {"r": 10}),
        (2, (3, 3, 40), {"window": 520, "r": 0}),
    ],
    ids=str,
)
def test_kv_attention(t, heads, more, kind, monkeypatch):
    monkeypatch.setattr(_native, "backend", lambda device: "triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", _native.MissingKernelWarning)
        starts = torch.tensor([500, 39], dtype=torch.int32, device=DEVICE)
        a = attention_cases.make([530, 37], t, heads, kind, DEVICE, **more)
        for given in (a, a | {"starts": starts}):
            if DEVICE == "cpu" and kind == torch.bfloat16:
                check_cut_attention(given)
            else:
                attention_cases.check(given)


@pytest.mark.parametrize("d", [8, 40, 64, 80, 96, 104, 128, 200, 256])
def test_int8_keys_are_transformed(d):
    a = attention_cases.make([5, 2], 2, (2, 1, d), torch.int8, DEVICE)
    a |= {name: a[name].float() for name in "qkv"}
    ours, theirs = attention_cases.copy(a), attention_cases.copy(a)
    order = attention_cases.SCHEMA
    y = kernel("kv_attention")(*(ours.get(name) for name in order), d**-0.5, 0, 0.0)
    torch.testing.assert_close(y, attention_cases.op.reference(**theirs))
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", attention_cases.KINDS, ids=str)
def test_kv_attention_stays_inside_of_the_cache(kind):
    def attend(a):
        return kernel("kv_attention")(*(a.get(name) for name in attention_cases.SCHEMA), 0.2, 0, 0.0)

    attention_cases.check_positions(attention_cases.make([90, 90], 2, (2, 1, 16), kind, DEVICE, spare=0), attend)


def check_cut_attention(a):
    """In bf16 the interpreter cuts instead of rounding: keys, queries and results are off by an ulp."""
    ours, theirs = attention_cases.copy(a), attention_cases.copy(a)
    y, expected = attention_cases.run(ours), attention_cases.op.reference(**theirs)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=0, equal_nan=True)
    torch.testing.assert_close(y, expected, rtol=2**-5, atol=2**-5 * expected.abs().max().item())


@pytest.mark.parametrize("op", ["int4_matmul", "int8_matmul", "int8_scaled_matmul"])
def test_refuses_other_layouts(op):
    x, w, w_scale, _ = int8_cases.make(2, 32, 64, torch.float32, DEVICE)
    zeros = (torch.zeros(32, 2, device=DEVICE),) if op == "int4_matmul" else ()
    with pytest.raises(ValueError, match=f"{op}: layout must be 'row'"):
        kernel(op)(x, w, w_scale, *zeros, layout="panel16")


def test_the_wrapper_falls_back_to_triton(monkeypatch):
    monkeypatch.setattr(_native, "backend", lambda device: "triton")
    x, w, w_scale, bias = int8_cases.make(3, 32, 64, torch.float32, DEVICE)
    with pytest.warns(_native.MissingKernelWarning, match="using triton"):
        _native._warn.cache_clear()
        out = ops.int8_matmul(x, w, w_scale, bias)
    assert torch.equal(out, kernel("int8_matmul")(x, w, w_scale, bias))


def test_without_any_library_the_reference_serves_with_one_warning(monkeypatch):
    monkeypatch.setattr(_native, "backend", lambda device: "reference")
    x, w, w_scale, bias = int8_cases.make(3, 32, 64, torch.float32, DEVICE)
    _native._warn.cache_clear()
    with pytest.warns(_native.MissingKernelWarning, match="fastinfer doctor") as caught:
        first = ops.int8_matmul(x, w, w_scale, bias)
        second = ops.int8_matmul(x, w, w_scale, bias)
    assert len(caught) == 1 and torch.equal(first, second)
    assert torch.equal(first, int8_cases.op.reference(x, w, w_scale, bias))
