"""Which modules are plain linears that a quantised linear can stand for."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastinfer.modules import Int4Linear, Int8Linear, QuantizedLinear
from fastinfer.modules.linear import float_weight
from fastinfer.ops.int4_matmul import GROUP_SIZES
from fastinfer.recipe import Spec

MIN_FEATURES = 16  # a panel of the kernels; below it there is nothing to gain

# Linears whose weight transformers reads instead of calling them, or casts their input to: model folder → names.
READ_NOT_CALLED = {
    "bamba": {"out_proj"},
    "colmodernvbert": {"embedding_proj_layer"},
    "colpali": {"embedding_proj_layer"},
    "colqwen2": {"embedding_proj_layer"},
    "deberta": {"in_proj"},
    "falcon_h1": {"out_proj"},
    "falcon_mamba": {"x_proj", "dt_proj", "out_proj", "lm_head"},
    "gemma3n": {"correction_coefs", "prediction_coefs"},
    "granitemoehybrid": {"out_proj"},
    "jamba": {"dt_proj"},
    "layoutlmv2": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "layoutlmv3": {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
    "longcat_flash": {"classifier"},
    "mamba": {"x_proj", "dt_proj", "out_proj", "lm_head"},
    "mamba2": {"out_proj", "lm_head"},
    "mobilebert": {"dense", "decoder"},
    "nemotron_h": {"out_proj"},
    "reformer": {"query_key", "value"},
    "rwkv": {"output", "value"},
    "wavlm": {"q_proj", "k_proj", "v_proj", "out_proj"},
    "xlstm": {"lm_head"},
    "zamba2": {"out_proj"},
}


TOO_SMALL = f"smaller than {MIN_FEATURES} features: nothing to gain"
LIKE_LINEAR = {"FalconLinear"}  # transformers' subclasses that multiply exactly like their parent


def is_linear(module: nn.Module) -> bool:
    """An nn.Linear or transformers Conv1D itself: a subclass may do more than multiply."""
    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in LIKE_LINEAR


def looks_linear(module: nn.Module) -> bool:
    """Something that a user would call a linear, whether we can replace it or not."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, QuantizedLinear)


def accelerate_hooks(module: nn.Module) -> list:
    """accelerate's hooks on a module, one by one."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def is_offloaded(module: nn.Module) -> bool:
    return any(getattr(hook, "offload", False) for hook in accelerate_hooks(module))


def _read_not_called(parent: nn.Module, name: str) -> bool:
    if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
        return True
    packages = [kind.__module__.split(".") for kind in type(parent).__mro__]
    folders = {package[2] for package in packages if package[:2] == ["transformers", "models"]}
    return any(name in READ_NOT_CALLED.get(folder, ()) for folder in folders)


def refusal(module: nn.Module, parent: nn.Module, name: str) -> str | None:
    """Why the linear called `name` in `parent` cannot be replaced, or None."""
    if is_offloaded(module):
        return "offloaded by accelerate: its weights come and go"
    if hasattr(module, "parametrizations"):
        return "its weight is parametrised"
    if _read_not_called(parent, name):
        return f"{type(parent).__name__} reads its weight without calling it"
    if not is_linear(module):
        return f"a {type(module).__name__} may do more than multiply"
    if "forward" in vars(module) and not accelerate_hooks(module):
        return "its forward was replaced on the instance"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is parametrised"
    if isinstance(weight, nn.parameter.UninitializedTensorMixin):
        return "its weight is not initialised yet"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}"
    if min(weight.shape) < MIN_FEATURES:
        return TOO_SMALL
    return None


def resolve(spec: Spec, module: nn.Module) -> tuple[Spec, str]:
    """The spec with its group size settled for this linear, and a note where it differs from what was asked for.

    Raises ValueError where an explicit group size does not divide K.
    """
    if spec.weights != "int4":
        return spec, ""
    k, method = float_weight(module).shape[1], spec.method or "hqq"
    if spec.group_size is not None:
        if k % spec.group_size:
            fits = [g for g in GROUP_SIZES if k % g == 0]
            hint = f"group_size={fits[-1]} does" if fits else "no group size does: keep it or use int8"
            raise ValueError(f"group_size={spec.group_size} does not divide its {k} input features; {hint}")
        return Spec("int4", spec.group_size, method), ""
    for group_size in (64, 32):
        if k % group_size == 0:
            note = "" if group_size == 64 else f"groups of {group_size}: 64 does not divide {k}"
            return Spec("int4", group_size, method), note
    return Spec("int8", activations="keep"), f"int8: no group size divides {k}"


def build(module: nn.Module, spec: Spec) -> QuantizedLinear:
    """The quantised linear for a resolved spec."""
    if spec.weights == "int4":
        assert spec.group_size and spec.method
        return Int4Linear.from_float(module, spec.group_size, spec.method)
    return Int8Linear.from_float(module, spec.activations or "keep")


def build_tied(module: nn.Linear, first: Int8Linear) -> Int8Linear:
    """A second linear on the weight of `first`, with a bias of its own."""
    shared = {"like": first.compute_dtype, "activations": first.activations, "layout": first.layout}
    return Int8Linear(first.weight, first.weight_scale, module.bias, **shared).train(module.training)


def packed_bytes(module: nn.Module, spec: Spec) -> int:
    """Bytes of weight and scales under a resolved spec, without building."""
    n, k = float_weight(module).shape
    return n * k + 4 * n if spec.group_size is None else n * k // 2 + 4 * n * (k // spec.group_size)


def is_causal(model: nn.Module) -> bool:
    """Whether a model attends causally somewhere: decoders, and encoder–decoders through their decoder.

    Attention modules say so with `is_causal` in most architectures; `can_generate()` and `config.is_decoder` do not
    (GPT2Model cannot generate, XLNet can, GPT-NeoX has is_decoder=False). Where no module has the flag, a forward that
    takes a cache counts, unless the configuration denies it.
    """
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    if flags:
        return any(flags)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or getattr(config, "is_decoder", None) is False:
            continue
        if {"past_key_values", "cache_params", "state"} & inspect.signature(module.forward).parameters.keys():
            return True
    return False


def default_activations(model: nn.Module) -> str:
    """ "int8" for encoders, whose matmuls have many rows and are bound by arithmetic; "keep" for anything causal."""
    return "keep" if is_causal(model) else "int8"
