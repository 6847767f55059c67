"""The decode loop: transformers' `_sample` with our step, and no wait for the device between tokens.

The host enqueues step i + 1, then looks at the tokens of step i. So it may compute one step too many, whose tokens are
dropped; and a row that a criterion of the user's finishes is padded one step late, before anything reads it. Processors of
users, which may count their calls (a grammar), are called as transformers calls them: there the host waits for each token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from fastinfer.generation.cache import KVCache
from fastinfer.generation.graphs import Step
from fastinfer.generation.sampling import Sampling, Settings
from fastinfer.generation.session import Session
from fastinfer.generation.stopping import Stopping

ModelStep = Callable[[torch.Tensor, KVCache], torch.Tensor]
_FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
CACHE_NAME = "cache" if "cache" in _FIELDS else "past_key_values"  # newer and older versions of transformers


@dataclasses.dataclass
class Request:
    """What `generate` hands to a decoding method."""

    model: Any
    input_ids: torch.Tensor
    processors: Any
    criteria: Any
    config: Any
    streamer: Any
    kwargs: dict[str, Any]
    started: bool = False  # whether there is a token: from then on it cannot be begun again

    def in_their_loop(self) -> Any:
        """Decodes as transformers would have."""
        return type(self.model)._sample(
            self.model,
            self.input_ids,
            logits_processor=self.processors,
            stopping_criteria=self.criteria,
            generation_config=self.config,
            streamer=self.streamer,
            **self.kwargs,
        )

    def prefill(self, cache: KVCache) -> torch.Tensor:
        """Runs the prompt through the model into the cache; logits [B, V] of its last position."""
        cache.set_padding(self.kwargs.get("attention_mask"))
        kwargs = self.kwargs | {CACHE_NAME: cache}
        return self.model._prefill(self.input_ids, self.config, kwargs).logits[:, -1].clone()  # not all of them


def whole_step(model_step: ModelStep, settings: Settings, eos: torch.Tensor | None, pad: int, session: Session) -> None:
    """A step from tokens to tokens, nothing on the host."""
    session.take(session.choose(model_part(model_step, session), settings), settings, eos, pad)


def model_part(model_step: ModelStep, session: Session) -> torch.Tensor:
    """A step's logits [B, V]; its positions are counted when its tokens are taken."""
    return model_step(session.ids, session.cache)[:, -1]


class Loop:
    """One call of `generate`."""

    def __init__(self, request: Request, model_step: ModelStep, session: Session):
        self.request, self.model_step, self.session = request, model_step, session
        config, ids = request.config, request.input_ids
        returns = bool(config.return_dict_in_generate)
        self.scores: list[torch.Tensor] | None = [] if returns and config.output_scores else None
        self.logits: list[torch.Tensor] | None = [] if returns and config.output_logits else None
        self.stopping = Stopping(request.criteria, ids)
        self.sampling = Sampling.of(request.processors, config.do_sample, ids.shape[1], self.scores is not None)
        self.pad = int(config._pad_token_tensor) if self.stopping.pads else 0
        self.most = max(1, self.stopping.limit - ids.shape[1])
        self.eos = self._eos()
        self.made = 0

    def _eos(self) -> torch.Tensor | None:
        """The eos tokens, with which a step pads finished rows itself; a single row needs no padding, it ends."""
        if len(self.request.input_ids) == 1 or not self.stopping.pads:
            return None
        return torch.tensor(sorted(self.stopping.eos), dtype=torch.int64, device=self.session.ids.device)

    def run(self, theirs: KVCache | None) -> Any:
        """Decodes. `theirs` is a cache that the caller keeps: steps run on a copy, since captured ones need their own."""
        try:
            return self._run(theirs)
        except BaseException:
            self.session.mail.settle()
            raise

    def _run(self, theirs: KVCache | None) -> Any:
        session = self.session
        session.cache.crop(-session.cache.filled)
        logits = self.request.prefill(session.cache if theirs is None else theirs)
        if theirs is not None:
            session.load(theirs)
        filled = session.cache.filled
        vocabulary, device = logits.shape[-1], logits.device
        session.start(self.sampling.settings.draws, self.sampling.seen(self.request.input_ids, vocabulary, device))
        kept = self._decode(logits)
        session.mail.close()
        if theirs is not None:
            session.unload(theirs, filled, kept - 1)
        return self._result(kept, theirs)

    def _decode(self, logits: torch.Tensor) -> int:
        """How many tokens a row were made, those after the end not counted."""
        mail, step = self.session.mail, self._step()
        self._pick(logits)
        self.request.started = True
        lag = 0 if self.sampling.watched else mail.lag
        kept = 0
        while True:
            mail.post(self.made - 1)
            last = self.made == self.most
            while kept < self.made - (0 if last else lag):
                kept += 1
                if self._look(kept - 1):
                    return kept
            if last:
                return kept
            if self.session.cache.filled == self.session.cache.capacity:
                self.session.grow()
                step = self._step()
            self._next(step)

    # ---- on the device ----------------------------------------------------------------------------------------------

    @property
    def _whole(self) -> bool:
        """Whether a step can be captured from tokens to tokens: nothing but `ops.sample` is done to its logits."""
        return not self.sampling.before and self.scores is None and self.logits is None

    def _step(self) -> Step:
        if not self._whole:
            return self.session.step("logits", partial(model_part, self.model_step))
        settings = self.sampling.settings
        key = (settings, None if self.eos is None else (self.stopping.eos, self.pad))
        return self.session.step(key, partial(whole_step, self.model_step, settings, self.eos, self.pad))

    def _next(self, step: Step) -> None:
        result = step(self.session)
        self.session.cache.advance(1)
        if self._whole:
            self.made += 1
        else:
            self._pick(result)

    def _pick(self, logits: torch.Tensor) -> None:
        """The next tokens out of logits, outside of a captured step."""
        if not self._whole:
            logits = logits.to(torch.float32, copy=True)
            raw, logits = logits, self.sampling.before(self._ids(self.made), logits)
            for record, values in ((self.logits, raw), (self.scores, logits)):
                if record is not None:
                    record.append(values)
        settings = self.sampling.settings
        self.session.take(self.session.choose(logits, settings), settings, self.eos, self.pad, stepped=self.made > 0)
        self.made += 1

    def _ids(self, made: int) -> torch.Tensor:
        """The prompt and the first so many new tokens, [B, ·]."""
        return torch.cat([self.request.input_ids, self.session.history[:made].t()], 1)

    # ---- on the host ------------------------------------------------------------------------------------------------

    def _look(self, i: int) -> bool:
        """Takes in the tokens of step i; whether all rows are finished."""
        tokens = self.session.mail.fetch(i)
        if self.stopping.pads and any(self.stopping.done):
            tokens.masked_fill_(torch.tensor(self.stopping.done), self.pad)
        with self.session.mail.aside() if self.stopping.others else contextlib.nullcontext():
            late = self.stopping.look(tokens, partial(self._so_far, i + 1))
        if self.request.streamer is not None:
            self.request.streamer.put(tokens)
        finished = all(self.stopping.done)
        if late and not finished and self.eos is not None:
            self.session.finish(self.stopping.done, self.pad, range(i + 1, self.made))
        return finished

    def _so_far(self, made: int) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        return self._ids(made), None if self.scores is None else tuple(self.scores[:made])

    def _result(self, kept: int, cache: KVCache | None) -> Any:
        if self.request.streamer is not None:
            self.request.streamer.end()
        ids = self._ids(kept)
        if not self.request.config.return_dict_in_generate:
            return ids
        return GenerateDecoderOnlyOutput(
            sequences=ids,
            scores=None if self.scores is None else tuple(self.scores[:kept]),
            logits=None if self.logits is None else tuple(self.logits[:kept]),
            **{CACHE_NAME: cache},
        )
