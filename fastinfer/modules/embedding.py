"""Int8Embedding: rows of an int8 weight, gathered and dequantised; made for a weight that a tied head multiplies by."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.modules.quantized import QuantizedModule
from fastinfer.ops.layout import ROW, gather_rows


def rounded(factor: float, dtype: torch.dtype) -> float:
    """A factor as `dtype` holds it; as a number, since a tensor made of it would be copied to the device each time."""
    return torch.tensor(factor, dtype=dtype, device="cpu").item()


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

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        scale = nn.functional.embedding(
            input, self.weight_scale[:, None]
        )  # refuses ids out of range, as it always does
        rows = (gather_rows(self.weight, input, self.layout).float() * scale).to(self.compute_dtype)
        return rows if self.factor == 1.0 else rows * rounded(self.factor, rows.dtype)

    def reset_parameters(self) -> None:
        raise RuntimeError("Int8Embedding has no random initialisation: build it from a float module")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, factor={self.factor:g}"
