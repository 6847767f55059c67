"""int8_scaled_matmul in Triton: the fallback where the CUDA library is missing.

x is quantised by int8_quantize, unless it is int8 already, and multiplied in int8 with exact int32 sums:
y = act((q[M, K] · w[N, K]ᵀ) · x_scale[M] · w_scale[N] + bias[N]) + residual. A program makes a BLOCK_M × BLOCK_N tile of
y, from a second tile of sums too where it is gated. Every edge is masked, so any M, N and K work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.epilogue import first_rows, gate_value, output, store_tile
from fastinfer.kernels.int8_quantize import int8_quantize
from fastinfer.kernels.launch import as_matrix, device_of, rows_per_block


@triton.jit
def scaled_tile(
    q, w, x_scale, w_scale, bias, m, rows, M, N, K,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(q · wᵀ) · x_scale · w_scale + bias for rows m of q and `rows` of w, in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        q_tile = tl.load(q + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0)
        w_tile = tl.load(w + rows[:, None] * K + k[None, :], mask=(rows[:, None] < N) & (k[None, :] < K), other=0)
        acc = tl.dot(q_tile, tl.trans(w_tile), acc, out_dtype=tl.int32)
    scaled = acc.to(tl.float32) * tl.load(x_scale + m, mask=m < M, other=0.0)[:, None]
    scaled *= tl.load(w_scale + rows, mask=rows < N, other=0.0)[None, :]
    if HAS_BIAS:
        scaled += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    return scaled


@triton.jit
def int8_scaled_matmul_kernel(
    q, w, x_scale, w_scale, bias, residual, y,  # [M, K], [N, K] int8; [M], [N], [N] or unused; as y or unused, [M, N_OUT]
    M, N, K, N_OUT,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows = first_rows(n, ACTIVATION)
    v = scaled_tile(q, w, x_scale, w_scale, bias, m, rows, M, N, K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K)
    if ACTIVATION != "none":
        up = scaled_tile(q, w, x_scale, w_scale, bias, m, rows + 8, M, N, K, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K)
        v = gate_value(v, ACTIVATION) * up
    store_tile(y, residual, v, m, n, M, N_OUT, HAS_RESIDUAL)


def int8_scaled_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = "row",
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As fastinfer.ops.int8_scaled_matmul, for layout "row"."""
    rows = as_matrix("int8_scaled_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = output(x, n, activation, out_dtype)
    if y.numel() == 0:
        return y
    q, x_scale = int8_quantize(rows) if x_scale is None else (rows, x_scale)
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(y.shape[-1], block_n))
    with device_of(x):
        int8_scaled_matmul_kernel[grid](
            q, w, x_scale, w_scale, w_scale if bias is None else bias, y if residual is None else residual, y,
            m, n, k, y.shape[-1],
            HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
        )  # fmt: skip
    return y
