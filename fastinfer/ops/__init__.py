"""The operators. Each module holds one: docstring, wrapper with checks, reference in torch, fake kernel."""

from fastinfer.ops.advance import advance
from fastinfer.ops.embed import embed
from fastinfer.ops.int4_matmul import int4_matmul
from fastinfer.ops.int8_matmul import int8_matmul
from fastinfer.ops.int8_quantize import int8_quantize
from fastinfer.ops.int8_scaled_matmul import int8_scaled_matmul
from fastinfer.ops.kv_attention import kv_attention
from fastinfer.ops.linear import linear
from fastinfer.ops.rms_norm import rms_norm
from fastinfer.ops.sample import sample

__all__ = [
    "advance",
    "embed",
    "int4_matmul",
    "int8_matmul",
    "int8_quantize",
    "int8_scaled_matmul",
    "kv_attention",
    "linear",
    "rms_norm",
    "sample",
]
