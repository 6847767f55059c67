"""Which calls of `generate` our loop serves: each function gives the reason why not, or ""."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerationMixin

from fastinfer.errors import CacheError
from fastinfer.generation.cache import KVCache, attention_layers
from fastinfer.generation.loop import CACHE_NAME, Request

METHODS = ("_sample", "_prefill", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
SET_ASIDE = ("custom_generate", "assistant_model", "synced_gpus", "position_ids")
PREPARED = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", CACHE_NAME}
"""What transformers prepares for a model that reads text, or the user gives as usual."""
MOST_POSITIONS = 1 << 20  # more is meant as "no limit", or as one that another criterion sets


def model_refusal(model: Any) -> str:
    """Why calls on this model always go to transformers' loop."""
    if "generate" in vars(model) or "custom_generate" not in _parameters(type(model).generate):
        return "it has a generate of its own"
    if model.config.is_encoder_decoder:
        return "encoder–decoder models are not supported"
    if type(model)._sample is not GenerationMixin._sample:
        return f"{type(model).__name__} has a decoding loop of its own"
    return ""


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def call_refusal(model: Any, given: dict[str, Any]) -> str:
    """For the arguments of `generate`, before transformers looks at them: what a callable `custom_generate` would spoil."""
    if torch.compiler.is_compiling():
        return "it is being compiled"
    for name in SET_ASIDE:
        if given.get(name) is not None and given.get(name) is not False:
            return f"{name} was given"

    def asked(name: str) -> Any:
        configs = (given.get("generation_config"), model.generation_config)
        values = (given.get(name), *(getattr(config, name, None) for config in configs))
        return next((value for value in values if value is not None), None)

    if (asked("num_beams") or 1) > 1 or (asked("num_beam_groups") or 1) > 1:
        return "beam search"
    if asked("penalty_alpha"):
        return "contrastive search"
    for name in ("constraints", "force_words_ids", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp",
                 "dola_layers", "cache_implementation", "token_healing"):  # fmt: skip
        if asked(name) not in (None, False):
            return f"{name} was given"
    return ""


def refusal(request: Request) -> str:
    """For a call that transformers has prepared."""
    model, config, kwargs = request.model, request.config, request.kwargs
    if model.training:
        return "the model is in train mode"
    for name in METHODS:
        if name in vars(model):
            return f"{name} was replaced on this model"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, None) or kwargs.get(name):
            return f"{name} was asked for"
    if not kwargs.get("use_cache"):
        return "use_cache=False"
    unknown = [name for name, value in kwargs.items() if value is not None and name not in PREPARED]
    if unknown:
        return f"{unknown[0]} was given"
    if request.input_ids.device != model.device:
        return f"input_ids are on {request.input_ids.device}, the model on {model.device}"
    if torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if not any(type(criterion) is MaxLengthCriteria for criterion in request.criteria):
        return "no max_length"
    if any(hasattr(criterion, "eos_token_id") for criterion in request.criteria) and config._pad_token_tensor is None:
        return "no pad token"
    return mask_refusal(request)


def mask_refusal(request: Request) -> str:
    mask = request.kwargs.get("attention_mask")
    if mask is None:
        return ""
    if mask.dim() != 2 or mask.shape[1] not in (
        request.input_ids.shape[1],
        past_of(request) + request.input_ids.shape[1],
    ):
        return f"an attention mask {list(mask.shape)}"
    seen = mask != 0
    broken = (seen[:, :-1] & ~seen[:, 1:]).any() | ~seen[:, -1].all()
    return "the attention mask has holes, or padding on the right" if broken.item() else ""


def past_of(request: Request) -> int:
    """How many positions the caller's cache has filled already."""
    cache = request.kwargs.get(CACHE_NAME)
    return cache.filled if isinstance(cache, KVCache) else 0


def prompt_of(request: Request) -> int:
    """How many positions its cache has filled when the prompt is in it."""
    mask, prompt = request.kwargs.get("attention_mask"), request.input_ids.shape[1]
    past = past_of(request)
    # newer transformers drop a mask of ones, and say how long it was
    seen = getattr(request.config, "_mask_length", -1) if mask is None else mask.shape[1]
    if seen == prompt > past:
        past = 0  # the whole text was given again, what is in the cache is part of it
    return past + prompt


def positions_of(request: Request) -> int:
    """How many positions its cache needs room for, at most."""
    return prompt_of(request) + max(1, request.criteria.max_length - request.input_ids.shape[1])


def cache_refusal(request: Request, limit: int | None) -> str:
    """A cache of the user's is served if it is a KVCache; the one that transformers made gives way to one.

    limit: positions that the model has embeddings for
    """
    cache = request.kwargs.get(CACHE_NAME)
    if limit is not None and positions_of(request) > limit + 1:
        return f"max_length is beyond the {limit} positions that the model has embeddings for"
    if positions_of(request) > MOST_POSITIONS:
        return f"max_length is beyond the {MOST_POSITIONS} positions that room is made for in advance"
    if isinstance(cache, KVCache):
        return ""
    if type(cache) is not DynamicCache:
        return f"its cache is a {type(cache).__name__}"
    if getattr(cache, "_is_user_defined", False):
        return "a DynamicCache was given: give a fastinfer.KVCache"
    try:
        attention_layers(request.model.config)
    except CacheError as error:
        return str(error)
    return ""
