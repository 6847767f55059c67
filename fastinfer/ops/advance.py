"""advance: the end of a decode step, everything on the device that counts or holds the new tokens, in one launch."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_device, describe, register_fake, run


def advance(
    tokens: torch.Tensor,
    ids: torch.Tensor,
    lengths: torch.Tensor,
    offset: torch.Tensor,
    ring: torch.Tensor,
    steps: torch.Tensor,
) -> None:
    """ids = ring[steps mod S] = tokens; then lengths, offset and steps grow by 1. All but tokens change in place.

    Args:
        tokens:  [B] int64, of `sample`
        ids:     [B, 1] int64, what the next step embeds
        lengths: [B] int32, the positions that are filled
        offset:  one int64, `sample`'s
        ring:    [S, B] int64, S from 1: the tokens of the last S steps
        steps:   one int64, the steps so far, 0 or more
    Returns: nothing
    Raises:  TypeError for a dtype, ValueError for a shape or device that does not fit, or what is not contiguous; all name
             the argument
    Backends: CPU; CUDA sm80+ (never waits for the device, can be captured in a graph); else the reference
    Numerics: exact
    Source:  –
    """
    b = tokens.shape[0] if tokens.dim() == 1 else -1
    if b < 0:
        raise ValueError(f"advance: tokens must be [B], got {describe(tokens)}")
    wanted = {"tokens": (tokens, [b]), "ids": (ids, [b, 1]), "lengths": (lengths, [b]), "ring": (ring, [-1, b])}
    for name, (t, shape) in (wanted | {"offset": (offset, None), "steps": (steps, None)}).items():
        dtype = torch.int32 if name == "lengths" else torch.int64
        if t.dtype != dtype:
            raise TypeError(f"advance: {name} must be {str(dtype).removeprefix('torch.')}, got {describe(t)}")
        if shape is None and t.numel() != 1:
            raise ValueError(f"advance: {name} must have one element, got {describe(t)}")
        if shape is not None and not (t.dim() == len(shape) and all(w in (-1, s) for s, w in zip(t.shape, shape))):
            raise ValueError(f"advance: {name} must be {str(shape).replace('-1', 'S')}, got {describe(t)}")
        check_device("advance", name, t, tokens, "tokens")
        if not t.is_contiguous():
            raise ValueError(f"advance: {name} must be contiguous, got strides {t.stride()}")
    if ring.shape[0] == 0:
        raise ValueError(f"advance: ring must have a row, got {describe(ring)}")
    run("advance", reference, tokens, ids, lengths, offset, ring, steps, triton=False)


def reference(tokens, ids, lengths, offset, ring, steps, dtype: torch.dtype | None = None) -> None:
    """The op in plain torch; it has no float for `dtype` to widen."""
    ids.copy_(tokens[:, None])
    ring.index_copy_(0, steps.reshape(1) % ring.shape[0], tokens[None])
    for count in (lengths, offset, steps):
        count += 1


@register_fake("advance")
def _(tokens, ids, lengths, offset, ring, steps):
    return None
