"""int8_quantize in Triton: the fallback where the CUDA library is missing.

A program takes a row: x_scale = max|v| / 127, q = round(v / x_scale) with halves to even, x_scale NaN for a row with NaN
or infinity. v is x, or its RMS norm, rounded to the dtype of x before and after norm_weight; squares are summed in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.launch import as_matrix, device_of

LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32: what exceeds it is infinite
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves no bits for a fraction


@triton.jit
def load_values(x, norm_weight, k, K, factor, HAS_NORM: tl.constexpr):
    """Columns k of v in fp32, 0 past the end."""
    v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if HAS_NORM:
        v = (v * factor).to(x.dtype.element_ty).to(tl.float32)
        v *= tl.load(norm_weight + k, mask=k < K, other=0.0).to(tl.float32)
        v = v.to(x.dtype.element_ty).to(tl.float32)
    return v


@triton.jit
def int8_quantize_kernel(
    x, norm_weight, q, x_scale,  # [M, K], [K] or unused, [M, K] int8, [M]
    K, eps,
    HAS_NORM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * K
    factor = 1.0
    if HAS_NORM:
        squares = tl.zeros((BLOCK_K,), tl.float64)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            v = tl.load(x + k, mask=k < K, other=0.0).to(tl.float64)
            squares += v * v
        mean = tl.div_rn(tl.sum(squares).to(tl.float32), K.to(tl.float32))
        factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    largest = tl.zeros((BLOCK_K,), tl.float32)
    spoiled = tl.zeros((BLOCK_K,), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.abs(load_values(x, norm_weight, k, K, factor, HAS_NORM))
        finite = v <= LARGEST  # false for NaN too
        largest = tl.maximum(largest, tl.where(finite, v, 0.0))
        spoiled = tl.where(finite, spoiled, 1)
    clean = tl.max(spoiled) == 0
    scale = tl.div_rn(tl.max(largest), 127.0)
    tl.store(x_scale + row, tl.where(clean, scale, float("nan")))
    divisor = tl.where(scale > 0.0, scale, 1.0)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = load_values(x, norm_weight, k, K, factor, HAS_NORM)
        v = tl.div_rn(tl.where(clean, v, 0.0), tl.zeros((BLOCK_K,), tl.float32) + divisor)
        v = tl.minimum(tl.maximum(v, -127.0), 127.0)
        tl.store(q + row * K + k, ((v + ROUNDER) - ROUNDER).to(tl.int8), mask=k < K)


def int8_quantize(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """As fastinfer.ops.int8_quantize."""
    rows = as_matrix("int8_quantize", x, "row")
    m, k = rows.shape
    q = x.new_empty(x.shape, dtype=torch.int8)
    x_scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if m > 0:
        with device_of(x):
            int8_quantize_kernel[(m,)](
                rows, rows if norm_weight is None else norm_weight, q, x_scale, k, eps,
                HAS_NORM=norm_weight is not None, BLOCK_K=1024,
            )  # fmt: skip
    return q, x_scale
