"""What every quantised module shares: plain tensors, canonical state dict, execution layout by device.

A module keeps its packed weight in the order its device's kernels read (csrc/LAYOUTS.md) and shows the canonical row
order in its state dict. Modules whose weights are tied share one Parameter and one `Packing`, so that the order is
known once, also after a deep copy.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fastinfer.ops._common import describe
from fastinfer.ops.layout import ROW, convert, native_layout


class StateDictError(ValueError):
    """A state dict entry does not fit a quantised module; names the entry. Nothing was loaded."""


class Packing:
    """The order that a packed weight is held in. Shared by the modules that share the weight."""

    def __init__(self, layout: str = ROW):
        self.layout = layout


class QuantizedModule(nn.Module):
    """Mixin. `weight` is an int8 Parameter [N, ·]; `laid_out` names every tensor that the layout reorders."""

    laid_out: tuple[str, ...] = ("weight",)
    scales: tuple[str, ...] = ("weight_scale",)

    def _init_quantized(self, weight: nn.Parameter, packing: Packing, like: torch.dtype) -> None:
        """Takes over a packed weight. `like` is the dtype that the module stands in for; `.to(dtype)` changes it."""
        self.register_parameter("weight", weight)
        self.packing = packing
        self.register_buffer("_like", torch.empty(0, dtype=like, device=weight.device), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the original weight would have now, after every `.to(dtype)` since."""
        return self._like.dtype

    @property
    def layout(self) -> str:
        return self.packing.layout

    def use_layout(self, layout: str) -> None:
        """Reorders the packed tensors in memory."""
        if layout == self.packing.layout:
            return
        for name in self.laid_out:
            tensor = getattr(self, name)
            tensor.data = convert(tensor.data, self.packing.layout, layout)
        self.packing.layout = layout

    def use_native_layout(self) -> None:
        """Brings the weights into the order that their device's kernels read fastest."""
        self.use_layout(native_layout(self.weight.device, self.weight.shape[1]))

    def _apply(self, fn, recurse=True):
        before = {name: self._buffers[name] for name in self.scales}
        super()._apply(fn, recurse)
        for name, scale in before.items():  # .to(dtype) moves scales but never rounds them
            if self._buffers[name].dtype != scale.dtype:
                self._buffers[name] = scale.to(self._buffers[name].device)
        self.use_native_layout()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.laid_out:
            tensor = getattr(self, name)
            canonical = convert(tensor.detach(), self.layout, ROW)
            destination[prefix + name] = canonical if self.layout != ROW or not keep_vars else tensor

    def check_state_dict(self, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Raises StateDictError where an entry for this module has the wrong shape or dtype, or a scale is not finite."""
        for name in ("weight", *self.scales):
            entry, own = state_dict.get(prefix + name), getattr(self, name)
            if entry is None:
                continue
            if entry.shape != own.shape or entry.dtype != own.dtype:
                raise StateDictError(f"state_dict[{prefix + name!r}] must be {describe(own)}, got {describe(entry)}")
            if name in self.scales and not entry.is_meta and not torch.isfinite(entry).all():
                raise StateDictError(f"state_dict[{prefix + name!r}] holds NaN or infinity")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.check_state_dict(state_dict, prefix)
        self.use_layout(ROW)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.use_native_layout()
