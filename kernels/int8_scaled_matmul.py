"""int8_scaled_matmul in Triton: the fallback where the CUDA library is missing.

Two kernels. One quantises each row of x: x_scale = max|x| / 127, q = round(x / x_scale) with halves to even, x_scale NaN
for a row with NaN or infinity. The other multiplies in int8 with exact int32 sums and scales them:
y[M, N] = (q[M, K] · w[N, K]ᵀ) · x_scale[M] · w_scale[N] + bias[N]. Every edge is masked, so any M, N and K work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.launch import as_matrix, device_of, rows_per_block

LARGEST = tl.constexpr(3.4028234663852886e38)  # of fp32: what exceeds it is infinite
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2^23: adding it leaves no bits for a fraction


@triton.jit
def quantize_rows_kernel(x, q, x_scale, K, BLOCK_K: tl.constexpr):  # x [M, K] to q [M, K] int8, x_scale [M]
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK_K,), tl.float32)
    spoiled = tl.zeros((BLOCK_K,), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.abs(tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32))
        finite = v <= LARGEST  # false for NaN too
        largest = tl.maximum(largest, tl.where(finite, v, 0.0))
        spoiled = tl.where(finite, spoiled, 1)
    clean = tl.max(spoiled) == 0
    scale = tl.div_rn(tl.max(largest), 127.0)
    tl.store(x_scale + row, tl.where(clean, scale, float("nan")))
    divisor = tl.where(scale > 0.0, scale, 1.0)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        v = tl.load(x + row * K + k, mask=k < K, other=0.0).to(tl.float32)
        v = tl.div_rn(tl.where(clean, v, 0.0), tl.zeros((BLOCK_K,), tl.float32) + divisor)
        v = tl.minimum(tl.maximum(v, -127.0), 127.0)
        tl.store(q + row * K + k, ((v + ROUNDER) - ROUNDER).to(tl.int8), mask=k < K)


@triton.jit
def int8_scaled_matmul_kernel(
    q, w, x_scale, w_scale, bias, y,  # [M, K] int8, [N, K] int8, [M], [N], [N] or unused, [M, N]
    M, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        q_tile = tl.load(q + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0)
        w_tile = tl.load(w + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
        acc = tl.dot(q_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    scaled = acc.to(tl.float32) * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    scaled *= tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        scaled += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = y + m[:, None] * N + n[None, :]
    tl.store(out, scaled.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def int8_scaled_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "row",
) -> torch.Tensor:
    """As fastinfer.ops.int8_scaled_matmul, for layout "row"."""
    rows = as_matrix("int8_scaled_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    q, x_scale = torch.empty_like(rows, dtype=torch.int8), x.new_empty(m, dtype=torch.float32)
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    with device_of(x):
        quantize_rows_kernel[(m,)](rows, q, x_scale, k, BLOCK_K=1024)
        int8_scaled_matmul_kernel[grid](
            q, w, x_scale, w_scale, w_scale if bias is None else bias, y, m, n, k,
            HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
        )  # fmt: skip
    return y
