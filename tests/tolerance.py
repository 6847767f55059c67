"""The one tolerance rule: a kernel may err at most twice as much as plain torch does in the same dtype, plus a floor."""

from __future__ import annotations

import torch

FLOOR_ULPS = 4.0


def error_bound(exact: torch.Tensor, plain: torch.Tensor, magnitude: float = 0.0) -> float:
    """The largest error allowed against `exact` (fp64), given the result `plain` of torch in the dtype of the op.

    `magnitude` is the largest Σ|terms| of a sum that is accumulated in fp32: one rounding of it belongs to the floor,
    since over few outputs plain torch may be right by luck.
    """
    if exact.numel() == 0:
        return 0.0
    floor = FLOOR_ULPS * torch.finfo(plain.dtype).eps * exact.abs().max().item()
    return 2 * (plain.double() - exact).abs().max().item() + floor + torch.finfo(torch.float32).eps * magnitude


def assert_within(out: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, magnitude: float = 0.0) -> None:
    """Fails with the worst index where `out` is further from `exact` than the rule allows."""
    assert out.shape == exact.shape, f"shape {list(out.shape)}, expected {list(exact.shape)}"
    assert out.dtype == plain.dtype, f"dtype {out.dtype}, expected {plain.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - exact).abs().nan_to_num(nan=float("inf"))
    bound = error_bound(exact, plain, magnitude)
    worst = error.argmax().item()
    index = tuple(i.item() for i in torch.unravel_index(torch.tensor(worst), out.shape))
    got, want = out.flatten()[worst].item(), exact.flatten()[worst].item()
    assert error.max().item() <= bound, f"at {index}: {got}, exact {want}; error {error.max():.3e} > {bound:.3e}"
