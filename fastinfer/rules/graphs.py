"""Which modules' calls may be recorded in CUDA graphs: encoders, whose every call is whole in itself."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from fastinfer.rules.linear import accelerate_hooks, is_causal


def find(model: nn.Module) -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost transformers models in `model` that attend to everything at once, with their paths."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module not in inside and isinstance(module, PreTrainedModel):
            inside.update(module.modules())
            if not is_causal(module):
                yield path, module


def refusal(module: nn.Module) -> str:
    """Why its forward cannot be exchanged, or ""."""
    if "forward" in vars(module) and not accelerate_hooks(module):
        return "its forward was replaced on the instance"
    return "its _apply was replaced on the instance" if "_apply" in vars(module) else ""
