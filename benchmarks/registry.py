"""What `run.py` times: one entry an op, with its shapes, a correctness check, its bytes and operations, and its peers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial

import peers
import torch
from peers import Problem
from torch import nn

from fastinfer import ops
from fastinfer.ops.layout import ROW, convert, native_layout
from fastinfer.timing import Calls

CPU_SHAPES = [(1, 640, 2048), (1, 262144, 640), (128, 384, 384), (1024, 384, 384), (1024, 1536, 384), (1024, 384, 1536)]
CUDA_SHAPES = [(m, n, k) for n, k in [(28672, 4096), (4096, 14336), (4096, 4096)] for m in (1, 4, 16, 64, 256, 1024)]
BARS_NK = [(28672, 4096), (4096, 14336), (4096, 4096), (2048, 2048)]
BARS_M = (1, 4, 8, 16, 64, 256, 2048)
ODD_NK = [
    (11008, 4096),
    (4096, 11008),
    (3584, 18944),
    (18944, 3584),
    (896, 896),
    (4864, 896),
    (2560, 2560),
    (4099, 4096),
]
ODD_M = (3, 7, 33, 129, 1000)
ROW_OPS = ("int8_quantize", "rms_norm")  # these have no weight matrix
# batch, positions, H · D, which says the heads: (H, G, D) of an 8B Llama, of Gemma 3 270M
KV_HEADS = {4096: (32, 8, 128), 1024: (4, 1, 256)}
KV_SHAPES = {
    "cpu": [(1, 1024, 4096), (1, 8192, 4096), (1, 1024, 1024), (1, 8192, 1024), (4, 1024, 4096)],
    "cuda": [(1, 1024, 4096), (1, 8192, 4096), (1, 65536, 4096), (64, 2048, 4096), (16, 4096, 4096), (1, 1024, 1024)],
}
KV_ODD = [(3, 777, 4096), (2, 2049, 1024), (1, 1, 4096)]
EMBED_SHAPES = [(m, v, k) for v, k in ((128256, 4096), (262144, 640)) for m in (1, 16)]
SAMPLE_SHAPES = [(m, v, 1) for v in (32000, 151936, 262144) for m in (1, 16)]
PRESETS = ("default", "bars", "odd")
GROUP = 128


@dataclasses.dataclass
class Case:
    """One op at one shape. `calls` work on different weights each, so that together they outgrow every cache."""

    calls: Calls
    exact: Callable[[], torch.Tensor]
    plain: Callable[[], torch.Tensor]
    magnitude: Callable[[], float]
    peers: dict[str, Calls]
    weight_bytes: int
    bytes: int
    operations: int
    result: Callable = lambda out: out  # what of a call's return is checked


def shapes(device: str, preset: str = "default", op: str = "") -> list[tuple[int, int, int]]:
    """(M, N, K) of a preset: `default` differs by device, `bars` are the sizes that bars are set on, `odd` awkward ones.

    For an op of ROW_OPS N is K, each M and K once; for attention M is the batch, N the positions, K = H · D; sample has
    rows and vocabularies, [M, N]; embed takes M rows of [N, K]; advance has a batch of M.
    """
    if op.startswith("kv_attention"):
        return KV_ODD if preset == "odd" else KV_SHAPES[device]
    if op == "sample":
        return SAMPLE_SHAPES
    if op == "embed":
        return EMBED_SHAPES
    if op == "advance":
        return [(1, 1, 1), (64, 1, 1)]
    if preset == "default":
        found = CPU_SHAPES if device == "cpu" else CUDA_SHAPES
    else:
        sizes, rows = (BARS_NK, BARS_M) if preset == "bars" else (ODD_NK, ODD_M)
        found = [(m, n, k) for n, k in sizes for m in rows]
    return list(dict.fromkeys((m, k, k) for m, _, k in found)) if op in ROW_OPS else found


def default_dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _laid_out(op: str, packed: tuple, problem: Problem) -> tuple[list[torch.Tensor], str]:
    """Packed weights, from row layout, as the device runs them, and the name of that layout."""
    kind = {"int8_matmul": "w8a16", "int8_scaled_matmul": "w8a8", "int4_matmul": "w4a16"}[op]
    layout = native_layout(torch.device(problem.device), kind, problem.n, problem.k, problem.dtype)
    return [convert(t, ROW, layout) if t.dim() == 2 else t for t in packed], layout


def _case(op: str, weights: list[tuple], problem: Problem) -> Case:
    """A case around packed weights in row layout, beside the op's peers."""
    module = importlib.import_module(f"fastinfer.ops.{op}")
    dtype, x = problem.dtype, problem.x()
    arguments = [_laid_out(op, packed, problem) for packed in weights]
    int8 = importlib.import_module("fastinfer.ops.int8_matmul")
    weight = partial(getattr(module, "dequantize", int8.dequantize), *weights[0])
    weight_bytes = sum(t.nbytes for t in arguments[0][0])
    given, rest = x, {}
    if op == "int8_scaled_matmul":  # what makes x int8 is an op of its own
        given, x_scale = ops.int8_quantize(x)
        rest = dict(x_scale=x_scale, out_dtype=dtype)
    return Case(
        calls=[partial(getattr(ops, op), given, *packed, layout=layout, **rest) for packed, layout in arguments],
        exact=lambda: module.reference(x, *weights[0], dtype=torch.float64),
        plain=lambda: (
            module.reference(x, *weights[0])
            if op == "int8_scaled_matmul"
            else nn.functional.linear(x, weight(dtype=dtype))
        ),
        magnitude=lambda: (x.abs().float() @ weight(dtype=torch.float32).abs().T).max().item(),
        peers=peers.collect(peers.NAMES[op], problem),
        weight_bytes=weight_bytes,
        bytes=weight_bytes + given.nbytes + dtype.itemsize * problem.m * problem.n,
        operations=2 * problem.m * problem.n * problem.k,
    )


def _int8(op: str) -> Callable[[Problem], Case]:
    def make(problem: Problem) -> Case:
        def weight() -> tuple:
            return problem.ints(problem.n, problem.k), torch.rand(problem.n, device=problem.device) * 0.01

        return _case(op, [weight() for _ in problem.copies(problem.n * problem.k)], problem)

    return make


def _int4(problem: Problem) -> Case:
    n, k, device = problem.n, problem.k, problem.device

    def weight() -> tuple:
        w = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8, device=device)
        w_scale = torch.rand(n, k // GROUP, device=device).half() * 0.01
        return w, w_scale, torch.rand(n, k // GROUP, device=device).half() * 15

    return _case("int4_matmul", [weight() for _ in problem.copies(n * k // 2)], problem)


def _linear(problem: Problem) -> Case:
    m, n, k, x = problem.m, problem.n, problem.k, problem.x()
    weight_bytes = n * k * x.element_size()
    weights = [torch.randn(n, k, device=problem.device).to(problem.dtype) for _ in problem.copies(weight_bytes)]
    return Case(
        calls=[partial(ops.linear, x, w) for w in weights],
        exact=lambda: importlib.import_module("fastinfer.ops.linear").reference(x, weights[0], dtype=torch.float64),
        plain=lambda: nn.functional.linear(x, weights[0]),
        magnitude=lambda: (x.abs().float() @ weights[0].float().abs().T).max().item(),
        peers=peers.collect(peers.NAMES["linear"], problem),
        weight_bytes=weight_bytes,
        bytes=weight_bytes + x.element_size() * m * (k + n),
        operations=2 * m * n * k,
    )


def _int8_quantize(problem: Problem) -> Case:
    """After a norm, as a decode step calls it; checked as q · x_scale. Its peer is the same in torch's operations."""
    module = importlib.import_module("fastinfer.ops.int8_quantize")
    m, k, weight = problem.m, problem.k, torch.rand(problem.k, device=problem.device).to(problem.dtype)
    xs = [problem.x() for _ in problem.copies(m * k * torch.finfo(problem.dtype).bits // 8)]

    def values(out: tuple, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return out[0].to(dtype) * out[1].to(dtype)[..., None]

    return Case(
        calls=[partial(ops.int8_quantize, x, weight) for x in xs],
        exact=lambda: values(module.reference(xs[0], weight), torch.float64),
        plain=lambda: values(module.reference(xs[0], weight)),
        magnitude=lambda: 0.0,
        peers={"torch": [partial(peers.rms_norm_int8, x, weight) for x in xs]},
        weight_bytes=0,
        bytes=m * k * (xs[0].element_size() + 1) + 4 * m,
        operations=0,
        result=values,
    )


def _rms_norm(problem: Problem) -> Case:
    """With a residual, as a decode step calls it; y and s are checked. Its peer is the same in torch's operations."""
    module = importlib.import_module("fastinfer.ops.rms_norm")
    weight = torch.rand(problem.k, device=problem.device).to(problem.dtype)
    bytes_each = 2 * problem.m * problem.k * problem.dtype.itemsize
    pairs = [(problem.x(), problem.x()) for _ in problem.copies(bytes_each)]
    x, residual = pairs[0]
    return Case(
        calls=[partial(ops.rms_norm, x, weight, 1e-6, residual) for x, residual in pairs],
        exact=lambda: torch.stack(module.reference(x, weight, 1e-6, residual, dtype=torch.float64)),
        plain=lambda: torch.stack(peers.add_rms_norm(x, weight, residual)),
        magnitude=lambda: 0.0,
        peers={"torch": [partial(peers.add_rms_norm, x, weight, residual) for x, residual in pairs]},
        weight_bytes=0,
        bytes=2 * bytes_each + weight.nbytes,
        operations=0,
        result=torch.stack,
    )


def _kv_attention(problem: Problem, int8: bool = False) -> Case:
    """A decode step with a full cache, which is all that is read; the peer has the new token there already."""
    module = importlib.import_module("fastinfer.ops.kv_attention")
    b, positions, dtype, device = problem.m, problem.n, problem.dtype, problem.device
    h, g, d = KV_HEADS[problem.k]
    elements = b * g * positions * d
    copies = problem.copies(2 * elements * (1 if int8 else dtype.itemsize))
    q, k, v = torch.randn(b, 1, h + 2 * g, d, device=device).to(dtype).split([h, g, g], 2)
    angle = torch.rand(1, 1, d, device=device) * 6
    lengths = torch.full((b,), positions - 1, dtype=torch.int32, device=device)
    rest = {"cos": angle.cos(), "sin": angle.sin()}

    def floats() -> list[torch.Tensor]:
        return [torch.randn(b, g, positions, d, device=device).to(dtype) for _ in "kv"]

    def cache() -> tuple[torch.Tensor, ...]:
        if not int8:
            return (*floats(), lengths)
        return (*(problem.ints(elements // d, d).view(b, g, positions, d) for _ in "kv"), lengths)

    def scales() -> dict[str, torch.Tensor]:
        return {f"{n}_scale": torch.rand(b, g, positions, device=device) / 40 for n in "kv"} if int8 else {}

    calls = [partial(ops.kv_attention, q, k, v, *cache(), **scales(), **rest) for _ in copies]

    def reference(wide: torch.dtype | None) -> torch.Tensor:
        k_cache, v_cache = (t.clone() if int8 else t.to(wide or dtype, copy=True) for t in calls[0].args[3:5])
        kept = {n: t.clone() for n, t in calls[0].keywords.items()}
        return module.reference(q, k, v, k_cache, v_cache, lengths, **kept, dtype=wide)

    return Case(
        calls=list(calls),
        exact=lambda: reference(torch.float64),
        plain=lambda: reference(None),
        magnitude=lambda: 8.0,
        peers={"sdpa": [partial(peers.sdpa, q.transpose(1, 2), *floats()) for _ in copies]},
        weight_bytes=0,
        bytes=2 * elements * (1 if int8 else dtype.itemsize) + (8 * b * g * positions if int8 else 0),
        operations=4 * b * h * positions * d,
    )


def _sample(problem: Problem) -> Case:
    """Temperature, top-k, top-p as chat models set them. Its peer is transformers' processors, softmax and multinomial."""
    module = importlib.import_module("fastinfer.ops.sample")
    m, v, device = problem.m, problem.n, problem.device
    logits = [
        (torch.randn(m, v, device=device) * 3).to(problem.dtype)
        for _ in problem.copies(m * v * torch.finfo(problem.dtype).bits // 8)
    ]
    seed, offset = torch.tensor([1], device=device), torch.tensor([0], device=device)
    settings = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
    return Case(
        calls=[partial(ops.sample, x, seed, offset, **settings) for x in logits],
        exact=lambda: module.reference(logits[0], seed, offset, **settings).double(),
        plain=lambda: module.reference(logits[0], seed, offset, **settings).double(),
        magnitude=lambda: 0.0,
        peers={"transformers": [partial(peers.warp_and_draw, x, **settings) for x in logits]},
        weight_bytes=0,
        bytes=logits[0].nbytes + 8 * m,
        operations=0,
        result=torch.Tensor.double,
    )


def _embed(problem: Problem) -> Case:
    """A step's tokens, from an int8 weight as a tied head holds it, with their rotary rows; x is checked."""
    module = importlib.import_module("fastinfer.ops.embed")
    m, v, k, dtype, device = problem.m, problem.n, problem.k, problem.dtype, problem.device
    w, w_scale = problem.ints(v, k), torch.rand(v, device=device) * 0.01
    (packed, _), layout = _laid_out("int8_matmul", (w, w_scale), problem)
    ids = torch.randint(0, v, (m, 1), device=device)
    tables = [torch.randn(8192, 128, device=device) for _ in range(2)]
    lengths = torch.randint(0, 8192, (m,), dtype=torch.int32, device=device)
    rest = 1.0, layout, dtype, *tables, lengths
    wide = torch.randn(v, k, device=device).to(dtype)
    return Case(
        calls=[partial(ops.embed, ids, packed, w_scale, *rest)],
        exact=lambda: module.reference(ids, packed, w_scale, *rest, dtype=torch.float64)[0],
        plain=lambda: module.reference(ids, packed, w_scale, *rest)[0],
        magnitude=lambda: 0.0,
        peers={"torch": [lambda: (nn.functional.embedding(ids, wide), *(t[lengths.long()] for t in tables))]},
        weight_bytes=0,
        bytes=m * (k * (1 + dtype.itemsize) + 4 * 128 * 4),
        operations=0,
        result=lambda out: out[0],
    )


def _advance(problem: Problem) -> Case:
    """The end of a step; what the ring then holds is checked. Its peer is the same in torch's operations."""
    module = importlib.import_module("fastinfer.ops.advance")
    m, device = problem.m, problem.device
    tokens, ids = torch.arange(m, device=device), torch.zeros(m, 1, dtype=torch.int64, device=device)
    lengths, ring = (
        torch.zeros(m, dtype=torch.int32, device=device),
        torch.zeros(8, m, dtype=torch.int64, device=device),
    )
    offset, steps = (torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2))
    given = tokens, ids, lengths, offset, ring, steps
    return Case(
        calls=[partial(ops.advance, *given)],
        exact=lambda: tokens.double(),
        plain=lambda: tokens.double(),
        magnitude=lambda: 0.0,
        peers={"torch": [partial(module.reference, *given)]},
        weight_bytes=0,
        bytes=40 * m,
        operations=0,
        result=lambda _: ids[:, 0].double(),
    )


OPS: dict[str, Callable[[Problem], Case]] = {
    "int8_matmul": _int8("int8_matmul"),
    "int8_scaled_matmul": _int8("int8_scaled_matmul"),
    "int4_matmul": _int4,
    "linear": _linear,
    "int8_quantize": _int8_quantize,
    "rms_norm": _rms_norm,
    "kv_attention": _kv_attention,
    "kv_attention int8": partial(_kv_attention, int8=True),
    "sample": _sample,
    "embed": _embed,
    "advance": _advance,
}
