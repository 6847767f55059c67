"""int4_matmul: int4 weights in groups, 16- or 32-bit activations (W4A16)."""

from __future__ import annotations

import torch

from fastinfer.ops._common import (
    FLOATS,
    check_beside,
    check_float,
    check_matmul,
    check_packed,
    describe,
    fake_matmul,
    linear_reference,
    register_fake,
    run,
)
from fastinfer.ops.layout import ROW, TILE_W4A16, convert, pack_nibbles, unpack_nibbles

GROUP_SIZES = (32, 64, 128)


def int4_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    w_zero: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    layout: str = ROW,
) -> torch.Tensor:
    """y = activation(x · ((q − w_zero) · w_scale)ᵀ + bias) + residual, int4 weights in groups of G, fp32 accumulation.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides
        w:       [N, K/2] int8, contiguous, two q a byte, LAYOUTS.md#int4-row or #panel16
        w_scale: [N, K/G] fp16|bf16|fp32, contiguous, in the layout of w; G is 32, 64 or 128
        w_zero:  [N, K/G] as w_scale: zero points in units of q, possibly fractional
        bias:    [N] dtype of x or fp32, or None
        residual: [..., N_out] dtype of x, contiguous, or None: added last
        activation: "none" | "silu_mul" | "gelu_mul" | "gelu_tanh_mul"; all but "none" take N in multiples of 16, with
                 gate and up rows interleaved, LAYOUTS.md#gate-up
        layout:  "row" | "panel16" | "tile_w4a16": the order w, w_scale and w_zero are held in
    Returns: [..., N_out] dtype of x; N_out is N, or N/2 where gated
    Raises:  TypeError for a dtype, ValueError for a shape, layout or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512-VNNI); CUDA sm80+; Triton
    Numerics: error ≤ 2× that of torch's linear on the dequantised weight, and its epilogue, in the dtype of x. The
             epilogue is computed in fp32 and cast once; only the row layout on CUDA from 128 rows on rounds the sums to
             the dtype of x before it
    Source:  group-wise weight-only quantisation as in Frantar et al., GPTQ, arXiv 2210.17323, §4; free zero points as in
             Badri and Shaji, HQQ (2023)
    """
    k = 2 * w.shape[-1]
    check_packed("int4_matmul", w, layout, TILE_W4A16)
    check_float("int4_matmul", "x", x)
    check_matmul("int4_matmul", x, w, k, bias, residual, activation, x.dtype)
    for name, t in (("w_scale", w_scale), ("w_zero", w_zero)):
        if t.dtype not in FLOATS or t.dtype != w_scale.dtype:
            raise TypeError(f"int4_matmul: {name} must be float16, bfloat16 or float32, as w_scale, got {describe(t)}")
        if t.dim() != 2 or t.shape[0] != w.shape[0] or t.shape != w_scale.shape:
            raise ValueError(f"int4_matmul: {name} must be [{w.shape[0]}, K/G], as w_scale, got {describe(t)}")
        check_beside("int4_matmul", name, t, w)
    groups = w_scale.shape[1]
    if groups == 0 or k % groups or k // groups not in GROUP_SIZES:
        raise ValueError(f"int4_matmul: w_scale must have K/G columns, G in {GROUP_SIZES}, K = {k}; got {groups}")
    epilogue = bias, residual, activation
    return run("int4_matmul", reference, x, w, w_scale, w_zero, *epilogue, layout, triton=layout == ROW)


def unpack(w: torch.Tensor, layout: str = ROW) -> torch.Tensor:
    """q [N, K] int8, 0 … 15, from packed w [N, K/2]."""
    return unpack_nibbles(convert(w, layout, ROW)).view(torch.int8)


def pack(q: torch.Tensor) -> torch.Tensor:
    """w [N, K/2] int8 in row layout from q [N, K] with values 0 … 15, K even."""
    return pack_nibbles(q.to(torch.uint8))


def dequantize(w, w_scale, w_zero, layout: str = ROW, dtype=torch.float32) -> torch.Tensor:
    """The weight [N, K] in `dtype`: (q − zero) · scale, computed in `dtype` or fp32, whichever is wider."""
    wide = torch.promote_types(dtype, torch.float32)
    scale, zero = (convert(t, layout, ROW).to(wide).unsqueeze(-1) for t in (w_scale, w_zero))
    q = unpack(w, layout).to(wide).view(w.shape[0], w_scale.shape[1], -1)
    return ((q - zero) * scale).flatten(1).to(dtype)


def reference(
    x, w, w_scale, w_zero, bias=None, residual=None, activation="none", layout=ROW, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """The op in plain torch. Computes in fp32, or in `dtype` (fp64 for tests), which is then also the result's."""
    weight = dequantize(w, w_scale, w_zero, layout, dtype or torch.float32)
    return linear_reference(x, weight, bias, residual, activation, dtype)


@register_fake("int4_matmul")
def _(x, w, w_scale, w_zero, bias, residual, activation, layout):
    return fake_matmul(x, w, activation)
