"""How new tokens reach the host."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch


class Mail:
    """Tokens of a device that the host can read at once.

    lag: how many steps the host enqueues before it looks at a step's tokens
    """

    lag = 0

    def __init__(self, history: torch.Tensor):
        self.history = history  # [steps, B]

    def post(self, i: int) -> None:
        """Sends the tokens of step i, which is enqueued, on their way."""

    def fetch(self, i: int) -> torch.Tensor:
        """The tokens of step i [B], on the CPU, to keep."""
        return self.history[i].clone()

    def aside(self) -> AbstractContextManager:
        """Work in here waits for the steps that were fetched, but not for later ones."""
        return contextlib.nullcontext()

    def open(self) -> None:
        """Work on the device from here on waits for that of the call before, which another stream may have."""

    def close(self) -> None:
        """Says that a call has enqueued all of its work."""

    def settle(self) -> None:
        """Waits until the device does nothing for this call any more, before its buffers go."""


class PinnedMail(Mail):
    """Tokens of a GPU, copied to pinned memory on a stream of their own while the next step runs."""

    lag = 1

    def __init__(self, history: torch.Tensor):
        super().__init__(history)
        self.stream = torch.cuda.Stream(history.device)
        self.slots = torch.empty(2, history.shape[1], dtype=history.dtype, pin_memory=True)
        self.made, self.closed = torch.cuda.Event(), torch.cuda.Event()
        self.copied = [torch.cuda.Event(), torch.cuda.Event()]

    def post(self, i: int) -> None:
        self.made.record(torch.cuda.current_stream(self.history.device))
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.made)
            self.slots[i % 2].copy_(self.history[i], non_blocking=True)
            self.copied[i % 2].record(self.stream)

    def fetch(self, i: int) -> torch.Tensor:
        self.copied[i % 2].synchronize()
        return self.slots[i % 2].clone()

    def aside(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream)

    def open(self) -> None:
        torch.cuda.current_stream(self.history.device).wait_event(self.closed)

    def close(self) -> None:
        current = torch.cuda.current_stream(self.history.device)
        current.wait_stream(self.stream)
        self.closed.record(current)

    def settle(self) -> None:
        torch.cuda.synchronize(self.history.device)
