"""int8_quantize: the bits of the reference, that reference against fp64 and transformers' norm, odd rows, errors."""

import importlib

import pytest
import torch
from matmul_cases import DTYPES, activations, inside_nan

from fastinfer.ops import int8_quantize, int8_scaled_matmul

op = importlib.import_module("fastinfer.ops.int8_quantize")
# none, one, odd, around 16 and a block's packs, rows that fill 1, 2 and 4 packs of a thread, longer ones
COLUMNS = [0, 1, 7, 15, 16, 24, 30, 100, 384, 1000, 4096, 4104, 8192, 11008, 14336, 16384, 16392, 20000]


def norm_weights(k, dtype, device):
    weight = torch.rand(k, device=device) + 0.5
    return None, weight.to(dtype), weight


def assert_same(out, expected):
    assert out[0].dtype == torch.int8 and out[1].dtype == torch.float32
    torch.testing.assert_close(out[1], expected[1], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[0], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("m", [0, 1, 3, 40])
def test_gives_the_bits_of_the_reference(m, k, dtype, device, native, poisoned):
    x = activations(m, k, dtype=dtype, device=device) if k else torch.zeros(m, 0, dtype=dtype, device=device)
    for weight in norm_weights(k, dtype, device):
        assert_same(int8_quantize(x, weight, 1e-5), op.reference(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 1000, 4096])
@pytest.mark.parametrize("norm", [False, True])
def test_is_within_half_a_step_of_fp64(k, norm, dtype, device, native):
    x = activations(20, k, dtype=dtype, device=device)
    weight = torch.rand(k, device=device).to(dtype) + 0.5 if norm else None
    q, x_scale = int8_quantize(x, weight)
    v = x.double() if weight is None else op.rms_norm(x, weight, 1e-6, torch.float64)
    rounding = 4 * torch.finfo(dtype).eps if norm else 1e-6
    error = (q.double() * x_scale.double()[:, None] - v).abs()
    assert (error <= 0.5 * x_scale[:, None] * (1 + 1e-5) + rounding * v.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_is_that_of_transformers(dtype, device, native):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(1024, eps=1e-5).to(device, dtype)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
        x = activations(50, 1024, dtype=dtype, device=device)
        (q, x_scale), expected = int8_quantize(x, norm.weight, 1e-5), op.reference(norm(x))
    torch.testing.assert_close(x_scale, expected[1], rtol=2 * torch.finfo(dtype).eps, atol=0)
    off = (q.int() - expected[0].int()).abs()
    assert off.max() <= 1 and off.float().mean() < 1e-3  # its mean is summed in fp32, its root is approximate


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 33, 71])
def test_a_row_with_nan_or_infinity_is_spoiled_alone(column, bad, weighted, device, native):
    x = torch.randn(4, 72, device=device)
    weight = torch.ones(72, device=device) if weighted else None
    clean = int8_quantize(x, weight)
    x[1, column] = bad
    q, x_scale = int8_quantize(x, weight)
    assert x_scale[1].isnan() and not q[1].any()
    others = [0, 2, 3]
    assert torch.equal(q[others], clean[0][others]) and torch.equal(x_scale[others], clean[1][others])


def test_a_norm_beyond_fp16_spoils_its_row(device, native):
    x = torch.zeros(2, 64, dtype=torch.float16, device=device)
    x[:, 0] = 1
    weight = torch.full((64,), 60000.0, dtype=torch.float16, device=device)
    q, x_scale = int8_quantize(x, weight)
    assert x_scale.isnan().all() and not q.any()


@pytest.mark.parametrize("weighted", [False, True])
def test_zero_rows_have_scale_zero(weighted, device, native):
    q, x_scale = int8_quantize(torch.zeros(3, 64, device=device), torch.ones(64, device=device) if weighted else None)
    assert not q.any() and not x_scale.any()


def test_tiny_and_huge_rows_match(device, native):
    x = torch.randn(4, 100, device=device) * torch.tensor([1e-44, 1e-38, 1e30, 3e37], device=device)[:, None]
    for weight in (None, torch.ones(100, device=device)):
        assert_same(int8_quantize(x, weight), op.reference(x, weight))


def test_rounds_halves_to_even(device, native):
    x = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 0.0], device=device)
    q, x_scale = int8_quantize(x)
    assert q.tolist() == [127, 0, 2, 2, 0, -2, 126, 0] and x_scale.shape == () and x_scale.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 71])
def test_reads_strided_x_and_nothing_around_it(k, dtype, device, native):
    x = activations(5, k, dtype=dtype, device=device)
    assert_same(int8_quantize(inside_nan(x)), int8_quantize(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_x_and_norm_weight_off_their_alignment(dtype, device, native):
    memory = activations(1, 3 * 64 + 1, dtype=dtype, device=device)[0]
    x, weight = memory[1:].view(3, 64), torch.rand(65, device=device).to(dtype)[1:]
    assert_same(int8_quantize(x, weight), op.reference(x, weight))


def test_keeps_leading_dimensions(device, native):
    x = torch.randn(2, 3, 64, device=device)
    q, x_scale = int8_quantize(x)
    flat = int8_quantize(x.view(6, 64))
    assert torch.equal(q.view(6, 64), flat[0]) and torch.equal(x_scale.view(6), flat[1]) and x_scale.shape == (2, 3)


@pytest.mark.parametrize("m", [2, 9, 70])
def test_a_row_does_not_depend_on_its_batch(m, device, native):
    x, weight = torch.randn(m, 1000, device=device), torch.rand(1000, device=device)
    alone = [int8_quantize(row, weight) for row in x.split(1)]
    assert_same(int8_quantize(x, weight), [torch.cat(parts) for parts in zip(*alone)])


@pytest.mark.parametrize("m", [1, 40])
def test_feeds_int8_scaled_matmul(m, device, native):
    """norm, then matmul, in two ops: as on the normalised activations."""
    x, weight = torch.randn(m, 128, device=device).bfloat16(), torch.rand(128, device=device).bfloat16()
    w = torch.randint(-127, 128, (64, 128), dtype=torch.int8, device=device)
    w_scale = torch.rand(64, device=device)
    q, x_scale = int8_quantize(x, weight)
    fused = int8_scaled_matmul(q, w, w_scale, x_scale=x_scale, out_dtype=torch.bfloat16)
    assert torch.equal(fused, int8_scaled_matmul(op.rms_norm(x, weight, 1e-6, None), w, w_scale))


BAD = [
    ("x", TypeError, lambda a: a | {"x": a["x"].int()}),
    ("x", ValueError, lambda a: a | {"x": a["x"].sum()}),
    ("norm_weight", ValueError, lambda a: a | {"norm_weight": a["norm_weight"][1:]}),
    ("norm_weight", TypeError, lambda a: a | {"norm_weight": a["norm_weight"].half()}),
    ("norm_weight", ValueError, lambda a: a | {"norm_weight": a["norm_weight"].repeat_interleave(2)[::2]}),
]


def good_arguments(device):
    return {"x": torch.randn(3, 64, device=device), "norm_weight": torch.ones(64, device=device), "eps": 1e-6}


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    with pytest.raises(error, match=rf"int8_quantize: .*\b{name}\b"):
        int8_quantize(**spoil(good_arguments(device)))


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    with pytest.raises(RuntimeError, match=rf"int8_quantize: .*\b{name}\b"):
        torch.ops.fastinfer.int8_quantize(*spoil(good_arguments(device)).values())


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted, device, native):
    weight = torch.ones(64, device=device) if weighted else None
    torch.library.opcheck(torch.ops.fastinfer.int8_quantize.default, (torch.randn(3, 64, device=device), weight, 1e-6))
