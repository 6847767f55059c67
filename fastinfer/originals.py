"""Keeps the weights that a patch replaces: by name in the model's own checkpoint, else in host memory."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from fastinfer.errors import PatchError


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes: equal values are not equal bits (−0.0, NaN)."""
    return tensor.contiguous().view(-1).view(torch.uint8)


@dataclasses.dataclass
class Held:
    """An original in host memory."""

    tensor: torch.Tensor

    def load(self) -> torch.Tensor:
        return self.tensor


@dataclasses.dataclass
class InCheckpoint:
    """An original that a safetensors file holds, bit for bit after a cast to `dtype`; `checksum` is of its bytes there."""

    file: Path
    key: str
    dtype: torch.dtype
    checksum: int

    def load(self) -> torch.Tensor:
        try:
            with safe_open(self.file, "pt") as tensors:
                tensor = tensors.get_tensor(self.key)
        except Exception as error:
            raise PatchError(f"cannot restore {self.key}: {self.file} is not readable any more ({error})") from error
        if _checksum(tensor) != self.checksum:
            raise PatchError(f"cannot restore {self.key}: {self.file} changed since the model was patched")
        return tensor.to(self.dtype)


def _checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bits(tensor).numpy())


class Checkpoint:
    """The safetensors files a model was loaded from, found through its `name_or_path`; empty where there are none."""

    def __init__(self, model: nn.Module):
        self.files: dict[str, Path] = {}
        self.prefixes = {""}
        self.trouble: str | None = None
        for module in model.modules():
            folder = _folder(getattr(module, "name_or_path", None))
            prefix = getattr(module, "base_model_prefix", "")
            if folder is not None and not self.files:
                with self._noting_trouble():
                    self.files = _key_files(folder)
            if isinstance(prefix, str) and prefix:
                self.prefixes.add(prefix + ".")

    @contextlib.contextmanager
    def _noting_trouble(self) -> Iterator[None]:
        """A checkpoint that cannot be read is no reason to fail: originals are then held in memory, and it is said."""
        try:
            yield
        except Exception as error:
            self.trouble = f"the checkpoint is not readable ({error}): originals are held in host memory"

    def find(self, paths: Iterable[str], weight: torch.Tensor) -> InCheckpoint | None:
        """Where the checkpoint holds exactly `weight` (after a cast to its dtype) under a name like one of `paths`."""
        for key in (name for path in paths for name in self._names(f"{path}.weight")):
            if key not in self.files:
                continue
            with self._noting_trouble():
                with safe_open(self.files[key], "pt") as tensors:
                    stored = tensors.get_tensor(key)
                same_shape = stored.shape == weight.shape
                if same_shape and torch.equal(_bits(stored.to(weight.device, weight.dtype)), _bits(weight)):
                    return InCheckpoint(self.files[key], key, weight.dtype, _checksum(stored))
        return None

    def _names(self, path: str) -> list[str]:
        """Names a parameter may have in the file: with and without a base model's prefix, or a wrapper's in front."""
        path = path.replace(".base_layer.", ".")
        parts = path.split(".")
        tails = [".".join(parts[i:]) for i in range(min(5, len(parts)))]
        return [prefix + tail for tail in tails for prefix in sorted(self.prefixes)]


def _folder(name_or_path: object) -> Path | None:
    """The local folder of a checkpoint, in the hub's cache too."""
    if not isinstance(name_or_path, str) or not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path).resolve()
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "model.safetensors.index.json"):
        try:
            found = try_to_load_from_cache(name_or_path, name)
        except ValueError:  # not a valid repository name
            return None
        if isinstance(found, str):
            return Path(found).parent
    return None


def _key_files(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return {key: folder / name for key, name in json.loads(index.read_text())["weight_map"].items()}
    if single.exists():
        with safe_open(single, "pt") as tensors:
            return dict.fromkeys(tensors.keys(), single)
    return {}
