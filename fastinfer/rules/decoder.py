"""Reads a causal language model by its structure, as what a fused decode step runs: embedding, layers, norm, head.

Names say what a part is for; everything else is read off the parts themselves: norms and activations are tried on random
input, sizes come from weights. Whatever a module has beyond that makes the model unfusable, with the reason. What a name
does not tell (an interleaved rotation, a gate on attention's output) is for the proof, fastinfer/generation/proof.py.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from fastinfer.errors import Unfusable
from fastinfer.generation.parts import Layer, Linears, Norm
from fastinfer.generation.rotation import Rotation
from fastinfer.modules.embedding import Int8Embedding, rounded
from fastinfer.rules import embedding as embedding_rule
from fastinfer.rules import reading
from fastinfer.rules.block import ATTENTION, read_layer
from fastinfer.rules.reading import Part

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
POSITIONS = ("wpe", "embed_positions", "position_embeddings")
ROTARY = ("rotary_emb", "rotary_pos_emb")
NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")
HEADS = ("lm_head", "embed_out")
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rotations whose angles change with the length of the text."""


@dataclasses.dataclass
class Positions:
    """A learned table of positions, whose row `offset` is the first."""

    table: nn.Embedding
    offset: int

    @property
    def count(self) -> int:
        return self.table.num_embeddings - self.offset


@dataclasses.dataclass
class Decoder:
    """What a fused step runs, in this order. `scale`, `softcap` and `divisor` change the logits."""

    embedding: nn.Embedding
    factor: float
    project_in: Linears | None
    positions: Positions | None
    rotation: Rotation | None
    layers: list[Layer]
    norm: Norm | None
    project_out: Linears | None
    head: Linears
    divisor: float = 1.0
    scale: float = 1.0
    softcap: float = 0.0

    def linears(self) -> list[Linears]:
        ends = [one for one in (self.project_in, self.project_out, self.head) if one is not None]
        return [one for layer in self.layers for one in layer.linears()] + ends


def generates(module: nn.Module) -> bool:
    """Whether `generate` can be called on a module."""
    return isinstance(module, PreTrainedModel) and isinstance(module, GenerationMixin) and module.can_generate()


def read(model: Any) -> Decoder:
    """The parts of a causal language model. Raises Unfusable where it has anything that the step does not know."""
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise Unfusable("an encoder–decoder model: its decoder also attends to an encoder's output")
    path, name = _stack(model)
    trunk = Part(model.get_submodule(path), path or "the model", ("embedding_multiplier",))
    config = getattr(trunk.module, "config", config)
    embedding, factor = _read_embedding(trunk)
    rotation, positions = _read_rotation(trunk, config), _read_positions(trunk)
    if rotation is None and positions is None:
        raise Unfusable(f"{trunk.path} has neither a rotation nor a table of positions that the fused step knows")
    stack = trunk.need("layers", name)
    count = min(len(stack), getattr(config, "num_hidden_layers", len(stack)))
    kinds = [] if rotation is None else rotation.kinds
    layers = [read_layer(stack[i], f"{path}.{name}.{i}", i, config, kinds) for i in range(count)]
    norm = trunk.take(*NORMS)
    ends = [trunk.linear(end) for end in ("project_in", "project_out")]
    trunk.done()
    head = _descend(model, path)
    decoder = Decoder(
        embedding,
        factor,
        None if ends[0] is None else Linears([ends[0]]),
        positions,
        rotation,
        layers,
        None if norm is None else reading.norm(norm, f"{trunk.path}'s last norm"),
        None if ends[1] is None else Linears([ends[1]]),
        Linears([head]),
    )
    _read_logits(decoder, model, config)
    _check_dtypes(decoder)
    return decoder


def _stack(model: nn.Module) -> tuple[str, str]:
    """Where the decoder layers are: the path of what holds them, and their name in it."""
    found = []
    for path, module in model.named_modules():
        for name, child in module._modules.items():
            if isinstance(child, nn.ModuleList) and len(child) and set(ATTENTION) & set(child[0]._modules):
                found.append((path, name))
    if len(found) != 1:
        raise Unfusable("it has no stack of decoder layers" if not found else "it has several stacks of layers")
    return found[0]


def _descend(model: nn.Module, path: str) -> nn.Module:
    """The head of the model, beside which there is nothing but what holds the layers."""
    part = Part(model, "the model", ("logit_scale",))
    head = part.linear(*HEADS)
    if head is None:
        raise Unfusable("it has no head that the fused step knows")
    for step in path.split(".") if path else ():
        inner = part.part((), step)
        part.done()
        part = inner or part
    return head


def _read_embedding(trunk: Part) -> tuple[nn.Embedding, float]:
    """The table of tokens, and the factor on its rows that its dtype has."""
    embedding = trunk.take(*EMBEDDINGS)
    if not isinstance(embedding, nn.Embedding):
        raise Unfusable(f"{trunk.path} has no embedding that the fused step knows")
    factor = 1.0 if isinstance(embedding, Int8Embedding) else embedding_rule.row_factor(embedding)
    if factor is None or embedding.max_norm is not None:
        raise Unfusable(f"the embedding, a {type(embedding).__name__}, does more than look rows up")
    dtype = embedding.compute_dtype if isinstance(embedding, Int8Embedding) else embedding.weight.dtype
    factor = rounded(factor, dtype)
    multiplier = getattr(trunk.module, "embedding_multiplier", 1.0)
    if factor != 1.0 and multiplier != 1.0:
        raise Unfusable("the embedding is scaled twice")
    return embedding, factor * float(multiplier)


def _read_positions(trunk: Part) -> Positions | None:
    table = trunk.take(*POSITIONS)
    if table is None:
        return None
    if not isinstance(table, nn.Embedding):
        raise Unfusable(f"positions are a {type(table).__name__}, which the fused step does not know")
    return Positions(table, int(getattr(table, "offset", 0)))


def _read_rotation(trunk: Part, config: Any) -> Rotation | None:
    module = trunk.take(*ROTARY)
    if module is None:
        return None
    types = getattr(module, "rope_type", "default")
    for kind in types.values() if isinstance(types, dict) else [types]:
        if any(name in str(kind) for name in LENGTH_DEPENDENT):
            raise Unfusable(f"its rotation ({kind}) changes with the length of the text")
    if _rotates_pairs(module):
        raise Unfusable("it rotates interleaved pairs, where the fused step rotates halves")
    by_layer = "layer_type" in inspect.signature(type(module).forward).parameters
    kinds = sorted(set(getattr(config, "layer_types", None) or ())) if by_layer else [""]
    rotation = Rotation(module, kinds)
    rotation.check()
    return rotation


def _rotates_pairs(module: nn.Module) -> bool:
    """Whether the function beside a rotary module rotates pairs (0, 1), (2, 3) …; the proof sees it too, but not why."""
    rotate = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
    try:
        return rotate is not None and torch.equal(rotate(torch.arange(4)), torch.tensor([-1, 0, -3, 2]))
    except Exception:  # another function of that name
        return False


def _read_logits(decoder: Decoder, model: Any, config: Any) -> None:
    """What the model does to its logits."""
    decoder.divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    decoder.scale = float(getattr(model, "logit_scale", None) or 1.0)
    decoder.softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)


def _check_dtypes(decoder: Decoder) -> None:
    """One dtype runs through a step."""
    dtypes = {getattr(m, "compute_dtype", m.weight.dtype) for one in decoder.linears() for m in one.linears}
    dtypes.add(getattr(decoder.embedding, "compute_dtype", decoder.embedding.weight.dtype))
    devices = {m.weight.device for one in decoder.linears() for m in one.linears}
    devices.add(decoder.embedding.weight.device)
    if len(dtypes) > 1:
        raise Unfusable(f"it computes in several dtypes: {', '.join(sorted(str(d) for d in dtypes))}")
    if len(devices) > 1:
        raise Unfusable(f"it is on several devices: {', '.join(sorted(str(d) for d in devices))}")
