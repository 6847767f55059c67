"""Models patched with and without merging, for tests that compare them."""

import copy

import torch
from architectures import build
from torch import nn

import fastinfer

GATED = ["llama", "mistral", "qwen2", "qwen3", "gemma3"]
UNMERGED = {"gpt2", "phi3"}  # their checkpoints are merged already


def both(name, weights="int8", dtype=torch.float32, **arguments):
    """A model patched without and with merging."""
    if weights == "int4":
        arguments["method"] = "rtn"  # faster
    original = build(name, dtype)
    apart = fastinfer.patch(copy.deepcopy(original), weights, merge=False, **arguments)
    return apart, fastinfer.patch(original, weights, merge=True, **arguments)


def siblings_of(model):
    return {id(m.siblings): m.siblings for m in model.modules() if getattr(m, "siblings", None)}.values()


def assert_merged(model, yes=True):
    assert siblings_of(model) and all(s.ready() is yes for s in siblings_of(model))


def replaced(linear):
    new = nn.Linear(linear.in_features, linear.out_features, bias=False)
    new.weight.data = linear.dequantize()
    return new
