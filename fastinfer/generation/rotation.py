"""Rotation: tables of the angles of a model's own rotary module, and the rows of them that a step needs."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.errors import Unfusable

SHORTEST = 256


class Rotation:
    """cos and sin of all positions, [kinds, positions, R] fp32; kinds with less than R columns leave the rest.

    Tables are made for powers of two of positions and kept, since a captured step reads the one it was captured with.

    kinds: the layer types that the module makes angles of, or [""] where it has one for all
    """

    def __init__(self, module: nn.Module, kinds: list[str]):
        self.module, self.kinds = module, kinds
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._widths: list[int] = []

    def check(self) -> None:
        """Raises Unfusable where the module gives no angles as kv_attention takes them."""
        self._widths = []
        for kind in self.kinds:
            cos, sin = self._angles(8, kind)
            if cos.shape != sin.shape or cos.dim() != 3 or cos.shape[-1] % 2:
                raise Unfusable(f"its rotation has angles of shapes {list(cos.shape)} and {list(sin.shape)}")
            self._widths.append(cos.shape[-1])
            first, second = cos.chunk(2, -1)
            if not torch.equal(first, second):
                raise Unfusable("its angles are not those of a rotation of halves: of interleaved pairs, perhaps")

    def _angles(self, positions: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.module.buffers()).device
        at = torch.arange(positions, device=device)[None]
        x = torch.empty(1, device=device)
        try:
            with torch.no_grad():
                angles = type(self.module).forward(self.module, x, at, **({"layer_type": kind} if kind else {}))
            cos, sin = angles
        except Exception as error:
            raise Unfusable(f"its rotation, a {type(self.module).__name__}, gives no cos and sin: {error!r}") from error
        return cos.float(), sin.float()

    def tables(self, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The tables of at least so many positions, as `ops.embed` takes them."""
        length = max(SHORTEST, 1 << max(0, positions - 1).bit_length())
        if length not in self._tables:
            widest = max(self._widths)
            pairs = [self._angles(length, kind) for kind in self.kinds]
            cos, sin = (
                torch.cat([nn.functional.pad(t, (0, widest - t.shape[-1])) for t in both]) for both in zip(*pairs)
            )
            self._tables[length] = cos, sin
        return self._tables[length]

    def by_kind(self, cos: torch.Tensor, sin: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """cos and sin [B, T, R] of each kind, from their rows [kinds, B, T, R]."""
        return {kind: (cos[i, ..., :r], sin[i, ..., :r]) for i, (kind, r) in enumerate(zip(self.kinds, self._widths))}
