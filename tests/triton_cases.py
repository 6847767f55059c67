"""Cases of the Triton kernels. test_triton.py runs this file in a process of its own."""

import importlib

import pytest
import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import tolerance
import torch
from matmul_cases import DTYPES, check_float_matmul

from fastinfer import _native, ops

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
    reference = importlib.import_module("fastinfer.ops.int8_scaled_matmul").reference
    x, w, w_scale, bias = int8_cases.make(m, n, k, dtype, DEVICE)
    out = kernel("int8_scaled_matmul")(x, w, w_scale, bias)
    tolerance.assert_within(out, reference(x, w, w_scale, bias, dtype=torch.float64), reference(x, w, w_scale, bias))


@pytest.mark.parametrize("g", [32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "n"), [(m, n) for m, n, _ in SHAPES])
def test_int4_matmul(m, n, g, dtype):
    x, *packed, bias = int4_cases.make(m, n, 2 * g, g, dtype, DEVICE)
    weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
    check_float_matmul(kernel("int4_matmul")(x, *packed, bias), x, weight, bias)


@pytest.mark.parametrize("op", ops.__all__)
def test_refuses_other_layouts(op):
    x, w, w_scale, _ = int8_cases.make(2, 32, 64, torch.float32, DEVICE)
    zeros = (torch.zeros(32, 2, device=DEVICE),) if op == "int4_matmul" else ()
    with pytest.raises(ValueError, match=f"{op}: layout must be 'row'"):
        kernel(op)(x, w, w_scale, *zeros, None, "panel16")


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
