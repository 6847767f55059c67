"""transformers' logits processors as the arguments of `ops.sample`, as far as they go."""

from __future__ import annotations

import dataclasses

import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastinfer import ops

ORDER: dict[type[LogitsProcessor], str] = {
    RepetitionPenaltyLogitsProcessor: "penalty",
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinPLogitsWarper: "min_p",
}
"""What `ops.sample` does, in its order, and the attribute with its number."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """The numbers that `ops.sample` is given. A captured step holds them."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def draws(self) -> bool:
        return self.temperature != 0

    def sample(
        self, logits: torch.Tensor, seed: torch.Tensor, offset: torch.Tensor, seen: torch.Tensor | None
    ) -> torch.Tensor:
        return ops.sample(
            logits,
            seed,
            offset,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            seen=seen,
        )


@dataclasses.dataclass
class Sampling:
    """How a call's tokens are chosen: processors that run on logits first, then `ops.sample` with settings."""

    before: LogitsProcessorList
    settings: Settings
    penalty: RepetitionPenaltyLogitsProcessor | None = None

    @classmethod
    def of(cls, processors: LogitsProcessorList, draws: bool, prompt: int, all_before: bool = False) -> Sampling:
        """Translates as many of the last processors as come in the order of `ops.sample`.

        Args:
            draws:      whether tokens are drawn; else the likeliest is taken
            prompt:     how many tokens the prompt has
            all_before: translate none, because the scores are asked for
        """
        taken: dict[str, LogitsProcessor] = {}
        kept = list(processors)
        places = list(ORDER)
        while kept and not all_before:
            last = kept[-1]
            if type(last) not in places or not _translates(last, prompt):
                break
            places = places[: places.index(type(last))]
            taken[ORDER[type(last)]] = kept.pop()
        numbers = {name: getattr(processor, name) for name, processor in taken.items()}
        penalty = numbers.pop("penalty", 1.0)
        temperature = numbers.pop("temperature", 1.0)
        settings = Settings(temperature, **numbers) if draws else Settings(0.0)
        return cls(
            LogitsProcessorList(kept),
            dataclasses.replace(settings, repetition_penalty=penalty),
            taken.get("penalty"),
        )

    @property
    def watched(self) -> bool:
        """Whether code of the user's runs on logits, which may mind a call with a token too many."""
        kinds = map(type, self.before)
        return any(k is PrefixConstrainedLogitsProcessor or k.__module__.split(".")[0] != "transformers" for k in kinds)

    def seen(self, ids: torch.Tensor, vocabulary: int, device: torch.device) -> torch.Tensor | None:
        """[B, V] bool, the tokens that the penalty counts at the end of the prompt, as the processor itself finds them."""
        if self.penalty is None:
            return None
        ids = ids.to(device)
        return self.penalty(ids, torch.ones(len(ids), vocabulary, device=device)) != 1


def _translates(processor: LogitsProcessor, prompt: int) -> bool:
    """Whether `ops.sample` does what this one does: plain numbers in range, nothing kept but what they say."""
    number = getattr(processor, ORDER[type(processor)])
    if not isinstance(number, (int, float)) or isinstance(number, bool):
        return False
    if isinstance(processor, RepetitionPenaltyLogitsProcessor):
        ignored = getattr(processor, "prompt_ignore_length", None)
        reaches_into_new = isinstance(ignored, int) and ignored > prompt
        return number != 1 and not reaches_into_new and 1e-30 < number < 1e30
    if isinstance(processor, TemperatureLogitsWarper):
        return 1e-30 < number < 1e30
    return getattr(processor, "filter_value", None) == -float("inf") and processor.min_tokens_to_keep == 1
