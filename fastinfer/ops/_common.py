"""What every op shares: argument checks with typed errors, and the choice of backend."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from fastinfer import _native
from fastinfer.ops.layout import PANEL16, ROW

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def describe(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"


def check_matmul(
    op: str, x: torch.Tensor, w: torch.Tensor, k: int, bias: torch.Tensor | None, layout: str, tile: str
) -> None:
    """The checks that all quantised matmuls share: x [..., K] float, w [N, ·] int8, bias [N], a layout of the op.

    `tile` is the op's tile layout.
    """
    if layout not in (layouts := (ROW, PANEL16, tile)):
        raise ValueError(f"{op}: layout must be one of {layouts}, got {layout!r}")
    if w.dtype != torch.int8 or w.dim() != 2:
        raise TypeError(f"{op}: w must be a two-dimensional int8 tensor, got {describe(w)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x must be float32, bfloat16 or float16, got {describe(x)}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"{op}: the last dimension of x must be K = {k}, got {describe(x)}")
    if x.device != w.device:
        raise ValueError(f"{op}: x is on {x.device}, w on {w.device}")
    check_beside(op, "w", w, w)
    if bias is not None:
        check_beside(op, "bias", bias, w)
    if bias is not None and (bias.shape != w.shape[:1] or bias.dtype not in (x.dtype, torch.float32)):
        raise ValueError(f"{op}: bias must be [{w.shape[0]}] in {x.dtype} or float32, got {describe(bias)}")


def check_beside(op: str, name: str, t: torch.Tensor, w: torch.Tensor) -> None:
    """The kernels read `t` as plain memory on w's device."""
    if t.device != w.device:
        raise ValueError(f"{op}: {name} must be on {w.device}, as w, got {t.device}")
    if not t.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, got strides {t.stride()}")


def check_int8_scale(op: str, w: torch.Tensor, w_scale: torch.Tensor) -> None:
    if w_scale.dtype != torch.float32 or w_scale.shape != w.shape[:1]:
        raise ValueError(f"{op}: w_scale must be float32 [{w.shape[0]}], got {describe(w_scale)}")
    check_beside(op, "w_scale", w_scale, w)


def linear_reference(x, weight, bias, dtype: torch.dtype | None):
    """x · weightᵀ + bias computed in `weight`'s dtype; cast to x's dtype unless `dtype` asked for another."""
    y = x.to(weight.dtype) @ weight.T
    if bias is not None:
        y = y + bias.to(weight.dtype)
    return y.to(dtype or x.dtype)


def run(op: str, reference: Callable[..., torch.Tensor], *args) -> torch.Tensor:
    """Calls `op` on the fastest backend that x's device has; the last of `args` is the layout."""
    device = args[0].device
    kind = _native.backend(device)
    if kind == "native":
        return getattr(torch.ops.fastinfer, op)(*args)
    _native.warn_fallback(device, kind)
    if kind == "triton" and args[-1] == ROW:
        return getattr(importlib.import_module(f"fastinfer.kernels.{op}"), op)(*args)
    return reference(*args)


def register_fake(op: str) -> Callable:
    """Registers a fake kernel for torch.compile and export, where the schema is there to attach it to."""

    def register(fake: Callable) -> Callable:
        if _native.status["cpu"] == "loaded":
            torch.library.register_fake(f"fastinfer::{op}", fake)
        return fake

    return register


def fake_matmul(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """An empty [..., N] in x's dtype: what every matmul here returns."""
    return x.new_empty((*x.shape[:-1], w.shape[0]))
