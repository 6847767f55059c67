"""int4_matmul in Triton: the fallback where the CUDA library is missing.

y = act(x[M, K] · ((q[N, K] − w_zero[N, K/G]) · w_scale[N, K/G])ᵀ + bias[N]) + residual. One step of the loop is one
group. For fp16 and bf16 it adds w_scale · (Σ q·x − w_zero · Σ x), the products exact, the sums fp32; an infinite x gives
NaN. For fp32 the zero point is subtracted before the products: the difference of two sums would cost more than fp32 has
to spare. A program makes a BLOCK_M × BLOCK_N tile of y, from a second tile of sums too where it is gated; its edges are
masked, so any M and N work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.epilogue import first_rows, gate_value, output, store_tile
from fastinfer.kernels.launch import as_matrix, device_of, dot_type, rows_per_block


@triton.jit
def grouped_tile(
    x, w, w_scale, w_zero, bias, m, rows, M, N, K,
    G: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x · ((q − w_zero) · w_scale)ᵀ + bias for rows m of x and `rows` of w, in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for group in range(0, K // G):
        k = group * G + tl.arange(0, G)
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=m[:, None] < M, other=0.0)
        byte = tl.load(w + rows[:, None] * (K // 2) + (k // 2)[None, :], mask=rows[:, None] < N, other=0).to(tl.int32)
        q_tile = (byte >> ((k % 2) * 4)[None, :]) & 15
        scale = tl.load(w_scale + rows * (K // G) + group, mask=rows < N, other=0.0).to(tl.float32)
        zero = tl.load(w_zero + rows * (K // G) + group, mask=rows < N, other=0.0).to(tl.float32)
        if x.dtype.element_ty == tl.float32:
            part = tl.dot(x_tile, tl.trans(q_tile.to(tl.float32) - zero[:, None]), input_precision="ieee")
        else:
            part = tl.dot(x_tile.to(DOT), tl.trans(q_tile.to(DOT)))
            part -= zero[None, :] * tl.sum(x_tile.to(tl.float32), 1)[:, None]
        acc += scale[None, :] * part
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def int4_matmul_kernel(
    x, w, w_scale, w_zero, bias, residual, y,  # [M, K], [N, K/2] int8, [N, K/G] twice, [N] or unused, as y or unused, …
    M, N, K, N_OUT,
    G: tl.constexpr, DOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows = first_rows(n, ACTIVATION)
    v = grouped_tile(x, w, w_scale, w_zero, bias, m, rows, M, N, K, G, DOT, HAS_BIAS, BLOCK_M, BLOCK_N)
    if ACTIVATION != "none":
        up = grouped_tile(x, w, w_scale, w_zero, bias, m, rows + 8, M, N, K, G, DOT, HAS_BIAS, BLOCK_M, BLOCK_N)
        v = gate_value(v, ACTIVATION) * up
    store_tile(y, residual, v, m, n, M, N_OUT, HAS_RESIDUAL)


def int4_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = "row",
) -> torch.Tensor:
    """As fastinfer.ops.int4_matmul, for layout "row"."""
    rows = as_matrix("int4_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = output(x, n, activation)
    if y.numel() == 0:
        return y
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(y.shape[-1], block_n))
    with device_of(x):
        int4_matmul_kernel[grid](
            rows, w, w_scale, w_zero, w_scale if bias is None else bias, y if residual is None else residual, y,
            m, n, k, y.shape[-1],
            G=k // w_scale.shape[1], DOT=dot_type(x), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
            ACTIVATION=activation, BLOCK_M=block_m, BLOCK_N=block_n,
        )  # fmt: skip
    return y
