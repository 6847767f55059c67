"""Reads a module's parts by name and structure, and holds a rule to account for everything that the module has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastinfer.errors import Unfusable
from fastinfer.generation.parts import ACTIVATIONS, Linears, Norm
from fastinfer.modules import QuantizedLinear, blocks
from fastinfer.rules import linear as linear_rule

HARMLESS = (nn.Dropout, nn.Identity)
"""Children that do nothing in eval mode."""

OURS = (blocks.shared_forward, blocks.gated_forward)


class Part:
    """A module being read. What it has and the rule has not taken by `done` is not understood.

    floats: names of numbers that the rule reads, or that change nothing in eval mode
    """

    def __init__(self, module: nn.Module, path: str, floats: tuple[str, ...] = ()):
        self.module, self.path, self.floats = module, path, floats
        self.taken: set[str] = set()
        check_forward(module, path)

    def take(self, *names: str) -> nn.Module | None:
        """The first child that has one of these names."""
        for name in names:
            child = self.module._modules.get(name)
            if child is not None:
                self.taken.add(name)
                check_forward(child, f"{self.path}.{name}")
                return child
        return None

    def need(self, what: str, *names: str) -> nn.Module:
        child = self.take(*names)
        if child is None:
            raise Unfusable(f"{self.path} has no {what} that the fused step knows")
        return child

    def part(self, floats: tuple[str, ...], *names: str) -> Part | None:
        """The first child that has one of these names, to be read in turn."""
        child = self.take(*names)
        name = next((name for name in names if self.module._modules.get(name) is child), "")
        return None if child is None else Part(child, f"{self.path}.{name}", floats)

    def linear(self, *names: str) -> nn.Module | None:
        """A child that is a linear."""
        child = self.take(*names)
        if child is not None and not is_linear(child):
            raise Unfusable(f"{self.path} has a {type(child).__name__} where the fused step looks for a linear")
        return child

    def left(self) -> dict[str, nn.Module]:
        """Children that nobody has taken and that do something."""
        children = self.module._modules.items()
        return {k: m for k, m in children if m is not None and k not in self.taken and not _is_harmless(m)}

    def done(self) -> None:
        """Raises Unfusable where the module has more than what was taken."""
        for name, child in self.left().items():
            raise Unfusable(f"{self.path} has a {name} ({type(child).__name__}) that the fused step does not know")
        for name, tensor in (*self.module._parameters.items(), *self.module._buffers.items()):
            if tensor is not None and name not in self.taken:
                raise Unfusable(f"{self.path} has a tensor {name} that the fused step does not know")
        for name, value in vars(self.module).items():
            if isinstance(value, float) and name not in self.floats and "drop" not in name:
                raise Unfusable(f"{self.path} has a factor {name} = {value:g} that the fused step does not know")


def _is_harmless(module: nn.Module) -> bool:
    return type(module) in HARMLESS and "forward" not in vars(module)


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, QuantizedLinear) or linear_rule.is_linear(module)


def check_forward(module: nn.Module, path: str) -> None:
    """Raises Unfusable where calling `module` does more than its class's forward (or our merged blocks') does."""
    if hasattr(module, "_hf_hook"):
        raise Unfusable(f"accelerate's hooks run around {path}")
    forward = vars(module).get("forward")
    if forward is not None and getattr(forward, "func", None) not in OURS:
        raise Unfusable(f"the forward of {path} was replaced on the instance")


# ---- what a module does, found by trying --------------------------------------------------------------------------


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    if got.shape != want.shape:
        return False
    tolerance = max(1e-5, 4 * torch.finfo(want.dtype).eps)
    got, want = got.float(), want.float()
    return bool(((got - want).abs() <= tolerance * want.abs().clamp_min(0.1)).all())


def norm(module: nn.Module, path: str) -> Norm:
    """The norm that `module` computes. Raises Unfusable where it is none that the step knows."""
    weight = module._parameters.get("weight")
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if weight is None or weight.dim() != 1 or not isinstance(eps, float):
        raise Unfusable(f"{path} is a {type(module).__name__}, no norm that the fused step knows")
    with torch.no_grad():
        x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)) + 0.5
        x[2:] *= eps**0.5  # small enough for eps to show
        x = x.to(weight.device, weight.dtype)
        try:
            want = type(module).forward(module, x)
        except Exception as error:
            raise Unfusable(f"{path}, a {type(module).__name__}, cannot be tried: {error!r}") from error
        if isinstance(want, torch.Tensor):
            for offset in (0.0, 1.0, None):
                found = Norm(module, eps, offset)
                if _close(found(x), want):
                    return found
    raise Unfusable(f"{path}, a {type(module).__name__}, is neither an RMS norm nor a layer norm")


def activation(function: Callable, path: str) -> str:
    """Which of ACTIVATIONS a module or function is."""
    x = torch.linspace(-6, 6, 193)
    with torch.no_grad():
        try:
            want = type(function).forward(function, x) if isinstance(function, nn.Module) else function(x)
        except Exception as error:
            raise Unfusable(f"the activation of {path} cannot be tried: {error!r}") from error
        errors = {name: (act(x) - want).abs().max().item() for name, act in ACTIVATIONS.items()}
    nearest = min(errors, key=lambda name: errors[name])
    if not errors[nearest] <= 1e-5:
        raise Unfusable(f"the activation of {path}, {type(function).__name__}, is none that the fused step knows")
    return nearest


def take_activation(part: Part) -> str:
    names = ("act_fn", "activation_fn", "act", "activation")
    function = part.take(*names) or next((vars(part.module)[n] for n in names if n in vars(part.module)), None)
    if function is None:
        raise Unfusable(f"{part.path} has no activation that the fused step knows")
    return activation(function, part.path)


def one(linear: nn.Module) -> Linears:
    return Linears([linear])
