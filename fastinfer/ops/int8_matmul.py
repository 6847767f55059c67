"""int8_matmul: int8 weights, 16- or 32-bit activations (W8A16)."""

from __future__ import annotations

import torch

from fastinfer.ops._common import (
    check_float,
    check_int8_scale,
    check_matmul,
    check_packed,
    fake_matmul,
    linear_reference,
    register_fake,
    run,
)
from fastinfer.ops.layout import ROW, TILE_W8A16, convert


def int8_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = ROW,
) -> torch.Tensor:
    """y = activation(x · (w · w_scale)ᵀ + bias) + residual, int8 weights scaled per output channel, fp32 accumulation.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        w:       [N, K] int8, contiguous, LAYOUTS.md#int8-row or #panel16
        w_scale: [N] fp32
        bias:    [N] dtype of x or fp32, or None
        residual: [..., N_out] dtype of x, contiguous, or None: added last
        activation: "none" | "silu_mul" | "gelu_mul" | "gelu_tanh_mul"; all but "none" take N in multiples of 16, with
                 gate and up rows interleaved, LAYOUTS.md#gate-up
        layout:  "row" | "panel16" | "tile_w8a16": the order w is held in
    Returns: [..., N_out] dtype of x; N_out is N, or N/2 where gated
    Raises:  TypeError for a dtype, ValueError for a shape, layout or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512-VNNI); CUDA sm80+; Triton
    Numerics: error ≤ 2× that of torch's linear on the dequantised weight, and its epilogue, in the dtype of x. The
             epilogue is computed in fp32 and cast once; only the row layout on CUDA from 192 rows on rounds the sums to
             the dtype of x before it
    Source:  weight-only quantisation as in Dettmers et al., LLM.int8(), arXiv 2208.07339, §2; no outlier columns here
    """
    check_packed("int8_matmul", w, layout, TILE_W8A16)
    check_float("int8_matmul", "x", x)
    check_matmul("int8_matmul", x, w, w.shape[-1], bias, residual, activation, x.dtype)
    check_int8_scale("int8_matmul", w, w_scale)
    return run("int8_matmul", reference, x, w, w_scale, bias, residual, activation, layout, triton=layout == ROW)


def dequantize(w: torch.Tensor, w_scale: torch.Tensor, layout: str = ROW, dtype=torch.float32) -> torch.Tensor:
    """The weight [N, K] in `dtype`: w · w_scale, computed in `dtype` or fp32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return (convert(w, layout, ROW).to(wide) * w_scale.to(wide)[:, None]).to(dtype)


def reference(
    x, w, w_scale, bias=None, residual=None, activation="none", layout=ROW, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The op in plain torch. Computes in fp32, or in `dtype` (fp64 for tests), which is then also the result's."""
    weight = dequantize(w, w_scale, layout, dtype or torch.float32)
    return linear_reference(x, weight, bias, residual, activation, dtype)


@register_fake("int8_matmul")
def _(x, w, w_scale, bias, residual, activation, layout):
    return fake_matmul(x, w, activation)
