"""int8_matmul in Triton: the fallback where the CUDA library is missing.

y = act(x[M, K] · (w[N, K] · w_scale[N])ᵀ + bias[N]) + residual; int8 weights exact in the dtype of x, fp32 sums, the scale
last. A program makes a BLOCK_M × BLOCK_N tile of y, from a second tile of sums too where it is gated; every edge is
masked, so any M, N and K work. Bound: memory for few rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.epilogue import first_rows, gate_value, output, store_tile
from fastinfer.kernels.launch import as_matrix, device_of, dot_type, rows_per_block


@triton.jit
def scaled_tile(
    x, w, w_scale, bias, m, rows, M, N, K,
    DOT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x · (w · w_scale)ᵀ + bias for rows m of x and `rows` of w, in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        w_tile = tl.load(w + rows[:, None] * K + k[None, :], mask=(rows[:, None] < N) & (k[None, :] < K), other=0)
        acc = tl.dot(x_tile.to(DOT), tl.trans(w_tile.to(DOT)), acc, input_precision="ieee")
    acc *= tl.load(w_scale + rows, mask=rows < N, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def int8_matmul_kernel(
    x, w, w_scale, bias, residual, y,  # [M, K], [N, K] int8, [N] fp32, [N] or unused, as y or unused, [M, N_OUT]
    M, N, K, N_OUT,
    DOT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows = first_rows(n, ACTIVATION)
    v = scaled_tile(x, w, w_scale, bias, m, rows, M, N, K, DOT, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K)
    if ACTIVATION != "none":
        up = scaled_tile(x, w, w_scale, bias, m, rows + 8, M, N, K, DOT, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K)
        v = gate_value(v, ACTIVATION) * up
    store_tile(y, residual, v, m, n, M, N_OUT, HAS_RESIDUAL)


def int8_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = "row",
) -> torch.Tensor:
    """As fastinfer.ops.int8_matmul, for layout "row"."""
    rows = as_matrix("int8_matmul", x, layout)
    (m, k), n = rows.shape, w.shape[0]
    y = output(x, n, activation)
    if y.numel() == 0:
        return y
    block_m, block_n = rows_per_block(m), 64
    grid = (triton.cdiv(m, block_m), triton.cdiv(y.shape[-1], block_n))
    with device_of(x):
        int8_matmul_kernel[grid](
            rows, w, w_scale, w_scale if bias is None else bias, y if residual is None else residual, y,
            m, n, k, y.shape[-1],
            DOT=dot_type(x), HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, ACTIVATION=activation,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64,
        )  # fmt: skip
    return y
