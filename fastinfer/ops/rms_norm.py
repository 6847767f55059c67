"""rms_norm: the RMS norm of a row, or of the sum of a row and a residual, which is then a result too."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_device, check_float, check_norm_weight, describe, divide, register_fake, run


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = s / sqrt(mean(s²) + eps) · (offset + weight) of each row of s = x + residual; y and s.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        weight:  [K] dtype of x or fp32, contiguous, or None: then y is s / sqrt(mean(s²) + eps), whatever the offset
        eps:     added to the mean of the squares
        residual: [..., K] shape and dtype of x, any strides, or None: then s is x
        offset:  added to weight; 1 is Gemma's norm
    Returns: y [..., K] and s [..., K], both in the dtype of x; s is x itself where there is no residual
    Raises:  TypeError for a dtype, ValueError for a shape or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512); CUDA sm80+; Triton
    Numerics: y and s are those of the reference bit for bit. s is x + residual rounded to the dtype of x, as a model's own
             addition is. y is computed from that s in fp32 and rounded once, with squares summed in fp64, so that no
             order of the sum shows in the fp32 mean. transformers' Gemma norms round alike but for their fp32 sum;
             LlamaRMSNorm rounds once more, before it multiplies by the weight (and returns fp32 where the weight is),
             so y is at most that rounding off, and nearer to fp64
    Source:  Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467, §4
    """
    check_float("rms_norm", "x", x)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least one dimension, got a scalar")
    check_norm_weight("rms_norm", "weight", weight, x)
    if residual is None:
        return run("rms_norm", reference, x, weight, eps, offset=offset), x
    check_device("rms_norm", "residual", residual, x)
    if residual.dtype != x.dtype:
        raise TypeError(f"rms_norm: residual must be {x.dtype}, as x, got {describe(residual)}")
    if residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual must be {list(x.shape)}, as x, got {describe(residual)}")
    return run("rms_norm.residual", reference, x, weight, eps, residual, offset)


def rms_factor(x: torch.Tensor, eps: float, dtype: torch.dtype | None) -> torch.Tensor:
    """1 / sqrt(mean(x²) + eps) [..., 1] in fp32, rounded as the kernels do, or in `dtype`."""
    mean = divide(x.double().square().sum(-1, keepdim=True).to(dtype or torch.float32), max(1, x.shape[-1]))
    root = (mean + torch.full_like(mean, eps)).double().sqrt().to(mean.dtype)  # torch's in fp32 is an ulp off at times
    return torch.ones_like(root) / root


def reference(
    x, weight, eps, residual=None, offset=0.0, dtype: torch.dtype | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The native op in plain torch: y, and s where there is a residual; in `dtype`, where given, nothing is rounded."""
    s = x.to(dtype or x.dtype)
    if residual is not None:
        s = s + residual.to(s.dtype)
    factor = rms_factor(s, eps, dtype)
    y = s.to(factor.dtype) * factor
    if weight is not None:
        y = y * (torch.full_like(weight, offset, dtype=factor.dtype) + weight.to(factor.dtype))
    y = y.to(s.dtype)
    return y if residual is None else (y, s)


@register_fake("rms_norm")
def _(x, weight, eps, offset):
    return x.new_empty(x.shape)


@register_fake("rms_norm.residual")
def _(x, weight, eps, residual, offset):
    return x.new_empty(x.shape), x.new_empty(x.shape)
