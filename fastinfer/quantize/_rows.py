"""Works through a weight in blocks of rows, so that quantising needs little memory beside it."""

from __future__ import annotations

from collections.abc import Iterator

import torch

BLOCK_ELEMENTS = 1 << 24  # 64 MiB in fp32


def row_blocks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Slices of rows with those rows in fp32, checked to be finite."""
    rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, len(weight), rows):
        block = weight.detach()[start : start + rows].float()
        if not torch.isfinite(block).all():
            raise ValueError("weight holds NaN or infinity")
        yield slice(start, start + rows), block


class ErrorSum:
    """Sums up ‖ŵ − w‖ / ‖w‖ over blocks."""

    def __init__(self) -> None:
        self.error = self.norm = 0.0

    def add(self, block: torch.Tensor, approximation: torch.Tensor) -> None:
        self.error += (approximation - block).double().pow(2).sum()
        self.norm += block.double().pow(2).sum()

    def relative(self) -> float:
        return float((self.error / self.norm) ** 0.5) if self.norm > 0 else 0.0
