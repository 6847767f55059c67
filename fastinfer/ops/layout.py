"""The execution layouts of csrc/LAYOUTS.md, as bijections on tensors, and which one a device runs on."""

from __future__ import annotations

import functools

import torch

from fastinfer import _native

ROW = "row"
PANEL16 = "panel16"
TILE_W4A16 = "tile_w4a16"
TILE_W8A16 = "tile_w8a16"
TILE_W8A8 = "tile_w8a8"
LAYOUTS = (ROW, PANEL16, TILE_W4A16, TILE_W8A16, TILE_W8A8)
PANEL = 16
TILE_ROWS = 16
TILE_COLUMNS = 128
"""A tile layout takes columns in multiples of the second; rows that fill no tile stay in row order behind the others."""
GATE_ROWS = 8
"""Rows of a gate that stand together, before as many that they are multiplied with: LAYOUTS.md#gate-up."""

# How a matrix is cut up: the dimensions of its row layout with their sizes (tiles and blocks of K take what is left), and
# their order in memory. Row 8h + g of tile T; column 16s + 8c + 2t + e (or 16c + e) of block b; group G.
_CUTS = {
    TILE_W4A16: (dict(T=-1, h=2, g=8, b=-1, s=4, c=2, t=4, e=2), "Tbgtsech"),
    TILE_W8A16: (dict(T=-1, h=2, g=8, b=-1, s=2, c=2, t=4, e=2), "Tbgtsceh"),
    TILE_W8A8: (dict(T=-1, h=2, g=8, b=-1, c=8, e=16), "Tbhcge"),
}
_SCALE_CUT = (dict(T=-1, h=2, g=8, G=-1), "TGgh")


@functools.cache
def _has_tile_kernels(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def native_layout(device: torch.device, kind: str, n: int, k: int, dtype: torch.dtype) -> str:
    """The execution layout on `device` for a weight [n, k] of `kind` "w4a16", "w8a16" or "w8a8", beside x in `dtype`."""
    row_bytes = k // 2 if kind == "w4a16" else k
    if _native.backend(device) != "native":
        return ROW
    if device.type == "cpu":
        return PANEL16 if row_bytes % 4 == 0 else ROW
    fits = n >= TILE_ROWS and k % TILE_COLUMNS == 0 and k > 0
    row = dtype == torch.float32 and kind != "w8a8"  # beside fp32 x there are kernels for rows alone
    if device.type != "cuda" or not fits or row:
        return ROW
    index = torch.cuda.current_device() if device.index is None else device.index
    return f"tile_{kind}" if _has_tile_kernels(index) else ROW


def unpack_nibbles(w: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 2C], the low nibble of a byte before its high one, from int8 [N, C]."""
    bits = w.view(torch.uint8)
    return torch.stack((bits & 15, bits >> 4), -1).flatten(1)


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """The int8 [N, C] that unpack_nibbles gives uint8 [N, 2C] for."""
    return (q[:, ::2] | q[:, 1::2] << 4).view(torch.int8)


def _cut(t: torch.Tensor, cut: tuple[dict[str, int], str], to_tile: bool) -> torch.Tensor:
    """`t` [N, C] with the dimensions of `cut` brought into their order in memory, or back."""
    sizes, order = cut
    n, c = t.shape
    sizes = sizes | {"T": n // TILE_ROWS}
    inner = [size for name, size in sizes.items() if name not in "Thg" and size > 0]
    rest = c // functools.reduce(int.__mul__, inner, 1)
    sizes = {name: rest if size < 0 else size for name, size in sizes.items()}
    names = list(sizes)
    if to_tile:
        return t.reshape(list(sizes.values())).permute([names.index(name) for name in order]).reshape(n, c)
    return t.reshape([sizes[name] for name in order]).permute([order.index(name) for name in names]).reshape(n, c)


def _tile(t: torch.Tensor, layout: str, to_tile: bool) -> torch.Tensor:
    n = t.shape[0]
    columns = t.shape[1] * (2 if layout == TILE_W4A16 else 1)
    if n < TILE_ROWS or (t.dtype == torch.int8 and columns % TILE_COLUMNS):
        raise ValueError(f"layout {layout!r} takes {TILE_ROWS} rows or more and columns in multiples of {TILE_COLUMNS}")
    whole = t[: n - n % TILE_ROWS]
    if t.dtype != torch.int8:
        tiles = _cut(whole, _SCALE_CUT, to_tile)
    elif layout == TILE_W4A16:
        tiles = pack_nibbles(_cut(unpack_nibbles(whole), _CUTS[layout], to_tile))
    else:
        tiles = _cut(whole, _CUTS[layout], to_tile)
    return tiles if n % TILE_ROWS == 0 else torch.cat((tiles, t[len(tiles) :]))


def _units(t: torch.Tensor) -> torch.Tensor:
    """The tensor in the units a panel interleaves: 4 bytes for int8 weights, one element for scales."""
    if t.dtype != torch.int8:
        return t
    aligned = not torch.compiler.is_compiling() and t.storage_offset() % 4 == 0  # which cannot be traced
    return (t if aligned else t.clone()).view(torch.int32)


def _panel(t: torch.Tensor, to_panel: bool) -> torch.Tensor:
    units = _units(t)
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
    for name, forth in ((source, False), (target, True)):
        if name != ROW:
            t = _panel(t.contiguous(), forth) if name == PANEL16 else _tile(t.contiguous(), name, forth)
    return t


def gather_rows(w: torch.Tensor, ids: torch.Tensor, layout: str) -> torch.Tensor:
    """Rows `ids` [...] (0 … N − 1) of int8 weights [N, K] held in `layout` → [..., K] int8."""
    ids = ids.long()
    if layout == ROW:
        return w[ids]
    n, k = w.shape
    if layout in (TILE_W8A16, TILE_W8A8):
        c = torch.arange(k, device=ids.device)
        g, h = ids % 8, ids % TILE_ROWS // 8
        if layout == TILE_W8A16:
            column = c // 32 * 512 + c % 8 // 2 * 16 + c % 32 // 16 * 8 + c % 16 // 8 * 4 + c % 2 * 2
            row = g * 64 + h
        else:
            column = c // 128 * 2048 + c % 128 // 16 * 128 + c % 16
            row = h * 1024 + g * 16
        start = ids // TILE_ROWS * (TILE_ROWS * k) + row
        in_tile = (ids < n - n % TILE_ROWS)[..., None]
        return w.view(-1)[torch.where(in_tile, start[..., None] + column, (ids * k)[..., None] + c)]
    units = w.view(torch.int32).view(-1)
    whole, columns = n - n % PANEL, k // 4
    in_panel = ids < whole
    start = torch.where(in_panel, ids // PANEL * (PANEL * columns) + ids % PANEL, ids * columns)
    step = torch.where(in_panel, PANEL, 1)
    steps = torch.arange(columns, device=ids.device)
    return units[start[..., None] + step[..., None] * steps].view(torch.int8)


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """One tensor [2R, …] from gate and up [R, …], R a multiple of 8, as gated activations take it (LAYOUTS.md#gate-up).

    For whatever has a first dimension of rows, in row order: weights, packed or not, scales, zero points, biases.
    """
    if gate.shape != up.shape or gate.dim() == 0 or gate.shape[0] % GATE_ROWS:
        raise ValueError(
            f"gate and up must have one shape, with rows in multiples of {GATE_ROWS}, got {list(gate.shape)} and "
            f"{list(up.shape)}"
        )
    return torch.stack([t.unflatten(0, (-1, GATE_ROWS)) for t in (gate, up)], 1).flatten(0, 2)


def split_gate_up(merged: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gate and up that interleave_gate_up made `merged` from."""
    if merged.dim() == 0 or merged.shape[0] % (2 * GATE_ROWS):
        raise ValueError(f"merged must have rows in multiples of {2 * GATE_ROWS}, got {list(merged.shape)}")
    gate, up = merged.unflatten(0, (-1, 2, GATE_ROWS)).unbind(1)
    return gate.flatten(0, 1), up.flatten(0, 1)
