"""KeptSiblings: float linears that are called on one input, as one matmul on one buffer.

The linears and their Parameters stay; each Parameter's memory becomes a slice of the merged buffer's rows, so there is one
copy of the weights. Nothing but the Parameters keeps that buffer alive: the whole is read off the first one's memory, so
that a model that is moved away leaves nothing behind. Whatever parts them (`.to()`, another Parameter) is seen by their
addresses, and `join` merges again. A transformers Conv1D, which keeps [K, N], becomes a transposed view of its rows [N, K].
"""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.modules.linear import float_weight


def _rows(linear: nn.Module) -> torch.Tensor:
    return float_weight(linear).detach()


class KeptSiblings:
    """The merged rows of some nn.Linears or Conv1Ds, in their order; of one Conv1D, its transposed weight."""

    def __init__(self, linears: list[nn.Module]):
        self.linears = linears

    def why_apart(self) -> str | None:
        """What keeps the linears from being merged, or None."""
        weights = [linear._parameters.get("weight") for linear in self.linears]
        biases = [linear._parameters.get("bias") for linear in self.linears]
        if any(weight is None or weight.is_meta or type(weight.data) is not torch.Tensor for weight in weights):
            return "a weight is no plain tensor"
        if any(weight.is_inference() for weight in weights if weight is not None):
            return "they were made in inference mode"
        if len({id(weight) for weight in weights}) < len(weights):
            return "they share a weight"
        if len({(w.dtype, w.device) for w in weights if w is not None}) > 1:
            return "they differ in dtype or device"
        if len({(b.dtype, b.device) for b in biases if b is not None}) > 1:
            return "their biases differ in dtype or device"
        if len({_rows(linear).shape[1] for linear in self.linears}) > 1:
            return "they differ in input features"
        return None

    def join(self) -> None:
        """Merges the linears, unless they are."""
        if self.intact():
            return
        merged = torch.cat([_rows(linear) for linear in self.linears])
        for linear, rows in zip(self.linears, merged.split(self._sizes()), strict=True):
            linear.weight.data = rows if isinstance(linear, nn.Linear) else rows.T
        given = [linear.bias for linear in self.linears if linear.bias is not None]
        if len(given) == len(self.linears) > 1:
            biases = torch.cat([bias.detach() for bias in given])
            for bias, piece in zip(given, biases.split(self._sizes()), strict=True):
                bias.data = piece

    def _sizes(self) -> list[int]:
        return [_rows(linear).shape[0] for linear in self.linears]

    def intact(self) -> bool:
        """Whether every Parameter still is its slice of one buffer."""
        return _consecutive([_rows(linear) for linear in self.linears]) and (
            any(linear.bias is None for linear in self.linears)
            or _consecutive([linear.bias.detach() for linear in self.linears])
        )

    def weight(self) -> torch.Tensor:
        """The merged rows [N, K], where `intact`."""
        first = _rows(self.linears[0])
        return first.as_strided((sum(self._sizes()), first.shape[1]), (first.shape[1], 1))

    def bias(self) -> torch.Tensor | None:
        """The merged biases [N], zeros where a linear has none; None where none has."""
        given = [linear.bias for linear in self.linears]
        if all(bias is None for bias in given):
            return None
        like = next(bias for bias in given if bias is not None).detach()
        if any(bias is None for bias in given):
            pieces = [like.new_zeros(n) if b is None else b.detach() for n, b in zip(self._sizes(), given, strict=True)]
            return torch.cat(pieces)
        return given[0].detach().as_strided((sum(self._sizes()),), (1,))

    def part(self) -> None:
        """Gives every Parameter memory of its own, in its own order."""
        for linear in self.linears:
            for parameter in (linear._parameters.get("weight"), linear._parameters.get("bias")):
                if parameter is not None and not parameter.is_meta:
                    parameter.data = parameter.detach().clone(memory_format=torch.contiguous_format)


def _consecutive(tensors: list[torch.Tensor]) -> bool:
    """Whether contiguous tensors lie one after the other in one storage."""
    at, storage = tensors[0].data_ptr(), tensors[0].untyped_storage().data_ptr()
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != at or tensor.untyped_storage().data_ptr() != storage:
            return False
        at += tensor.nbytes
    return True
