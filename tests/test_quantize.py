"""Quantisers: bounds, edge cases, HQQ ahead of round-to-nearest, blocks of rows."""

import pytest
import torch

from fastinfer.ops.int4_matmul import dequantize as dequantize_int4
from fastinfer.ops.int4_matmul import unpack
from fastinfer.ops.int8_matmul import dequantize as dequantize_int8
from fastinfer.quantize import _rows, quantize_int4, quantize_int8


def test_int8_errs_by_at_most_half_a_step(device):
    weight = torch.randn(50, 70, device=device)
    w, w_scale, error = quantize_int8(weight)
    assert w.dtype == torch.int8 and w_scale.shape == (50,) and w.abs().max() == 127
    difference = (dequantize_int8(w, w_scale) - weight).abs()
    assert (difference <= w_scale[:, None] / 2 * 1.0001).all()
    assert error == pytest.approx((difference.norm() / weight.norm()).item(), rel=1e-4)


def test_int8_of_zero_rows_and_extremes():
    weight = torch.stack([torch.zeros(8), torch.full((8,), 1e-38), torch.full((8,), -3e38)])
    w, w_scale, _ = quantize_int8(weight)
    assert (w[0] == 0).all() and (w[2] == -127).all()
    torch.testing.assert_close(dequantize_int8(w, w_scale)[2], weight[2])


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_stays_within_its_range(method, group_size, device):
    weight = torch.randn(40, 256, device=device) * 0.02
    w, w_scale, w_zero, error = quantize_int4(weight, group_size, method)
    assert w.shape == (40, 128) and w_scale.shape == w_zero.shape == (40, 256 // group_size)
    assert w_scale.dtype == w_zero.dtype == torch.float16
    back = dequantize_int4(w, w_scale, w_zero)
    assert error == pytest.approx(((back - weight).norm() / weight.norm()).item(), rel=1e-3)
    if method == "rtn":
        step = w_scale.float().repeat_interleave(group_size, 1)
        assert ((back - weight).abs() <= step * 0.52).all()


def test_hqq_shrinks_its_norm_of_the_error_on_heavy_tails():
    weight = torch.distributions.StudentT(4.0).sample((64, 512))
    errors = {}
    for method in ("rtn", "hqq"):
        q = quantize_int4(weight, 64, method)
        errors[method] = (dequantize_int4(q.w, q.w_scale, q.w_zero) - weight).abs().mean()
    assert errors["hqq"] < errors["rtn"]


def test_hqq_repeats_bit_for_bit(device):
    weight = torch.randn(16, 128)
    here = quantize_int4(weight.to(device), 64)
    again = quantize_int4(weight.to(device), 64)
    assert all(torch.equal(a, b) for a, b in zip(here[:3], again[:3], strict=True))


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-4, 1e7, 1e30])
def test_int4_of_any_magnitude_is_as_good(size):
    weight = torch.randn(16, 128)
    usual, other = quantize_int4(weight, 64), quantize_int4(weight * size, 64)
    assert other.error == pytest.approx(usual.error, rel=0.1) and other.w_scale.dtype == torch.float32
    back = dequantize_int4(other.w, other.w_scale, other.w_zero)
    assert ((back - weight * size).double().norm() / (weight * size).double().norm()).item() < 0.12


@pytest.mark.parametrize("value", [0.0, 0.5, -0.25, 1e-9])
def test_int4_of_constant_groups(value):
    weight = torch.full((4, 64), value)
    for method in ("rtn", "hqq"):
        q = quantize_int4(weight, 32, method)
        back = dequantize_int4(q.w, q.w_scale, q.w_zero)
        assert back.isfinite().all() and (back - weight).abs().max() <= abs(value) * 0.01


def test_levels_use_all_four_bits():
    q = quantize_int4(torch.linspace(-1, 1, 64).repeat(2, 1), 64, "rtn")
    assert set(unpack(q.w)[0].tolist()) == set(range(16))


def test_blocks_of_rows_change_nothing_for_int8(monkeypatch):
    weight = torch.randn(37, 64)
    whole = quantize_int8(weight)
    monkeypatch.setattr(_rows, "BLOCK_ELEMENTS", 5 * 64)
    parts = quantize_int8(weight)
    assert torch.equal(whole.w, parts.w) and torch.equal(whole.w_scale, parts.w_scale)
    assert whole.error == pytest.approx(parts.error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_refuses_nan_and_infinity(bad):
    weight = torch.randn(4, 64)
    weight[2, 7] = bad
    for quantise in (quantize_int8, quantize_int4):
        with pytest.raises(ValueError, match="weight holds NaN or infinity"):
            quantise(weight)


def test_names_bad_arguments():
    weight = torch.randn(4, 96)
    with pytest.raises(ValueError, match=r"group_size must be one of .* and divide K = 96, got 64"):
        quantize_int4(weight, 64)
    with pytest.raises(ValueError, match="group_size must be one of"):
        quantize_int4(weight, 48)
    with pytest.raises(ValueError, match="method must be one of"):
        quantize_int4(weight, 32, "gptq")
