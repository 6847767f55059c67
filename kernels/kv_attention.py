"""kv_attention in Triton: the fallback where the CUDA library is missing.

Three launches: a program appends a head of a token, rotated, transformed and rounded as the reference does; a program takes
a block of queries that share a head of the cache over KEYS keys, with a running softmax; a program combines a query's
pieces, in order. Pieces start at the first key that a row sees, so that a row's result does not depend on its batch or its
padding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastinfer.kernels.int8_quantize import LARGEST, ROUNDER
from fastinfer.kernels.launch import device_of, dot_type
from fastinfer.ops.kv_attention import transform_size

KEYS = 512


@triton.jit
def load_rotated(x, cos, sin, i, D, R):
    """Dimensions i of x [D] in fp32, the first R of them rotated."""
    v = tl.load(x + i, mask=i < D, other=0.0).to(tl.float32)
    if R > 0:
        first = i < R // 2
        other = tl.load(x + tl.where(first, i + R // 2, i - R // 2), mask=i < R, other=0.0).to(tl.float32)
        c = tl.load(cos + i, mask=i < R, other=1.0).to(tl.float32)
        s = tl.load(sin + i, mask=i < R, other=0.0).to(tl.float32)
        v = tl.where(i < R, v * c + tl.where(first, -other, other) * s, v)
    return v


@triton.jit
def hadamard(v, STAGES: tl.constexpr, BLOCK_D: tl.constexpr):
    """H v of each 2^STAGES elements of v [BLOCK_D], as the reference: sums and differences of elements 1, 2, 4 … apart."""
    for stage in tl.static_range(STAGES):
        pairs = tl.permute(tl.reshape(v, (BLOCK_D // (2 << stage), 2, 1 << stage)), (0, 2, 1))
        a, b = tl.split(pairs)
        v = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (BLOCK_D,))
    return v


@triton.jit
def length_of(lengths, b, T, L):
    return tl.maximum(tl.minimum(tl.load(lengths + b), L - T), 0)  # never outside of the cache


@triton.jit
def append_kernel(
    x, cos, sin,  # [B, T, G, D], [B or 1, T, R] twice or unused
    lengths, cache, scales,  # [B], [B, G, L, D], [B, G, L] or unused
    T, G, L, D, R,
    x_row, x_token, x_head, cos_row, cos_token, sin_row, sin_token,
    INT8: tl.constexpr, STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, g = tl.program_id(0), tl.program_id(1)
    b, t = (token // T).to(tl.int64), token % T
    i = tl.arange(0, BLOCK_D)
    x += b * x_row + t * x_token + g * x_head
    v = load_rotated(x, cos + b * cos_row + t * cos_token, sin + b * sin_row + t * sin_token, i, D, R)
    v = hadamard(v, STAGES, BLOCK_D)
    position = (b * G + g) * L + length_of(lengths, b, T, L) + t
    if INT8:
        finite = tl.abs(v) <= LARGEST  # false for NaN too
        clean = tl.max(tl.where(finite, 0, 1)) == 0
        scale = tl.div_rn(tl.max(tl.where(finite, tl.abs(v), 0.0)), 127.0)
        tl.store(scales + position, tl.where(clean, scale, float("nan")))
        divisor = tl.where(scale > 0.0, scale, 1.0)
        v = tl.div_rn(tl.where(clean, v, 0.0), tl.zeros((BLOCK_D,), tl.float32) + divisor)
        v = (tl.minimum(tl.maximum(v, -127.0), 127.0) + ROUNDER) - ROUNDER
    tl.store(cache + position * D + i, v.to(cache.dtype.element_ty), mask=i < D)


@triton.jit
def rotate_kernel(
    x, cos, sin, out,  # [B, T, H, D], [B or 1, T, R] twice, [B, T, H, D] contiguous
    T, D, R,
    x_row, x_token, x_head, cos_row, cos_token, sin_row, sin_token,
    STAGES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    b, t = (token // T).to(tl.int64), token % T
    i = tl.arange(0, BLOCK_D)
    x += b * x_row + t * x_token + head * x_head
    v = load_rotated(x, cos + b * cos_row + t * cos_token, sin + b * sin_row + t * sin_token, i, D, R)
    v = hadamard(v, STAGES, BLOCK_D) * (1.0 / (1 << STAGES))
    to = token.to(tl.int64) * tl.num_programs(1) + head
    tl.store(out + to * D + i, v.to(out.dtype.element_ty), mask=i < D)


@triton.jit
def attend_kernel(
    q, k_cache, v_cache, k_scale, v_scale, lengths, starts, sums, stats,  # sums [pairs, pieces, rows, D], stats […, 2]
    T, G, GROUP, L, D, scale, softcap, window,
    INT8: tl.constexpr, HAS_STARTS: tl.constexpr, KEYS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    piece, pair = tl.program_id(0), tl.program_id(2).to(tl.int64)
    b, g = pair // G, pair % G
    rows = T * GROUP
    row = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    i = tl.arange(0, BLOCK_D)
    length = length_of(lengths, b, T, L)
    start = tl.maximum(tl.load(starts + b), 0) if HAS_STARTS else 0
    t = row // GROUP
    high = length + t
    low = tl.zeros((BLOCK_Q,), tl.int32) + start
    begin = start
    if window > 0:
        low = tl.maximum(low, high - window + 1)
        begin = tl.maximum(start, length - window + 1)
    begin += piece * KEYS
    end = tl.minimum(begin + KEYS, length + T)
    at = ((b * T + t) * G + g) * GROUP + row % GROUP
    there = (row < rows)[:, None] & (i < D)[None, :]
    query = tl.load(q + at[:, None] * D + i[None, :], mask=there, other=0.0).to(DOT)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for k0 in range(begin, end, 64):
        key = k0 + tl.arange(0, 64)
        inside = key < end
        from_key = (pair * L + key)[:, None] * D + i[None, :]
        mask = inside[:, None] & (i < D)[None, :]
        keys = tl.load(k_cache + from_key, mask=mask, other=0.0).to(DOT)
        score = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
        if INT8:
            score *= tl.load(k_scale + pair * L + key, mask=inside, other=0.0)[None, :]
        if softcap > 0:
            score = softcap * (1.0 - 2.0 / (tl.exp(2.0 * score / softcap) + 1.0))
        seen = inside[None, :] & (key[None, :] <= high[:, None]) & (key[None, :] >= low[:, None])
        score = tl.where(seen, score, float("-inf"))
        larger = tl.maximum(top, tl.max(score, 1))
        base = tl.where(larger == float("-inf"), 0.0, larger)
        factor = tl.exp(top - base)
        weight = tl.where(seen, tl.exp(score - base[:, None]), 0.0)
        total = total * factor + tl.sum(weight, 1)
        values = tl.load(v_cache + from_key, mask=mask, other=0.0).to(tl.float32)
        if INT8:
            values *= tl.load(v_scale + pair * L + key, mask=inside, other=0.0)[:, None]
        acc = acc * factor[:, None] + tl.dot(weight.to(DOT), values.to(DOT), input_precision="ieee")
        top = larger
    to = (pair * tl.num_programs(0) + piece) * rows + row
    tl.store(stats + 2 * to, top, mask=row < rows)
    tl.store(stats + 2 * to + 1, total, mask=row < rows)
    tl.store(sums + to[:, None] * D + i[None, :], acc, mask=there)


@triton.jit
def combine_kernel(sums, stats, y, T, G, GROUP, D, pieces, BLOCK_D: tl.constexpr):
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = T * GROUP
    i = tl.arange(0, BLOCK_D)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for piece in range(pieces):
        at = (pair * pieces + piece) * rows + row
        piece_top, piece_total = tl.load(stats + 2 * at), tl.load(stats + 2 * at + 1)
        larger = tl.maximum(top, piece_top)
        base = tl.where(larger == -float("inf"), 0.0, larger)
        ours, theirs = tl.exp(top - base), tl.exp(piece_top - base)
        total = total * ours + piece_total * theirs
        acc = acc * ours + tl.load(sums + at * D + i, mask=i < D, other=0.0) * theirs
        top = larger
    acc = tl.where(total == 0.0, 0.0, acc / tl.where(total == 0.0, 1.0, total))
    to = ((pair // G * T + row // GROUP) * G + pair % G) * GROUP + row % GROUP
    tl.store(y + to * D + i, acc.to(y.dtype.element_ty), mask=i < D)


def _rotation(cos: torch.Tensor | None, sin: torch.Tensor | None) -> tuple[int, list[int]]:
    """R, and the strides of cos and sin: of a row, which is 0 where all share one, and of a token."""
    if cos is None or sin is None:
        return 0, [0] * 4
    return cos.shape[2], [s for x in (cos, sin) for s in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]


def kv_attention(
    q, k, v, k_cache, v_cache, lengths, k_scale, v_scale, cos, sin, starts, scale, window, softcap
) -> torch.Tensor:
    """As the native op."""
    (b, t, h, d), (g, positions) = q.shape, k_cache.shape[1:3]
    y = q.new_empty(q.shape)
    if y.numel() == 0:
        return y
    rows, pieces, wide = t * (h // g), triton.cdiv(positions, KEYS), triton.next_power_of_2(max(d, 16))
    rotated = torch.empty_like(y)
    sums = q.new_empty((b * g, pieces, rows, d), dtype=torch.float32)
    stats = q.new_empty((b * g, pieces, rows, 2), dtype=torch.float32)
    r, strides = _rotation(cos, sin)
    c, s = (k if x is None else x for x in (cos, sin))
    int8, block = k_scale is not None, 16 if rows <= 16 else 32
    stages = transform_size(d).bit_length() - 1 if int8 else 0
    exact = {"BLOCK_D": wide, "enable_fp_fusion": False}  # torch rounds products before the sum
    with device_of(q):
        for x, cache, scales, rotates, mixes in ((k, k_cache, k_scale, r, stages), (v, v_cache, v_scale, 0, 0)):
            append_kernel[(b * t, g)](
                x, c, s, lengths, cache, scales if int8 else lengths, t, g, positions, d, rotates,
                *x.stride()[:3], *strides, INT8=int8, STAGES=mixes, **exact,
            )  # fmt: skip
        rotate_kernel[(b * t, h)](q, c, s, rotated, t, d, r, *q.stride()[:3], *strides, STAGES=stages, **exact)
        attend_kernel[(pieces, triton.cdiv(rows, block), b * g)](
            rotated, k_cache, v_cache, k_scale if int8 else lengths, v_scale if int8 else lengths, lengths,
            lengths if starts is None else starts, sums, stats, t, g, h // g, positions, d, scale, softcap, window,
            INT8=int8, HAS_STARTS=starts is not None, KEYS=KEYS, BLOCK_Q=block, BLOCK_D=wide, DOT=dot_type(q),
        )  # fmt: skip
        combine_kernel[(rows, b * g)](sums, stats, y, t, g, h // g, d, pieces, BLOCK_D=wide)
    return y
