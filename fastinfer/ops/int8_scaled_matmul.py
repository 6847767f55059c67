"""int8_scaled_matmul: int8 weights and int8 activations (W8A8)."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_int8_scale, check_matmul, fake_matmul, register_fake, run
from fastinfer.ops.layout import ROW, TILE_W8A8, convert


def int8_scaled_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = ROW,
) -> torch.Tensor:
    """y = (q · wᵀ) · x_scale · w_scale + bias, where q is x quantised to int8 per token; int32 accumulation.

    Each row of x gets x_scale = max|x| / 127 and q = round(x / x_scale), halves to even. A row that holds NaN or
    infinity comes out as NaN.

    Args:
        x:       [..., K] fp32|bf16|fp16, any strides; K ≤ 131,072, so that int32 cannot overflow
        w:       [N, K] int8, contiguous, LAYOUTS.md#int8-row or #panel16
        w_scale: [N] fp32
        bias:    [N] dtype of x or fp32, or None
        layout:  "row" | "panel16" | "tile_w8a8": the order w is held in
    Returns: [..., N] dtype of x
    Raises:  TypeError for a dtype, ValueError for a shape, layout or device that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512-VNNI); CUDA sm80+; Triton
    Numerics: the integer stage is exact; scales and bias are applied in fp32
    Source:  per-token activations: Yao et al., ZeroQuant, arXiv 2206.01861, §3.1; symmetric here
    """
    check_matmul("int8_scaled_matmul", x, w, w.shape[-1], bias, layout, TILE_W8A8)
    check_int8_scale("int8_scaled_matmul", w, w_scale)
    if w.shape[-1] > MAX_K:
        raise ValueError(f"int8_scaled_matmul: w must have at most {MAX_K} columns, got {list(w.shape)}")
    return run("int8_scaled_matmul", reference, x, w, w_scale, bias, layout)


MAX_K = 131_072  # 2^31 / (127 · 128), rounded down to a power of two


def quantize_activations(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q [..., K] and x_scale [..., 1], both fp32 tensors: x ≈ q · x_scale with whole q in −127 … 127."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    x_scale = largest / torch.full_like(largest, 127)  # by a number, torch would multiply by 1/127 on CUDA
    return (x / x_scale.where(x_scale > 0, 1.0)).round().clamp(-127, 127), x_scale


def reference(x, w, w_scale, bias=None, layout=ROW, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The op in plain torch, the integer stage exact; scaled in fp32, or in `dtype`, which is then also the result's."""
    if x.shape[-1] == 0:
        q, x_scale = x.float(), x.new_zeros((*x.shape[:-1], 1), dtype=torch.float32)
    else:
        q, x_scale = quantize_activations(x)
    wide = dtype or torch.float32
    acc = q.double() @ convert(w, layout, ROW).double().T  # |sums| < 2^53: exact
    row_nan = torch.isfinite(x_scale).logical_not()
    y = acc.to(wide) * (x_scale.to(wide) * w_scale.to(wide))
    if bias is not None:
        y = y + bias.to(wide)
    return y.masked_fill(row_nan, float("nan")).to(dtype or x.dtype)


@register_fake("int8_scaled_matmul")
def _(x, w, w_scale, bias, layout):
    return fake_matmul(x, w)
