"""Models that generate, and devices of the CPU that behave as a GPU does: one step late, with captured steps."""

from __future__ import annotations

import copy

import architectures
import torch
from architectures import build
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerFast

import fastinfer
from fastinfer.generation import engine as engines
from fastinfer.generation.mail import Mail

PROMPT = 9


def long(monkeypatch, name: str, dtype: torch.dtype = torch.float32, positions: int = 256):
    """A tiny model with room for so many positions that never stops by itself."""
    for table in (architectures.SMALL, architectures.GROUPED):
        monkeypatch.setitem(table, "max_position_embeddings", positions)
    model = build(name, dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def prompts(rows: int, padded: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 131, (rows, PROMPT), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : 4 * (row + 1) % 9] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


class LateMail(Mail):
    """Tokens reach the host one step late, as on a GPU; those of a step that was not posted cannot be read."""

    lag = 1

    def __init__(self, history):
        super().__init__(history)
        self.slots: dict[int, torch.Tensor] = {}

    def post(self, i):
        self.slots[i % 2] = self.history[i].clone()

    def fetch(self, i):
        return self.slots[i % 2].clone()


class Log(TorchDispatchMode):
    """The operations that run, with shapes and plain arguments, and the addresses of tensors from outside."""

    def __init__(self):
        super().__init__()
        self.calls, self.made = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        flat = torch.utils._pytree.tree_flatten((args, kwargs))[0]
        self.calls.append((str(func), *(self._describe(value) for value in flat)))
        self.made.append(result)  # kept, so that no address is used twice
        return result

    def _describe(self, value):
        if not isinstance(value, torch.Tensor):
            return str(value)
        made = torch.utils._pytree.tree_flatten(self.made)[0]
        storages = {t.untyped_storage().data_ptr() for t in made if isinstance(t, torch.Tensor)}
        outside = value.untyped_storage().data_ptr() not in storages
        return str(value.dtype), tuple(value.shape), value.data_ptr() if outside else None


class Replays:
    """A stand-in for CUDA graphs: replaying runs the work. With `strict`, each replay must do the same operations, on the
    same tensors, with the same numbers: what a graph would do."""

    strict = False
    recorded = 0
    warmed = 0

    def __init__(self, device=None):
        self.live = []

    def warm(self, work):
        Replays.warmed += 1
        return work()

    def record(self, work):
        Replays.recorded += 1
        result = torch.empty(0)
        first: list = []

        def replay():
            if Replays.strict:
                with Log() as log:
                    value = work()
                first[:] = first or log.calls
                assert log.calls == first, next(
                    pair for pair in zip(log.calls, first, strict=False) if pair[0] != pair[1]
                )
            else:
                value = work()
            if isinstance(value, torch.Tensor):
                result.set_(value.clone())  # at the same object, and overwritten by the next replay

        return replay, result


def late(monkeypatch):
    """The CPU as a device that runs behind the host, with captured steps."""
    monkeypatch.setattr(Replays, "recorded", 0)
    monkeypatch.setattr(Replays, "warmed", 0)
    monkeypatch.setitem(engines.BACKENDS, "cpu", engines.Backend(LateMail, Replays))


def patched(model, **options):
    return fastinfer.patch(copy.deepcopy(model), "keep", **options)


def engine(model):
    return vars(model)["_fastinfer"].engine


def both(pair, rows=1, padded=False, **options):
    """What both models generate. The second has to do it in our loop."""
    given = prompts(rows, padded)
    theirs = pair[0].generate(**given, **copy.copy(options))
    ours = pair[1].generate(**given, **copy.copy(options))
    assert fastinfer.report(pair[1]).last_generate == "fused"
    return theirs, ours


def same(pair, **options):
    theirs, ours = both(pair, **options)
    assert torch.equal(theirs, ours)
    return ours


def made(pair, rows=3):
    return pair[0].generate(**prompts(rows), max_new_tokens=30)[:, PROMPT:]


def letters():
    """A tokenizer whose token i is the letter chr(33 + i)."""
    tokenizer = Tokenizer(models.WordLevel({chr(33 + i): i for i in range(131)}, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Streamer:
    def __init__(self, fail_at=None):
        self.events, self.fail_at = [], fail_at

    def put(self, value):
        self.events.append(value.tolist())
        if len(self.events) == self.fail_at:
            raise OSError("the client is gone")

    def end(self):
        self.events.append("end")
