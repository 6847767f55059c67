"""Watch: whether a model still is what was read from it, cheap enough to ask before every `generate`."""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

from fastinfer.hooks import is_recorder
from fastinfer.modules.snapshot import PLAIN


class Watch:
    """The modules, tensors and addresses of a model as they were when it was read."""

    def __init__(self, model: nn.Module):
        self.modules: list[tuple[str, nn.Module, dict, Any]] = []
        self.tensors: list[tuple[dict, str, int]] = []  # addresses alone: what is moved away is not to be kept alive
        for path, module in model.named_modules():
            self.modules.append((path, module, dict(module._modules), vars(module).get("forward")))
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self.tensors.append((table, name, tensor.data_ptr()))

    def changed(self) -> str | None:
        """What a fused step would pass over: a module exchanged, a hook, another forward, train mode."""
        if torch_module._has_any_global_hook():
            return "a hook on all modules is set"
        for path, module, children, forward in self.modules:
            if module._modules != children:
                return f"modules of {path or 'the model'} were exchanged"
            if module._forward_pre_hooks or not all(map(is_recorder, module._forward_hooks.values())):
                return f"{path or 'the model'} has hooks"
            if vars(module).get("forward") is not forward:
                return f"the forward of {path or 'the model'} was replaced"
            if module.training:
                return f"{path or 'the model'} is in train mode"
        return None

    def moved(self) -> bool:
        """Whether any tensor is elsewhere in memory."""
        tensors = ((table.get(name), address) for table, name, address in self.tensors)
        return any(tensor is None or tensor.data_ptr() != address for tensor, address in tensors)


class Settings:
    """Numbers and names that modules and configurations hold, and how often a module's buffers were written to.

    holders: modules and configurations
    written: a module of whose buffers tables were made, or None
    """

    def __init__(self, holders: Iterable[Any], written: nn.Module | None):
        self.rows = []
        for table in map(vars, holders):
            names = [name for name, value in table.items() if type(value) in PLAIN and name != "training"]
            if names:
                get = itemgetter(*names)
                self.rows.append((table, get, get(table)))
        self.written = written  # not its buffers: what is moved away is not to be kept alive
        self.versions = self._versions()

    def changed(self) -> bool:
        try:
            changed = any(get(table) != values for table, get, values in self.rows)
        except KeyError:
            return True
        return changed or self._versions() != self.versions

    def _versions(self) -> list[int]:
        buffers = [] if self.written is None else self.written.buffers()
        return [0 if buffer.is_inference() else buffer._version for buffer in buffers]
