"""Loads the native libraries and says what runs where.

The CPU library holds every operator's schema, so it is loaded first; the CUDA library only where torch has CUDA.
Where a library is missing the ops fall back (Triton on a GPU, else the references in torch) with one warning.
FASTINFER_NATIVE=0 loads nothing, for tests of that fallback.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
MIN_CAPABILITY = (8, 0)

status: dict[str, str] = {}
"""Library name ("cpu", "cuda") to "loaded", or to the reason why it is not."""


class MissingKernelWarning(UserWarning):
    """An op runs on a slower fallback because its native library is missing."""


def _load(name: str) -> str:
    if os.environ.get("FASTINFER_NATIVE") == "0":
        return "switched off by FASTINFER_NATIVE=0"
    path = FOLDER / f"_{name}.abi3.so"
    if not path.exists():
        return f"not built: {path.name} is not in {FOLDER}"
    if name == "cuda":
        if status["cpu"] != "loaded":
            return f"needs the cpu library, which is {status['cpu']}"
        if torch.version.cuda is None:
            return "this torch has no CUDA"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"failed to load: {error}"
    return "loaded"


for _name in ("cpu", "cuda"):
    status[_name] = _load(_name)


def cpu_isa() -> str:
    """The instruction set of the CPU kernels: "avx512_vnni", "avx2", or "none" where they cannot run."""
    return torch.ops.fastinfer.cpu_isa() if status["cpu"] == "loaded" else "none"


@functools.cache
def _device_backend(kind: str, index: int | None) -> str:
    if kind == "meta":
        return "native" if status["cpu"] == "loaded" else "reference"
    if kind == "cpu":
        return "native" if cpu_isa() != "none" else "reference"
    if kind == "cuda" and torch.cuda.get_device_capability(index) >= MIN_CAPABILITY:
        if status["cuda"] == "loaded":
            return "native"
        if importlib.util.find_spec("triton") is not None:
            return "triton"
    return "reference"


@torch.compiler.assume_constant_result
def backend(device: torch.device) -> str:
    """How an op runs on `device`: "native" (our library), "triton", or "reference" (plain torch)."""
    return _device_backend(device.type, device.index)


def describe(device: torch.device) -> str:
    """`backend` in words, for reports: "cpu library (avx2)"."""
    kind = backend(device)
    if kind != "native":
        return kind
    return f"cpu library ({cpu_isa()})" if device.type == "cpu" else f"{device.type} library"


@functools.cache
def _warn(kind: str, used: str, why: str) -> None:
    warnings.warn(
        f"fastinfer: no native kernels for {kind} ({why}); using {used}, which is slower. `fastinfer doctor` says more.",
        MissingKernelWarning,
        stacklevel=5,
    )


def warn_fallback(device: torch.device, used: str) -> None:
    """Warns once a device type that an op runs on a fallback."""
    if torch.compiler.is_compiling():
        return
    why = status.get(device.type, "not a supported device")
    if why == "loaded":
        why = "the CPU has no AVX2" if device.type == "cpu" else "compute capability below 8.0"
    _warn(device.type, used, why)
