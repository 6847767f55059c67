"""int8 weights, one scale an output channel."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastinfer.quantize._rows import ErrorSum, row_blocks


class Int8Weight(NamedTuple):
    """A weight [N, K] as LAYOUTS.md#int8-row, and the relative error ‖ŵ − w‖ / ‖w‖ it has."""

    w: torch.Tensor
    w_scale: torch.Tensor
    error: float


def quantize_int8(weight: torch.Tensor) -> Int8Weight:
    """Round-to-nearest int8 with a symmetric scale a row.

    Args:
        weight: [N, K] floating point, any device and strides
    Returns: Int8Weight on weight's device: w [N, K] int8 in −127 … 127, w_scale [N] fp32, weight ≈ w · w_scale[:, None]
    Raises:  ValueError where weight holds NaN or infinity
    """
    w = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    w_scale = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    error = ErrorSum()
    for rows, block in row_blocks(weight) if weight.shape[1] else ():
        scale = block.abs().amax(1, keepdim=True) / 127
        q = (block / scale.where(scale > 0, 1.0)).round_().clamp_(-127, 127)
        w[rows], w_scale[rows] = q.to(torch.int8), scale.squeeze(1)
        error.add(block, q.mul_(scale))
    return Int8Weight(w, w_scale, error.relative())
