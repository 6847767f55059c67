"""Shapes, inputs and checks that the matmuls' tests share."""

from __future__ import annotations

from itertools import product

import tolerance
import torch
from torch import nn

from fastinfer.ops._common import ACTIVATIONS, apply_epilogue, out_features
from fastinfer.ops.layout import PANEL16, ROW, native_layout

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# M, N: none, one, odd, one past a tile, a real model's
ROWS_COLUMNS = [(0, 32), (1, 1), (1, 16), (1, 384), (2, 33), (3, 100), (5, 17), (8, 64), (9, 48), (17, 257), (33, 130)]
ROWS_COLUMNS += [(65, 96), (129, 384)]
REAL_SHAPES = [(1, 2048, 2048), (16, 1536, 384), (128, 384, 1536), (7, 30522, 384), (1, 4096, 14336)]

# for the tile layouts: K in multiples of 128; every kernel shape, its splits of K, partly filled tiles
TILE_SHAPES = [
    (1, 16, 128),
    (1, 48, 2048),
    (2, 4096, 256),
    (8, 272, 896),
    (9, 16, 384),
    (16, 1040, 1024),
    (16, 64, 14336),
]
TILE_SHAPES += [(17, 16, 128), (33, 144, 512), (64, 272, 1024), (65, 512, 896), (129, 256, 384), (300, 1040, 2048)]
TILE_SHAPES += [(1000, 2064, 256), (64, 4096, 2048), (3, 8448, 256), (12, 8448, 256)]
TILE_SHAPES += [(13, 17000, 1152)]  # several row tiles a warp, which use buffers anew; a tail
TILE_SHAPES += [(16, 256, 53248)]  # too large for decode_matmul's shared memory
TILE_SHAPES += [(16, 72000, 4096)] if torch.cuda.is_available() else []  # too; half a minute without a GPU

# rows behind the tiles: 1 to 15 of them, one and more chunks of K a warp, fewer and more tokens than fill the GPU
TAIL_SHAPES = [(m, n, k) for m in (1, 3, 16, 17, 64, 200) for n, k in [(17, 128), (1003, 768)]]
TAIL_SHAPES += [(5, 30, 14336), (16, 4099, 4096), (40, 31, 2048), (2065, 35, 256)]

# M, N, K for epilogues: none, one, odd, several panels and tiles, past every change of kernel; N in sixteens for gates
EPILOGUE_SHAPES = [(0, 32, 128), (1, 16, 128), (3, 48, 128), (17, 272, 128), (40, 64, 256), (200, 32, 128)]
GATES = [name for name in ACTIVATIONS if name != "none"]


def layouts(kind: str, w: torch.Tensor, k: int, dtype: torch.dtype) -> list[str]:
    """The layouts that kernels for w's device take for a weight [N, k] of `kind`, beside x in `dtype`."""
    if w.device.type == "cpu":
        return [ROW, PANEL16] if w.shape[1] % 4 == 0 else [ROW]
    return sorted({ROW, native_layout(w.device, kind, w.shape[0], k, dtype)})


def activations(*shape: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Normal values with a few large columns, as real activations have."""
    x = torch.randn(*shape, device=device)
    if x.numel():
        x[..., :: max(1, shape[-1] // 3)] *= 8
    return x.to(dtype)


def inside_nan(x: torch.Tensor) -> torch.Tensor:
    """The same values as an offset, strided view into a tensor of NaN."""
    around = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 7), float("nan"))
    view = around[..., 3 : 3 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def check_float_matmul(out, x, weight64, bias) -> None:
    """Holds a weight-only matmul to the rule, against torch's linear on the dequantised weight in the dtype of x."""
    bias64 = None if bias is None else bias.double()
    exact = nn.functional.linear(x.double(), weight64, bias64)
    plain = nn.functional.linear(x, weight64.to(x.dtype), None if bias is None else bias.to(x.dtype))
    magnitude = (x.double().abs() @ weight64.abs().T).max().item() if exact.numel() else 0.0
    tolerance.assert_within(out, exact, plain, magnitude)


def epilogues(m: int, n: int, activation: str, dtype: torch.dtype, device: str):
    """(bias, residual) in every combination, for a result in `dtype`."""
    biases = None, torch.randn(n, device=device).to(dtype), torch.randn(n, device=device)
    residual = torch.randn(m, out_features(n, activation), device=device).to(dtype)
    return product(biases, (None, residual))


def check_epilogue(out, x, weight64, bias, residual, activation, halves: bool = False) -> None:
    """Holds act(x · wᵀ + bias) + residual to the rule, against torch's own operations in the dtype of x."""
    exact = apply_epilogue(x.double() @ weight64.T, bias, residual, activation, halves)
    plain = apply_epilogue(nn.functional.linear(x, weight64.to(x.dtype)), bias, residual, activation, halves)
    magnitude = 0.0
    if exact.numel():
        magnitude = (x.double().abs() @ weight64.abs().T).max().item()
        if activation != "none":  # a factor carries its error times the other factor
            magnitude *= 2 * max(1.0, (x.double() @ weight64.T).abs().max().item())
    tolerance.assert_within(out, exact, plain, magnitude)
