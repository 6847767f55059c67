"""How kernels are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fastinfer import _native


@contextlib.contextmanager
def dependent_launch() -> Iterator[None]:
    """Lets each of our CUDA kernels start, and fetch weights, while the kernel before it still runs (this thread).

    For steps that are captured in a CUDA graph: a decode step's kernels then follow each other without a gap. Weights are
    read without waiting for earlier kernels, so nothing inside may write them; the first kernel waits as usual. So does
    kv_attention behind a matmul read lengths, starts and what the cache holds: none of the two kernels before it may write
    them. Does nothing without the CUDA library, or for kernels that cannot (compute capability other than 9.0).

    Source: CUDA C++ Programming Guide, programmatic dependent launch.
    """
    if _native.status["cuda"] != "loaded":
        yield
        return
    before = torch.ops.fastinfer.dependent_launch(True)
    try:
        yield
    finally:
        torch.ops.fastinfer.dependent_launch(before)
