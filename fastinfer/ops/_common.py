"""What every op shares: argument checks with typed errors, and the choice of backend."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

import torch
from torch import nn

from fastinfer import _native
from fastinfer.ops.layout import GATE_ROWS, PANEL16, ROW
from fastinfer.tuning import plans

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def check_matmul(
    op: str,
    x: torch.Tensor,
    w: torch.Tensor,
    k: int,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
) -> None:
    """The checks that all matmuls share: x [..., K], w [N, ·], bias [N], the epilogue of a result in `dtype`."""
    if w.dim() != 2:
        raise TypeError(f"{op}: w must be a two-dimensional tensor, got {describe(w)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: the last dimension of x must be K = {k}, got {describe(x)}")
    if x.device != w.device:
        raise ValueError(f"{op}: x is on {x.device}, w on {w.device}")
    check_beside(op, "w", w, w)
    if bias is not None:
        check_beside(op, "bias", bias, w)
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype not in (dtype, torch.float32)):
        raise ValueError(f"{op}: bias must be [{w.shape[0]}] in {dtype} or float32, got {describe(bias)}")
    check_activation(op, w.shape[0], activation)
    if residual is not None:
        check_beside(op, "residual", residual, w)
        shape = (*x.shape[:-1], out_features(w.shape[0], activation))
        if residual.shape != shape or residual.dtype != dtype:
            raise ValueError(f"{op}: residual must be {list(shape)} in {dtype}, as y, got {describe(residual)}")


def check_packed(op: str, w: torch.Tensor, layout: str, tile: str) -> None:
    """w [N, ·] int8 in a layout of the op, whose tile layout is `tile`."""
    if layout not in (layouts := (ROW, PANEL16, tile)):
        raise ValueError(f"{op}: layout must be one of {layouts}, got {layout!r}")
    if w.dtype != torch.int8 or w.dim() != 2:
        raise TypeError(f"{op}: w must be a two-dimensional int8 tensor, got {describe(w)}")


def check_float(op: str, name: str, t: torch.Tensor) -> None:
    if t.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {describe(t)}")


def check_beside(op: str, name: str, t: torch.Tensor, other: torch.Tensor, other_name: str = "w") -> None:
    """The kernels read `t` as plain memory on the other's device."""
    check_device(op, name, t, other, other_name)
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()}")


def check_device(op: str, name: str, t: torch.Tensor, other: torch.Tensor, other_name: str = "x") -> None:
    if t.device != other.device:
        raise ValueError(f"{op}: {name} must be on {other.device}, as {other_name}, got {t.device}")


def check_norm_weight(op: str, name: str, weight: torch.Tensor | None, x: torch.Tensor) -> None:
    """The weight [K] of a norm of x [..., K], or none."""
    if weight is None:
        return
    check_beside(op, name, weight, x, "x")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: {name} must be {x.dtype} or float32, got {describe(weight)}")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"{op}: {name} must be {list(x.shape[-1:])}, got {describe(weight)}")


def divide(a: torch.Tensor, by: float) -> torch.Tensor:
    return a / torch.full_like(a, by)  # by a number, torch would multiply by its reciprocal on CUDA


def check_int8_scale(op: str, w: torch.Tensor, w_scale: torch.Tensor) -> None:
    if w_scale.dtype != torch.float32 or w_scale.shape != w.shape[:1]:
        raise ValueError(f"{op}: w_scale must be float32 [{w.shape[0]}], got {describe(w_scale)}")
    check_beside(op, "w_scale", w_scale, w)


# ---- epilogues ------------------------------------------------------------------------------------------------------

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor] | None] = {
    "none": None,
    "silu_mul": nn.functional.silu,
    "gelu_mul": nn.functional.gelu,
    "gelu_tanh_mul": functools.partial(nn.functional.gelu, approximate="tanh"),
}
"""What an epilogue applies to the gate before it multiplies; every one but "none" halves the columns."""


def check_activation(op: str, n: int, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"{op}: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if activation != "none" and n % (2 * GATE_ROWS):
        raise ValueError(f"{op}: activation {activation!r} needs w with rows in multiples of {2 * GATE_ROWS}, got {n}")


def out_features(n: int, activation: str) -> int:
    """Columns of y for N rows of w."""
    return n if activation == "none" else n // 2


def apply_epilogue(v: torch.Tensor, bias, residual, activation: str, halves: bool = False) -> torch.Tensor:
    """activation(v + bias) + residual in v's dtype; a gated activation takes LAYOUTS.md#gate-up, or [gate, up] halves."""
    if bias is not None:
        v = v + bias.to(v.dtype)
    act = ACTIVATIONS[activation]
    if act is not None:
        gate, up = v.chunk(2, -1) if halves else (t.flatten(-2) for t in v.unflatten(-1, (-1, 2, GATE_ROWS)).unbind(-2))
        v = act(gate) * up
    return v if residual is None else v + residual.to(v.dtype)


def linear_reference(x, weight, bias, residual, activation, dtype: torch.dtype | None, halves: bool = False):
    """The matmul and its epilogue computed in `weight`'s dtype; cast to x's dtype unless `dtype` asked for another."""
    return apply_epilogue(x.to(weight.dtype) @ weight.T, bias, residual, activation, halves).to(dtype or x.dtype)


# ---- dispatch -------------------------------------------------------------------------------------------------------


def run(op: str, reference: Callable, *args, triton: bool = True, **named):
    """Calls `op` on the fastest backend that the first argument's device has; `triton` says whether that may be one.

    `op` may name an overload, as in the table of schemas; Triton and the reference take all of an op's in one function.
    """
    stem, _, overload = op.partition(".")
    device = args[0].device
    kind = _native.backend(device)
    if kind == "native":
        if args[0].is_cuda:
            plans.load_for(device)
        native = getattr(torch.ops.fastinfer, stem)
        return (getattr(native, overload) if overload else native)(*args, **named)
    _native.warn_fallback(device, kind)
    if kind == "triton" and triton:
        return getattr(importlib.import_module(f"fastinfer.kernels.{stem}"), stem)(*args, **named)
    return reference(*args, **named)


def register_fake(op: str) -> Callable:
    """Registers a fake kernel for torch.compile and export, where the schema is there to attach it to."""

    def register(fake: Callable) -> Callable:
        if _native.status["cpu"] == "loaded":
            torch.library.register_fake(f"fastinfer::{op}", fake)
        return fake

    return register


def fake_matmul(x: torch.Tensor, w: torch.Tensor, activation: str, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty [..., N] (half as many columns where gated) in `dtype`, by default x's: what every matmul here returns."""
    return x.new_empty((*x.shape[:-1], out_features(w.shape[0], activation)), dtype=dtype or x.dtype)
