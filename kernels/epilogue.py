"""What the Triton matmuls do with their results: activation(v) times what it gates, residual, the cast."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def gate_value(v, ACTIVATION: tl.constexpr):
    """The activation of a gate in fp32; tanh(u) = 2 · sigmoid(2u) − 1 makes gelu's approximation v · sigmoid(2u)."""
    if ACTIVATION == "gelu_mul":
        out = 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh_mul":
        out = v / (1.0 + tl.exp(-1.5957691216057308 * v * (1.0 + 0.044715 * v * v)))
    else:
        out = v / (1.0 + tl.exp(-v))
    return out


@triton.jit
def first_rows(n, ACTIVATION: tl.constexpr):
    """The rows of w that columns n of y come from: those of the gate, where there is one (LAYOUTS.md#gate-up)."""
    return n if ACTIVATION == "none" else n // 8 * 16 + n % 8


@triton.jit
def store_tile(y, residual, v, m, n, M, N_OUT, HAS_RESIDUAL: tl.constexpr):
    """v plus the residual to rows m and columns n of y [M, N_OUT]."""
    at = m[:, None] * N_OUT + n[None, :]
    mask = (m[:, None] < M) & (n[None, :] < N_OUT)
    if HAS_RESIDUAL:
        v += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, v.to(y.dtype.element_ty), mask=mask)


def output(x: torch.Tensor, n: int, activation: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty y for x [..., K] and N rows of w."""
    return x.new_empty((*x.shape[:-1], n if activation == "none" else n // 2), dtype=dtype or x.dtype)
