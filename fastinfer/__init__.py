"""Makes Hugging Face models fast in place.

>>> model = fastinfer.patch(model)        # int8 weights on fastinfer's kernels; the model stays a transformers model
>>> print(fastinfer.report(model))        # what was replaced, what was not and why
>>> fastinfer.unpatch(model)              # the original, bit for bit
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_PUBLIC = {
    "patch": "fastinfer.patching",
    "unpatch": "fastinfer.patching",
    "report": "fastinfer.patching",
    "Recipe": "fastinfer.recipe",
    "Spec": "fastinfer.recipe",
    "Report": "fastinfer.reports",
    "Int8Linear": "fastinfer.modules",
    "Int4Linear": "fastinfer.modules",
    "KVCache": "fastinfer.generation.cache",
    "CacheError": "fastinfer.errors",
    "PatchError": "fastinfer.errors",
    "GroupSizeError": "fastinfer.errors",
    "RecipeError": "fastinfer.errors",
    "StateDictError": "fastinfer.modules",
}
__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from fastinfer.errors import CacheError, GroupSizeError, PatchError, RecipeError
    from fastinfer.generation.cache import KVCache
    from fastinfer.modules import Int4Linear, Int8Linear, StateDictError
    from fastinfer.patching import patch, report, unpatch
    from fastinfer.recipe import Recipe, Spec
    from fastinfer.reports import Report


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
