"""What both demos share: timing, sizes, the table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import nn

import fastinfer
from fastinfer.modules import QuantizedLinear
from fastinfer.planning import model_bytes

SENTENCES = Path(__file__).parent.parent / "data" / "sentences.txt"


def read_lines(text: Path | None) -> list[str]:
    """The non-empty lines of a text file, or the sentences that come with fastinfer."""
    lines = (text or SENTENCES).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


def seconds(call: Callable[[], object], device: str) -> float:
    wait = partial(torch.cuda.synchronize, device) if device.startswith("cuda") else int
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def interleaved_medians(calls: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each call. The calls take turns, so that a disturbance of the machine hits all alike."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def megabytes(model: nn.Module) -> float:
    """All parameters and buffers, shared ones once."""
    return model_bytes(model) / 1e6


def linear_share(patched: nn.Module) -> float:
    """Bytes of the replaced linears' weights, scales and zero points, as a share of the same weights in fp32."""
    held = floats = 0
    seen = set()
    for module in patched.modules():
        if isinstance(module, QuantizedLinear) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            held += module.packed_bytes()
            floats += 4 * module.in_features * module.out_features
    return held / floats


def patched_copies(load: Callable[[], nn.Module], group_size: int) -> dict[str, nn.Module]:
    """The original, and one model each with int8 and int4 weights."""
    return {
        "original": load(),
        "int8": fastinfer.patch(load(), "int8", reversible=False),
        f"int4 g{group_size}": fastinfer.patch(load(), "int4", group_size=group_size, reversible=False),
    }


def print_table(headers: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, *rows]:
        print("  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]))


def describe_machine(device: str) -> str:
    from fastinfer import _native

    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name(device)
    return f"{where}, {_native.describe(torch.device(device))}, torch {torch.__version__}"
