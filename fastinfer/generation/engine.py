"""What a model that was patched decodes with: its fused step, and sessions that stay for later calls."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections import OrderedDict
from typing import Any

import torch

from fastinfer.generation.cache import KVCache
from fastinfer.generation.graphs import CUDAGraphs, Recorder
from fastinfer.generation.loop import CACHE_NAME, Loop, Request
from fastinfer.generation.mail import Mail, PinnedMail
from fastinfer.generation.session import Session, bucket
from fastinfer.generation.support import cache_refusal, model_refusal, refusal

SESSIONS = 4  # numbers of rows whose buffers stay


class Engine:
    """Decodes for one model. A copy, or one that was pickled, makes its step and sessions anew when it is first asked.

    Args:
        model: a transformers model that generates
        kind:  how its cache keeps keys and values, "keep" | "int8"
        path:  the model's place in what was patched
    """

    def __init__(self, model: Any, kind: str, path: str):
        self.model, self.kind, self.path = model, kind, path
        self.reason = model_refusal(model)  # why its loop is never used
        self.last = ""  # why the last call did not use it
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.step: Any = None
        self.sessions: OrderedDict[tuple, Session] = OrderedDict()
        self.recorder: Recorder | None = None
        self.addresses: tuple = ()
        self.lock = threading.Lock()
        self.holder: int | None = None

    def __getstate__(self) -> dict:
        return {name: vars(self)[name] for name in ("model", "kind", "path", "reason", "last")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._start_afresh()

    def prepare(self) -> str:
        """Finds the model's step and proves it, unless that was tried; why there is none, or ""."""
        from fastinfer.generation.step import DecodeStep, Unfusable

        if self.step is None and not self.reason:
            try:
                step = DecodeStep.of(self.model)
                self.reason = step.prove() or ""
            except Unfusable as error:
                self.reason = str(error)
            if not self.reason:
                self.step = step
        return self.reason

    # ---- a call -----------------------------------------------------------------------------------------------------

    def decode(self, request: Request) -> Any:
        """Decodes here, or in transformers' loop where that is asked for; `last` says why."""
        if self.holder == threading.get_ident():  # a streamer, or a criterion, that generates
            self.last = "called from inside another generate of this model"
            return request.in_their_loop()
        with self.lock, torch.inference_mode(False), torch.no_grad():
            self.holder = threading.get_ident()
            try:
                reason = refusal(request) or cache_refusal(request) or self.prepare() or self.step.stale() or ""
                self.last = reason
                if not reason:
                    return self._run(request)
            finally:
                self.holder = None
        return request.in_their_loop()

    def _run(self, request: Request) -> Any:
        self._forget_what_moved()
        given = request.kwargs.get(CACHE_NAME)
        theirs = given if isinstance(given, KVCache) else None
        if theirs is None and request.config.return_dict_in_generate:
            theirs = KVCache(self.model.config, kind=self.kind)
        rows, prompt = request.input_ids.shape
        past = 0 if theirs is None else theirs.filled
        positions = past + max(prompt + 1, request.criteria.max_length)
        key = (rows, self.kind if theirs is None else theirs.kind)
        session = self._session(key, positions)
        with self._device():
            result = Loop(request, self.step, session).run(theirs)
        # only now: a session that an exception went through may be half done
        self.sessions[key] = session
        while len(self.sessions) > SESSIONS:
            self.sessions.popitem(last=False)
        return result

    def _session(self, key: tuple, positions: int) -> Session:
        """Takes the session for so many rows out of those that stayed, if it has room, or makes one."""
        found = self.sessions.pop(key, None)
        if found is not None and found.cache.capacity >= positions:
            return found
        rows, kind = key
        device = self.model.device
        if self.recorder is None and device.type == "cuda":
            self.recorder = CUDAGraphs(device)
        cache = KVCache(self.model.config, kind=kind, capacity=bucket(positions))
        return Session(cache, rows, device, PinnedMail if device.type == "cuda" else Mail, self.recorder)

    def _forget_what_moved(self) -> None:
        """Drops captured steps, which hold addresses of weights, when weights have other ones."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        addresses = tuple(tensor.data_ptr() for tensor in tensors)
        if addresses != self.addresses:
            self.sessions.clear()
            self.recorder = None
            self.addresses = addresses

    def _device(self) -> contextlib.AbstractContextManager:
        device = self.model.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
