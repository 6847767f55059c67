"""The execution layouts of csrc/LAYOUTS.md, as bijections on tensors, and which one a device runs on."""

from __future__ import annotations

import torch

from fastinfer import _native

ROW = "row"
PANEL16 = "panel16"
LAYOUTS = (ROW, PANEL16)
PANEL = 16


def native_layout(device: torch.device, row_bytes: int) -> str:
    """The execution layout on `device` for weights of `row_bytes` bytes a row."""
    on_cpu_kernels = device.type == "cpu" and _native.backend(device) == "native"
    return PANEL16 if on_cpu_kernels and row_bytes % 4 == 0 else ROW


def _units(t: torch.Tensor) -> torch.Tensor:
    """The tensor in the units a panel interleaves: 4 bytes for int8 weights, one element for scales."""
    if t.dtype != torch.int8:
        return t
    return (t.clone() if t.storage_offset() % 4 else t).view(torch.int32)


def _swap(t: torch.Tensor, to_panel: bool) -> torch.Tensor:
    units = _units(t.contiguous())
    n, c = units.shape
    whole = n - n % PANEL
    out = units.clone()
    inner = (PANEL, c) if to_panel else (c, PANEL)
    out[:whole] = units[:whole].reshape(-1, *inner).transpose(1, 2).reshape(whole, c)
    return out.view(t.dtype)


def convert(t: torch.Tensor, source: str, target: str) -> torch.Tensor:
    """`t` [N, C] (int8 weights or per-group scales) from one layout to another; `t` itself where they are the same."""
    for name in (source, target):
        if name not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {name!r}")
    if source == target:
        return t
    return _swap(t, to_panel=target == PANEL16)


def gather_rows(w: torch.Tensor, ids: torch.Tensor, layout: str) -> torch.Tensor:
    """Rows `ids` [...] (0 … N − 1) of int8 weights [N, K] held in `layout` → [..., K] int8."""
    ids = ids.long()
    if layout == ROW:
        return w[ids]
    n, k = w.shape
    units = w.view(torch.int32).view(-1)
    whole, columns = n - n % PANEL, k // 4
    in_panel = ids < whole
    start = torch.where(in_panel, ids // PANEL * (PANEL * columns) + ids % PANEL, ids * columns)
    step = torch.where(in_panel, PANEL, 1)
    steps = torch.arange(columns, device=ids.device)
    return units[start[..., None] + step[..., None] * steps].view(torch.int8)
