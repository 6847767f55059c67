"""A transformers cache in the layout that kv_attention reads, in the model's dtype or in int8."""

from __future__ import annotations

from functools import partial

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from fastinfer.errors import CacheError
from fastinfer.generation.cache_layer import KVCacheLayer, Shared, check_crop, round_up
from fastinfer.ops._common import describe

KINDS = ("keep", "int8")
# A "dummy" stores nothing: it has no attention, or that of another layer.
LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention", "dummy")


class KVCache(Cache):
    """A model's keys and values in the layout that kv_attention reads, to be given to a model or to `generate`.

    >>> cache = fastinfer.KVCache(kind="int8")
    >>> model.generate(**inputs, past_key_values=cache)  # `cache=cache` in newer versions of transformers

    Buffers are static and grow in blocks of 256 positions. Rows are padded on the left, so that all hold as many.
    Sliding layers keep all positions: the window is the mask's. An encoder-decoder model takes it for its self-attention,
    as `EncoderDecoderCache(KVCache(), DynamicCache())`, never alone.

    Args:
        config:   a model's configuration, which tells the layers and refuses those that are no attention (state spaces);
                  None: layers are made as the model writes them
        kind:     "keep": the dtype of the model's keys; "int8": a scale a token and head, half the bytes of bf16
        capacity: positions to have room for from the start, rounded up to a block; more are added when they are needed
    Shapes:  of each of `layers`: k_cache, v_cache [B, G, L, D]; k_scale, v_scale [B, G, L] fp32 beside int8, else None.
             `lengths` [B] int32 on the device, the positions filled, one tensor for all layers; None before the first
             update. `starts` [B] int32, the first position that counts, or None for 0
    Raises:  CacheError for what does not fit or is not supported (offloading, gradients through the cache, another
             batch while there is content); nothing has changed then
    """

    def __init__(self, config: PreTrainedConfig | None = None, *, kind: str = "keep", capacity: int = 0) -> None:
        if kind not in KINDS:
            raise CacheError(f"KVCache: kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        check_positions("capacity", capacity)
        count = 0 if config is None else attention_layers(config)
        self.kind, self._shared = kind, Shared(round_up(capacity))
        super().__init__(layers=[KVCacheLayer(kind, self._shared) for _ in range(count)])
        self.layer_class_to_replicate = partial(KVCacheLayer, kind, self._shared)

    def __repr__(self) -> str:
        return f"KVCache(kind={self.kind!r}, layers={len(self)}, filled={self.filled}, capacity={self.capacity})"

    def __iter__(self):
        """Keys, values and no window of each layer, as DynamicCache gives them."""
        for layer in self.layers:
            yield layer.keys, layer.values, None

    @property
    def capacity(self) -> int:
        """L, the positions that there is room for; the same in all layers after a forward or `reserve`."""
        return self._shared.capacity

    @property
    def filled(self) -> int:
        """How many positions are filled, as the host knows."""
        return self._shared.filled

    @property
    def lengths(self) -> torch.Tensor | None:
        """[B] int32 on the device: what kv_attention reads. The same tensor until the number of rows or device changes."""
        return self._shared.lengths

    @property
    def starts(self) -> torch.Tensor | None:
        """[B] int32, the first position of each row that counts, or None for 0."""
        return self._shared.starts

    @property
    def batch_size(self) -> int:
        return -1 if self.lengths is None else len(self.lengths)

    # ---- for the loop -----------------------------------------------------------------------------------------------

    def reserve(self, positions: int) -> None:
        """Makes room for so many positions, rounded up to a block, in all layers. The contents stay; buffers may move."""
        check_positions("positions", positions)
        self._shared.capacity = max(self.capacity, round_up(positions))
        for layer in self.layers:
            layer.grow()

    def advance(self, n: int) -> None:
        """Counts n more positions on the host, of a step that wrote them; `lengths` is the step's own to advance."""
        check_positions("n", n)
        if self.filled + n > self.capacity:
            raise CacheError(
                f"KVCache: n must be at most {self.capacity - self.filled}, the room left in {self.capacity} positions, "
                f"got {n}"
            )
        self._shared.filled += n
        for layer in self.layers:
            layer.filled += n if layer.is_initialized else 0

    def set_lengths(self) -> None:
        """Writes the host's count to the device."""
        self._shared.hold(self.filled)

    def set_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Takes `starts` from a [B, positions] mask that is padded on the left; None, or no padding: all count.

        Waits for the device: a mask with holes or padding on the right, which `starts` cannot say, is an error.
        """
        if attention_mask is None:
            self._shared.pad(None)
            return
        if attention_mask.dim() != 2 or self.batch_size not in (-1, len(attention_mask)):
            rows = "B" if self.batch_size == -1 else self.batch_size
            raise CacheError(
                f"KVCache: attention_mask must be [{rows}, positions] or None, got {describe(attention_mask)}"
            )
        seen = attention_mask != 0
        padding = (~seen).sum(1, dtype=torch.int32)
        broken, padded = torch.stack([(seen[:, :-1] & ~seen[:, 1:]).any(), padding.any()]).tolist()
        if broken:
            raise CacheError("KVCache: attention_mask must be padded on the left alone: 0 … 0 1 … 1 in each row")
        self._shared.pad(padding if padded else None)

    def pad_as(self, other: KVCache) -> None:
        """Takes the padding of another cache of as many rows."""
        self._shared.pad(other.starts)

    # ---- transformers' interface ------------------------------------------------------------------------------------

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # it grows; before the first layer is there too

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last −tokens_to_remove positions of all layers; a positive number is refused."""
        check_crop(tokens_to_remove, self.filled)
        kept = self.filled + tokens_to_remove
        for layer in self.layers:
            layer.keep(kept)

    def reset(self) -> None:
        """Forgets everything, the padding too; the buffers stay, and any number of rows may come next."""
        super().reset()
        self._shared.hold(0)
        self._shared.pad(None)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take_starts(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.starts is not None:
            rows = torch.arange(len(self.starts), device=self.starts.device)
            self._take_starts(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        if self.starts is not None:
            self._take_starts(torch.arange(len(self.starts), device=self.starts.device)[indices])

    def _take_starts(self, rows: torch.Tensor) -> None:
        if self.starts is not None:
            self._shared.pad(self.starts.index_select(0, rows.to(self.starts.device)))

    def offload(self, layer_idx: int, only_non_sliding: bool = True) -> None:
        raise CacheError("KVCache cannot be offloaded: its buffers stay where attention reads them")

    prefetch = offload


def attention_layers(config: PreTrainedConfig) -> int:
    """How many layers a cache of the model has; an error where some are no attention over all tokens."""
    if not isinstance(config, PreTrainedConfig):
        raise CacheError(f"KVCache: config must be a transformers configuration or None, got {type(config).__name__}")
    types = get_layer_types_and_kwargs(config.get_text_config(decoder=True))[0]
    others = sorted({kind for kind in types if kind not in LAYER_TYPES})
    if others:
        raise CacheError(
            f"KVCache: config must have layers of attention over keys and values alone, got {', '.join(others)}: "
            "use transformers' DynamicCache(config=…)"
        )
    return len(types)


def check_positions(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise CacheError(f"KVCache: {name} must be a whole number of positions, 0 or more, got {value!r}")
