"""Reads a decoder's layer: its attention, its feedforward, and how norms and sums wire them together."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastinfer.errors import Unfusable
from fastinfer.generation.parts import Attention, Feedforward, Layer, Linears, Norm
from fastinfer.modules.linear import float_weight
from fastinfer.rules import reading
from fastinfer.rules.reading import Part

ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEEDFORWARD = ("mlp", "feed_forward", "ffn")
FUSED = {"qkv_proj": "blocks", "c_attn": "blocks", "Wqkv": "blocks", "query_key_value": "groups"}
"""Names of linears that hold query, key and value, and the order of their rows."""

SEQUENTIAL, PARALLEL = False, True
WIRINGS: dict[tuple[str, ...], tuple[tuple[int | None, int | None, int | None, int | None], bool]] = {
    ("input_layernorm", "post_attention_layernorm"): ((0, None, 1, None), SEQUENTIAL),
    ("ln_1", "ln_2"): ((0, None, 1, None), SEQUENTIAL),
    ("self_attn_layer_norm", "final_layer_norm"): ((0, None, 1, None), SEQUENTIAL),
    ("norm1", "norm2"): ((0, None, 1, None), SEQUENTIAL),
    (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ): ((0, 1, 2, 3), SEQUENTIAL),
    (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    ): ((0, 1, 2, 3), SEQUENTIAL),
    ("post_attention_layernorm", "post_feedforward_layernorm"): ((None, 0, None, 1), SEQUENTIAL),
    ("input_layernorm",): ((0, None, 0, None), PARALLEL),
    ("ln_1",): ((0, None, 0, None), PARALLEL),
    ("ln_attn", "ln_mlp"): ((0, None, 1, None), PARALLEL),
}
"""Names of a layer's norms → which of them stands before attention, behind it, before the feedforward, behind it."""

ATTENTION_FLOATS = ("scaling", "attn_logit_softcapping", "inv_norm_factor", "beta", "rope_theta")
NOT_FUSED = {
    "clip_qkv": "clips queries, keys and values",
    "new_decoder_architecture": "repeats its keys and values in the cache",
    "attention_chunk_size": "attends in chunks",
    "attn_temperature_tuning": "scales queries by their position",
    "alibi": "biases scores by distance (ALiBi)",
}
"""Settings that change what attention computes, where they are on."""


def read_layer(module: nn.Module, path: str, index: int, config: Any, rotations: list[str]) -> Layer:
    """The parts of a decoder layer. Raises Unfusable where it has anything that the step does not know.

    rotations: the kinds of rotation that the model has, by layer type; [""] for one of all layers, [] for none
    """
    part = Part(module, path, ("residual_multiplier",))
    if getattr(module, "do_layer_norm_before", True) is False:
        raise Unfusable(f"{path} norms behind its sums")
    attending = part.part(ATTENTION_FLOATS, *ATTENTION)
    if attending is None:
        raise Unfusable(f"{path} has no attention that the fused step knows")
    attention = _read_attention(attending, index, config, rotations)
    inner = part.part((), *FEEDFORWARD)
    feedforward = _read_feedforward(inner or part)
    norms, parallel = _wire(part, config)
    for read in (attending, inner, part):
        if read is not None:
            read.done()
    multiplier = float(getattr(module, "residual_multiplier", 1.0))
    return Layer(attention, feedforward, norms[0], norms[1], norms[2], norms[3], parallel, multiplier)


def _wire(part: Part, config: Any) -> tuple[list[Norm | None], bool]:
    """The layer's norms in their places, and whether attention and feedforward stand side by side."""
    names = set(part.left())
    for known, (places, parallel) in WIRINGS.items():
        if set(known) != names:
            continue
        norms = [reading.norm(part.take(name) or part.module, f"{part.path}.{name}") for name in known]
        for owner in (part.module, config):
            for flag in ("use_parallel_residual", "parallel_attn"):
                parallel = bool(getattr(owner, flag, parallel))
        return [None if place is None else norms[place] for place in places], parallel
    raise Unfusable(
        f"{part.path} has {', '.join(sorted(names)) or 'no norm'} beside attention and feedforward, which is "
        "no arrangement that the fused step knows"
    )


# ---- feedforward ----------------------------------------------------------------------------------------------------


def _read_feedforward(part: Part) -> Feedforward:
    if any("expert" in name for name in part.module._modules):
        raise Unfusable(f"{part.path} is a mixture of experts")
    gate = part.linear("gate_proj", "w1")
    up = part.linear("up_proj", "w3", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in")
    down = part.linear("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out")
    if up is None or down is None:
        raise Unfusable(f"{part.path} has no linears up and down that the fused step knows")
    activation = reading.take_activation(part)
    if gate is not None:
        return Feedforward(Linears([gate, up], activation), reading.one(down))
    if float_rows(up) == 2 * float_columns(down):
        return Feedforward(Linears([up], activation), reading.one(down))
    return Feedforward(reading.one(up), reading.one(down), activation)


def float_rows(linear: Any) -> int:
    return linear.out_features if hasattr(linear, "out_features") else float_weight(linear).shape[0]


def float_columns(linear: Any) -> int:
    return linear.in_features if hasattr(linear, "in_features") else float_weight(linear).shape[1]


# ---- attention ------------------------------------------------------------------------------------------------------


def _read_attention(part: Part, index: int, config: Any, rotations: list[str]) -> Attention:
    module, path = part.module, part.path
    for owner in (config, module):
        for name, why in NOT_FUSED.items():
            if getattr(owner, name, None):
                raise Unfusable(f"{path} {why} ({name})")
    if getattr(module, "is_causal", True) is not True:
        raise Unfusable(f"{path} is not causal")
    if getattr(module, "layer_idx", index) != index:
        raise Unfusable(f"{path} keeps its keys under layer {module.layer_idx}, not {index}")
    attention = _read_heads(part, index, config)
    attention.out = reading.one(part.linear("o_proj", "out_proj", "dense", "c_proj") or _no(path, "output linear"))
    attention.q_norm, attention.k_norm = _read_head_norms(part, attention)
    kind = (getattr(config, "layer_types", None) or [""] * (index + 1))[index]
    attention.window = _window(module, path, kind, config)
    if getattr(config, "_attn_implementation", None) != "sdpa":  # there transformers leaves it out, or refuses it
        attention.softcap = float(getattr(module, "attn_logit_softcapping", None) or 0.0)
    attention.rotation = _rotation(module, kind, rotations)
    return attention


def _no(path: str, what: str) -> nn.Module:
    raise Unfusable(f"{path} has no {what} that the fused step knows")


def _read_heads(part: Part, index: int, config: Any) -> Attention:
    """The linears of query, key and value, and how their products split into heads."""
    apart = [part.linear(name) for name in ("q_proj", "k_proj", "v_proj")]
    module: Any = part.module
    heads = getattr(config, "num_attention_heads", 0)
    head_dim = next((d for name in ("head_dim", "head_size") if (d := getattr(module, name, None))), None)
    if not isinstance(head_dim, int) or not heads:
        raise Unfusable(f"{part.path} does not tell the size of its heads")
    if None not in apart:
        linears, order = [linear for linear in apart if linear is not None], "apart"
        rows = [float_rows(linear) for linear in linears]
    else:
        name = next((name for name in FUSED if name in module._modules), None)
        linears, order = [part.linear(name or "") or _no(part.path, "query, key and value linears")], FUSED[name or ""]
        total = float_rows(linears[0])
        kv_rows = (total - heads * head_dim) // 2
        rows = [heads * head_dim, kv_rows, total - heads * head_dim - kv_rows]
    groups = rows[1] // head_dim
    if rows[0] != heads * head_dim or rows[1:] != [groups * head_dim] * 2 or not groups or heads % groups:
        raise Unfusable(f"{part.path} has linears of {rows} rows, which are no {heads} heads of {head_dim}")
    scale = next((s for name in ("scaling", "inv_norm_factor") if (s := getattr(module, name, None)) is not None), None)
    scale = head_dim**-0.5 if scale is None else float(scale)
    return Attention(index, Linears(linears), Linears(linears[:1]), order, heads, groups, head_dim, scale)


def _read_head_norms(part: Part, attention: Attention) -> tuple[Norm | None, Norm | None]:
    found = []
    for names, heads in ((("q_norm", "q_layernorm"), attention.heads), (("k_norm", "k_layernorm"), attention.kv_heads)):
        child = part.take(*names)
        norm = None if child is None else reading.norm(child, f"{part.path}.{names[0]}")
        if norm is not None and len(norm.module.weight) not in (attention.head_dim, heads * attention.head_dim):
            raise Unfusable(f"{part.path}.{names[0]} is neither over a head nor over all")
        found.append(norm)
    if (found[0] is None) != (found[1] is None):
        raise Unfusable(f"{part.path} norms queries or keys alone")
    return found[0], found[1]


def _window(module: nn.Module, path: str, kind: str, config: Any) -> int:
    """How many positions the layer sees; 0: all."""
    if kind not in ("", "full_attention", "sliding_attention"):
        raise Unfusable(f"{path} is of the kind {kind}")
    if "sliding_window" in vars(module):
        return vars(module)["sliding_window"] or 0
    return 0 if kind == "full_attention" else getattr(config, "sliding_window", None) or 0


def _rotation(module: nn.Module, kind: str, rotations: list[str]) -> str | None:
    if not rotations or not getattr(module, "use_rope", True):
        return None
    return kind if kind in rotations else rotations[0]
