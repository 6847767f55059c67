"""Times calls on a GPU by replays of a CUDA graph; weights rotate, so that together they outgrow the last-level cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Calls = Sequence[Callable[[], Any]]
CUDA_CACHE_BYTES = 300 << 20
"""More than any GPU's L2 holds."""


def copies(weight_bytes: int, cache_bytes: int = CUDA_CACHE_BYTES) -> int:
    """How many weights together hold more than the cache; two at least."""
    return max(2, cache_bytes // weight_bytes + 1)


class Replays:
    """`count` calls captured in a CUDA graph, cycling through the list. What they run must have run once before.

    Our own kernels are launched as the caller's `dependent_launch` says.
    """

    def __init__(self, calls: Calls, count: int):
        self.count, self.graph = count, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(count):
                calls[i % len(calls)]()
        self.graph.replay()

    def measure(self, repeats: int) -> list[float]:
        """Microseconds of a call, one figure a replay."""
        times = []
        for _ in range(repeats):
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            self.graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / self.count)
        return times


def time_cuda(calls: Calls, repeats: int = 20) -> float:
    """Median microseconds of a call inside a CUDA graph that cycles through the list."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    return statistics.median(Replays(calls, max(2, 32 // len(calls)) * len(calls)).measure(repeats))
