"""int8_matmul: int8 weights, 16- or 32-bit activations (W8A16)."""

from __future__ import annotations

import torch

from fastinfer.ops._common import (
    check_int8_scale,
    check_matmul,
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
    layout: str = ROW,
) -> torch.Tensor:
    """y = x · (w · w_scale)ᵀ + bias, int8 weights scaled per output channel, fp32 accumulation.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        w:       [N, K] int8, contiguous, LAYOUTS.md#int8-row or #panel16
        w_scale: [N] fp32
        bias:    [N] dtype of x or fp32, or None
        layout:  "row" | "panel16" | "tile_w8a16": the order w is held in
    Returns: [..., N] dtype of x
    Raises:  TypeError for a dtype, ValueError for a shape, layout or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512-VNNI); CUDA sm80+; Triton
    Numerics: error ≤ 2× that of torch's linear on the dequantised weight in the dtype of x
    Source:  weight-only quantisation as in Dettmers et al., LLM.int8(), arXiv 2208.07339, §2; no outlier columns here
    """
    check_matmul("int8_matmul", x, w, w.shape[-1], bias, layout, TILE_W8A16)
    check_int8_scale("int8_matmul", w, w_scale)
    return run("int8_matmul", reference, x, w, w_scale, bias, layout)


def dequantize(w: torch.Tensor, w_scale: torch.Tensor, layout: str = ROW, dtype=torch.float32) -> torch.Tensor:
    """The weight [N, K] in `dtype`: w · w_scale, computed in `dtype` or fp32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return (convert(w, layout, ROW).to(wide) * w_scale.to(wide)[:, None]).to(dtype)


def reference(x, w, w_scale, bias=None, layout=ROW, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The op in plain torch. Computes in fp32, or in `dtype` (fp64 for tests), which is then also the result's."""
    weight = dequantize(w, w_scale, layout, dtype or torch.float32)
    return linear_reference(x, weight, bias, dtype)


@register_fake("int8_matmul")
def _(x, w, w_scale, bias, layout):
    return fake_matmul(x, w)
