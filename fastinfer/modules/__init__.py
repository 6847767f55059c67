"""Modules on our ops: they know weights, packing and state dicts, not the model they sit in."""

from fastinfer.modules.embedding import Int8Embedding
from fastinfer.modules.linear import Int4Linear, Int8Linear, QuantizedLinear
from fastinfer.modules.quantized import QuantizedModule, StateDictError

__all__ = ["Int4Linear", "Int8Embedding", "Int8Linear", "QuantizedLinear", "QuantizedModule", "StateDictError"]
