"""Which linears of a block can be merged: found by watching the block's forward, not by names.

A probe calls the forward of the block's class on random input, with stubs in place of its linears. Linears that are given
the very same tensor are siblings. Two of them whose outputs g and u reach a third linear as act(g) · u, and whose block
returns what that third one gives, are a gate and its up: that block is proven to be down(act(gate(x)) · up(x)).
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastinfer.modules.linear import float_weight
from fastinfer.modules.siblings import ROWS, Siblings
from fastinfer.ops._common import ACTIVATIONS
from fastinfer.recipe import Spec
from fastinfer.rules import linear as linear_rule

GATES = {name: act for name, act in ACTIVATIONS.items() if act is not None}
CROSS = re.compile(r"cross|enc_?dec|encoder_attn", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Found:
    """Linears that a block calls on one input. `down` is the child that the gated product goes to."""

    members: tuple[str, ...]
    activation: str = "none"
    down: str = ""


@dataclasses.dataclass
class _Call:
    name: str
    x: torch.Tensor
    version: int
    y: torch.Tensor


class _Stub(nn.Module):
    """Stands in for a linear: notes what it is called on and answers at random. Anything else it looks up in the linear."""

    def __init__(
        self, name: str, linear: nn.Module, calls: list[_Call], generator: torch.Generator, strided: bool
    ) -> None:
        super().__init__()
        self.__dict__.update(name=name, linear=linear, calls=calls, generator=generator, strided=strided)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["linear"], name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.randn(*x.shape[:-1], float_weight(self.linear).shape[0], generator=self.generator).to(x)
        y = torch.cat((y, y), -1)[..., : y.shape[-1]] if self.strided else y  # as columns of a merged product are
        self.calls.append(_Call(self.name, x, x._version, y))
        return y


def pays(device: torch.device) -> bool:
    """Whether merging is worth it by default: it saves launches, of which a CPU has none (there 0 to 7% slower)."""
    return device.type == "cuda"


def is_block(module: nn.Module) -> bool:
    """Whether all linears in a module are its own children: an attention or an MLP, not a layer, not a model."""
    from transformers import PreTrainedModel

    own = {id(child) for child in module.children()}
    inner = [m for m in module.modules() if linear_rule.looks_linear(m)]
    return not isinstance(module, PreTrainedModel) and all(id(m) in own for m in inner)


def refusal(block: nn.Module, path: str) -> str | None:
    """Why linears of this block stay apart, or None."""
    if "forward" in vars(block) and not linear_rule.accelerate_hooks(block):
        return "the block's forward was replaced on the instance"
    if linear_rule.is_offloaded(block):
        return "offloaded by accelerate"
    if any(CROSS.search(part) for part in path.split(".")[-2:]):
        return "cross-attention: keys and values come from another input"
    return None


def eligible(found: Found, linears: dict[str, tuple[nn.Module, Spec]]) -> tuple[Found | None, str]:
    """The members that can share a buffer, and why others cannot: all must become the same, in whole groups of rows."""
    alike: dict[tuple, list[str]] = {}
    reasons = {}
    for name in found.members:
        if name not in linears:
            reasons[name] = "stays as it is"
            continue
        linear, spec = linears[name]
        n, k = float_weight(linear).shape
        if n % ROWS:
            reasons[name] = f"has {n} output features, not a multiple of {ROWS}"
            continue
        kind = spec.weights, spec.group_size, spec.activations, k, linear.weight.dtype, linear.weight.device
        alike.setdefault(kind, []).append(name)
    most: list[str] = max(alike.values(), key=len, default=[])
    reason = "; ".join(f"{name} {why}" for name, why in reasons.items()) or "they become different kinds"
    if len(most) == len(found.members):
        return found, ""
    return (Found(tuple(most)), reason) if len(most) > 1 else (None, reason)


def find(block: nn.Module) -> Found | None:
    """What the block's forward calls on one input, or None."""
    calls, result, error = _watch(block, strided=False)
    groups: dict[tuple[int, int], list[_Call]] = {}
    for i, call in enumerate(calls):
        if call.name not in [earlier.name for earlier in calls[:i]]:
            groups.setdefault((id(call.x), call.version), []).append(call)
    group = max(groups.values(), key=len, default=[])
    if len(group) < 2 or _watch(block, strided=True)[2] != error:
        return None
    if len(group) == 2 and len(calls) == 3 and calls[2] not in group:
        for gate, up in (group, group[::-1]):
            activation = _activation(gate.y, up.y, calls[2].x)
            if activation and isinstance(result, torch.Tensor) and torch.equal(result, calls[2].y):
                return Found((gate.name, up.name), activation, calls[2].name)
    return Found(tuple(call.name for call in group))


def _activation(gate: torch.Tensor, up: torch.Tensor, h: torch.Tensor) -> str | None:
    if h.shape != gate.shape or h.shape != up.shape or h.dtype != gate.dtype:
        return None
    errors = {name: _error(h, act(gate) * up) for name, act in GATES.items()}
    nearest = min(errors, key=lambda name: errors[name])  # in 16 bits both forms of gelu may be near enough
    return nearest if errors[nearest] <= _tolerance(h.dtype) else None


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30)).item()


def _tolerance(dtype: torch.dtype) -> float:
    return max(1e-5, 4 * torch.finfo(dtype).eps)


def _watch(block: nn.Module, strided: bool) -> tuple[list[_Call], object, str]:
    """Calls of the block's linears in one run of its class's forward, and what that returned or raised."""
    linears = {name: child for name, child in block._modules.items() if linear_rule.looks_linear(child)}
    first = next(iter(linears.values()))
    weight, generator = first.weight, torch.Generator().manual_seed(0)  # one for all: no two linears answer alike
    x = torch.randn(2, 4, float_weight(first).shape[1], generator=generator).to(weight.device, weight.dtype)
    calls: list[_Call] = []
    stubs = {name: _Stub(name, linear, calls, generator, strided) for name, linear in linears.items()}
    arguments = _arguments(block, x)
    result, error = None, ""
    devices = [weight.device] if weight.device.type == "cuda" else []
    with _in_place_of(block, stubs), torch.random.fork_rng(devices), torch.no_grad():
        try:
            result = type(block).forward(block, **arguments)
        except Exception as raised:  # it may well miss a mask or a rotation, after the calls
            error = repr(raised)
    return calls, result, error


def _arguments(block: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """x for the first argument and for those that name an input of attention, None for others without a default."""
    parameters = list(inspect.signature(type(block).forward).parameters.values())[1:]
    given = {}
    for i, p in enumerate(p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)):
        if i == 0 or p.default is p.empty:
            given[p.name] = x if i == 0 or p.name in ("query", "key", "value") else None
    return given


@contextlib.contextmanager
def _in_place_of(block: nn.Module, stubs: dict[str, _Stub]) -> Iterator[None]:
    """The block in eval mode with stubs for its linears."""
    modules = dict(block._modules)
    training = [(module, module.training) for module in block.modules()]
    try:
        for module, _ in training:
            module.training = False
        block._modules.update(stubs)
        yield
    finally:
        block._modules.update(modules)
        for module, mode in training:
            module.training = mode


def why_unproven(siblings: Siblings, apart: list[torch.Tensor], x: torch.Tensor) -> str | None:
    """What is wrong with the merged matmul of x, compared with what the linears gave apart, or None."""
    pairs = list(zip(siblings.split(siblings.product(x)), apart, strict=True))
    if siblings.pair:
        act = GATES[siblings.activation]
        pairs.append((siblings.product(x, siblings.activation), act(apart[0].float()) * apart[1].float()))
    for got, want in pairs:
        if not _error(got, want) <= _tolerance(x.dtype):
            return f"merged, they differ from each alone by {_error(got, want):.1e}"
    return None


def build(siblings: Siblings) -> str | None:
    """Merges the linears of `siblings` and proves it on random input; where it cannot, parts them and says why."""
    first = siblings.linears[0]
    x = torch.randn(2, first.in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(first.weight.device, first.compute_dtype)
    apart = [linear.matmul(x, linear.bias) for linear in siblings.linears]
    siblings.settle()
    reason = siblings.apart or why_unproven(siblings, apart, x)
    if reason is not None:
        siblings.part()
    return reason
