"""sample: the next token of each row of logits, greedy or drawn, with transformers' warpers, on the device."""

from __future__ import annotations

import math

import torch

from fastinfer.ops._common import check_device, check_float, describe, divide, register_fake, run

MAX_VOCABULARY = 1 << 20  # so that the sum of all weights stays below 2^60
WEIGHT_ONE = float(1 << 40)  # the weight of the likeliest token
FARTHEST = -30.0  # e^-30 is less than a unit of weight


def sample(
    logits: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The next token of each row: the likeliest, or one drawn from what transformers' processors would leave.

    In their order and meaning, on fp32 scores: repetition penalty, temperature, top-k (ties with the k-th stay), top-p
    (the smallest set that reaches top_p, at least one; of equal scores those of higher index first), min-p.
    Infinite scores mean their limit: +inf shuts out all finite ones, −inf is drawn only where all are −inf. A row with
    NaN gives the index of its first NaN, since a device raises no error.

    Args:
        logits:  [B, V] fp32|bf16|fp16, V from 1 to 2^20
        seed:    one int64 on the device of logits, any number
        offset:  one int64 on the device of logits, to be advanced by 1 after each step (in a captured graph, too)
        temperature: scores are divided by it; 0 takes the likeliest, the first of equal ones, and draws nothing
        top_k:   how many of the likeliest stay; 0: all
        top_p:   the share of probability that stays; 1: all
        min_p:   the least probability that stays, as a share of the likeliest's; 0: all
        repetition_penalty: divides positive and multiplies negative logits of tokens in `seen`; 1: off
        seen:    [B, V] bool, contiguous, or None
    Returns: tokens [B] int64
    Raises:  TypeError for a dtype, ValueError for a shape, device or number that does not fit; both name the argument
    Backends: CPU (AVX2, AVX512), CUDA (one launch, in clusters on compute capability 9.0; never waits for the device, can
             be captured in a graph, starts early inside of dependent_launch); else the reference in torch's operations
    Numerics: the tokens are those of the reference, whatever the backend and the rest of the batch. The weight of a token
             is ⌊2^40 · e^(score − highest)⌋ with an exponential that is spelt out in fp32 operations, each rounded;
             sums of weights are integers, so their order does not matter. top-p removes the least likely while their
             weights sum up to at most ⌊(1 − top_p) · total⌋, in fp64. Row b draws r, the first word of Philox 4x32-10
             with key seed and counter (offset, b), and takes the smallest index whose cumulative weight exceeds
             ⌊r · total / 2^32⌋
    Source:  Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox); Holtzman et al., arXiv
             1904.09751 (top-p); Nguyen et al., arXiv 2407.01082 (min-p); Keskar et al., arXiv 1909.05858, §4.1 (penalty)
    """
    check_tensors(logits, seed, offset, seen)
    check_numbers(temperature, top_k, top_p, min_p, repetition_penalty)
    if repetition_penalty != 1 and seen is None:
        raise ValueError("sample: repetition_penalty needs seen, the mask of the tokens so far")
    numbers = float(temperature), top_k, float(top_p), float(min_p), float(repetition_penalty)
    return run("sample", reference, logits, seed, offset, *numbers, seen, triton=False)


def check_tensors(logits, seed, offset, seen) -> None:
    check_float("sample", "logits", logits)
    if logits.dim() != 2 or not 1 <= logits.shape[1] <= MAX_VOCABULARY:
        raise ValueError(f"sample: logits must be [B, V] with V from 1 to {MAX_VOCABULARY}, got {describe(logits)}")
    for name, t in (("seed", seed), ("offset", offset)):
        if t.dtype != torch.int64:
            raise TypeError(f"sample: {name} must be int64, got {describe(t)}")
        if t.numel() != 1:
            raise ValueError(f"sample: {name} must have one element, got {describe(t)}")
        check_device("sample", name, t, logits, "logits")
    if seen is None:
        return
    if seen.dtype != torch.bool:
        raise TypeError(f"sample: seen must be bool, got {describe(seen)}")
    if seen.shape != logits.shape:
        raise ValueError(f"sample: seen must be {list(logits.shape)}, as logits, got {describe(seen)}")
    if seen.device != logits.device or not seen.is_contiguous():
        where = f"got {seen.device}, strides {seen.stride()}"
        raise ValueError(f"sample: seen must be contiguous on {logits.device}, as logits, {where}")


def check_numbers(temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    smallest = torch.finfo(torch.float32).tiny
    if not (temperature == 0 or smallest <= temperature < math.inf):
        raise ValueError(f"sample: temperature must be 0 or a positive float32, got {temperature}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"sample: top_k must be an int, got {type(top_k).__name__}")
    if top_k < 0:
        raise ValueError(f"sample: top_k must be at least 0, got {top_k}")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if not 0 <= share <= 1:
            raise ValueError(f"sample: {name} must be between 0 and 1, got {share}")
    if not smallest <= repetition_penalty <= torch.finfo(torch.float32).max:
        raise ValueError(f"sample: repetition_penalty must be a positive float32, got {repetition_penalty}")


# ---- the steps, in plain torch; none waits for the device -------------------------------------------------------------


def scores_of(logits, temperature: float, repetition_penalty: float, seen, dtype: torch.dtype | None) -> torch.Tensor:
    s = logits.to(dtype or torch.float32)
    if seen is not None and repetition_penalty != 1:
        s = torch.where(seen, torch.where(s < 0, s * repetition_penalty, divide(s, repetition_penalty)), s)
    return divide(s, temperature or 1.0) + 0.0  # −0 becomes 0: they are equal, their bits are not


def exponential(d: torch.Tensor) -> torch.Tensor:
    """e^d for d ≤ 0: 2ⁿ times the Taylor series around 0 of what is left of d, each operation rounded to fp32."""
    if d.dtype == torch.float64:
        return d.exp()
    d = d.clamp(min=FARTHEST)
    n = (d * 1.44269504).round()
    r = d - n * 0.693359375 + n * 2.12194440e-4  # ln 2 in two parts, the first exact in few bits
    e = r * (1 / 5040) + 1 / 720
    for coefficient in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        e = e * r + coefficient
    return e * ((n.to(torch.int32) + 127) << 23).view(torch.float32)


def weights_of(s: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The weight of each token, int64 [B, V], 0 where it is not kept."""
    highest = s.amax(-1, keepdim=True)
    e = exponential(torch.where(s == highest, 0.0, s - highest))
    weights = (e * WEIGHT_ONE).to(torch.int64)
    if 0 < top_k < s.shape[-1]:
        removed = s < torch.topk(s, top_k).values[..., -1:]
        s, weights = s.masked_fill(removed, -torch.inf), weights.masked_fill(removed, 0)
    if top_p < 1:
        order = s.sort(dim=-1, stable=True).indices
        limit = (weights.sum(-1, keepdim=True).double() * (1.0 - top_p)).to(torch.int64)
        removed = weights.gather(-1, order).cumsum(-1) <= limit
        removed[..., -1] = False
        weights = weights.masked_fill(removed.scatter(-1, order, removed), 0)
    return weights.masked_fill(e < min_p, 0) if min_p > 0 else weights


def philox(counter: list[torch.Tensor], key: list[torch.Tensor]) -> list[torch.Tensor]:
    """Philox 4x32-10 on 32-bit words held in int64, whose products wrap to the right bits."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & low) ^ c1 ^ k0, p1 & low, (p0 >> 32 & low) ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return [c0, c1, c2, c3]


def random_words(seed: torch.Tensor, offset: torch.Tensor, rows: int) -> torch.Tensor:
    """r [B], from 0 to 2^32 − 1, for the rows of a batch."""
    low = 0xFFFFFFFF
    seed, offset = seed.reshape(1), offset.reshape(1)
    row = torch.arange(rows, device=seed.device)
    return philox([offset & low, offset >> 32 & low, row & low, row >> 32], [seed & low, seed >> 32 & low])[0]


def draw(weights: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """The smallest index of each row whose cumulative weight exceeds ⌊r · total / 2^32⌋."""
    sums = weights.cumsum(-1)
    total = sums[..., -1]
    high, low = total >> 30, total & ((1 << 30) - 1)  # r · total may have 92 bits
    target = (r * high + (r * low >> 30)) >> 2
    return (sums <= target[..., None]).sum(-1)


def reference(
    logits,
    seed,
    offset,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    repetition_penalty=1.0,
    seen=None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The op in plain torch; in `dtype`, where given, scores and exponentials are."""
    s = scores_of(logits, temperature, repetition_penalty, seen, dtype)
    if temperature == 0:
        tokens = s.argmax(-1)
    else:
        tokens = draw(weights_of(s, top_k, top_p, min_p), random_words(seed, offset, len(s)))
    nan = s.isnan()
    return torch.where(nan.any(-1), nan.to(torch.uint8).argmax(-1), tokens)


@register_fake("sample")
def _(logits, seed, offset, temperature, top_k, top_p, min_p, repetition_penalty, seen):
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)
