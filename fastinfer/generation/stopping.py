"""Which rows are finished, found out on the host."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

HOST = (MaxTimeCriteria, StopStringCriteria)


class Stopping:
    """transformers' stopping criteria: its own ones on tokens that are on the host, those of users on the device's.

    done:  which rows are finished
    eos:   the ids that finish a row
    limit: the length at which all are finished
    """

    def __init__(self, criteria: StoppingCriteriaList, prompt: torch.Tensor):
        self.eos = frozenset(i for c in criteria if type(c) is EosTokenCriteria for i in c.eos_token_id.tolist())
        self.on_host = [c for c in criteria if type(c) in HOST]
        self.others = [c for c in criteria if type(c) not in (*HOST, MaxLengthCriteria, EosTokenCriteria)]
        self.pads = any(hasattr(c, "eos_token_id") for c in criteria)  # transformers' condition
        self.lengths = [c for c in criteria if type(c) is MaxLengthCriteria]
        self.limit = min(c.max_length for c in self.lengths)
        self.done = [False] * len(prompt)
        steps = max(1, self.limit - prompt.shape[1])
        self.ids = torch.empty(len(prompt), prompt.shape[1] + steps, dtype=torch.int64)
        self.ids[:, : prompt.shape[1]] = prompt
        self.length = prompt.shape[1]

    def look(self, tokens: torch.Tensor, so_far: Callable[[], tuple]) -> list[int]:
        """Takes the next tokens [B] in. Returns the rows that are finished by something else than an eos token.

        so_far: gives what criteria of users are called with, the sequences and scores on the device
        """
        self.ids[:, self.length] = tokens
        self.length += 1
        before = list(self.done)
        if self.eos:
            self.done = [d or t in self.eos for d, t in zip(self.done, tokens.tolist(), strict=True)]
        by_eos = list(self.done)
        if self.length >= self.limit:
            self._add(True)
        for criterion in [*self.on_host, *filter(self._warns, self.lengths)]:
            self._add(criterion(self.ids[:, : self.length], None))
        if self.others:
            ids, scores = so_far()
            for criterion in self.others:
                self._add(criterion(ids, scores))
        return [r for r, done in enumerate(self.done) if done and not (before[r] or by_eos[r])]

    def _warns(self, criterion: MaxLengthCriteria) -> bool:
        """Whether it has something to say: once there are more tokens than the model has positions."""
        most = criterion.max_position_embeddings
        return most is not None and self.length > most

    def _add(self, done) -> None:
        """What a criterion said: a bool, or a tensor of one a row."""
        said = done.reshape(-1).tolist() if isinstance(done, torch.Tensor) else [bool(done)]
        said = said * len(self.done) if len(said) == 1 else said
        self.done = [a or bool(b) for a, b in zip(self.done, said, strict=True)]
