"""sample's steps: the kept sets of transformers' processors, exact probabilities, Philox, draws for given numbers."""

import pytest
import torch
from matmul_cases import DTYPES
from sample_cases import SETTINGS, call, ids, one, op, processed, repeat

# ---- the kept set and its probabilities ------------------------------------------------------------------------------


@pytest.mark.models
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 7, 100, 1000, 20011])
@pytest.mark.parametrize("settings", [s for s in SETTINGS if s.get("temperature", 1) > 1e-3], ids=ids)
def test_keeps_what_transformers_keeps(settings, v, dtype, penalty, device):
    logits = (torch.randn(8, v, device=device) * 3).to(dtype)
    logits[:, v // 2 :: 5] = -torch.inf if v > 1 else 0.0
    tokens = torch.randint(0, v, (8, 10), device=device)
    seen = torch.zeros(8, v, dtype=torch.bool, device=device).scatter_(1, tokens, True)
    expected = processed(logits, **settings, repetition_penalty=penalty, tokens=tokens)
    rest = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | {k: s for k, s in settings.items() if k != "temperature"}
    scores = op.scores_of(logits, settings.get("temperature", 1.0), penalty, seen, None)
    weights = op.weights_of(scores, **rest)

    probabilities = expected.double().softmax(-1)
    vanishing = scores < scores.amax(-1, keepdim=True) - 27  # weights there are 0, 1 or 2
    share = weights.double() / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(share.sort().values, probabilities.sort().values, rtol=1e-5, atol=1e-11)
    # sorted, because transformers' sort is not stable: which of equal scores top-p keeps there is not defined
    kept = scores.masked_fill((weights == 0) | vanishing, -torch.inf).sort().values
    expected = expected.masked_fill(vanishing, -torch.inf)
    different = kept != expected.sort().values
    assert different.sum() <= (1 if "top_p" in settings else 0)
    if dtype == torch.float32:
        elsewhere = ((weights > 0) & ~vanishing) != (expected > -torch.inf)
        assert elsewhere.sum() <= different.sum()


def test_keeps_every_tie_with_the_kth_score(device):
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]], device=device)
    weights = op.weights_of(logits, 2, 1.0, 0.0)
    assert (weights > 0).tolist() == [[False, True, True, True, True, False]]
    drawn = {call(logits, offset=i, top_k=2).item() for i in range(200)}
    assert drawn == {1, 2, 3, 4}


def test_top_p_keeps_equal_scores_from_the_last_one_on(device):
    logits = torch.zeros(1, 10, device=device)
    for top_p, kept in [(0.0, 1), (0.05, 1), (0.25, 3), (0.55, 6), (0.999, 10)]:
        weights = op.weights_of(logits, 0, top_p, 0.0)
        assert (weights > 0).tolist() == [[i >= 10 - kept for i in range(10)]]
        assert {call(logits, offset=i, top_p=top_p).item() for i in range(300)} == set(range(10 - kept, 10))


@pytest.mark.parametrize("penalty", [1.5, 0.5])
def test_penalty_divides_positive_and_multiplies_negative_logits(penalty, device):
    logits = torch.tensor([[2.0, 2.0, -2.0, -2.0, 0.0, -torch.inf]], device=device)
    seen = torch.tensor([[True, False, True, False, True, True]], device=device)
    expected = torch.tensor([[2 / penalty, 2.0, -2 * penalty, -2.0, 0.0, -torch.inf]], device=device)
    torch.testing.assert_close(op.scores_of(logits, 1.0, penalty, seen, None), expected)
    assert call(logits, temperature=0.0, repetition_penalty=penalty, seen=seen).item() == (1 if penalty > 1 else 0)


def test_exponential_is_within_two_units_of_fp64(device):
    d = -torch.rand(200000, device=device) * 29
    e = op.exponential(d).double()
    assert ((e / d.double().exp() - 1).abs() <= 2 * torch.finfo(torch.float32).eps).all()
    assert op.exponential(torch.zeros(1, device=device)).item() == 1.0


# ---- the draw --------------------------------------------------------------------------------------------------------

# of Random123: counter, key, result
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected, device):
    words = op.philox([one(c, device) for c in counter], [one(k, device) for k in key])
    assert [w.item() for w in words] == expected


def test_draws_the_first_index_beyond_the_target(device):
    weights = torch.tensor([[0, 3, 0, 5, 8, 0]], device=device)
    for target, token in enumerate([1] * 3 + [3] * 5 + [4] * 8):
        first, last = target << 28, (target + 1 << 28) - 1  # of the r that hit this sixteenth
        for r in (first, last):
            assert op.draw(weights, one(r, device)).item() == token


def test_target_is_exact_for_large_totals(device):
    generator = torch.Generator().manual_seed(3)
    for bits in (40, 50, 60):
        for _ in range(50):
            total, r = (torch.randint(0, 1 << b, (1,), generator=generator).item() for b in (bits, 32))
            cut = r * total >> 32
            if total < 2 or cut == 0:
                continue
            for first, token in ((cut, 1), (cut + 1, 0)):
                weights = torch.tensor([[first, total - first]], device=device)
                assert op.draw(weights, one(r, device)).item() == token


CHI_SQUARES = [{}, {"temperature": 0.6}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 12, "top_p": 0.9}]


def chi_square(counts, probabilities) -> tuple[float, int]:
    kept = probabilities > 0
    assert not counts[~kept].any()
    expected = probabilities[kept] * counts.sum()
    return ((counts[kept] - expected) ** 2 / expected).sum().item(), int(kept.sum()) - 1


@pytest.mark.models
@pytest.mark.parametrize("settings", CHI_SQUARES, ids=ids)
def test_draws_follow_the_probabilities(settings, device):
    logits = torch.randn(1, 20, device=device)
    probabilities = processed(logits, **settings).double().softmax(-1)[0].cpu()
    tokens = torch.cat([call(repeat(logits, 4000), seed=7, offset=i, **settings) for i in range(10)])
    counts = torch.bincount(tokens.cpu(), minlength=20).double()
    found, freedom = chi_square(counts, probabilities)
    limit = freedom + 4 * (2 * freedom) ** 0.5  # four standard deviations
    assert found < limit
    wrong = probabilities * torch.linspace(0.9, 1.1, 20, dtype=torch.float64)
    assert chi_square(counts, wrong / wrong.sum())[0] > limit  # this test can fail


def test_rows_and_steps_are_independent(device):
    logits = torch.zeros(1, 2, device=device)
    tokens = torch.stack([call(repeat(logits, 100), offset=i) for i in range(100)]).double()
    centred = tokens - tokens.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.T):
        assert (centred * other).mean().abs() < 0.02 * 0.5
    assert 0.48 < tokens.mean() < 0.52
