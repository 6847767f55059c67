"""What the Triton matmuls share on the host side."""

from __future__ import annotations

import contextlib
import os

import torch
import triton.language as tl


def as_matrix(op: str, x: torch.Tensor, layout: str) -> torch.Tensor:
    """x [..., K] as a contiguous [M, K]; these kernels read weights in the row layout alone."""
    if layout != "row":
        raise ValueError(f"{op}: layout must be 'row' for the Triton kernel, got {layout!r}")
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).contiguous()


def device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes x's device current, which Triton launches on; nothing for the CPU of the interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_per_block(m: int) -> int:
    """Rows of x a program takes: few for decoding, so that little of the tile is empty."""
    return 16 if m <= 16 else 32 if m <= 32 else 64


def dot_type(x: torch.Tensor) -> tl.dtype:
    """The type tl.dot multiplies in: that of x, but fp32 in the interpreter, whose dot takes bf16 for its bit patterns."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x.dtype]
