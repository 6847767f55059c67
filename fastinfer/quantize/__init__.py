"""Quantisers of weights. They need no data."""

from fastinfer.quantize.int4 import quantize_int4
from fastinfer.quantize.int8 import quantize_int8

__all__ = ["quantize_int4", "quantize_int8"]
