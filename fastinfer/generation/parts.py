"""The parts that a fused decode step is made of: norms, linears, attention, feedforward, layers.

The rules (fastinfer/rules/decoder.py) find them in a model. A part holds the model's modules and reads their tensors at each
call, so that whatever moves or loads the model is seen; only `Linears.settle` remembers which linears are merged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinfer import ops
from fastinfer.modules import QuantizedLinear
from fastinfer.modules.kept import KeptSiblings
from fastinfer.modules.linear import float_weight
from fastinfer.ops._common import ACTIVATIONS as EPILOGUES
from fastinfer.ops.layout import GATE_ROWS

if TYPE_CHECKING:
    from fastinfer.generation.cache import KVCache

Act = Callable[[torch.Tensor], torch.Tensor]
Rotations = dict[str, tuple[torch.Tensor, torch.Tensor]]


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.relu(x).square()


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return nn.functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Act] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": nn.functional.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}
"""Where there is an epilogue of that name and "_mul", it runs in the matmul of a gate and an up that are merged."""


# ---- norm and linears -----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Norm:
    """An RMS norm by offset + weight, or a layer norm (`offset` None)."""

    module: nn.Module
    eps: float
    offset: float | None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.module.weight
        if self.offset is not None:
            return ops.rms_norm(x, weight, self.eps, offset=self.offset)[0]
        return nn.functional.layer_norm(x, x.shape[-1:], weight, getattr(self.module, "bias", None), self.eps)


def multiply(linear: nn.Module, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """linear(x) + residual, without gradients or hooks."""
    if isinstance(linear, QuantizedLinear):
        return linear.matmul(x, linear.bias, residual=residual)
    weight = float_weight(linear)
    if weight.is_contiguous():
        return ops.linear(x, weight, linear.bias, residual)
    y = nn.functional.linear(x, weight, linear.bias)  # a Conv1D in its own order, which no kernel of ours reads
    return y if residual is None else y + residual


class Linears:
    """Linears that take one input. They run as one matmul where they are merged, else one by one.

    activation: "" or, for a gate and an up, or one linear that holds both one after the other, a name in ACTIVATIONS
    """

    def __init__(self, linears: list[nn.Module], activation: str = ""):
        self.linears, self.activation = linears, activation
        self.kept: KeptSiblings | None = None
        self.settle()

    def merge_kept(self) -> KeptSiblings | None:
        """Merges float linears (several, or a Conv1D) into one buffer, where they can be."""
        kept = KeptSiblings(self.linears)
        alone = len(self.linears) == 1 and float_weight(self.linears[0]).is_contiguous()
        if alone or any(isinstance(linear, QuantizedLinear) for linear in self.linears) or kept.why_apart():
            return None
        kept.join()
        self.kept = kept
        self.settle()
        return kept

    def settle(self) -> None:
        """Finds out which linears are merged as things are; after whatever may have changed that."""
        self.merged = self.kept is not None and self.kept.intact()
        self.siblings: list[Any] = []
        for linear in self.linears:
            together = getattr(linear, "siblings", None)
            if together is None or any(together is one for one in self.siblings) or not together.ready():
                continue
            if all(any(one is own for own in self.linears) for one in together.linears):
                self.siblings.append(together)

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """The only linear's product + residual."""
        return multiply(self.linears[0], x, residual)

    def outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each linear gives."""
        if self.merged and self.kept is not None and len(self.linears) > 1:
            y = ops.linear(x, self.kept.weight(), self.kept.bias())
            return list(y.split([float_weight(linear).shape[0] for linear in self.linears], -1))
        done = {}
        for together in self.siblings:
            shares = together.split(together.product(x))
            done.update({id(linear): y for linear, y in zip(together.linears, shares, strict=True)})
        return [done[id(one)] if id(one) in done else multiply(one, x) for one in self.linears]

    def activated(self, x: torch.Tensor) -> torch.Tensor:
        """act(gate(x)) · up(x)."""
        epilogue = f"{self.activation}_mul"
        for together in self.siblings:
            if together.pair and together.activation == epilogue and together.linears[0] is self.linears[0]:
                return together.product(x, epilogue)
        weight, bias = self._whole()
        if weight is not None and epilogue in EPILOGUES and len(weight) % (2 * GATE_ROWS) == 0:
            return ops.linear(x, weight, bias, activation=epilogue)
        gate, up = self.outputs(x) if len(self.linears) == 2 else self.outputs(x)[0].chunk(2, -1)
        return ACTIVATIONS[self.activation](gate) * up

    def _whole(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Float rows of all linears [N, K] and their biases, where they lie in one buffer."""
        if self.merged and self.kept is not None:
            return self.kept.weight(), self.kept.bias()
        only = self.linears[0]
        if len(self.linears) > 1 or isinstance(only, QuantizedLinear) or not float_weight(only).is_contiguous():
            return None, None
        return float_weight(only), only.bias


def normed(norm: Norm | None, linears: Linears, x: torch.Tensor) -> Any:
    """The norm of x, and linears of that: the one place where a norm and the matmul behind it can become one kernel."""
    n = x if norm is None else norm(x)
    return linears.activated(n) if linears.activation else linears.outputs(n)


# ---- attention, feedforward, layer ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Context:
    """What all layers of a step share. `rotations` holds cos and sin [B, T, R] of each kind of rotation."""

    cache: KVCache
    rotations: Rotations


@dataclasses.dataclass
class Attention:
    """qkv: query, key and value linears ("apart"), or one of all, in `order` "blocks" [q | k | v] or "groups" (per head of
    the cache: its queries, its key, its value)."""

    index: int
    qkv: Linears
    out: Linears
    order: str
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int = 0
    softcap: float = 0.0
    rotation: str | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    def split(self, outputs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q [B, T, H, D], k and v [B, T, G, D] out of the products of `qkv`, normed but not rotated."""
        h, g, d = self.heads, self.kv_heads, self.head_dim
        if self.order == "groups":
            grouped = outputs[0].unflatten(-1, (g, h // g + 2, d))
            q, k, v = grouped[..., :-2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]
        elif self.order == "blocks":
            q, k, v = outputs[0].unflatten(-1, (-1, d)).split([h, g, g], 2)
        else:
            q, k, v = (y.unflatten(-1, (-1, d)) for y in outputs)
        return self._normed(self.q_norm, q), self._normed(self.k_norm, k), v

    def _normed(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        if norm is None:
            return x
        if norm.module.weight.shape[0] == self.head_dim:
            return norm(x)
        return norm(x.flatten(2)).view(x.shape)  # over all heads at once

    def __call__(self, outputs: list[torch.Tensor], context: Context) -> torch.Tensor:
        """[B, T, H · D] of what the cache and the new tokens give."""
        q, k, v = self.split(outputs)
        layer = context.cache.layers[self.index]
        cos, sin = (None, None) if self.rotation is None else context.rotations[self.rotation]
        y = ops.kv_attention(
            q,
            k,
            v,
            layer.k_cache,
            layer.v_cache,
            context.cache.lengths,
            k_scale=layer.k_scale,
            v_scale=layer.v_scale,
            cos=cos,
            sin=sin,
            starts=context.cache.starts,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
        )
        return y.flatten(2)


@dataclasses.dataclass
class Feedforward:
    """down(act(up(x))); `up` has the activation itself where it is gated."""

    up: Linears
    down: Linears
    activation: str = ""

    def inner(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        if self.up.activation:
            return normed(norm, self.up, x)
        return ACTIVATIONS[self.activation](normed(norm, self.up, x)[0])


@dataclasses.dataclass
class Layer:
    """Attention and feedforward, each with a norm before and behind it or none; one after the other, or `parallel`."""

    attention: Attention
    feedforward: Feedforward
    before_attention: Norm | None
    after_attention: Norm | None
    before_feedforward: Norm | None
    after_feedforward: Norm | None
    parallel: bool = False
    multiplier: float = 1.0

    def __call__(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        given = x
        attended = self.attention(normed(self.before_attention, self.attention.qkv, x), context)
        x = self._add(self.attention.out, attended, self.after_attention, x)
        h = self.feedforward.inner(self.before_feedforward, given if self.parallel else x)
        return self._add(self.feedforward.down, h, self.after_feedforward, x)

    def _add(self, linears: Linears, h: torch.Tensor, norm: Norm | None, residual: torch.Tensor) -> torch.Tensor:
        """residual + multiplier · norm(linear(h))."""
        if norm is None and self.multiplier == 1.0:
            return linears(h, residual)
        y = linears(h) if norm is None else norm(linears(h))
        return torch.add(residual, y, alpha=self.multiplier)

    def linears(self) -> list[Linears]:
        return [self.attention.qkv, self.attention.out, self.feedforward.up, self.feedforward.down]
