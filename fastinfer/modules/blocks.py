"""Forwards for blocks whose linears are merged (siblings.py). Each is set on the instance; the class stays as it is.

Every block keeps the forward of its class and opens a round around it, so that its linears find their siblings. A gated MLP
that was proven to be down(act(gate(x)) · up(x)) runs as that, in two matmuls, as long as nothing has changed in it.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastinfer.modules.siblings import Siblings


def shared_forward(block: nn.Module, siblings: Siblings, *args, **kwargs) -> Any:
    """The forward of the block's class, in which the first sibling that is called computes for all."""
    token, result = siblings.begin(), None
    completed = False
    try:
        result = type(block).forward(block, *args, **kwargs)
        completed = True
    finally:
        siblings.end(token, completed)
    return result


class Gated:
    """What a gated MLP consisted of when it was proven to be down(act(gate(x)) · up(x))."""

    def __init__(self, block: nn.Module, siblings: Siblings, down: str):
        self.siblings, self.down = siblings, down
        self.modules = {name: child for name, child in block._modules.items() if name != down and child is not None}
        self.others = {name: value for name, value in vars(block).items() if _is_activation(value)}

    def unchanged(self, block: nn.Module) -> bool:
        """Whether a call of the class's forward would still do nothing but that."""
        if not torch.compiler.is_compiling() and torch_module._has_any_global_hook():
            return False
        for name, child in self.modules.items():
            if block._modules.get(name) is not child or "forward" in child.__dict__:
                return False
            if child._forward_hooks or child._forward_pre_hooks or child._backward_hooks or child._backward_pre_hooks:
                return False
        return all(block.__dict__.get(name) is value for name, value in self.others.items())


def _is_activation(value: object) -> bool:
    return callable(value) and not isinstance(value, (nn.Module, partial, type, types.MethodType))


def gated_forward(block: nn.Module, gated: Gated, *args, **kwargs) -> Any:
    """down(act(gate(x)) · up(x)), gate and up as one matmul with the activation in its epilogue."""
    siblings = gated.siblings
    if len(args) == 1 and not kwargs and not block.training and gated.unchanged(block):
        x = args[0]
        if siblings.ready() and not any(linear.trains(x) for linear in siblings.linears):
            with torch.no_grad():
                h = siblings.product(siblings.linears[0].cast(x), siblings.activation)
            return getattr(block, gated.down)(h)
    return shared_forward(block, siblings, *args, **kwargs)


def _slot(block: nn.Module) -> str:
    return "_old_forward" if "_hf_hook" in vars(block) else "forward"  # below accelerate's, where that is


def install(block: nn.Module, siblings: Siblings, down: str = "") -> None:
    """Gives a block the forward that runs its siblings; `down` names what the product of a proven gated MLP goes to."""
    forward = partial(gated_forward, block, Gated(block, siblings, down)) if down else None
    setattr(block, _slot(block), forward or partial(shared_forward, block, siblings))


def uninstall(block: nn.Module) -> None:
    """Gives a block the forward of its class back, wherever accelerate has moved ours since."""
    for slot in ("forward", "_old_forward"):
        if getattr(vars(block).get(slot), "func", None) in (shared_forward, gated_forward):
            delattr(block, slot)
            if slot == "_old_forward":
                block._old_forward = types.MethodType(type(block).forward, block)
