"""Snapshot: whether a module still is what it was, cheap enough to ask at every call."""

from __future__ import annotations

from itertools import chain
from operator import is_

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from fastinfer.hooks import is_recorder
from fastinfer.modules.capture import CaptureError

PLAIN = (type(None), bool, int, float, str)
"""Types of values that are what they say: equal ones do the same."""


class Snapshot:
    """Everything that a call of a module depends on besides its inputs: tensors, submodules, attributes, configurations.

    All comparisons are loops that run in C: 0.1 ms for a BERT of twelve layers. Values *in* tensors may change, as a graph
    reads them anew. Parameters that were exchanged live on until the snapshot is dropped.

    Raises: CaptureError where the module depends on more than can be watched
    """

    def __init__(self, module: nn.Module, device: torch.device):
        modules = list(module.modules())
        tables = [table for m in modules for table in (m._parameters, m._buffers)]
        self.tensors = [t for table in tables for t in table.values() if t is not None]
        for m in modules:
            if type(m).__module__.split(".")[0] == "peft":
                raise CaptureError("adapters can be switched off and on")
        if any(t.device != device for t in self.tensors):
            raise CaptureError(f"not all its tensors are on {device}")
        self.training = any(m.training for m in modules)
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.tables = tables + [m._modules for m in modules]
        configs = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, PretrainedConfig)}
        self.attributes = [vars(holder) for holder in (*modules, *configs.values())]
        self.members, self.values = _values(self.tables), _values(self.attributes)
        self.hooks = [h for m in modules if m is not module for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.hooks_seen = -1

    def in_place(self) -> bool:
        """Whether all tensors are where they were: their memory may be read."""
        return list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses

    def unchanged(self) -> bool:
        """Whether everything else is as it was, and no hook wants to see what happens inside."""
        members = _values(self.tables)
        if len(members) != len(self.members) or not all(map(is_, members, self.members)):
            return False
        try:  # lists compare what is identical at once, and anything else by its ==
            return _values(self.attributes) == self.values and not self.hooked()
        except (RuntimeError, ValueError):  # of tensors, arrays
            return False

    def hooked(self) -> bool:
        """Whether a submodule, or all modules, have hooks; those by which transformers records outputs idle otherwise."""
        if torch_module._has_any_global_hook():
            return True
        if self.hooks_seen != RemovableHandle.next_id:  # a hook was added somewhere since
            hooks = chain.from_iterable(map(dict.values, self.hooks))
            if not all(map(is_recorder, hooks)):
                return True
            self.hooks_seen = RemovableHandle.next_id
        return False


def _values(tables: list[dict]) -> list:
    return list(chain.from_iterable(map(dict.values, tables)))
