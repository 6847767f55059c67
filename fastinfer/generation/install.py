"""`generate` of a patched model: transformers' own, with our loop as its decoding method where that serves the call."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from typing import Any

import torch
from transformers.generation.stopping_criteria import StoppingCriteriaList, StopStringCriteria

from fastinfer.generation.engine import Engine
from fastinfer.generation.loop import Request
from fastinfer.generation.support import call_refusal


def generate(self: Any, engine: Engine, *args, **kwargs) -> Any:
    """`type(self).generate(self, …)`, decoded by the engine if it can."""
    own = type(self).generate
    bound = inspect.signature(own).bind(self, *args, **kwargs).arguments
    given = bound | bound.get("kwargs", {})
    reason = call_refusal(self, given)
    if reason:
        engine.last = reason
        return own(self, *args, **kwargs)
    del given["self"]
    given.pop("kwargs", None)
    given["custom_generate"] = partial(decode, engine, given.get("streamer"))
    return own(self, **given | stop_strings(self, given))


def decode(
    engine: Engine,
    streamer: Any,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """What transformers' `generate` calls as its `custom_generate`. It hands a callable no streamer, hence the binding."""
    request = Request(model, input_ids, logits_processor, stopping_criteria, generation_config, streamer, model_kwargs)
    return engine.decode(request)


def stop_strings(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments that say what `stop_strings` and `tokenizer` do, because a callable `custom_generate` loses the latter."""
    config = given.get("generation_config")
    asked = [given.get("stop_strings"), config and config.stop_strings, model.generation_config.stop_strings]
    strings = next((strings for strings in asked if strings is not None), None)
    if strings is None or given.get("tokenizer") is None:
        return {}  # without a tokenizer, transformers says what is missing
    criteria = StoppingCriteriaList(given.get("stopping_criteria") or [])
    if not any(type(criterion) is StopStringCriteria for criterion in criteria):
        criteria.insert(0, StopStringCriteria(stop_strings=strings, tokenizer=given["tokenizer"]))
    changed: dict[str, Any] = {"stopping_criteria": criteria}
    if asked[1] is not None:
        changed["generation_config"] = copy.copy(config)
        changed["generation_config"].stop_strings = None
    if asked[0] is not None or asked[2] is not None:  # else no argument, which would warn beside a generation_config
        changed["stop_strings"] = None
    return changed
