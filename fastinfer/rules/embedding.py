"""Which embeddings an Int8Embedding can stand for: those whose weight a replaced head multiplies by."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.modules import Int8Embedding, Int8Linear


def row_factor(module: nn.Embedding) -> float | None:
    """The constant that `module` multiplies its rows by, proved on a few rows; None where it does something else."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return None
    if type(module).forward is nn.Embedding.forward:
        return 1.0
    scale = getattr(module, "embed_scale", None)
    if scale is None:
        scale = getattr(module, "scalar_embed_scale", None)
    if scale is None:
        return None
    factor = float(scale)
    weight = module.weight
    ids = torch.linspace(0, len(weight) - 1, min(len(weight), 8), device=weight.device).long()
    with torch.no_grad():
        expected = weight[ids] * torch.tensor(factor, dtype=weight.dtype, device=weight.device)
        return factor if torch.equal(type(module).forward(module, ids), expected) else None  # no hooks fire


def refusal(module: nn.Module) -> str | None:
    """Why this embedding cannot share a head's int8 weight, or None."""
    if not isinstance(module, nn.Embedding):
        return f"its weight is shared with a {type(module).__name__}"
    if module.max_norm is not None:
        return "its embedding renormalises rows (max_norm)"
    if row_factor(module) is None:
        return f"its embedding, a {type(module).__name__}, does more than look rows up"
    return None


def build(module: nn.Embedding, head: Int8Linear) -> Int8Embedding:
    """An embedding on the head's int8 weight, as one Parameter in one order."""
    new = Int8Embedding(
        head.weight,
        head.weight_scale,
        like=module.weight.dtype,
        layout=head.layout,
        padding_idx=module.padding_idx,
        factor=row_factor(module),
    )
    for name, buffer in module.named_buffers(recurse=False):  # such as embed_scale, which other code may read
        new.register_buffer(name, buffer, persistent=name not in module._non_persistent_buffers_set)
    return new.train(module.training)
