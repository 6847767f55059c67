"""linear: float weights, with the epilogues of the quantised matmuls."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_float, check_matmul, describe, fake_matmul, linear_reference, register_fake, run


def linear(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y = activation(x · wᵀ + bias) + residual.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        w:       [N, K] dtype of x, contiguous
        bias:    [N] dtype of x or fp32, or None
        residual: [..., N_out] dtype of x, contiguous, or None: added last
        activation: "none" | "silu_mul" | "gelu_mul" | "gelu_tanh_mul"; all but "none" take N in multiples of 16, the rows
                 of the gate before those of what it is multiplied with, so that each is a view of w (and of bias)
    Returns: [..., N_out] dtype of x; N_out is N, or N/2 where gated
    Raises:  TypeError for a dtype, ValueError for a shape or device that does not fit; both name the argument
    Backends: CUDA sm90, up to 16 rows of fp16|bf16 and K in multiples of 32: one kernel; otherwise CPU (AVX2, AVX512) and
             CUDA sm80+: torch's linear and one kernel for the epilogue; elsewhere plain torch
    Numerics: error ≤ 2× that of torch's linear and its epilogue in the dtype of x. Where x · wᵀ is torch's it is rounded
             to the dtype of x (with a bias of that dtype added); the rest is computed in fp32 and cast once
    Source:  –
    """
    check_float("linear", "x", x)
    if w.dtype != x.dtype:
        raise TypeError(f"linear: w must have the dtype of x, {x.dtype}, got {describe(w)}")
    check_matmul("linear", x, w, w.shape[-1] if w.dim() else 0, bias, residual, activation, x.dtype)
    return run("linear", reference, x, w, bias, residual, activation, triton=False)


def reference(x, w, bias=None, residual=None, activation="none", dtype: torch.dtype | None = None) -> torch.Tensor:
    """The op in plain torch. Computes in fp32, or in `dtype` (fp64 for tests), which is then also the result's."""
    return linear_reference(x, w.to(dtype or torch.float32), bias, residual, activation, dtype, halves=True)


@register_fake("linear")
def _(x, w, bias, residual, activation):
    return fake_matmul(x, w, activation)
