"""int4 weights in groups along K, each with a scale and a free zero point: round-to-nearest and HQQ."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastinfer.ops.int4_matmul import GROUP_SIZES, pack
from fastinfer.quantize._rows import ErrorSum, row_blocks

METHODS = ("rtn", "hqq")
LEVELS = 15


class Int4Weight(NamedTuple):
    """A weight [N, K] as LAYOUTS.md#int4-row, and the relative error ‖ŵ − w‖ / ‖w‖ it has.

    w_scale and w_zero are fp16, or fp32 where a group's scale is outside of fp16's normal range.
    """

    w: torch.Tensor
    w_scale: torch.Tensor
    w_zero: torch.Tensor
    error: float


def quantize_int4(weight: torch.Tensor, group_size: int = 64, method: str = "hqq") -> Int4Weight:
    """Int4 in groups of `group_size` along K, without data.

    Args:
        weight:     [N, K] floating point, any device and strides; K a multiple of group_size
        group_size: 32, 64 or 128
        method:     "rtn", round to nearest between a group's minimum and maximum; "hqq", zero points then refined so
                    that a sparse norm of the error falls
    Returns: Int4Weight on weight's device: w [N, K/2] int8 (two q a byte), w_scale and w_zero [N, K/G]
    Raises:  ValueError for a group_size that is unknown or does not divide K, an unknown method, NaN or infinity
    Source:  Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023)
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    n, k = weight.shape
    if group_size not in GROUP_SIZES or k % group_size:
        raise ValueError(f"group_size must be one of {GROUP_SIZES} and divide K = {k}, got {group_size}")
    w = torch.empty((n, k // 2), dtype=torch.int8, device=weight.device)
    w_scale = torch.empty((n, k // group_size), dtype=_scale_dtype(weight, group_size), device=weight.device)
    w_zero = torch.empty_like(w_scale)
    error = ErrorSum()
    for rows, block in row_blocks(weight):
        groups = block.view(len(block), -1, group_size)
        scale, zero = _range_scale_zero(groups)
        if method == "hqq":
            zero = _refine_zero(groups, scale, zero)
        w_scale[rows], w_zero[rows] = scale.squeeze(-1), zero.squeeze(-1)
        # q is rounded against the scale and zero point as stored
        scale, zero = w_scale[rows].float().unsqueeze(-1), w_zero[rows].float().unsqueeze(-1)
        q = _round(groups, scale, zero)
        w[rows] = pack(q.view_as(block))
        error.add(groups, (q - zero) * scale)
    return Int4Weight(w, w_scale, w_zero, error.relative())


def _round(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    return (groups / scale + zero).round_().clamp_(0, LEVELS)


def _scale_dtype(weight: torch.Tensor, group_size: int) -> torch.dtype:
    """fp16 where it holds every group's scale without loss of range, else fp32."""
    limits = torch.finfo(torch.float16)
    for _, block in row_blocks(weight):
        scale, _ = _range_scale_zero(block.view(len(block), -1, group_size))
        if (scale < limits.smallest_normal).any() or (scale > limits.max).any():
            return torch.float32
    return torch.float16


def _range_scale_zero(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [N, K/G, 1] from a group's range, widened to hold 0 so that zero lies in 0 … 15."""
    low = groups.amin(-1, keepdim=True).clamp(max=0)
    high = groups.amax(-1, keepdim=True).clamp(min=0)
    scale = high / LEVELS - low / LEVELS
    scale = scale.where(scale > 0, 1.0)
    return scale, -low / scale


def _refine_zero(
    groups: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    steps: int = 20,
    p: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
) -> torch.Tensor:
    """HQQ's half-quadratic solver: alternates a sparse error (an lp shrinkage) and the zero point that fits the rest."""
    best = best_error = None
    for _ in range(steps):
        q = _round(groups, scale, zero)
        error = groups - (q - zero) * scale
        mean_error = error.abs().mean()
        if best_error is not None and mean_error >= best_error:
            break
        best, best_error = zero, mean_error
        size = error.abs()
        sparse = error.sign() * (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)
        zero = (q - (groups - sparse) / scale).mean(-1, keepdim=True)
        beta *= growth
    return best
