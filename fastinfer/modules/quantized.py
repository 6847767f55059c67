"""What every quantised module shares: plain tensors, canonical state dict, execution layout by device.

A module keeps its packed weight in the order its device's kernels read (csrc/LAYOUTS.md) and shows the canonical row
order in its state dict. The Parameter itself is marked with the order it is in: modules that share it agree, and one
put in from outside (by accelerate, say), without a mark, is in row order. Deep copies and pickles, which drop the mark,
get it back from the module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fastinfer.ops._common import describe
from fastinfer.ops.layout import PANEL16, ROW, convert, native_layout

MARK = "_fastinfer_layout"


class StateDictError(ValueError):
    """A state dict entry that does not fit a quantised module; names the entry."""


class QuantizedModule(nn.Module):
    """Mixin. `weight` is an int8 Parameter [N, ·]; `laid_out` names every tensor that the layout reorders.

    Attributes:
        weights_loaded: whether load_state_dict has brought in other quantised weights since construction
    """

    laid_out: tuple[str, ...] = ("weight",)
    scales: tuple[str, ...] = ("weight_scale",)

    def _init_quantized(self, weight: nn.Parameter, layout: str, like: torch.dtype) -> None:
        """Takes over a packed weight. `like` is the dtype that the module stands in for; `.to(dtype)` changes it."""
        self.register_parameter("weight", weight)
        setattr(weight, MARK, layout)
        self._last_layout = layout
        self.weights_loaded = False
        self.register_buffer("_like", torch.empty(0, dtype=like, device=weight.device), persistent=False)

    @property
    def layout(self) -> str:
        """The order that the weight is in, LAYOUTS.md."""
        if torch.compiler.is_compiling():  # torch.export puts tensors of its own, without a mark, in the weight's place
            return getattr(self.weight, MARK, self._last_layout)
        return getattr(self.weight, MARK, ROW)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the original weight would have now, after every `.to(dtype)` since."""
        return self._like.dtype

    def packed_bytes(self) -> int:
        """Bytes of the weight with its scales and zero points."""
        return self.weight.nbytes + sum(getattr(self, name).nbytes for name in self.scales)

    def use_layout(self, layout: str) -> None:
        """Reorders the packed tensors in memory, unless a module that shares the weight has done so; all or none."""
        current = self.layout
        names = self.laid_out if current != layout else ()
        for name, converted in [(name, convert(self._in_layout(name, current), current, layout)) for name in names]:
            self._put(name, converted)
        for name in self.laid_out:
            setattr(getattr(self, name), MARK, layout)
        self._last_layout = layout

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        """`tensor` as what is called `name`. A Parameter keeps its identity; a buffer may be the caller's (assign=True)."""
        if name in self._parameters:
            getattr(self, name).data = tensor
        else:
            self._buffers[name] = tensor

    def _in_layout(self, name: str, layout: str) -> torch.Tensor:
        """The tensor `name` in the order `layout`. Who replaces the weight alone (accelerate) leaves scales in theirs."""
        tensor = getattr(self, name).detach()
        return convert(tensor, getattr(getattr(self, name), MARK, layout), layout)

    def native_layout(self) -> str:
        """The order to hold the weights in on their device. Here, for weights that are only gathered: as they are, unless
        another device's kernels read that order."""
        if self.weight.device.type == "cpu":
            n, k = self.weight.shape
            return native_layout(self.weight.device, "w8a16", n, k, self.compute_dtype)
        return ROW if self.layout == PANEL16 else self.layout

    def use_native_layout(self) -> None:
        """Brings the weights into the order that their device's kernels read fastest."""
        self.use_layout(self.native_layout())

    def __getstate__(self) -> dict:
        return vars(self) | {MARK: self.layout}

    def __setstate__(self, state: dict) -> None:
        layout = state.pop(MARK)
        super().__setstate__(state)
        if not hasattr(self.weight, MARK):  # else a module that shares it was here first
            setattr(self.weight, MARK, layout)
        self.use_native_layout()  # it may have been loaded onto another device

    def _apply(self, fn: Callable, recurse: bool = True):
        if fn(torch.empty(0, dtype=torch.int8, device=self.weight.device)).dtype != torch.int8:
            raise TypeError(
                f"{type(self).__name__}: the int8 weight cannot change its dtype; use .to(dtype) or .half()"
            )
        before = {name: self._buffers[name] for name in self.scales}
        super()._apply(fn, recurse)
        for name, scale in before.items():  # .to(dtype) moves scales but never rounds them
            if self._buffers[name].dtype != scale.dtype:
                self._buffers[name] = scale.to(self._buffers[name].device)
        self.use_native_layout()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.laid_out if self.layout != ROW else ():
            destination[prefix + name] = convert(getattr(self, name).detach(), self.layout, ROW)

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
        weight, layout = self.weight, self.layout
        self.use_layout(ROW)
        for name in ("weight", *self.scales):
            own = getattr(self, name)
            entry = state_dict.get(prefix + name, own)
            if not (entry is own or entry.is_meta or own.is_meta or torch.equal(entry.to(own.device), own)):
                self.weights_loaded = True
        super()._load_from_state_dict(state_dict, prefix, *args)
        if (
            self.weight is not weight
        ):  # assigned: neither the caller's tensor nor that of modules tied before may change
            weight.data = convert(weight.data, ROW, layout)
            setattr(weight, MARK, layout)
            self.weight = nn.Parameter(self.weight.detach(), requires_grad=False)
        self.use_native_layout()
