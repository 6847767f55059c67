"""Records work on a GPU as a CUDA graph, and leaves the process as it was where that fails."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastinfer.ops.launch import dependent_launch

_one_at_a_time = threading.Lock()  # torch allows one capture in a process, whatever is captured


class CaptureError(RuntimeError):
    """Why work could not be recorded."""


class CUDARecorder:
    """Records work as CUDA graphs that share their memory: results must be copied before the next replay.

    `ordered` keeps replays in order that callers launch on different streams.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()
        self.last: torch.cuda.Stream | None = None

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What replays the work, and its result: the same tensors, written by each replay. Raises CaptureError."""
        with _one_at_a_time, torch.cuda.device(self.device):
            try:
                return self._record(work)
            except CaptureError:  # a kernel's first use may do what a capture forbids: that is done now
                return self._record(work)

    def _record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        reasons: list[Exception] = []
        try:
            with self._capture(graph), dependent_launch():
                try:
                    result = work()
                except Exception as error:
                    reasons.append(error)
                    raise
        except Exception as error:  # leaving a capture that failed raises an error of its own
            torch.cuda.set_stream(before)
            self._mend()
            reason = str(reasons[0] if reasons else error).strip().partition("\n")[0]
            raise CaptureError(reason or type(error).__name__) from None
        return graph.replay, result

    @contextlib.contextmanager
    def _capture(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        collects = gc.isenabled()
        gc.disable()  # what it would free may call what a capture forbids
        try:  # thread_local: what other threads do meanwhile is no error
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                yield
        finally:
            if collects:
                gc.enable()

    def _mend(self) -> None:
        """Undoes what a failed capture leaves behind: an allocator and a random generator that think it still runs."""
        with contextlib.suppress(RuntimeError):  # where it was told
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self.pool = torch.cuda.graph_pool_handle()
        with contextlib.suppress(RuntimeError):
            x = torch.zeros(1, device=self.device)
            with self._capture(torch.cuda.CUDAGraph()):  # the end of a capture that succeeds resets the generator
                x.add_(1)

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        """Around a replay and the copies in and out: waits for the one before, if that was launched on another stream."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.last is not None and self.last != stream:
                stream.wait_event(self.done)
            yield
            self.done.record(stream)
            self.last = stream

    def finish(self) -> None:
        """Waits for the last replay, so that what it uses may be freed."""
        if self.last is not None:
            self.done.synchronize()


RECORDERS: dict[str, Callable[[torch.device], Any]] = {"cuda": CUDARecorder}
"""What records on a kind of device; work on others is never recorded."""
