"""What a model that was patched decodes with: its fused step, and sessions that stay for later calls."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastinfer.generation.cache import KVCache
from fastinfer.generation.graphs import CUDAGraphs, Recorder
from fastinfer.generation.loop import CACHE_NAME, Loop, Request
from fastinfer.generation.mail import Mail, PinnedMail
from fastinfer.generation.session import Session, bucket
from fastinfer.generation.support import cache_refusal, positions_of, prompt_of, refusal


@dataclasses.dataclass(frozen=True)
class Backend:
    """How a kind of device hands tokens to the host, and what captures its steps."""

    mail: type[Mail] = Mail
    recorder: Callable[[torch.device], Recorder | None] = lambda device: None
    guard: Callable[[torch.device], AbstractContextManager] = contextlib.nullcontext


BACKENDS = {"cuda": Backend(PinnedMail, CUDAGraphs, torch.cuda.device)}
SESSIONS = 4  # numbers of rows whose buffers stay
ROOM = 1024  # new tokens that there is room for at first, however large max_length is


class Engine:
    """Decodes for one model. A copy, or one that was pickled, captures its steps anew.

    Args:
        model: a transformers model that generates
        step:  its DecodeStep
        kind:  how its cache keeps keys and values, "keep" | "int8"
    """

    def __init__(self, model: Any, step: Any, kind: str):
        self.model, self.step, self.kind = model, step, kind
        self.last = ""  # "fused", or why the last call was not decoded here
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.sessions: OrderedDict[tuple, Session] = OrderedDict()
        self.recorder: Recorder | None = None
        self.epoch = -1
        self.lock = threading.Lock()
        self.holder: int | None = None
        self.mail: Mail | None = None  # of the call before, which may be on another stream: captured steps share memory

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("model", "step", "kind", "last")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start_afresh()

    # ---- a call -----------------------------------------------------------------------------------------------------

    def decode(self, request: Request) -> Any:
        """Decodes here, or in transformers' loop where that is asked for; `last` says why."""
        if self.holder == threading.get_ident():  # a streamer, or a criterion, that generates
            self.last = "called from inside another generate of this model"
            return request.in_their_loop()
        with self.lock, torch.inference_mode(False), torch.no_grad():
            self.holder = threading.get_ident()
            try:
                reason = self.step.stale() or refusal(request) or cache_refusal(request, self.step.limit)
                self.last = reason or "fused"
                if not reason:
                    result = self._run(request)
                    self.last = "fused"  # again: a call from inside of it has said something else
                    return result
            except RuntimeError as error:
                if not _lacks_memory(error) or request.started or isinstance(request.kwargs.get(CACHE_NAME), KVCache):
                    raise
                self.sessions.clear()
                self.last = f"out of memory with a cache for {positions_of(request)} positions"
            finally:
                self.holder = None
        return request.in_their_loop()

    def _run(self, request: Request) -> Any:
        if self.step.epoch != self.epoch:  # weights have moved: what was captured reads them where they were
            self.sessions.clear()
            self.recorder = None
            self.epoch = self.step.epoch
        given = request.kwargs.get(CACHE_NAME)
        theirs = given if isinstance(given, KVCache) else None
        if theirs is None and request.config.return_dict_in_generate:
            theirs = KVCache(self.model.config, kind=self.kind)
        rows = len(request.input_ids)
        key = (rows, self.kind if theirs is None else theirs.kind)
        device = self.model.device
        with _backend(device).guard(device):
            session = self._session(key, request)
            if self.mail is not None:
                self.mail.open()
            self.mail = None
            result = Loop(request, self.step, session).run(theirs)
            self.mail = session.mail
        # only now: a session that an exception went through may be half done
        self.sessions[key] = session
        while len(self.sessions) > SESSIONS:
            self.sessions.popitem(last=False)
        return result

    def _session(self, key: tuple, request: Request) -> Session:
        """Takes the session for so many rows out of those that stayed, if it has room, or makes one."""
        most = positions_of(request)
        positions = min(most, prompt_of(request) + ROOM)
        found = self.sessions.pop(key, None)
        if found is not None and found.cache.capacity >= positions and len(found.history) >= most:
            return found
        rows, kind = key
        device = self.model.device
        backend = _backend(device)
        if self.recorder is None:
            self.recorder = backend.recorder(device)
        cache = KVCache(self.model.config, kind=kind, capacity=bucket(positions))
        return Session(cache, bucket(most), rows, device, backend.mail, self.recorder)


def _lacks_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed. torch has a type of error for it on GPUs alone."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _backend(device: torch.device) -> Backend:
    return BACKENDS.get(device.type, Backend())
