"""int8_quantize: activations to int8 with a scale a token, after an RMS norm if one is given."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_float, check_norm_weight, divide, register_fake, run
from fastinfer.ops.rms_norm import rms_factor


def int8_quantize(
    x: torch.Tensor, norm_weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """q = round(v / x_scale), halves to even, with x_scale = max|v| / 127 of each row; v is x, or its RMS norm.

    A row of v that holds NaN or infinity gets x_scale NaN and q 0; a row of zeros gets x_scale 0.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        norm_weight: [K] dtype of x or fp32, contiguous, or None; v = x / sqrt(mean(x²) + eps) · norm_weight then
        eps:     added to the mean of the squares
    Returns: q [..., K] int8, −127 … 127; x_scale [...] fp32
    Raises:  TypeError for a dtype, ValueError for a shape or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512); CUDA sm80+; Triton
    Numerics: q and x_scale are those of the reference bit for bit. The norm rounds as transformers' LlamaRMSNorm hands
             it on: x / sqrt(mean(x²) + eps) in fp32, rounded to the dtype of x, that times norm_weight, rounded again.
             Squares are summed in fp64, so that no order of the sum shows in the fp32 mean
    Source:  per-token scales: Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; norm: Zhang and Sennrich, Root Mean Square
             Layer Normalization, arXiv 1910.07467, §4
    """
    check_float("int8_quantize", "x", x)
    if x.dim() == 0:
        raise ValueError("int8_quantize: x must have at least one dimension, got a scalar")
    check_norm_weight("int8_quantize", "norm_weight", norm_weight, x)
    return run("int8_quantize", reference, x, norm_weight, eps)


def rms_norm(x, norm_weight, eps: float, dtype: torch.dtype | None) -> torch.Tensor:
    """x's RMS norm in x's dtype, or in `dtype` without a rounding on the way."""
    factor = rms_factor(x, eps, dtype)
    normed = (x.to(factor.dtype) * factor).to(dtype or x.dtype)
    return (normed.to(factor.dtype) * norm_weight.to(factor.dtype)).to(dtype or x.dtype)


def reference(x, norm_weight=None, eps=1e-6, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in plain torch; in `dtype`, where given, nothing is rounded but q."""
    v = x if norm_weight is None else rms_norm(x, norm_weight, eps, dtype)
    v = v.to(dtype or torch.float32)
    largest = v.abs().amax(-1, keepdim=True) if x.shape[-1] else v.new_zeros((*x.shape[:-1], 1))
    finite = torch.isfinite(largest)
    x_scale = divide(largest, 127).masked_fill(~finite, float("nan"))
    q = (v / x_scale.where(x_scale > 0, 1.0)).round().clamp(-127, 127)
    return q.masked_fill(~finite, 0).to(torch.int8), x_scale.squeeze(-1)


@register_fake("int8_quantize")
def _(x, norm_weight, eps):
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=torch.float32)
