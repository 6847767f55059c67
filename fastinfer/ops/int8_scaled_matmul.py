"""int8_scaled_matmul: int8 weights and int8 activations (W8A8)."""

from __future__ import annotations

import torch

from fastinfer.ops._common import (
    FLOATS,
    apply_epilogue,
    check_beside,
    check_float,
    check_int8_scale,
    check_matmul,
    check_packed,
    describe,
    fake_matmul,
    register_fake,
    run,
)
from fastinfer.ops.int8_quantize import reference as quantize
from fastinfer.ops.layout import ROW, TILE_W8A8, convert

MAX_K = 131_072  # 2^31 / (127 · 128), rounded down to a power of two


def int8_scaled_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = ROW,
    x_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = activation((q · wᵀ) · x_scale · w_scale + bias) + residual, q int8 activations per token; int32 accumulation.

    A float x is quantised as int8_quantize does it; an int8 x is q itself, and comes with its x_scale. Both ways give
    the same bits. A row that holds NaN or infinity comes out as NaN.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides, or int8, −127 … 127; K ≤ 131,072, so that int32 cannot overflow
        w:       [N, K] int8, contiguous, LAYOUTS.md#int8-row or #panel16
        w_scale: [N] fp32
        bias:    [N] dtype of y or fp32, or None
        residual: [..., N_out] dtype of y, contiguous, or None: added last
        activation: "none" | "silu_mul" | "gelu_mul" | "gelu_tanh_mul"; all but "none" take N in multiples of 16, with
                 gate and up rows interleaved, LAYOUTS.md#gate-up
        layout:  "row" | "panel16" | "tile_w8a8": the order w is held in
        x_scale: [...] fp32, contiguous, beside int8 x; None beside float x
        out_dtype: fp32|bf16|fp16 beside int8 x; None beside float x
    Returns: [..., N_out] out_dtype, or the dtype of float x; N_out is N, or N/2 where gated
    Raises:  TypeError for a dtype, ValueError for a shape, layout or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512-VNNI); CUDA sm80+; Triton
    Numerics: the integer stage is exact; scales and epilogue are computed in fp32 and cast once
    Source:  per-token activations: Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; symmetric here
    """
    check_packed("int8_scaled_matmul", w, layout, TILE_W8A8)
    check_activations(x, x_scale, out_dtype)
    check_matmul("int8_scaled_matmul", x, w, w.shape[-1], bias, residual, activation, out_dtype or x.dtype)
    check_int8_scale("int8_scaled_matmul", w, w_scale)
    if x_scale is not None:
        check_beside("int8_scaled_matmul", "x_scale", x_scale, w)
    if w.shape[-1] > MAX_K:
        raise ValueError(f"int8_scaled_matmul: w must have at most {MAX_K} columns, got {list(w.shape)}")
    epilogue = bias, residual, activation
    rest = layout, x_scale, out_dtype
    return run("int8_scaled_matmul", reference, x, w, w_scale, *epilogue, *rest, triton=layout == ROW)


def check_activations(x: torch.Tensor, x_scale: torch.Tensor | None, out_dtype: torch.dtype | None) -> None:
    """An int8 x comes with x_scale and out_dtype, a float x with neither."""
    op = "int8_scaled_matmul"
    if x.dtype == torch.int8:
        if x_scale is None or x_scale.dtype != torch.float32 or x_scale.shape != x.shape[:-1]:
            got = "None" if x_scale is None else describe(x_scale)
            raise ValueError(f"{op}: x_scale must be float32 {list(x.shape[:-1])} beside int8 x, got {got}")
        if out_dtype not in FLOATS:
            raise TypeError(f"{op}: out_dtype must be float32, bfloat16 or float16 beside int8 x, got {out_dtype}")
        return
    check_float(op, "x", x)
    for name, value in (("x_scale", x_scale), ("out_dtype", out_dtype)):
        if value is not None:
            raise ValueError(f"{op}: {name} must be None beside float x, which is quantised here")


def reference(
    x,
    w,
    w_scale,
    bias=None,
    residual=None,
    activation="none",
    layout=ROW,
    x_scale=None,
    out_dtype=None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The op in plain torch, the integer stage exact; scaled in fp32, or in `dtype`, which is then also the result's."""
    q, x_scale = quantize(x) if x_scale is None else (x, x_scale)
    wide = dtype or torch.float32
    acc = q.double() @ convert(w, layout, ROW).double().T  # |sums| < 2^53: exact
    v = acc.to(wide) * (x_scale.to(wide)[..., None] * w_scale.to(wide))
    return apply_epilogue(v, bias, residual, activation).to(dtype or out_dtype or x.dtype)


@register_fake("int8_scaled_matmul")
def _(x, w, w_scale, bias, residual, activation, layout, x_scale, out_dtype):
    return fake_matmul(x, w, activation, out_dtype)
