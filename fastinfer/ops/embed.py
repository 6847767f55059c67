"""embed: the beginning of a decode step: rows of the embedding, and of the rotary tables at the positions they have."""

from __future__ import annotations

import torch
from torch import nn

from fastinfer.ops._common import FLOATS, check_beside, check_int8_scale, describe, register_fake, run
from fastinfer.ops.layout import LAYOUTS, PANEL16, ROW, TILE_COLUMNS, TILE_ROWS, TILE_W4A16, gather_rows


def embed(
    ids: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor | None = None,
    factor: float = 1.0,
    layout: str = ROW,
    out_dtype: torch.dtype | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x = w[ids] · w_scale[ids] · factor, and the rows of cos and sin at position lengths − starts + t of each token.

    Positions beyond the tables' ends take their first or last row (padding is before position 0). An id that is no row of
    w is an error on the CPU; CUDA takes the nearest row, since a captured graph can raise nothing.

    Args:
        ids:     [B, T] int64, 0 … V − 1
        w:       [V, K] float, contiguous, or int8 in `layout`
        w_scale: [V] fp32 beside int8 w, else None
        factor:  a constant that the model multiplies embeddings by
        layout:  that of int8 w: "row", "panel16", "tile_w8a16" or "tile_w8a8" (csrc/LAYOUTS.md); "row" of float w
        out_dtype: fp32|bf16|fp16 beside int8 w, else None
        cos:     [P, R] fp32, or [N, P, R] for N tables; contiguous; or None
        sin:     like cos
        lengths: [B] int32, contiguous, beside cos and sin: how many positions there were before
        starts:  [B] int32, contiguous, or None for 0: how many of them are padding
    Returns: x [B, T, K] in out_dtype or the dtype of w; cos and sin [B, T, R] or [N, B, T, R] fp32, or None
    Raises:  TypeError for a dtype, ValueError for a shape, device or layout that does not fit; both name the argument.
             RuntimeError (IndexError where there is no library) for ids out of range, on the CPU
    Backends: CPU; CUDA sm80+ (one launch, can be captured in a graph, starts early inside of dependent_launch); else the
             reference
    Numerics: bit for bit those of the reference: int8 times scale in fp32, rounded to out_dtype; factor rounded to that
             dtype, and the product too, as transformers' scaled embeddings do
    Source:  –
    """
    check_weights(ids, w, w_scale, layout, out_dtype)
    given = ids, w, w_scale, float(factor), layout, out_dtype
    tables = {"cos": cos, "sin": sin, "lengths": lengths}
    if all(t is None for t in tables.values()) and starts is None:
        return run("embed", reference, *given, triton=False), None, None
    for name, t in tables.items():
        if t is None:
            raise ValueError(f"embed: {name} must be given: cos, sin and lengths come together")
    check_tables(ids, cos, sin, lengths, starts)
    return run("embed.rotary", reference, *given, cos, sin, lengths, starts, triton=False)


def check_weights(ids, w, w_scale, layout, out_dtype) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"embed: ids must be int64, got {describe(ids)}")
    if ids.dim() != 2:
        raise ValueError(f"embed: ids must be [B, T], got {describe(ids)}")
    if w.dtype not in (*FLOATS, torch.int8):
        raise TypeError(f"embed: w must be float32, bfloat16, float16 or int8, got {describe(w)}")
    if w.dim() != 2 or w.shape[0] == 0:
        raise ValueError(f"embed: w must be [V, K] with V ≥ 1, got {describe(w)}")
    check_beside("embed", "ids", ids, w)
    check_beside("embed", "w", w, w)
    int8 = w.dtype == torch.int8
    if layout not in LAYOUTS or layout == TILE_W4A16 or (not int8 and layout != ROW):
        raise ValueError(f"embed: layout must be one of int8 w, or {ROW!r}, got {layout!r} beside {describe(w)}")
    if layout == PANEL16 and w.shape[1] % 4:
        raise ValueError(f"embed: layout {layout!r} takes w with columns in multiples of 4, got {describe(w)}")
    if layout not in (ROW, PANEL16) and (w.shape[0] < TILE_ROWS or w.shape[1] % TILE_COLUMNS):
        raise ValueError(
            f"embed: layout {layout!r} takes w with tiles of {TILE_ROWS} × {TILE_COLUMNS}, got {describe(w)}"
        )
    if (w_scale is not None) != int8:
        raise ValueError(f"embed: w_scale must be given beside int8 w alone, got w {describe(w)}")
    if w_scale is not None:
        check_int8_scale("embed", w, w_scale)
    if out_dtype not in (FLOATS if int8 else (None,)):
        wanted = "float32, bfloat16 or float16 beside int8 w" if int8 else "None beside float w"
        raise TypeError(f"embed: out_dtype must be {wanted}, got {out_dtype}")


def check_tables(ids, cos, sin, lengths, starts) -> None:
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype != torch.float32:
            raise TypeError(f"embed: {name} must be float32, got {describe(t)}")
        if t.dim() not in (2, 3) or t.shape[-2] == 0 or t.shape != cos.shape:
            raise ValueError(f"embed: {name} must be [P, R] or [N, P, R], cos and sin alike, got {describe(t)}")
    for name, t in (("lengths", lengths), ("starts", starts)):
        if t is None:
            continue
        if t.dtype != torch.int32:
            raise TypeError(f"embed: {name} must be int32, got {describe(t)}")
        if t.shape != ids.shape[:1]:
            raise ValueError(f"embed: {name} must be [{ids.shape[0]}], got {describe(t)}")
    for name, t in (("cos", cos), ("sin", sin), ("lengths", lengths), ("starts", starts)):
        if t is not None:
            check_beside("embed", name, t, ids, "ids")


def rows_of(ids, w, w_scale, factor, layout, out_dtype, dtype) -> torch.Tensor:
    if ids.is_cuda:
        ids = ids.clamp(0, w.shape[0] - 1)
    if w_scale is None:
        x = nn.functional.embedding(ids, w)
    else:
        scale = nn.functional.embedding(ids, w_scale[:, None])  # refuses ids out of range
        x = gather_rows(w, ids, layout).to(dtype or torch.float32) * scale
    x = x.to(dtype or out_dtype or w.dtype)
    return x if factor == 1 else x * torch.full((), factor, dtype=x.dtype, device=x.device)


def reference(
    ids,
    w,
    w_scale=None,
    factor=1.0,
    layout=ROW,
    out_dtype=None,
    cos=None,
    sin=None,
    lengths=None,
    starts=None,
    dtype: torch.dtype | None = None,
):
    """The native op in plain torch: x, or x, cos and sin where there are tables; in `dtype`, where given, x is."""
    x = rows_of(ids, w, w_scale, factor, layout, out_dtype, dtype)
    if cos is None:
        return x
    first = lengths if starts is None else lengths - starts
    positions = first.long()[:, None] + torch.arange(ids.shape[1], device=ids.device)
    positions = positions.clamp(0, cos.shape[-2] - 1)
    return x, cos[..., positions, :], sin[..., positions, :]


@register_fake("embed")
def _(ids, w, w_scale, factor, layout, out_dtype):
    return w.new_empty((*ids.shape, w.shape[1]), dtype=out_dtype or w.dtype)


@register_fake("embed.rotary")
def _(ids, w, w_scale, factor, layout, out_dtype, cos, sin, lengths, starts):
    x = w.new_empty((*ids.shape, w.shape[1]), dtype=out_dtype or w.dtype)
    rows = (*cos.shape[:-2], *ids.shape, cos.shape[-1])
    return x, cos.new_empty(rows), cos.new_empty(rows)
