"""rms_norm: the bits of the reference, that reference against fp64, transformers' own norms, odd rows, errors."""

import importlib
from itertools import product

import pytest
import tolerance
import torch
from matmul_cases import DTYPES, activations, inside_nan
from torch import nn

from fastinfer.ops import rms_norm

op = importlib.import_module("fastinfer.ops.rms_norm")
# none, one, odd, around 16 and a block's packs, each size of a block, rows that fill 1, 2 and 4 packs, longer ones
COLUMNS = [0, 1, 7, 15, 16, 24, 30, 128, 256, 264, 1000, 1024, 1032, 4096, 4104, 8192, 11008, 16384, 16392, 20000]


def make(m, k, dtype, device):
    """x and a residual."""
    if k == 0:
        return [torch.zeros(m, 0, dtype=dtype, device=device) for _ in range(2)]
    return [activations(m, k, dtype=dtype, device=device) for _ in range(2)]


def weights(k, dtype, device):
    weight = torch.randn(k, device=device)
    return None, weight.to(dtype), weight


def expected(x, weight, eps, residual=None, offset=0.0):
    out = op.reference(x, weight, eps, residual, offset)
    return (out, x) if residual is None else out


def assert_same(out, other):
    for a, b in zip(out, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", COLUMNS)
@pytest.mark.parametrize("m", [0, 1, 3, 40])
def test_gives_the_bits_of_the_reference(m, k, dtype, device, native, poisoned):
    x, residual = make(m, k, dtype, device)
    for weight, added, offset in product(weights(k, dtype, device), (None, residual), (0.0, 1.0)):
        args = x, weight, 1e-5, added, offset
        assert_same(rms_norm(*args), expected(*args))


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 64, 999, 4096])
def test_is_as_near_to_fp64_as_torch(k, dtype, added, offset, device, native):
    x, residual = make(20, k, dtype, device)
    weight = torch.randn(k, device=device).to(dtype)
    y, s = rms_norm(x, weight, 1e-5, residual if added else None, offset)
    plain_s = x + residual if added else x
    plain = nn.functional.rms_norm(plain_s, [k], weight + offset, 1e-5)
    exact_s = x.double() + residual.double() if added else x.double()
    exact = exact_s * (exact_s.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * (offset + weight.double())
    tolerance.assert_within(y, exact, plain)
    tolerance.assert_within(s, exact_s, plain_s)


def norm_of(family):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return {"llama": (LlamaRMSNorm, 0.0), "gemma": (Gemma3RMSNorm, 1.0)}[family]


@pytest.mark.models
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_is_the_norm_of_transformers(family, dtype, added, device, native):
    """Within the rule, and one rounding from their operations: they sum in fp32, and Llama's rounds before the weight."""
    cls, offset = norm_of(family)
    norm = cls(1024, eps=1e-5).to(device, dtype)
    x, residual = make(50, 1024, dtype, device)
    with torch.no_grad():
        norm.weight.normal_()
        theirs_s = x + residual if added else x
        theirs = norm(theirs_s)
        y, s = rms_norm(x, norm.weight, 1e-5, residual if added else None, offset)
    assert torch.equal(s, theirs_s)
    exact = op.reference(s, norm.weight.detach(), 1e-5, offset=offset, dtype=torch.float64)
    tolerance.assert_within(y, exact, theirs)
    unit = torch.finfo(dtype).eps / 2
    roundings = 8 if dtype == torch.float32 else 3.1 if family == "llama" else 2.1
    assert ((y.double() - theirs.double()).abs() <= roundings * unit * exact.abs() + torch.finfo(dtype).tiny).all()
    if dtype != torch.float32 and family == "gemma":
        assert (y != theirs).float().mean() < 1e-2  # theirs but for their order of the sum


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("column", "k"), [(0, 72), (33, 72), (71, 72), (70, 71)])
def test_a_row_with_nan_or_infinity_is_spoiled_alone(column, k, bad, added, device, native):
    x, residual = make(4, k, torch.float32, device)
    args = torch.ones(k, device=device), 1e-6, residual if added else None
    clean = rms_norm(x, *args)[0]
    x[1, column] = bad
    y = rms_norm(x, *args)[0]
    assert y[1, column].isnan() and (y[1].isnan() | (y[1] == 0)).all()
    others = [0, 2, 3]
    assert torch.equal(y[others], clean[others])
    assert_same(rms_norm(x, *args), expected(x, *args))


def test_zero_tiny_and_huge_rows_match(device, native):
    x = torch.randn(5, 100, device=device) * torch.tensor([0.0, 1e-44, 1e-38, 1e18, 3e37], device=device)[:, None]
    args = x, torch.ones(100, device=device), 1e-6, torch.zeros_like(x)
    assert_same(rms_norm(*args), expected(*args))


def test_a_sum_beyond_fp16_is_infinite_as_in_torch(device, native):
    x = torch.full((1, 16), 40000.0, dtype=torch.float16, device=device)
    y, s = rms_norm(x, None, 1e-6, x)
    assert s.isinf().all() and y.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [64, 71])
def test_reads_strided_rows_and_nothing_around_them(k, dtype, device, native):
    x, residual = make(5, k, dtype, device)
    weight = torch.randn(k, device=device)
    assert_same(rms_norm(inside_nan(x), weight, 1e-6)[:1], rms_norm(x, weight, 1e-6)[:1])
    strided = rms_norm(inside_nan(x), weight, 1e-6, inside_nan(residual))
    assert_same(strided, rms_norm(x, weight, 1e-6, residual))
    assert all(t.is_contiguous() for t in strided)


@pytest.mark.parametrize("off", ["x", "residual", "weight"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_operands_off_their_alignment(dtype, off, device, native):
    def at(name, *shape):
        memory = activations(1, 1 + torch.Size(shape).numel(), dtype=dtype, device=device)[0]
        return (memory[1:] if name == off else memory[:-1]).view(shape)

    args = at("x", 3, 64), at("weight", 64), 1e-6, at("residual", 3, 64)
    assert_same(rms_norm(*args), expected(*args))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 0, 64)])
def test_keeps_leading_dimensions(shape, device, native):
    x, weight = torch.randn(shape, device=device), torch.rand(64, device=device)
    out, flat = (rms_norm(t, weight, 1e-6, 2 * t) for t in (x, x.view(-1, 64)))
    assert all(a.shape == shape and torch.equal(a.view(-1, 64), b) for a, b in zip(out, flat))


def test_without_a_residual_the_sum_is_x_itself(device, native):
    x = torch.randn(3, 64, device=device)
    before = x.clone()
    y, s = rms_norm(x, None, 1e-6)
    assert s is x and y.data_ptr() != x.data_ptr() and torch.equal(x, before)


def test_leaves_its_arguments_alone(device, native):
    x, residual = make(3, 64, torch.float32, device)
    before = x.clone(), residual.clone()
    rms_norm(x, None, 1e-6, residual)
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


@pytest.mark.parametrize("m", [2, 9, 70])
def test_a_row_does_not_depend_on_its_batch(m, device, native):
    x, residual = make(m, 1000, torch.bfloat16, device)
    weight = torch.rand(1000, device=device)
    alone = [rms_norm(a, weight, 1e-6, b) for a, b in zip(x.split(1), residual.split(1))]
    assert_same(rms_norm(x, weight, 1e-6, residual), [torch.cat(parts) for parts in zip(*alone)])


BAD = [
    ("x", TypeError, lambda a: a | {"x": a["x"].int()}),
    ("x", ValueError, lambda a: a | {"x": a["x"].sum()}),
    ("weight", ValueError, lambda a: a | {"weight": a["weight"][1:]}),
    ("weight", TypeError, lambda a: a | {"weight": a["weight"].half()}),
    ("weight", ValueError, lambda a: a | {"weight": a["weight"].repeat_interleave(2)[::2]}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"][1:]}),
    ("residual", ValueError, lambda a: a | {"residual": a["residual"][0]}),
    ("residual", TypeError, lambda a: a | {"residual": a["residual"].half()}),
]


def good_arguments(device):
    x = torch.randn(3, 64, device=device)
    return {"x": x, "weight": torch.ones(64, device=device), "eps": 1e-6, "residual": x + 1, "offset": 0.0}


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device):
    with pytest.raises(error, match=rf"rms_norm: .*\b{name}\b"):
        rms_norm(**spoil(good_arguments(device)))


@pytest.mark.parametrize(("name", "spoil"), [(name, spoil) for name, _, spoil in BAD])
def test_the_native_op_checks_for_itself(name, spoil, device, native):
    arguments = spoil(good_arguments(device))
    with pytest.raises(RuntimeError, match=rf"rms_norm: .*\b{name}\b"):
        torch.ops.fastinfer.rms_norm.residual(**arguments)
    if name != "residual":
        del arguments["residual"]
        with pytest.raises(RuntimeError, match=rf"rms_norm: .*\b{name}\b"):
            torch.ops.fastinfer.rms_norm.default(**arguments)


@pytest.mark.parametrize("name", ["weight", "residual"])
def test_names_what_is_on_another_device(name):
    arguments = good_arguments("cpu")
    with pytest.raises(ValueError, match=rf"rms_norm: {name} must be on cpu, as x, got meta"):
        rms_norm(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(weighted, device, native):
    a = good_arguments(device)
    weight = a["weight"] if weighted else None
    torch.library.opcheck(torch.ops.fastinfer.rms_norm.default, (a["x"], weight, 1e-6, 1.0))
    torch.library.opcheck(torch.ops.fastinfer.rms_norm.residual, (a["x"], weight, 1e-6, a["residual"], 1.0))


@pytest.mark.parametrize("added", [False, True])
def test_compiles_in_one_graph(added, device, native):
    a = good_arguments(device)
    args = a["x"], a["weight"], 1e-6, a["residual"] if added else None, 1.0
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*args), rms_norm(*args))
