"""int4_matmul in Triton: the fallback where the CUDA library is missing.

y[M, N] = x[M, K] · ((q[N, K] − w_zero[N, K/G]) · w_scale[N, K/G])ᵀ + bias[N]. One step of the loop is one group. For fp16
and bf16 it adds w_scale · (Σ q·x − w_zero · Σ x), the products exact, the sums fp32; an infinite x gives NaN. For fp32 the
zero point is subtracted before the products: the difference of two sums would cost more than fp32 has to spare.
A program makes a BLOCK_M × BLOCK_N tile of y; its edges are masked, so any M and N work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.launch import as_matrix, device_of, dot_type, rows_per_block


@triton.jit
def int4_matmul_kernel(
    x, w, w_scale, w_zero, bias, y,  # [M, K], [N, K/2] int8, [N, K/G] twice, [N] or unused, [M, N]
    M, N, K,
    G: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, K // G):
        k = group * G + tl.arange(0, G)
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=m[:, None] < M, other=0.0)
        byte = tl.load(w + n[:, None] * (K // 2) + (k // 2)[None, :], mask=n[:, None] < N, other=0).to(tl.int32)
        q_tile = (byte >> ((k % 2) * 4)[None, :]) & 15
        scale = tl.load(w_scale + n * (K // G) + group, mask=n < N, other=0.0).to(tl.float32)
        zero = tl.load(w_zero + n * (K // G) + group, mask=n < N, other=0.0).to(tl.float32)
        if x.dtype.element_ty == tl.float32:
            part = tl.dot(x_tile, tl.trans(q_tile.to(tl.float32) - zero[:, None]), input_precision="ieee")
        else:
            part = tl.dot(x_tile.to(DOT), tl.trans(q_tile.to(DOT)))
            part -= zero[None, :] * tl.sum(x_tile.to(tl.float32), 1)[:, None]
        acc += scale[None, :] * part
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    out = y + m[:, None] * N + n[None, :]
    tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


def int4_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "row",
) -> torch.Tensor:
    """As fastinfer.ops.int4_matmul, for layout "row"."""
    rows = as_matrix("int4_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel() == 0:
        return y
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n))
    with device_of(x):
        int4_matmul_kernel[grid](
            rows, w, w_scale, w_zero, w_scale if bias is None else bias, y, m, n, k,
            G=k // w_scale.shape[1], DOT=dot_type(x), HAS_BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return y
