"""Int8Embedding: rows of an int8 weight, gathered and dequantised; made for a weight that a tied head multiplies by."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.modules.quantized import QuantizedModule
from fastinfer.ops.layout import ROW, TILE_ROWS, TILE_W8A8, TILE_W8A16, gather_rows

TILES = TILE_W8A16, TILE_W8A8


class Int8Embedding(QuantizedModule, nn.Embedding):
    """weight[ids] · weight_scale[ids] · factor in `compute_dtype`.

    weight [V, D] int8 is a Parameter, usually shared with the head's Int8Linear; weight_scale [V] fp32 is a buffer.
    `factor` is a constant that the original multiplied its rows by (Gemma), rounded to `compute_dtype` as there.
    """

    def __init__(self, weight: nn.Parameter, weight_scale, *, like, layout: str = ROW, padding_idx=None, factor=1.0):
        nn.Module.__init__(self)  # nn.Embedding's own would allocate a float weight
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.max_norm, self.norm_type = padding_idx, None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._init_quantized(weight, layout, like)
        self.register_buffer("weight_scale", weight_scale)
        self.factor = factor
        self._places_key: tuple | None = None
        self._places_found: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale = nn.functional.embedding(
            input, self.weight_scale[:, None]
        )  # refuses ids out of range, as it always does
        rows = (gather_rows(self.weight, input, self.layout).float() * scale).to(self.compute_dtype)
        return rows if self.factor == 1.0 else rows * self.rounded_factor(rows.dtype)

    def rounded_factor(self, dtype: torch.dtype) -> float:
        """The factor as `dtype` holds it; as a number, since a tensor made of it would be copied to the device each time."""
        return torch.tensor(self.factor, dtype=dtype, device="cpu").item()

    def look_up(self, ids: torch.Tensor) -> torch.Tensor:
        """What `forward` gives, bit for bit, in few kernels: for steps in which every launch counts, not for traces."""
        places = self._places()
        if places is None:
            return type(self).forward(self, ids)
        starts, columns = places
        codes = self.weight.view(-1)[nn.functional.embedding(ids, starts) + columns]
        scale = nn.functional.embedding(ids, self.weight_scale[:, None])
        rows = torch.empty(codes.shape, dtype=self.compute_dtype, device=codes.device)
        torch.mul(codes, scale, out=rows)
        return rows if self.factor == 1.0 else rows * self.rounded_factor(rows.dtype)

    def _places(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Where the weight's elements are in memory: of each row's first [V, 1], and of each column from there [D]; None
        where the order of the weight is not such a sum."""
        (n, k), layout = self.weight.shape, self.layout
        key = n, k, layout, self.weight.device
        if self._places_key != key:
            self._places_key, self._places_found = key, None
            if layout in TILES and n % TILE_ROWS == 0:
                device = self.weight.device
                tile = torch.arange(TILE_ROWS * k, device=device).view(TILE_ROWS, k)
                inside = gather_rows(tile, torch.arange(TILE_ROWS, device=device), layout)
                columns = inside[0] - inside[0, 0]
                if torch.equal(inside, inside[:, :1] + columns):
                    tiles = torch.arange(n // TILE_ROWS, device=device)[:, None] * (TILE_ROWS * k)
                    self._places_found = (tiles + inside[:, 0]).view(-1, 1), columns
        return self._places_found

    def __getstate__(self) -> dict:
        return super().__getstate__() | {"_places_key": None, "_places_found": None}

    def reset_parameters(self) -> None:
        raise RuntimeError("Int8Embedding has no random initialisation: build it from a float module")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor:g}"
