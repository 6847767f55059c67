"""Work on fixed buffers, captured once in a CUDA graph and replayed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch

from fastinfer.modules.capture import CaptureError, CUDARecorder

Work = Callable[[], Any]


class Recorder(Protocol):
    """What a Step is captured with."""

    def warm(self, work: Work) -> Any:
        """Runs work as it is, so that what it sets up on first use is there."""

    def record(self, work: Work) -> tuple[Callable[[], None], Any]:
        """Captures work without running it. Returns what replays it, and its result: the same tensors at each replay."""


class Step:
    """Work whose inputs, outputs and state are tensors that stay: run as it is the first time, then captured, then replayed.

    The first run is a real one, so that warming up costs no step. Without a recorder, or where it fails, work runs as it is
    each time. Its arguments have to be the same objects at each call: it does not keep them, since what they are may hold
    the step.
    """

    def __init__(self, work: Callable, recorder: Recorder | None = None):
        self.work, self.recorder = work, recorder
        self.warm = False
        self.replay: Callable[[], None] | None = None
        self.result: Any = None

    def __call__(self, *args: Any) -> Any:
        if self.recorder is None:
            return self.work(*args)
        if not self.warm:
            result = self.recorder.warm(partial(self.work, *args))
            self.warm = True
            return result
        if self.replay is None:
            try:
                self.replay, self.result = self.recorder.record(partial(self.work, *args))
            except CaptureError as error:
                warnings.warn(f"the decode step runs as it is, since it cannot be captured: {error}", stacklevel=2)
                self.recorder = None
                return self.work(*args)
        self.replay()
        return self.result


class CUDAGraphs(CUDARecorder):
    """Captures steps as CUDA graphs, after a first run on the stream that they are captured on."""

    def warm(self, work: Work) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        if isinstance(result, torch.Tensor):
            result.record_stream(current)
        return result
