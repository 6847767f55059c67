"""sample: kernels against the reference, what a row depends on, odd rows, errors. Its steps: test_sample_steps.py."""

import pytest
import torch
from matmul_cases import DTYPES, inside_nan
from sample_cases import SETTINGS, call, expect, ids, one, op, repeat

from fastinfer.ops import sample
from fastinfer.ops.launch import dependent_launch

# a scalar, odd, a chunk of 16 and one past it, bigger ones
VOCABULARIES = [1, 2, 7, 16, 17, 33, 1000, 5003]

# ---- kernels against the reference -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_gives_the_tokens_of_the_reference(settings, v, dtype, device, native):
    for b, scale in ((0, 1), (1, 1), (20, 1), (20, 8), (5, 0)):
        logits = (torch.randn(b, v, device=device) * scale).to(dtype)
        seen = torch.rand(b, v, device=device) < 0.3
        tokens = call(logits, **settings)
        assert tokens.dtype == torch.int64 and tokens.shape == (b,)
        assert torch.equal(tokens, expect(logits, **settings))
        assert torch.equal(tokens, call(logits, **settings, seen=seen))
        settings_seen = settings | {"seen": seen, "repetition_penalty": 1.3}
        assert torch.equal(call(logits, **settings_seen), expect(logits, **settings_seen))


def test_writes_every_token(device, native, poisoned):
    assert call(torch.randn(100, 50, device=device)).max() < 50


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_gives_the_tokens_of_the_reference_on_thousands_of_rows(settings, device, native):
    for offset in range(3):
        logits = torch.randn(1000, 128, device=device) * torch.rand(1000, 1, device=device) * 10
        assert torch.equal(call(logits, 3, offset, **settings), expect(logits, 3, offset, **settings))


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40 + 3, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("offset", [0, 5, -2, 2**33])
def test_kernel_draws_the_same_numbers(seed, offset, device, native):
    """Over 2^20 equal weights the token is the first 20 bits of the random number."""
    logits = torch.zeros(1, 1 << 20, device=device)
    assert call(repeat(logits, 5), seed, offset).tolist() == expect(repeat(logits, 5), seed, offset).tolist()
    r = op.random_words(one(seed, device), one(offset, device), 5)
    assert call(repeat(logits, 5), seed, offset).tolist() == (r >> 12).tolist()


@pytest.mark.parametrize("v", [151936, 262144, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_large_vocabularies(v, dtype, device, native):
    logits = (torch.randn(2, v, device=device) * 3).to(dtype)
    for settings in ({}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 50, "top_p": 0.9}, {"top_p": 0.95}):
        assert torch.equal(call(logits, **settings), expect(logits, **settings))


MANY_KEPT = [
    {"top_k": 2048},
    {"top_k": 5000},
    {"top_k": 3000, "top_p": 0.7},
    {"top_p": 0.3},
    {"top_p": 0.999, "min_p": 0.1},
    {"temperature": 5.0, "top_p": 0.9},
]


@pytest.mark.parametrize(("b", "v"), [(1, 50257), (6, 20008), (70, 2049)])
@pytest.mark.parametrize("settings", MANY_KEPT, ids=ids)
def test_cuts_that_keep_many(settings, b, v, device, native):
    """Of scores that differ, of 60 distinct ones, of equal ones, and of two, one of which is rare."""
    logits = torch.randn(b, v, device=device)
    for scores in (logits, (10 * logits).round() / 10, torch.zeros_like(logits), (logits > 1.5) * 0.25):
        assert torch.equal(call(scores, **settings), expect(scores, **settings))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("b", "v"), [(130, 2056), (40, 8192), (9, 50257), (1, 128256)])
def test_greedy_finds_the_first_of_the_likeliest_anywhere(b, v, dtype, device, native):
    for _ in range(5):
        logits = torch.randn(b, v, device=device).clamp(max=1).to(dtype)
        first, later = torch.randint(0, v // 2, (b, 1), device=device), torch.randint(v // 2, v, (b, 1), device=device)
        logits.scatter_(1, torch.cat([later, first], 1), 3.0)
        assert torch.equal(call(logits, temperature=0.0), first[:, 0])
        seen = torch.zeros(b, v, dtype=torch.bool, device=device).scatter_(1, first, True)
        assert torch.equal(call(logits, temperature=0.0, repetition_penalty=2.0, seen=seen), later[:, 0])


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_few_distinct_scores(settings, device, native):
    logits = torch.randint(-3, 3, (200, 300), device=device).float()
    logits[logits == 0] *= -1  # −0 equals 0
    logits[:, ::7] = 0.0
    logits[:100, 50:] = -torch.inf
    assert torch.equal(call(logits, **settings), expect(logits, **settings))


def test_fp64_exponentials_give_the_same_tokens_but_for_rounding(device):
    logits = torch.randn(2000, 300, device=device) * 2
    assert (call(logits, top_k=50) != expect(logits, top_k=50, dtype=torch.float64)).sum() <= 2


# ---- what a row depends on -------------------------------------------------------------------------------------------


def test_same_seed_and_offset_give_the_same_tokens(device):
    logits = torch.randn(50, 500, device=device)
    first = call(logits, 4, 2)
    assert torch.equal(first, call(logits, 4, 2))
    for seed, offset in ((5, 2), (4, 3), (2, 4)):
        assert (first != call(logits, seed, offset)).float().mean() > 0.5


def test_a_row_does_not_depend_on_the_others(device):
    logits = torch.randn(40, 500, device=device)
    settings = {"temperature": 1.2, "top_k": 100, "top_p": 0.95}
    tokens = call(logits, **settings)
    assert torch.equal(tokens[:7], call(logits[:7], **settings))
    others = torch.randn_like(logits)
    others[30] = logits[30]
    assert call(others, **settings)[30] == tokens[30]


def test_advances_by_an_offset_on_the_device(device):
    logits, seed, offset = torch.randn(20, 100, device=device), one(1, device), one(0, device)
    for step in range(3):
        assert torch.equal(sample(logits, seed, offset), call(logits, 1, step))
        offset += 1


def test_seed_and_offset_may_be_scalars(device):
    logits = torch.randn(20, 100, device=device)
    scalars = [torch.tensor(n, device=device) for n in (3, 9)]
    assert torch.equal(sample(logits, *scalars), call(logits, 3, 9))


# ---- odd rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_takes_the_first_of_equal_scores(dtype, device):
    logits = torch.zeros(3, 100, dtype=dtype, device=device)
    logits[1, [40, 41, 99]] = 2.0
    logits[2] = -torch.inf
    logits[0, :50] = -0.0
    assert call(logits, temperature=0.0).tolist() == [0, 40, 0]
    assert torch.equal(call(logits, 1, 1, temperature=0.0), call(logits, 2, 2, temperature=0.0))


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
@pytest.mark.parametrize("sign", [1, -1])
def test_a_row_with_nan_gives_the_index_of_the_first(sign, settings, device):
    logits = torch.randn(3, 70, device=device)
    clean = call(logits, **settings)
    logits[1, [33, 60]] = torch.tensor(float("nan"), device=device).copysign(torch.tensor(float(sign), device=device))
    logits[1, 5] = torch.inf
    assert call(logits, **settings).tolist() == [clean[0].item(), 33, clean[2].item()]


@pytest.mark.parametrize("settings", SETTINGS, ids=ids)
def test_never_draws_what_is_masked(settings, device):
    logits = torch.full((300, 40), -torch.inf, device=device)
    logits[:, [3, 17]] = torch.randn(300, 2, device=device)
    assert set(call(logits, **settings).tolist()) <= {3, 17}


def test_draws_any_where_all_are_masked(device):
    logits = torch.full((400, 4), -torch.inf, device=device)
    assert set(call(logits).tolist()) == {0, 1, 2, 3}
    assert set(call(logits, top_k=1).tolist()) == {0, 1, 2, 3}


def test_plus_infinity_shuts_out_finite_scores(device):
    logits = torch.randn(400, 20, device=device)
    logits[:, [4, 9]] = torch.inf
    assert set(call(logits).tolist()) == {4, 9} and set(call(logits, temperature=0.0).tolist()) == {4}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [64, 71])
def test_reads_strided_logits_and_nothing_around_them(v, dtype, device, native):
    logits = torch.randn(5, v, device=device).to(dtype)
    assert torch.equal(call(inside_nan(logits)), call(logits))
    assert torch.equal(call(logits.T.contiguous().T), call(logits))
    sequence = torch.stack([torch.full_like(logits, torch.nan), logits], 1)
    assert torch.equal(call(sequence[:, -1]), call(logits))
    assert torch.equal(call(repeat(logits[:1], 6)), call(logits[:1].repeat(6, 1)))


# ---- errors and the dispatcher ---------------------------------------------------------------------------------------

BAD = [
    ("logits", TypeError, {"logits": torch.ones(3, 8, dtype=torch.int64)}),
    ("logits", ValueError, {"logits": torch.ones(8)}),
    ("logits", ValueError, {"logits": torch.ones(3, 0)}),
    ("logits", ValueError, {"logits": torch.ones(1, (1 << 20) + 1)}),
    ("seed", TypeError, {"seed": torch.zeros(1)}),
    ("seed", ValueError, {"seed": torch.zeros(2, dtype=torch.int64)}),
    ("offset", TypeError, {"offset": torch.zeros(1, dtype=torch.int32)}),
    ("offset", ValueError, {"offset": torch.zeros(0, dtype=torch.int64)}),
    ("temperature", ValueError, {"temperature": -1.0}),
    ("temperature", ValueError, {"temperature": 1e-50}),
    ("temperature", ValueError, {"temperature": float("nan")}),
    ("temperature", ValueError, {"temperature": float("inf")}),
    ("top_k", ValueError, {"top_k": -1}),
    ("top_p", ValueError, {"top_p": 1.1}),
    ("top_p", ValueError, {"top_p": float("nan")}),
    ("min_p", ValueError, {"min_p": -0.1}),
    ("repetition_penalty", ValueError, {"repetition_penalty": 0.0}),
    ("repetition_penalty", ValueError, {"repetition_penalty": float("inf")}),
    ("seen", TypeError, {"seen": torch.zeros(3, 8)}),
    ("seen", ValueError, {"seen": torch.zeros(3, 7, dtype=torch.bool)}),
    ("seen", ValueError, {"seen": torch.zeros(8, 3, dtype=torch.bool).T}),
]
ONLY_IN_PYTHON = [
    ("top_k", TypeError, {"top_k": 2.0}),
    ("top_k", TypeError, {"top_k": True}),
    ("seen", ValueError, {"seen": None, "repetition_penalty": 1.2}),
]


def arguments(device, spoilt=()):
    good = {"logits": torch.randn(3, 8), "seed": one(0, "cpu"), "offset": one(0, "cpu")}
    good |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.1}
    good |= {"seen": torch.zeros(3, 8, dtype=torch.bool)} | dict(spoilt)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in good.items()}
    return {k: moved.pop(k) for k in ("logits", "seed", "offset")}, moved


@pytest.mark.parametrize(("name", "error", "spoilt"), BAD + ONLY_IN_PYTHON)
def test_names_the_bad_argument(name, error, spoilt, device):
    tensors, rest = arguments(device, spoilt)
    with pytest.raises(error, match=rf"sample: .*\b{name}\b"):
        sample(*tensors.values(), **rest)


@pytest.mark.parametrize("name", ["seed", "offset", "seen"])
def test_names_an_argument_on_another_device(name, device):
    tensors, rest = arguments(device)
    where = tensors if name in tensors else rest
    where[name] = where[name].to("meta")
    with pytest.raises(ValueError, match=rf"sample: {name} must be"):
        sample(*tensors.values(), **rest)


@pytest.mark.parametrize(("name", "spoilt"), [(name, spoilt) for name, _, spoilt in BAD])
def test_the_native_op_checks_for_itself(name, spoilt, native):
    tensors, rest = arguments("cpu", spoilt)
    with pytest.raises(RuntimeError, match=rf"sample: {name}\b"):
        torch.ops.fastinfer.sample(*tensors.values(), *rest.values())


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, device, native):
    tensors, rest = arguments(device, {} if masked else {"seen": None})
    torch.library.opcheck(torch.ops.fastinfer.sample.default, (*tensors.values(), *rest.values()))


def test_compiles_without_a_graph_break(device, native):
    def step(logits, seed, offset):
        return sample(logits * 2, seed, offset, temperature=0.8, top_k=20) + 1

    logits, seed, offset = torch.randn(6, 300, device=device), one(3, device), one(4, device)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, seed, offset), step(logits, seed, offset))


@pytest.mark.parametrize("settings", [SETTINGS[1], SETTINGS[-2], {"top_p": 0.9}], ids=ids)
def test_runs_in_a_captured_graph(settings):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logits, seed, offset = torch.randn(8, 50000, device="cuda"), one(3, "cuda"), one(0, "cuda")
    expected = [call(logits, 3, step, **settings) for step in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), dependent_launch():
        tokens = sample(logits, seed, offset, **settings)
        offset += 1
    for step in range(3):
        graph.replay()
        assert torch.equal(tokens, expected[step])


def test_cuda_gives_the_tokens_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    logits = torch.randn(500, 1000) * 4
    for settings in SETTINGS:
        assert torch.equal(call(logits.cuda(), 5, 6, **settings).cpu(), call(logits, 5, 6, **settings))
