"""What `run.py` times: one entry an op, with its shapes, a correctness check, its bytes and operations, and a peer."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from fastinfer import ops
from fastinfer.ops.layout import ROW, convert, native_layout

CPU_SHAPES = [(1, 640, 2048), (1, 262144, 640), (128, 384, 384), (1024, 384, 384), (1024, 1536, 384), (1024, 384, 1536)]
CUDA_SHAPES = [(m, n, k) for n, k in [(28672, 4096), (4096, 14336), (4096, 4096)] for m in (1, 4, 16, 64, 256, 1024)]
GROUP = 128


@dataclasses.dataclass
class Case:
    """One op at one shape. `calls` work on different weights each, so that together they outgrow every cache."""

    calls: list[Callable[[], torch.Tensor]]
    exact: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]
    magnitude: Callable[[], float]
    peers: dict[str, list[Callable[[], torch.Tensor]]]
    bytes: int
    operations: int


def shapes(device: str) -> list[tuple[int, int, int]]:
    return CPU_SHAPES if device == "cpu" else CUDA_SHAPES


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _copies(weight_bytes: int, cache_bytes: int) -> int:
    return max(2, cache_bytes // weight_bytes + 1)


def _case(op: str, weights: list[tuple], m: int, n: int, k: int, dtype: torch.dtype, device: str, cache: int) -> Case:
    """A case around packed weights in row layout; the peer is torch's linear on the dequantised weight."""
    module = importlib.import_module(f"fastinfer.ops.{op}")
    x = torch.randn(m, k, device=device).to(dtype)
    layout = native_layout(torch.device(device), weights[0][0].shape[1])

    def laid_out(packed: tuple) -> list[torch.Tensor]:
        return [convert(t, ROW, layout) if t.dim() == 2 else t for t in packed]

    calls = [lambda p=p: getattr(ops, op)(x, *p, None, layout) for p in map(laid_out, weights)]
    int8 = importlib.import_module("fastinfer.ops.int8_matmul")
    weight = partial(getattr(module, "dequantize", int8.dequantize), *weights[0])
    element = torch.finfo(dtype).bits // 8
    floats = [torch.randn(n, k, device=device).to(dtype) for _ in range(_copies(n * k * element, cache))]
    linear = f"torch {str(dtype).removeprefix('torch.')} linear"
    packed_bytes = sum(t.nbytes for t in weights[0])
    return Case(
        calls=calls,
        exact=lambda: module.reference(x, *weights[0], dtype=torch.float64),
        plain=lambda: (
            module.reference(x, *weights[0])
            if op == "int8_scaled_matmul"
            else nn.functional.linear(x, weight(dtype=dtype))
        ),
        magnitude=lambda: (x.abs().float() @ weight(dtype=torch.float32).abs().T).max().item(),
        peers={linear: [lambda w=w: nn.functional.linear(x, w) for w in floats]},
        bytes=packed_bytes + element * m * (k + n),
        operations=2 * m * n * k,
    )


def _int8(op: str) -> Callable[..., Case]:
    def make(m: int, n: int, k: int, dtype: torch.dtype, device: str, cache: int) -> Case:
        def weight() -> tuple:
            w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
            return w, torch.rand(n, device=device) * 0.01

        return _case(op, [weight() for _ in range(_copies(n * k, cache))], m, n, k, dtype, device, cache)

    return make


def _int4(m: int, n: int, k: int, dtype: torch.dtype, device: str, cache: int) -> Case:
    def weight() -> tuple:
        w = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
        w_scale = torch.rand(n, k // GROUP, device=device).half() * 0.01
        return w, w_scale, torch.rand(n, k // GROUP, device=device).half() * 15

    case = _case("int4_matmul", [weight() for _ in range(_copies(n * k // 2, cache))], m, n, k, dtype, device, cache)
    if device != "cpu" and dtype == torch.bfloat16:
        case.peers["tinygemm int4"] = _tinygemm(m, n, k, len(case.calls), device)
    return case


def _tinygemm(m: int, n: int, k: int, copies: int, device: str) -> list[Callable[[], torch.Tensor]]:
    """torch's own int4 kernel on random weights of the same shape and group size."""
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    calls = []
    for _ in range(copies):
        q = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.int32).to(torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        scales = torch.rand(k // GROUP, n, 2, device=device, dtype=torch.bfloat16) * 0.01
        calls.append(lambda p=packed, s=scales: torch.ops.aten._weight_int4pack_mm(x, p, GROUP, s))
    return calls


OPS: dict[str, Callable[..., Case]] = {
    "int8_matmul": _int8("int8_matmul"),
    "int8_scaled_matmul": _int8("int8_scaled_matmul"),
    "int4_matmul": _int4,
}
