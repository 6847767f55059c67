"""Methods of a patched model that check first, or refuse, because transformers' own would do harm."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from fastinfer.errors import PatchError
from fastinfer.modules import QuantizedModule


def load_state_dict(self: nn.Module, state_dict: Mapping, *args, **kwargs):
    """load_state_dict that checks every quantised entry before any is copied."""
    for path, module in self.named_modules():
        if isinstance(module, QuantizedModule):
            module.check_state_dict(state_dict, f"{path}." if path else "")
    return type(self).load_state_dict(self, state_dict, *args, **kwargs)


def _refuse_save(self: nn.Module, *args, **kwargs):
    raise PatchError(
        "save_pretrained on a patched model would write int8 and int4 tensors that from_pretrained cannot read: "
        "save it before patching, or call fastinfer.unpatch first; state_dict() holds the quantised tensors"
    )


def _refuse_resize(self: nn.Module, *args, **kwargs):
    raise PatchError("resize_token_embeddings needs the original weights: unpatch, resize, patch again")


REFUSING = {"save_pretrained": _refuse_save, "resize_token_embeddings": _refuse_resize}
