"""rms_norm in Triton: the fallback where the CUDA library is missing.

A program takes a row: s is x, or x + residual rounded to their dtype; y = s / sqrt(mean(s²) + eps) · (offset + weight) in
fp32, rounded once; squares are summed in fp64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.launch import as_matrix, device_of


@triton.jit
def load_sum(x, residual, k, K, HAS_RESIDUAL: tl.constexpr):
    """Columns k of s in the dtype of x, 0 past the end."""
    s = tl.load(x + k, mask=k < K, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + k, mask=k < K, other=0.0)
        s = (s.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
    return s


@triton.jit
def rms_norm_kernel(
    x, residual, weight, total, y,  # [M, K], [M, K] or unused, [K] or unused, [M, K] or unused, [M, K]
    K, eps, offset,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * K
    x += start
    residual += start
    squares = tl.zeros((BLOCK_K,), tl.float64)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        s = load_sum(x, residual, k, K, HAS_RESIDUAL)
        if HAS_RESIDUAL:
            tl.store(total + start + k, s, mask=k < K)
        wide = s.to(tl.float64)
        squares += wide * wide
    mean = tl.div_rn(tl.sum(squares).to(tl.float32), K.to(tl.float32))
    factor = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = load_sum(x, residual, k, K, HAS_RESIDUAL).to(tl.float32) * factor
        if HAS_WEIGHT:
            v *= offset + tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(y + start + k, v.to(y.dtype.element_ty), mask=k < K)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """As the native op: y, and s where there is a residual."""
    rows = as_matrix("rms_norm", x, "row")
    added = rows if residual is None else as_matrix("rms_norm", residual, "row")
    m, k = rows.shape
    y = x.new_empty(x.shape)
    total = y if residual is None else x.new_empty(x.shape)
    if m > 0:
        with device_of(x):
            rms_norm_kernel[(m,)](
                rows, added, rows if weight is None else weight, total, y, k, eps, float(offset),
                HAS_RESIDUAL=residual is not None, HAS_WEIGHT=weight is not None, BLOCK_K=1024,
            )  # fmt: skip
    return y if residual is None else (y, total)
