"""Proof of a decode step: it runs against the model's own forward, on one cache, and must give the same logits.

Structure can lie (a rotation of other pairs, a gate that a name does not tell), so that no step is used unproven. How far
two right computations may be apart is measured on the model itself: its forward with and without a cache, which differ in
rounding alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinfer.generation.cache import KVCache
from fastinfer.generation.cache_layer import round_up

if TYPE_CHECKING:
    from fastinfer.generation.step import DecodeStep

PROMPT = 12
STEPS = (1, 1, 3)
PADDING = (0, 5)
WINDOWED = range(2)
NOISE = 3.0
FLOOR = 6.0
LEAST = 1e-5
COARSE = 2e-2
"""A step may differ by so many times the model's own noise, or roundings of its dtype, whichever is more; in fp32, where any
lie shows, by LEAST, or with int8 activations, where a rounding can move a code by a whole step, by COARSE. Measured on tiny
models of 2 and 12 layers in bf16: right steps are up to 0.021 apart where the noise is up to 0.019; without rotation, head
norms or the right activation they are 0.09 to 1.1 apart."""


def prove(step: DecodeStep) -> str | None:
    """Why the step is not the model's forward, or None."""
    model = step.model
    with torch.no_grad(), _quiet(model):
        reason = step.watch.changed()
        if reason is not None:
            return reason
        try:
            noise, reason = _padded(step)
            return reason or _windows(step, noise)
        except Exception as error:  # whatever it is, the model works without the step
            return f"it cannot be tried: {type(error).__name__}: {error}"


def _padded(step: DecodeStep) -> tuple[float, str | None]:
    """A padded batch: prefill by the model, then steps of one token and of several; no padding, the first row alone.

    The model's own noise, and how the step differs, or None.
    """
    model, total = step.model, PROMPT + sum(STEPS)
    ids = _random_ids(model, len(PADDING), total)
    mask = torch.ones_like(ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    plain, noise = _forward(model, ids, mask), 0.0
    for rows in (slice(None), slice(0, 1)):
        cache = KVCache()
        cache.set_padding(mask[rows, :PROMPT])
        _forward(model, ids[rows, :PROMPT], mask[rows, :PROMPT], cache)
        at = PROMPT
        for count in STEPS:
            new, seen = ids[rows, at : at + count], mask[rows, : at + count]
            got = _step(step, new, cache)
            want = _forward(model, new, seen, cache)  # over what the step has written
            noise = max(noise, _error(plain[rows, at : at + count], want))
            reason = _compare(
                step, got, want, noise, f"{count} new beside {at} tokens" + (", padded" if len(new) > 1 else "")
            )
            if reason is not None:
                return noise, reason
            at += count
    return noise, None


def _windows(step: DecodeStep, noise: float) -> str | None:
    """Past each sliding window, in a cache of random keys and values, which is cheaper than a long prompt."""
    model = step.model
    reached = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    windows = {layer.attention.window for layer in step.decoder.layers} - {0}
    for window in sorted(w for w in windows if w < reached):
        ids = _random_ids(model, 1, 2 + len(WINDOWED))
        cache = KVCache()
        _forward(model, ids[:, :2], torch.ones_like(ids[:, :2]), cache)
        _fill(cache, window)
        for i in WINDOWED:
            new = ids[:, 2 + i : 3 + i]
            got = _step(step, new, cache)
            want = _forward(model, new, ids.new_ones(1, cache.filled + 1), cache)
            reason = _compare(step, got, want, noise, f"{i + 1} past a window of {window}")
            if reason is not None:
                return reason
    return None


def _fill(cache: KVCache, positions: int) -> None:
    """Gives a cache random keys and values, in buffers that layers of one shape share: each is done when the next begins."""
    shared: dict[torch.Size, list[torch.Tensor]] = {}
    capacity = round_up(positions + len(WINDOWED))
    generator = torch.Generator(cache.layers[0].k_cache.device).manual_seed(1)
    for layer in cache.layers:
        b, g, _, d = layer.k_cache.shape
        if layer.k_cache.shape not in shared:
            made = [layer.k_cache.new_empty(b, g, capacity, d).normal_(generator=generator) for _ in range(2)]
            shared[layer.k_cache.shape] = made
        layer.k_cache, layer.v_cache = shared[layer.k_cache.shape]
    cache.reserve(capacity)
    cache.advance(positions - cache.filled)
    cache.set_lengths()


def _step(step: DecodeStep, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
    cache.reserve(cache.filled + ids.shape[1])
    return step(ids, cache)


def _least(step: DecodeStep) -> float:
    linears = [linear for one in step.decoder.linears() for linear in one.linears]
    return COARSE if any(getattr(linear, "activations", "keep") == "int8" for linear in linears) else LEAST


def _compare(step: DecodeStep, got: torch.Tensor, want: torch.Tensor, noise: float, where: str) -> str | None:
    error = _error(got, want)
    if error <= max(NOISE * noise, FLOOR * torch.finfo(want.dtype).eps, _least(step)):
        return None
    return f"logits differ from the model's own by {error:.1e} ({where})"


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest distance of a token's logits, relative to theirs."""
    distance = (got.float() - want.float()).norm(dim=-1) / want.float().norm(dim=-1).clamp_min(1e-30)
    return distance.max().item()


def _random_ids(model: Any, rows: int, length: int) -> torch.Tensor:
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, embedding.num_embeddings, (rows, length), generator=generator)
    return ids.to(embedding.weight.device)


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
    """The model's own logits of ids, the last ones under mask [B, positions]."""
    known = inspect.signature(type(model).forward).parameters
    at = (mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    given: dict[str, Any] = {"position_ids": at} if "position_ids" in known else {}
    given["cache" if "cache" in known else "past_key_values"] = cache
    return model(input_ids=ids, attention_mask=mask, use_cache=cache is not None, **given).logits


@contextlib.contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without autocast."""
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device.type
    try:
        for module in training:
            module.training = False
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
