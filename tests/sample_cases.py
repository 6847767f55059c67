"""Settings and calls that sample's tests share, and transformers' own processors."""

from __future__ import annotations

import importlib

import torch

from fastinfer.ops import sample

op = importlib.import_module("fastinfer.ops.sample")
SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 100.0},
    {"temperature": 1e-30},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 50},
    {"top_k": 10**6},
    {"top_p": 0.0},
    {"top_p": 0.5},
    {"top_p": 0.95},
    {"min_p": 1.0},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_k": 40, "top_p": 0.9},
    {"temperature": 1.5, "top_k": 200, "top_p": 0.99, "min_p": 0.02},
]


def one(number, device):
    return torch.tensor([number], device=device)


def repeat(row, times):
    return row.expand(times, -1)


def call(logits, seed=1, offset=0, **settings):
    return sample(logits, one(seed, logits.device), one(offset, logits.device), **settings)


def expect(logits, seed=1, offset=0, **settings):
    return op.reference(logits, one(seed, logits.device), one(offset, logits.device), **settings)


def ids(settings):
    return "-".join(f"{k}={v}" for k, v in settings.items()) or "plain"


def processed(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, tokens=None):
    """fp32 scores after transformers' own processors, in the order in which `generate` calls them."""
    from transformers import generation as g

    steps = [g.RepetitionPenaltyLogitsProcessor(repetition_penalty)] if tokens is not None else []
    steps += [g.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    steps += [g.TopKLogitsWarper(top_k)] if top_k else []
    steps += [g.TopPLogitsWarper(top_p)] if top_p < 1 else []
    steps += [g.MinPLogitsWarper(min_p)] if min_p else []
    return g.LogitsProcessorList(steps)(tokens, logits.float())
