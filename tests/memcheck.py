"""Small calls of every op, checked against fp64 on the CPU, to be run under compute-sanitizer (make memcheck).

The references stay off the GPU: under the sanitizer it is our kernels that should take the time.
"""

import os
import sys
from itertools import product

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own, so that overruns show

import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import test_linear as linear_cases
import tolerance
import torch
from matmul_cases import (
    DTYPES,
    GATES,
    TAIL_SHAPES,
    TILE_SHAPES,
    activations,
    check_epilogue,
    check_float_matmul,
    epilogues,
)
from test_linear import DECODE_SHAPES

from fastinfer import ops
from fastinfer.ops.layout import ROW, TILE_W4A16, TILE_W8A16, convert, native_layout

ROWS = [1, 3, 8, 9, 17, 33, 70, 200]
COLUMNS = [1, 33, 130]


def check_tiles(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> int:
    """The kernels of the tile layouts; none where the GPU has none.

    Beside fp32 x the weight is dequantised for torch's linear, so that what is plain is torch's on the same device.
    """
    where = device if dtype == torch.float32 else "cpu"
    if native_layout(torch.device(device), "w4a16", n, k, torch.bfloat16) != TILE_W4A16:
        return 0

    def there(layout: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [(convert(t, ROW, layout) if t.dim() == 2 else t).to(device) for t in tensors]

    x, w, w_scale, bias = case = int8_cases.make(m, n, k, dtype, "cpu")
    weight = int8_cases.op.dequantize(w, w_scale, dtype=torch.float64)
    out = ops.int8_matmul(x.to(device), *there(TILE_W8A16, w, w_scale, bias), layout=TILE_W8A16)
    check_float_matmul(*(t.to(where) for t in (out, x, weight, bias)))
    scaled = sys.modules["fastinfer.ops.int8_scaled_matmul"].reference
    layout = native_layout(torch.device(device), "w8a8", n, k, torch.bfloat16)
    out = ops.int8_scaled_matmul(x.to(device), *there(layout, w, w_scale, bias), layout=layout).cpu()
    tolerance.assert_within(out, scaled(*case, dtype=torch.float64), scaled(*case))
    for g in (32, 64, 128):
        x, *packed, bias = int4_cases.make(m, n, k, g, dtype, "cpu")
        weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
        out = ops.int4_matmul(x.to(device), *there(TILE_W4A16, *packed, bias), layout=TILE_W4A16)
        check_float_matmul(*(t.to(where) for t in (out, x, weight, bias)))
    return 5


def check_epilogues(m: int, dtype: torch.dtype, device: str) -> int:
    """Every op with gates, biases and residuals, in the layouts that the device has; and linear."""
    n, k, calls = 48, 256, 0
    cases = {
        "int8_matmul": ("w8a16", int8_cases.op, int8_cases.make(m, n, k, dtype, "cpu")[:-1]),
        "int4_matmul": ("w4a16", int4_cases.op, int4_cases.make(m, n, k, 64, dtype, "cpu")[:-1]),
    }
    scaled = sys.modules["fastinfer.ops.int8_scaled_matmul"].reference
    for activation in ("none", *GATES):
        for bias, residual in epilogues(m, n, activation, dtype, "cpu"):
            there = [t if t is None else t.to(device) for t in (bias, residual)]
            for name, (kind, op, (x, *packed)) in cases.items():
                weight = op.dequantize(*packed, dtype=torch.float64)
                for layout in {ROW, native_layout(torch.device(device), kind, n, k, dtype)}:
                    laid_out = [(convert(t, ROW, layout) if t.dim() == 2 else t).to(device) for t in packed]
                    out = getattr(ops, name)(x.to(device), *laid_out, *there, activation, layout).cpu()
                    check_epilogue(out, x, weight, bias, residual, activation)
                    calls += 1
            x, w, w_scale = cases["int8_matmul"][2]
            out = ops.int8_scaled_matmul(*(t.to(device) for t in (x, w, w_scale)), *there, activation).cpu()
            args = x, w, w_scale, bias, residual, activation
            tolerance.assert_within(out, scaled(*args, dtype=torch.float64), scaled(*args))
            w = (w / 128).to(dtype)
            out = ops.linear(x.to(device), w.to(device), *there, activation).cpu()
            check_epilogue(out, x, w.double(), bias, residual, activation, halves=True)
            calls += 2
    return calls


def check_linear(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> int:
    x, w = linear_cases.make(m, n, k, dtype, "cpu")
    bias = torch.randn(n)
    check_float_matmul(ops.linear(x.to(device), w.to(device), bias.to(device)).cpu(), x, w.double(), bias)
    return 1


def check_quantize(m: int, k: int, dtype: torch.dtype, device: str) -> int:
    reference = sys.modules["fastinfer.ops.int8_quantize"].reference
    x, weight = activations(m, k, dtype=dtype, device="cpu"), torch.rand(k)
    for norm_weight in (None, weight, weight.to(dtype)):
        on_device = None if norm_weight is None else norm_weight.to(device)
        q, x_scale = ops.int8_quantize(x.to(device), on_device)
        expected = reference(x, norm_weight)
        assert torch.equal(q.cpu(), expected[0]) and torch.equal(x_scale.cpu(), expected[1])
    return 3


def check_norm(m: int, k: int, dtype: torch.dtype, device: str) -> int:
    reference = sys.modules["fastinfer.ops.rms_norm"].reference
    x, residual = (activations(m, k, dtype=dtype, device="cpu") for _ in range(2))
    weight = torch.rand(k)
    for given in (None, weight, weight.to(dtype)):
        on_device = None if given is None else given.to(device)
        y, _ = ops.rms_norm(x.to(device), on_device, 1e-6)
        assert torch.equal(y.cpu(), reference(x, given, 1e-6))
        out = ops.rms_norm(x.to(device), on_device, 1e-6, residual.to(device), 1.0)
        expected = reference(x, given, 1e-6, residual, 1.0)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(out, expected))
    return 6


def main(device: str) -> int:
    torch.manual_seed(0)
    scaled = sys.modules["fastinfer.ops.int8_scaled_matmul"].reference
    calls = 0
    for m, n, dtype in product(ROWS, COLUMNS, DTYPES):
        for k in (30, 64, 208):
            case = int8_cases.make(m, n, k, dtype, "cpu")
            there = [t.to(device) for t in case]
            x, w, w_scale, bias = case
            weight = int8_cases.op.dequantize(w, w_scale, dtype=torch.float64)
            check_float_matmul(ops.int8_matmul(*there).cpu(), x, weight, bias)
            out = ops.int8_scaled_matmul(*there).cpu()
            tolerance.assert_within(out, scaled(*case, dtype=torch.float64), scaled(*case))
            calls += 2
        for g in (32, 64, 128):
            x, *packed, bias = case = int4_cases.make(m, n, 384, g, dtype, "cpu")
            weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
            check_float_matmul(ops.int4_matmul(*(t.to(device) for t in case)).cpu(), x, weight, bias)
            calls += 1
    for m, dtype in product([1, 9, 33, 200], DTYPES):
        calls += check_epilogues(m, dtype, device)
    for m, k, dtype in product([1, 9], [30, 64, 4096, 8192, 16384, 20000], DTYPES):
        calls += check_quantize(m, k, dtype, device)
    for m, k, dtype in product([1, 9], [1, 30, 128, 1024, 4096, 8192, 16384, 20000], DTYPES):
        calls += check_norm(m, k, dtype, device)
    for (m, n, k), dtype in product(DECODE_SHAPES, DTYPES):
        calls += check_linear(m, n, k, dtype, device)
    for (m, n, k), dtype in product(TILE_SHAPES + TAIL_SHAPES, DTYPES if device == "cuda" else []):
        if dtype == torch.float32 and n * k > 1 << 26:
            continue  # torch's kernels, and slow ones under memcheck
        calls += check_tiles(m, n, k, dtype, device)
    print(f"{calls} calls right on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
