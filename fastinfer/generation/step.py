"""DecodeStep: a causal language model's forward for a few tokens on a KVCache, in as few kernels as its parts allow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastinfer import ops
from fastinfer.errors import Unfusable
from fastinfer.generation import proof
from fastinfer.generation.parts import Context, Rotations, multiply
from fastinfer.generation.watch import Settings, Watch
from fastinfer.modules.embedding import Int8Embedding, rounded
from fastinfer.modules.kept import KeptSiblings
from fastinfer.rules import decoder as rule

if TYPE_CHECKING:
    from fastinfer.generation.cache import KVCache

MOST_TOKENS = 16


class DecodeStep:
    """Runs 1 … 16 new tokens of each row through a model, its own modules' weights and nothing of their forwards.

    A step allocates and launches the same for every call of one shape, reads nothing back from the device, and so can be
    captured in a CUDA graph (after one call outside of it, which makes the tables of angles).

    Attributes:
        decoder: the parts, as read from the model
        epoch:   counts up whenever weights were found in another place in memory: what was captured before is void
        limit:   positions that the model has embeddings for, None where they are computed

    >>> step = DecodeStep.of(model)
    >>> logits = step(ids, cache); cache.lengths += ids.shape[1]; cache.advance(ids.shape[1])
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.epoch = 0
        self._kept: list[KeptSiblings] | None = None
        self._read()

    @classmethod
    def of(cls, model: nn.Module) -> DecodeStep:
        """The step of a model, found by its structure; nothing is changed. Raises Unfusable with the reason."""
        return cls(model)

    @classmethod
    def proven(cls, model: nn.Module, merge: bool) -> tuple[DecodeStep | None, str]:
        """The step of a model after its proof, with float linears merged or not; and in words what came of it."""
        try:
            step = cls(model)
        except Unfusable as error:
            return None, f"not fused: {error}"
        reason: str | None = "interrupted"
        try:
            if merge:
                step.merge()
            reason = step.prove()
        finally:
            if reason is not None:
                step.release()
        return (step, str(step)) if reason is None else (None, f"not fused: {reason}")

    def __str__(self) -> str:
        return f"fused, {len(self.decoder.layers)} layers"

    def _read(self) -> None:
        try:
            self.decoder = rule.read(self.model)
            self._factors = _factors(self.decoder.embedding, self.decoder.factor)
        except Unfusable:
            raise
        except Exception as error:  # of a structure that nobody foresaw; the model works without the step
            raise Unfusable(f"its structure cannot be read: {type(error).__name__}: {error}") from error
        if self._kept is not None:
            self.merge()
        self.watch = Watch(self.model)
        self._settings = self._read_settings()

    def _read_settings(self) -> Settings:
        """What changes the model's own forward besides weights and modules: a norm's epsilon, the number of layers, the kind
        of attention (sdpa leaves a softcap out)."""
        rotary = None if self.decoder.rotation is None else self.decoder.rotation.module
        return Settings([self.model.config.get_text_config(), *self.model.modules()], rotary)

    def __getstate__(self) -> dict:
        """A copy or a pickle holds the model, and reads it again when it is complete."""
        return {"model": self.model, "epoch": self.epoch, "_kept": self._kept}

    def __getattr__(self, name: str) -> Any:
        if name in ("decoder", "watch") and "model" in vars(self):
            self._read()
            return vars(self)[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def limit(self) -> int | None:
        return None if self.decoder.positions is None else self.decoder.positions.count

    # ---- weights ----------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Brings float linears that take one input into one buffer, their Parameters slices of it (`KeptSiblings`)."""
        merged = [kept for linears in self.decoder.linears() if (kept := linears.merge_kept()) is not None]
        known = {id(linear) for kept in merged for linear in kept.linears}
        self._kept = merged + [kept for kept in self._kept or [] if id(kept.linears[0]) not in known]
        self.watch = Watch(self.model)

    def release(self) -> None:
        """Undoes `merge`: every Parameter gets memory of its own. The step is not to be used any more."""
        for kept in self._kept or []:
            kept.part()
        self._kept = None

    def stale(self) -> str | None:
        """Why the step does not stand for the model as it is now, or None. Follows weights and settings."""
        reason = self.watch.changed()
        if reason is None and torch.is_autocast_enabled(self.decoder.embedding.weight.device.type):
            reason = "autocast is on"
        if reason is not None or not (self.watch.moved() or self._settings.changed()):
            return reason
        try:
            self._read()
        except Unfusable as error:
            return str(error)
        self.epoch += 1
        return None

    def prove(self) -> str | None:
        """How the step differs from the model's own forward, or None: prefill, cached steps, padding, windows."""
        return proof.prove(self)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits of new tokens, whose keys and values go into the cache at its lengths; the lengths stay.

        Args:
            ids:   [B, T] int64, T from 1 to 16
            cache: holds B rows, with room for T more positions in each
        Returns: [B, T, V] in the model's dtype
        Raises:  ValueError for ids that do not fit
        """
        if ids.dim() != 2 or not 0 < ids.shape[1] <= MOST_TOKENS or cache.lengths is None:
            raise ValueError(
                f"ids must be [B, 1 … {MOST_TOKENS}] beside a cache with content, got {list(ids.shape)} and {cache!r}"
            )
        decoder = self.decoder
        x, rotations = self._embed(ids, cache)
        context = Context(cache, rotations)
        for layer in decoder.layers:
            x = layer(x, context)
        if decoder.norm is not None:
            x = decoder.norm(x)
        if decoder.project_out is not None:
            x = decoder.project_out(x)
        return self._logits(x)

    def _embed(self, ids: torch.Tensor, cache: KVCache) -> tuple[torch.Tensor, Rotations]:
        """x [B, T, K] and the angles of each kind of rotation, at positions lengths − starts + t."""
        decoder = self.decoder
        inner, outer = self._factors
        operands = _operands(decoder.embedding) | {"factor": inner}
        ids = ids.contiguous()
        rotations: Rotations = {}
        if decoder.rotation is None:
            x, _, _ = ops.embed(ids, **operands)
        else:
            cos, sin = decoder.rotation.tables(cache.capacity)
            at = {"cos": cos, "sin": sin, "lengths": cache.lengths, "starts": cache.starts}
            x, cos, sin = ops.embed(ids, **operands, **at)
            rotations = decoder.rotation.by_kind(cos, sin)
        if outer != 1.0:
            x = x * outer
        if decoder.project_in is not None:
            x = multiply(decoder.project_in.linears[0], x)
        if decoder.positions is not None:
            at = _positions(cache.lengths, cache.starts, ids.shape[1])
            x = x + nn.functional.embedding(at + decoder.positions.offset, decoder.positions.table.weight)
        return x, rotations

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        decoder = self.decoder
        logits = decoder.head(x)
        if decoder.divisor != 1.0:
            logits = logits / decoder.divisor
        if decoder.scale != 1.0:
            logits = logits * decoder.scale
        if decoder.softcap:
            logits = torch.tanh(logits / decoder.softcap) * decoder.softcap
        return logits


def _factors(embedding: nn.Embedding, factor: float) -> tuple[float, float]:
    """A factor on an embedding's rows as that for `ops.embed`, which rounds it to their dtype, and one for what it gives."""
    if isinstance(embedding, Int8Embedding):
        return embedding.factor, factor
    held = rounded(factor, embedding.weight.dtype) == factor
    return (factor, 1.0) if held else (1.0, factor)


def _operands(embedding: nn.Embedding) -> dict[str, Any]:
    """An embedding's rows as `ops.embed` takes them."""
    if not isinstance(embedding, Int8Embedding):
        return {"w": embedding.weight}
    scaled = {"w_scale": embedding.weight_scale, "out_dtype": embedding.compute_dtype}
    return {"w": embedding.weight, "layout": embedding.layout, **scaled}


def _positions(lengths: torch.Tensor, starts: torch.Tensor | None, count: int) -> torch.Tensor:
    """Positions [B, T] of new tokens in their texts: lengths − starts + t."""
    at = (lengths if starts is None else lengths - starts)[:, None]
    return at if count == 1 else at + torch.arange(count, dtype=at.dtype, device=at.device)
