"""Small calls of every op, checked against fp64 on the CPU, to be run under compute-sanitizer (make memcheck).

The references stay off the GPU: under the sanitizer it is our kernels that should take the time.
"""

import os
import sys
from itertools import product

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # every tensor an allocation of its own, so that overruns show

import test_int4_matmul as int4_cases
import test_int8_matmul as int8_cases
import tolerance
import torch
from matmul_cases import DTYPES, TILE_SHAPES, check_float_matmul

from fastinfer import ops
from fastinfer.ops.layout import ROW, TILE_W4A16, TILE_W8A16, convert, native_layout

ROWS = [1, 3, 8, 9, 17, 33, 70, 200]
COLUMNS = [1, 33, 130]


def check_tiles(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> int:
    """The kernels of the tile layouts; none where the GPU has none."""
    if native_layout(torch.device(device), "w4a16", n, k, torch.bfloat16) != TILE_W4A16:
        return 0

    def there(layout: str, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [(convert(t, ROW, layout) if t.dim() == 2 else t).to(device) for t in tensors]

    x, w, w_scale, bias = case = int8_cases.make(m, n, k, dtype, "cpu")
    weight = int8_cases.op.dequantize(w, w_scale, dtype=torch.float64)
    out = ops.int8_matmul(x.to(device), *there(TILE_W8A16, w, w_scale, bias), TILE_W8A16).cpu()
    check_float_matmul(out, x, weight, bias)
    scaled = sys.modules["fastinfer.ops.int8_scaled_matmul"].reference
    layout = native_layout(torch.device(device), "w8a8", n, k, torch.bfloat16)
    out = ops.int8_scaled_matmul(x.to(device), *there(layout, w, w_scale, bias), layout).cpu()
    tolerance.assert_within(out, scaled(*case, dtype=torch.float64), scaled(*case))
    for g in (32, 64, 128):
        x, *packed, bias = int4_cases.make(m, n, k, g, dtype, "cpu")
        weight = int4_cases.op.dequantize(*packed, dtype=torch.float64)
        out = ops.int4_matmul(x.to(device), *there(TILE_W4A16, *packed, bias), TILE_W4A16).cpu()
        check_float_matmul(out, x, weight, bias)
    return 5


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
    for (m, n, k), dtype in product(TILE_SHAPES, DTYPES if device == "cuda" else []):
        calls += check_tiles(m, n, k, dtype, device)
    print(f"{calls} calls right on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "cuda"))
