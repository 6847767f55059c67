"""Hooks of a module, handed over to what stands for it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import output_capturing

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def adopt(old: nn.Module, new: nn.Module) -> None:
    """Hands a module's hooks and marks over. The hook tables are shared, so that removing a hook works on both."""
    for table in HOOK_TABLES:
        setattr(new, table, getattr(old, table))
    new._is_full_backward_hook = old._is_full_backward_hook
    move_accelerate_hook(old, new)
    vars(new).update({key: value for key, value in vars(old).items() if key not in vars(new) and key != "forward"})


def move_accelerate_hook(source: nn.Module, target: nn.Module) -> None:
    """accelerate's hooks wrap the forward of one module: they are taken off and put on again, never copied."""
    hook = getattr(source, "_hf_hook", None)
    if hook is None:
        return
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(source)
    vars(source).pop("forward", None)
    try:
        add_hook_to_module(target, hook)
    except BaseException:
        add_hook_to_module(source, hook)
        raise


def is_recorder(hook: Any) -> bool:
    """Whether a hook is transformers' own: put in when hidden states or attentions are first asked for, it stays, and does
    nothing in other calls."""
    return getattr(hook, "__module__", "") == output_capturing.__name__
