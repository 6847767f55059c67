"""The public kernels that ours are compared with, in the same process: name → calls on rotating random weights.

| name | kernel | needs |
|---|---|---|
| linear (bf16, fp32, …) | torch's linear on float weights: cuBLAS, oneDNN | – |
| tinygemm int4 | `aten._weight_int4pack_mm`, group 128, zero points | CUDA, bf16, M ≤ 16 (far behind above) |
| `_int_mm` (bare) | `aten._int_mm` | CUDA, M > 16 |
| Marlin int4, Machete int4 | vLLM, group 128, symmetric | FASTINFER_PEERS; Machete: compute capability 9.0 |
| CUTLASS int8 (bare) | vLLM's `cutlass_scaled_mm` | FASTINFER_PEERS |
| sdpa | torch's `scaled_dot_product_attention` on a cache in the dtype of q, one query a row (kv_attention) | – |
| torch | the same in torch's operations, where no single one does it (int8_quantize, rms_norm) | – |
| transformers | its logits processors, softmax and multinomial, as `generate` calls them (sample) | transformers |

The bare ones get activations that are already int8, as int8_scaled_matmul does here; `_int_mm` has no scales.

FASTINFER_PEERS is a folder that holds, out of the vLLM wheel built for the torch in use (0.20.2: torch 2.11, CUDA 13),
vllm/_C.abi3.so, vllm/_C_stable_libtorch.abi3.so and vllm/scalar_type.py. A peer that is missing, or refuses a shape or a
dtype, is left out, and why is printed once.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from fastinfer.timing import Calls, copies

GROUP = 128
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class RefusedError(RuntimeError):
    """A peer is not there, or does not take this problem."""


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise RefusedError(reason)


@dataclasses.dataclass(frozen=True)
class Problem:
    """y [M, N] = x [M, K] · wᵀ, and the bytes that the copies of the weights have to outgrow."""

    m: int
    n: int
    k: int
    dtype: torch.dtype
    device: str
    cache_bytes: int

    def copies(self, weight_bytes: int) -> range:
        return range(copies(weight_bytes, self.cache_bytes))

    def x(self) -> torch.Tensor:
        return torch.randn(self.m, self.k, device=self.device).to(self.dtype)

    def ints(self, rows: int, columns: int) -> torch.Tensor:
        return torch.randint(-127, 128, (rows, columns), device=self.device, dtype=torch.int8)

    def bits(self, *size: int) -> torch.Tensor:
        """int32 with all bits random: eight int4 each."""
        return torch.randint(-(2**31), 2**31, size, device=self.device).to(torch.int32)

    def scales(self, *size: int) -> torch.Tensor:
        return (torch.rand(*size, device=self.device) * 0.01).to(self.dtype)


def sdpa(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return nn.functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def linear(p: Problem) -> Calls:
    x = p.x()
    bytes_each = p.n * p.k * torch.finfo(p.dtype).bits // 8
    weights = [torch.randn(p.n, p.k, device=p.device).to(p.dtype) for _ in p.copies(bytes_each)]
    return [functools.partial(nn.functional.linear, x, w) for w in weights]


def rms_norm_int8(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8_quantize with a norm, in torch's operations."""
    v = nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-6).float()
    x_scale = v.abs().amax(-1, keepdim=True) / 127
    return (v / x_scale).round().to(torch.int8), x_scale.squeeze(-1)


def add_rms_norm(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rms_norm with a residual, in torch's operations."""
    s = x + residual
    return nn.functional.rms_norm(s, s.shape[-1:], weight, 1e-6), s


def warp_and_draw(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """sample with transformers' own processors."""
    from transformers import generation

    steps = [generation.TemperatureLogitsWarper(temperature), generation.TopKLogitsWarper(top_k)]
    scores = generation.LogitsProcessorList([*steps, generation.TopPLogitsWarper(top_p)])(None, logits.float())
    return torch.multinomial(scores.softmax(-1), 1).squeeze(1)


def tinygemm(p: Problem) -> Calls:
    _require(p.dtype == torch.bfloat16, "bf16 only")
    _require(p.m <= 16, "timed up to M = 16 only")
    _require(p.k % GROUP == 0, "K must be a multiple of 128")
    x, calls = p.x(), []
    for _ in p.copies(p.n * p.k // 2):
        q = torch.randint(0, 256, (p.n, p.k // 2), device=p.device, dtype=torch.uint8)
        w = torch.ops.aten._convert_weight_to_int4pack(q, 8)
        scale_zero = p.scales(p.k // GROUP, p.n, 2)
        calls.append(functools.partial(torch.ops.aten._weight_int4pack_mm, x, w, GROUP, scale_zero))
    return calls


def int_mm(p: Problem) -> Calls:
    _require(p.m > 16, "needs more than 16 rows")
    x = p.ints(p.m, p.k)
    weights = [p.ints(p.n, p.k).t() for _ in p.copies(p.n * p.k)]
    return [functools.partial(torch.ops.aten._int_mm, x, w) for w in weights]


@functools.cache
def _load_vllm(folder: Path) -> int:
    """Loads the libraries; returns vLLM's number for int4 with a zero point of 8."""
    torch.ops.load_library(str(folder / "_C_stable_libtorch.abi3.so"))
    torch.ops.load_library(str(folder / "_C.abi3.so"))
    spec = importlib.util.spec_from_file_location("_fastinfer_peers_scalar_type", folder / "scalar_type.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass looks its module up there
    spec.loader.exec_module(module)
    return module.scalar_types.uint4b8.id


def _vllm() -> int:
    folder = os.environ.get("FASTINFER_PEERS")
    if not folder:
        raise RefusedError("FASTINFER_PEERS is not set")
    return _load_vllm(Path(folder).absolute() / "vllm")


def marlin(p: Problem) -> Calls:
    uint4b8 = _vllm()
    _require(p.dtype in (torch.bfloat16, torch.float16), "16-bit activations only")
    _require(p.n % 64 == 0 and p.k % GROUP == 0, "N must be a multiple of 64, K of 128")
    x, calls = p.x(), []
    none = torch.empty(0, device=p.device, dtype=torch.int32)  # zero points, g_idx, permutation
    locks = torch.zeros(4 * _multiprocessors(p.device), device=p.device, dtype=torch.int32)
    whole_k, atomic_add, fp32_reduce, float_zeros = True, False, True, False
    for _ in p.copies(p.n * p.k // 2):
        w = torch.ops._C.gptq_marlin_repack(p.bits(p.k // 8, p.n), none, p.k, p.n, 4, False)
        tensors = x, None, w, None, p.scales(p.k // GROUP, p.n), None, None, none, none, none, locks
        numbers = uint4b8, p.m, p.n, p.k, whole_k, atomic_add, fp32_reduce, float_zeros
        calls.append(functools.partial(torch.ops._C.marlin_gemm, *tensors, *numbers))
    return calls


def machete(p: Problem) -> Calls:
    uint4b8 = _vllm()
    _require(p.dtype in (torch.bfloat16, torch.float16), "16-bit activations only")
    _require(_capability(p.device) == (9, 0), "compute capability 9.0 only")
    _require(p.n % 128 == 0 and p.k % GROUP == 0, "N and K must be multiples of 128")
    x, calls = p.x(), []
    for _ in p.copies(p.n * p.k // 2):
        column_major = p.bits(p.n, p.k // 8).t()
        w = torch.ops._C.machete_prepack_B(column_major, p.dtype, uint4b8, p.dtype)
        scales = p.scales(p.k // GROUP, p.n)
        options = None, GROUP, None, None, None  # zero points, …, channel scales, token scales, schedule
        calls.append(functools.partial(torch.ops._C.machete_mm, x, w, uint4b8, p.dtype, scales, *options))
    return calls


def cutlass_int8(p: Problem) -> Calls:
    _vllm()
    _require(p.n % 16 == 0 and p.k % 16 == 0, "N and K must be multiples of 16")
    out_dtype = torch.float16 if p.dtype == torch.float16 else torch.bfloat16
    x, out = p.ints(p.m, p.k), torch.empty(p.m, p.n, device=p.device, dtype=out_dtype)
    x_scale, w_scale = (torch.rand(*size, device=p.device) * 0.01 for size in ((p.m, 1), (1, p.n)))

    def call(w: torch.Tensor) -> torch.Tensor:
        torch.ops._C.cutlass_scaled_mm(out, x, w, x_scale, w_scale, None)
        return out

    return [functools.partial(call, p.ints(p.n, p.k).t()) for _ in p.copies(p.n * p.k)]


def _capability(device: str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _multiprocessors(device: str) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


PEERS: dict[str, Callable[[Problem], Calls]] = {
    "linear": linear,
    "tinygemm int4": tinygemm,
    "Marlin int4": marlin,
    "Machete int4": machete,
    "_int_mm (bare)": int_mm,
    "CUTLASS int8 (bare)": cutlass_int8,
}
NAMES = {
    "int4_matmul": ("linear", "tinygemm int4", "Marlin int4", "Machete int4"),
    "int8_matmul": ("linear",),
    "linear": ("linear",),
    "int8_scaled_matmul": ("linear", "_int_mm (bare)", "CUTLASS int8 (bare)"),
}

_told: set[tuple[str, str]] = set()


def _tell(name: str, error: Exception) -> None:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if (name, reason) not in _told:
        _told.add((name, reason))
        print(f"peer left out: {name}: {reason}", flush=True)


def calls_of(name: str, problem: Problem) -> Calls | None:
    """The peer's calls, the first one tried; None, with the reason printed once, where it cannot run."""
    try:
        calls = PEERS[name](problem)
        out = calls[0]()
        if problem.device != "cpu":
            torch.cuda.synchronize()  # a kernel's failure belongs to this peer, not to who comes next
        _require(out.shape == (problem.m, problem.n), f"returned the shape {list(out.shape)}")
        _require(bool(out.isfinite().all()) and bool(out.any()), "returned NaN, infinity or nothing but zeros")
    except (RuntimeError, OSError, AttributeError) as error:  # AttributeError: the library lacks the op
        _tell(name, error)
        return None
    return calls


def collect(names: Iterable[str], problem: Problem) -> dict[str, Calls]:
    """Those of the peers that can run, by their names in a report. On the CPU torch's linear is the only one."""
    found = {}
    for name in names:
        if problem.device == "cpu" and name != "linear":
            continue
        calls = calls_of(name, problem)
        if calls is not None:
            found[f"{SHORT[problem.dtype]} linear" if name == "linear" else name] = calls
    return found
