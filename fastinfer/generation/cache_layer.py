"""The layers of a KVCache: buffers that grow in blocks, and what transformers calls on a layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from fastinfer.errors import CacheError
from fastinfer.ops import int8_quantize
from fastinfer.ops._common import describe
from fastinfer.ops.kv_attention import hadamard, transform_size

BUFFERS = ("k_cache", "v_cache", "k_scale", "v_scale")
BLOCK = 256  # positions by which buffers grow
MOST_GROWTH = 4096
"""Where doubling ends: a step reads the whole cache anyway, so that a copy in so many steps is nothing."""


def round_up(positions: int) -> int:
    return -(-positions // BLOCK) * BLOCK


class Shared:
    """What all layers of a cache have in common. Layers hold this and not their cache: a cycle would keep its memory."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.filled = 0
        self.lengths: torch.Tensor | None = None
        self.starts: torch.Tensor | None = None
        self._padding: torch.Tensor | None = None  # where `starts` was last

    def make_room(self, positions: int) -> None:
        """Raises the capacity for appending; each layer follows as it is written."""
        if positions > self.capacity:
            self.capacity = round_up(max(positions, self.capacity + min(self.capacity, MOST_GROWTH)))

    def hold(self, filled: int) -> None:
        self.filled = filled
        if self.lengths is not None:
            self.lengths.fill_(filled)

    def size(self, batch: int, device: torch.device) -> None:
        if self.lengths is None or len(self.lengths) != batch or self.lengths.device != device:
            with torch.inference_mode(False):  # a tensor made in inference mode cannot be written outside of it
                self.lengths = torch.full((batch,), self.filled, dtype=torch.int32, device=device)

    def pad(self, starts: torch.Tensor | None) -> None:
        if starts is None:
            self.starts = None
            return
        at = self._padding
        if at is None or at.shape != starts.shape or at.device != starts.device:
            with torch.inference_mode(False):
                self._padding = starts.clone()
        else:
            at.copy_(starts)  # at the same address, which a captured graph may hold
        self.starts = self._padding


class Stored(torch.autograd.Function):
    """What the cache returns where gradients are recorded: a forward works, a backward through it says why it cannot."""

    @staticmethod
    def forward(ctx, new: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
        return stored.clone()  # a view would be written by the next step

    @staticmethod
    def backward(ctx, *grads):
        raise CacheError("KVCache holds no gradients: train without a cache, or with transformers' DynamicCache")


class KVCacheLayer(CacheLayerMixin):
    """Keys and values of one attention layer, LAYOUTS.md#kv-cache. A sliding layer keeps all: the window is the mask's.

    `k_cache` and `v_cache` are [B, G, L, D] in the dtype of the keys or int8, `k_scale` and `v_scale` [B, G, L] fp32
    beside int8, whose keys are transformed; all None before the first `update`. Positions from `filled` on are not
    initialised.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, kind: str, shared: Shared) -> None:  # not the base's: keys and values are properties here
        self.kind, self.shared = kind, shared
        self.is_initialized = False
        self.filled = 0
        self.dtype: torch.dtype | None = None  # that of the keys: what int8 is dequantised to
        self.k_cache: Any = None
        self.v_cache: Any = None
        self.k_scale: Any = None
        self.v_scale: Any = None
        self.transform: Any = None  # [n, n], fp32: what int8 keys were multiplied by

    # ---- what a forward calls ---------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allots buffers of the cache's capacity for rows, heads and dtype as those of [B, G, T, D] keys and values."""
        self.is_initialized = False
        self.k_cache = self.v_cache = self.k_scale = self.v_scale = None  # the old ones go first
        self.dtype = key_states.dtype
        with torch.inference_mode(False):
            for side, states in (("k", key_states), ("v", value_states)):
                b, g, _, d = states.shape
                shape = (b, g, self.shared.capacity)
                dtype = torch.int8 if self.kind == "int8" else self.dtype
                setattr(self, f"{side}_cache", torch.empty(*shape, d, dtype=dtype, device=states.device))
                if self.kind == "int8":
                    setattr(self, f"{side}_scale", torch.empty(shape, dtype=torch.float32, device=states.device))
            if self.kind == "int8":
                self.transform = hadamard(torch.eye(transform_size(key_states.shape[3]), device=key_states.device))
        if self.shared.lengths is None or len(self.shared.lengths) != len(key_states):
            self.shared.size(len(key_states), key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [B, G, T, D] keys (rotated already) and values; returns all so far, [B, G, filled, D].

        They are views for "keep" and what the codes stand for with "int8", of the new tokens too.
        """
        self._check(key_states, value_states)
        end = self.filled + key_states.shape[2]
        self.shared.make_room(end)
        if not (self.is_initialized and self._fits(key_states, value_states)):
            self.lazy_initialization(key_states, value_states)
        self.grow()
        new_keys = key_states if self.transform is None else hadamard(key_states.detach().float())
        self._write(new_keys, self.k_cache, self.k_scale)
        self._write(value_states, self.v_cache, self.v_scale)
        self.filled = end
        if end > self.shared.filled:  # the first layer of a forward; with layers on several devices, lengths is on its
            self.shared.size(len(key_states), key_states.device)
            self.shared.hold(end)
        keys, values = self.keys, self.values
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            keys, values = Stored.apply(key_states, keys), Stored.apply(value_states, values)
        return keys, values

    @property
    def keys(self) -> torch.Tensor | None:
        """[B, G, filled, D]: a view, or dequantised."""
        return self._read(self.k_cache, self.k_scale, self.transform)

    @property
    def values(self) -> torch.Tensor | None:
        return self._read(self.v_cache, self.v_scale)

    def get_seq_length(self) -> int:
        return self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_max_length(self) -> int:
        return -1  # it grows

    # ---- what generation calls between forwards ---------------------------------------------------------------------

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last −tokens_to_remove positions. A positive number, once the length to keep, is refused."""
        check_crop(tokens_to_remove, self.filled if self.is_initialized else None)
        if self.is_initialized:
            self.keep(self.filled + tokens_to_remove)

    def keep(self, positions: int) -> None:
        """Forgets what lies beyond so many positions."""
        self.filled = min(self.filled, positions)
        if self.shared.filled > positions:
            self.shared.hold(positions)

    def reset(self) -> None:
        """Forgets everything; the buffers stay for the next use."""
        self.keep(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._take(torch.arange(len(self.k_cache), device=self.k_cache.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._take(torch.arange(len(self.k_cache), device=self.k_cache.device)[indices])

    def offload(self) -> None:
        raise CacheError("KVCache cannot be offloaded: its buffers stay where attention reads them")

    prefetch = offload

    # ---- buffers ----------------------------------------------------------------------------------------------------

    def grow(self) -> None:
        """Moves the contents to buffers of the cache's capacity, if these are smaller; one buffer at a time."""
        for name in BUFFERS:
            old = getattr(self, name)
            if old is None or old.shape[2] >= self.shared.capacity:
                continue
            with torch.inference_mode(False):
                new = old.new_empty(*old.shape[:2], self.shared.capacity, *old.shape[3:])
            new[:, :, : self.filled] = old[:, :, : self.filled]
            setattr(self, name, new)

    def _take(self, rows: torch.Tensor) -> None:
        """Makes row i that of rows[i]; in place where there are as many, so that the buffers keep their addresses."""
        for name in BUFFERS:
            old = getattr(self, name)
            if old is None:
                continue
            rows = rows.to(old.device)
            if len(rows) == len(old):
                filled = old[:, :, : self.filled]
                filled.copy_(filled.index_select(0, rows))
            else:
                with torch.inference_mode(False):
                    setattr(self, name, old.index_select(0, rows))
        if self.shared.lengths is not None:
            self.shared.size(len(self.k_cache), self.shared.lengths.device)

    def _write(self, new: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None) -> None:
        new = new.detach()
        at = slice(self.filled, self.filled + new.shape[2])
        if scales is not None:
            new, scales[:, :, at] = int8_quantize(new)
        cache[:, :, at] = new

    def _read(
        self, cache: torch.Tensor | None, scales: torch.Tensor | None, transform: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        if cache is None:
            return None
        stored = cache[:, :, : self.filled]
        if scales is None:
            return stored
        scales = scales[:, :, : self.filled, None]
        if transform is not None:  # sums of codes are exact, in any order and in TF32 too; `out` keeps autocast away
            codes = stored.float().unflatten(-1, (-1, len(transform)))
            stored = torch.matmul(codes, transform, out=torch.empty_like(codes)).flatten(-2)
            scales = scales / len(transform)
        # one pass, rounded once: the product in fp32 never lies in memory
        wide = torch.empty(stored.shape, dtype=self.dtype, device=stored.device)
        return torch.mul(stored, scales, out=wide)

    def _fits(self, key_states: torch.Tensor, value_states: torch.Tensor) -> bool:
        return self.dtype == key_states.dtype and all(
            (*new.shape[:2], new.shape[3], new.device) == (*old.shape[:2], old.shape[3], old.device)
            for new, old in ((key_states, self.k_cache), (value_states, self.v_cache))
        )

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if key_states.dim() != 4 or not key_states.is_floating_point():
            raise CacheError(f"KVCache: key_states must be [B, G, T, D] floating point, got {describe(key_states)}")
        if self.kind == "int8" and key_states.dtype == torch.float64:
            raise CacheError('KVCache: key_states must be fp32|bf16|fp16 for kind="int8", got float64')
        if value_states.shape[:3] != key_states.shape[:3] or value_states.dtype != key_states.dtype:
            raise CacheError(
                f"KVCache: value_states must be [B, G, T, ·] beside key_states {describe(key_states)}, "
                f"got {describe(value_states)}"
            )
        if self.filled and not self._fits(key_states, value_states):
            b, g, _, d = self.k_cache.shape
            raise CacheError(
                f"KVCache: key_states must be {str(self.dtype).removeprefix('torch.')} [{b}, {g}, T, {d}] on "
                f"{self.k_cache.device} beside the {self.filled} positions that are held, got {describe(key_states)} on "
                f"{key_states.device}. For other rows, call batch_repeat_interleave, batch_select_indices or reset first"
            )
        starts = self.shared.starts
        if starts is not None and len(starts) != len(key_states):
            raise CacheError(
                f"KVCache: key_states must have {len(starts)} rows, as the mask given to set_padding, "
                f"got {describe(key_states)}"
            )


def check_crop(tokens_to_remove: int, filled: int | None) -> None:
    if tokens_to_remove > 0 or (filled is not None and -tokens_to_remove > filled):
        raise CacheError(
            f"KVCache: tokens_to_remove must be −(positions to forget), {-(filled or 0)} … 0, got {tokens_to_remove}"
        )
