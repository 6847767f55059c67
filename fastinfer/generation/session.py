"""What one number of rows decodes with: a cache, the buffers that a step reads and writes, its captured steps."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch

from fastinfer import ops
from fastinfer.generation.cache import KVCache
from fastinfer.generation.cache_layer import BUFFERS
from fastinfer.generation.graphs import Recorder, Step
from fastinfer.generation.mail import Mail
from fastinfer.generation.sampling import Settings

STEPS = 8  # captured steps that a session keeps: one for each set of sampling settings, say
SMALLEST = 256


def bucket(positions: int) -> int:
    """The capacity for so many positions: a power of two, so that calls of similar lengths share their steps."""
    return max(SMALLEST, 1 << (positions - 1).bit_length())


class Session:
    """Buffers that stay for all calls with as many rows. A step is a function of them alone, so that it can be captured.

    cache:    keys and values; they grow
    ids:      [B, 1] int64, the tokens that the next step takes
    history:  [most, B] int64, the tokens made in this call
    made:     one int64, how many these are: where the next ones go
    offset:   one int64, what `ops.sample` counts draws with: the same number
    seed:     one int64
    finished: [B] bool, rows that get padding from here on
    seen:     [B, V] bool, the tokens that a repetition penalty counts, or None before the first call with one
    """

    def __init__(
        self,
        cache: KVCache,
        most: int,
        rows: int,
        device: torch.device,
        mail: Callable[[torch.Tensor], Mail],
        recorder: Recorder | None,
    ):
        self.cache, self.recorder = cache, recorder
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.history = torch.zeros(most, rows, dtype=torch.int64, device=device)
        self.made = torch.zeros(1, dtype=torch.int64, device=device)
        self.offset = torch.zeros(1, dtype=torch.int64, device=device)
        self.uncounted = torch.zeros(rows, dtype=torch.int32, device=device)  # in place of lengths, beside the prompt's
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)
        self.seen: torch.Tensor | None = None
        self.mail = mail(self.history)
        self.steps: OrderedDict[Hashable, Step] = OrderedDict()
        self.addresses: tuple = ()

    def start(self, draws: bool, seen: torch.Tensor | None) -> None:
        """Sets all buffers for a new call, once the prompt is in the cache."""
        self.made.zero_()
        self.offset.zero_()
        self.finished.zero_()
        if draws:
            self.seed.random_()  # from the device's generator, which torch.manual_seed seeds
        if seen is not None and self.seen is not None and self.seen.shape == seen.shape:
            self.seen.copy_(seen)
        elif seen is not None:
            self.seen = seen
        addresses = self._addresses(self.cache)
        if addresses != self.addresses:
            self.steps.clear()
            self.addresses = addresses

    def grow(self) -> None:
        """Makes twice the room for keys and values. What was captured is void: they have moved."""
        self.mail.settle()
        self.cache.reserve(2 * self.cache.capacity)
        self.steps.clear()
        self.addresses = self._addresses(self.cache)

    @staticmethod
    def _addresses(cache: KVCache) -> tuple:
        tensors = [getattr(layer, name) for layer in cache.layers for name in BUFFERS]
        return tuple(None if t is None else t.data_ptr() for t in [*tensors, cache.lengths])

    def step(self, key: Hashable, work: Callable[[Session], Any]) -> Step:
        """The captured step of that key, or a new one that does `work`; the ones that were not used for longest go."""
        starts = self.cache.starts
        key = (key, None if starts is None else starts.data_ptr())
        found = self.steps.pop(key, None)
        self.steps[key] = found = Step(work, self.recorder) if found is None else found
        while len(self.steps) > STEPS:
            self.steps.popitem(last=False)
        return found

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int32, the positions that the cache has filled, on the device."""
        assert self.cache.lengths is not None, "a cache without content"
        return self.cache.lengths

    # ---- caches of callers ------------------------------------------------------------------------------------------

    def load(self, theirs: KVCache) -> None:
        """Takes the contents of a caller's cache."""
        if not copy_contents(theirs, self.cache):
            capacity = self.cache.capacity
            self.cache = copy.deepcopy(theirs)
            self.cache.reserve(capacity)
        self.cache.pad_as(theirs)

    def unload(self, theirs: KVCache, filled: int, new: int) -> None:
        """Appends to a caller's cache, which has `filled` positions, as many new ones; more that were made are dropped."""
        self.cache.crop(filled + new - self.cache.filled)
        copy_contents(self.cache, theirs, filled)

    # ---- what a step does -------------------------------------------------------------------------------------------

    def choose(self, logits: torch.Tensor, settings: Settings) -> torch.Tensor:
        """The next tokens of logits [B, V]."""
        penalised = settings.repetition_penalty != 1
        return settings.sample(logits, self.seed, self.offset, self.seen if penalised else None)

    def take(
        self, tokens: torch.Tensor, settings: Settings, eos: torch.Tensor | None, pad: int, stepped: bool = True
    ) -> None:
        """Puts tokens where the next step and the host find them; with `eos`, finished rows get `pad`.

        stepped: they come from a step, whose positions are counted with them; else from the prompt
        """
        if eos is not None:
            tokens = tokens.masked_fill(self.finished, pad)
            self.finished.logical_or_((tokens[:, None] == eos).any(1))
        if settings.repetition_penalty != 1 and self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        lengths = self.lengths if stepped else self.uncounted
        ops.advance(tokens, self.ids, lengths, self.offset, self.history, self.made)

    # ---- what the host mends ----------------------------------------------------------------------------------------

    def finish(self, done: list[bool], pad: int, steps: range) -> None:
        """Marks rows as finished that the device does not know of, and pads what it has made for them since.

        It may have finished others meanwhile, of which the host does not know: these stay so, and keep their eos token.
        """
        rows = torch.tensor(done, device=self.finished.device)
        self.finished.logical_or_(rows)
        for i in steps:
            self.history[i].masked_fill_(rows, pad)
        if steps:
            self.ids.masked_fill_(rows[:, None], pad)


def copy_contents(source: KVCache, target: KVCache, first: int = 0) -> bool:
    """Makes target's contents those of source, of which it has the `first` positions already; False where it cannot."""
    target.reserve(source.filled)
    if len(source.layers) != len(target.layers):
        return False
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(source.layers, target.layers, strict=True)
        for name in BUFFERS
    ]
    if not all(a is b is None or (a is not None and b is not None and _alike(a, b)) for a, b in pairs):
        return False
    for a, b in pairs:
        if a is not None:
            b[:, :, first : source.filled] = a[:, :, first : source.filled]
    target.crop(-target.filled)
    target.advance(source.filled)
    target.set_lengths()
    return True


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape[:2], a.shape[3:], a.dtype, a.device) == (b.shape[:2], b.shape[3:], b.dtype, b.device)
