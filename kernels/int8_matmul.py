"""int8_matmul in Triton: the fallback where the CUDA library is missing.

y[M, N] = x[M, K] · (w[N, K] · w_scale[N])ᵀ + bias[N]; int8 weights exact in the dtype of x, fp32 sums, the scale last.
A program makes a BLOCK_M × BLOCK_N tile of y; every edge is masked, so any M, N and K work. Bound: memory for few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.launch import as_matrix, device_of, dot_type, rows_per_block


@triton.jit
def int8_matmul_kernel(
    x, w, w_scale, bias, y,  # [M, K], [N, K] int8, [N] fp32, [N] or unused, [M, N]
    M, N, K,
    DOT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        w_tile = tl.load(w + n[:, None] * K + k[None, :], mask=(n[:, None] < N) & (k[None, :] < K), other=0)
        acc = tl.dot(x_tile.to(DOT), tl.trans(w_tile.to(DOT)), acc, input_precision="ieee")
    acc *= tl.load(w_scale + n, mask=n < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = y + m[:, None] * N + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def int8_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "row",
) -> torch.Tensor:
    """As fastinfer.ops.int8_matmul, for layout "row"."""
    rows = as_matrix("int8_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    with device_of(x):
        int8_matmul_kernel[grid](
            rows, w, w_scale, w_scale if bias is None else bias, y, m, n, k,
            DOT=dot_type(x), HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
        )  # fmt: skip
    return y
