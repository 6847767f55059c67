"""kv_attention: new keys and values go into a static cache, rotated on the way, and the queries attend to it."""

from __future__ import annotations

import torch

from fastinfer.ops._common import check_device, check_float, describe, register_fake, run
from fastinfer.ops.int8_quantize import reference as quantize

NAME = "kv_attention"
MAX_HEAD = 256


def kv_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: torch.Tensor,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """y = softmax(softcap · tanh(scale · q · keysᵀ / softcap)) · values, over a cache that first takes the new k and v.

    Query t of row b stands at position p = lengths[b] + t and sees the positions max(starts[b], p − window + 1) … p,
    from starts[b] on where there is no window. Query heads h with the same h // (H/G) share a head of the cache.

    Args:
        q:       [B, T, H, D] fp32|bf16|fp16, not rotated; the last dimension contiguous, other strides free (a view of a
                 merged QKV output); D a multiple of 8 up to 256. Made for few queries: a long prefill goes elsewhere
        k:       [B, T, G, D] dtype of q, not rotated, strides as q; H is a multiple of G
        v:       [B, T, G, D] dtype of q, strides as q
        k_cache: [B, G, L, D] dtype of q, or int8, which holds transformed keys; contiguous, LAYOUTS.md#kv-cache. Positions
                 lengths[b] … lengths[b] + T − 1 are written; those before starts[b] or from lengths[b] + T on are never
                 read
        v_cache: [B, G, L, D] like k_cache
        lengths: [B] int32: how many positions of each row are filled. The op leaves it, so that all layers of a step can
                 share it. lengths[b] + T > L raises on the CPU; elsewhere that cannot be seen without a sync, and is the
                 caller's to keep: the kernels take the last T positions then
        k_scale: [B, G, L] fp32, contiguous, written beside k_cache: given with an int8 cache, and only then
        v_scale: [B, G, L] fp32, contiguous, written beside v_cache
        cos:     [B or 1, T, R] fp32 or dtype of q, the last dimension contiguous, R even and ≤ D: the first R dimensions of
                 q and k are rotated in pairs i, i + R/2, as Llama's rotate_half does; None: no rotation
        sin:     like cos
        starts:  [B] int32, the first position of each row that counts (left padding), or None for 0; below 0 raises on the
                 CPU and is 0 elsewhere
        scale:   factor of the scores, or None for D^−½
        window:  how many positions a query sees at most, its own included; 0: all
        softcap: bound of the scores' tanh, as in Gemma 2; 0: none
    Returns: [B, T, H, D] dtype of q, contiguous; 0 for a query that sees nothing
    Raises:  TypeError for a dtype, ValueError for a shape, stride, device or value that does not fit; both name the
             argument. Nothing is written then
    Backends: CPU (AVX2, AVX512); CUDA sm80+, made for 16-bit queries; Triton
    Numerics: error ≤ 2× that of the same in torch's operations in the dtype of q. Rotation, scores, softmax and sums are
             fp32. What the cache gets is that of the reference bit for bit: keys rotated in fp32 and rounded once; int8 as
             int8_quantize rounds, one scale a token and head, keys after a Hadamard transform in fp32 (`hadamard`), which
             spreads the channels that stand out; queries get the same, times 1/n, so that q · k is what it was. Attention
             sees what the cache holds, of the new tokens too. The same bits from run to run, for any number of threads,
             and whatever else is in the batch
    Source:  split over keys: Dao et al., Flash-Decoding, 2023; grouped queries: Ainslie et al., arXiv 2305.13245; rotary:
             Su et al., arXiv 2104.09864; softcap: Gemma 2, arXiv 2408.00118; transformed keys: Ashkboos et al., QuaRot,
             arXiv 2404.00456
    """
    _check_new(q, k, v)
    _check_cache(q, k, k_cache, v_cache, k_scale, v_scale)
    _check_rows(q, k_cache.shape[2], lengths, starts)
    _check_rotation(q, cos, sin)
    if window < 0:
        raise ValueError(f"{NAME}: window must be 0 or more, got {window}")
    if not softcap >= 0:
        raise ValueError(f"{NAME}: softcap must be 0 or more, got {softcap}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    optional = k_scale, v_scale, cos, sin, starts
    return run(NAME, reference, q, k, v, k_cache, v_cache, lengths, *optional, scale, window, float(softcap))


def _check_new(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    check_float(NAME, "q", q)
    if q.dim() != 4 or q.shape[3] % 8 or not 0 < q.shape[3] <= MAX_HEAD:
        raise ValueError(f"{NAME}: q must be [B, T, H, D] with D a multiple of 8 up to {MAX_HEAD}, got {describe(q)}")
    for name, t in (("k", k), ("v", v)):
        check_device(NAME, name, t, q, "q")
        if t.dtype != q.dtype:
            raise TypeError(f"{NAME}: {name} must have the dtype of q, {q.dtype}, got {describe(t)}")
        if t.dim() != 4 or t.shape[:2] != q.shape[:2] or t.shape[3] != q.shape[3]:
            raise ValueError(f"{NAME}: {name} must be [B, T, G, D] beside q {list(q.shape)}, got {describe(t)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{NAME}: k must have G heads that divide those of q, {q.shape[2]}, got {describe(k)}")
    if v.shape != k.shape:
        raise ValueError(f"{NAME}: v must have the shape of k, {list(k.shape)}, got {describe(v)}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(3) != 1:
            raise ValueError(f"{NAME}: the last dimension of {name} must be contiguous, got strides {t.stride()}")


def _check_cache(q, k, k_cache, v_cache, k_scale, v_scale) -> None:
    b, t, g, d = k.shape
    if k_cache.dtype not in (q.dtype, torch.int8):
        raise TypeError(f"{NAME}: k_cache must have the dtype of q, {q.dtype}, or int8, got {describe(k_cache)}")
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{NAME}: v_cache must have the dtype of k_cache, got {describe(v_cache)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(NAME, name, cache, q, "q")
        if cache.dim() != 4 or cache.shape != (b, g, k_cache.shape[2], d) or cache.shape[2] < t:
            raise ValueError(f"{NAME}: {name} must be [{b}, {g}, L, {d}] with L ≥ T = {t}, got {describe(cache)}")
        if not cache.is_contiguous():
            raise ValueError(f"{NAME}: {name} must be contiguous, got strides {cache.stride()}")
    for name, scales in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scales is not None) != (k_cache.dtype == torch.int8):
            raise ValueError(f"{NAME}: {name} must be given with an int8 cache, and only then")
        if scales is None:
            continue
        check_device(NAME, name, scales, q, "q")
        if scales.dtype != torch.float32 or scales.shape != k_cache.shape[:3] or not scales.is_contiguous():
            raise ValueError(
                f"{NAME}: {name} must be float32 {list(k_cache.shape[:3])}, contiguous, got {describe(scales)}"
            )


def _check_rows(q: torch.Tensor, positions: int, lengths: torch.Tensor, starts: torch.Tensor | None) -> None:
    b, t = q.shape[:2]
    for name, rows in (("lengths", lengths), ("starts", starts)):
        if rows is None:
            continue
        check_device(NAME, name, rows, q, "q")
        if rows.dtype != torch.int32:
            raise TypeError(f"{NAME}: {name} must be int32, got {describe(rows)}")
        if rows.shape != (b,) or not rows.is_contiguous():
            raise ValueError(f"{NAME}: {name} must be [{b}], contiguous, got {describe(rows)}")
        if q.device.type == "cpu" and not torch.compiler.is_compiling():
            values, most = rows.tolist(), positions - (t if rows is lengths else 0)
            if not all(0 <= value <= most for value in values):
                raise ValueError(f"{NAME}: {name} must be 0 … {most} for T = {t}, L = {positions}, got {values}")


def _check_rotation(q: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> None:
    if cos is None and sin is None:
        return
    for name, t in (("cos", cos), ("sin", sin)):
        if t is None:
            raise ValueError(f"{NAME}: {name} must be given beside the other of cos and sin")
        check_device(NAME, name, t, q, "q")
        if t.dtype not in (q.dtype, torch.float32) or (cos is not None and t.dtype != cos.dtype):
            raise TypeError(f"{NAME}: {name} must be {q.dtype} or float32, cos and sin alike, got {describe(t)}")
        if t.dim() != 3 or t.shape[0] not in (1, q.shape[0]) or t.shape[1] != q.shape[1] or t.stride(2) != 1:
            raise ValueError(f"{NAME}: {name} must be [B or 1, T, R] with T = {q.shape[1]}, got {describe(t)}")
        if t.shape[2] % 2 or t.shape[2] > q.shape[3] or (cos is not None and t.shape != cos.shape):
            raise ValueError(f"{NAME}: {name} must have an even R ≤ {q.shape[3]}, cos and sin alike, got {describe(t)}")


def rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """x [B, T, heads, D] in `dtype`, its first R dimensions rotated."""
    x = x.to(dtype)
    if cos is None or sin is None:
        return x
    cos, sin = cos[:, :, None].to(dtype), sin[:, :, None].to(dtype)
    front, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = front.chunk(2, -1)
    return torch.cat([front * cos + torch.cat([-second, first], -1) * sin, rest], -1)


def transform_size(d: int) -> int:
    """How many dimensions `hadamard` mixes: the largest power of two that divides D."""
    return d & -d


@torch.no_grad()
def hadamard(x: torch.Tensor) -> torch.Tensor:
    """H x for each block of n = transform_size(D) dimensions of x [..., D]; H H = n. Without gradients.

    H is Sylvester's matrix of 1 and −1, applied as sums and differences of elements 1, 2, 4 … n/2 apart, in that order:
    each is rounded once, so that the bits are the same everywhere. Neighbours are always the next pairs, since sums go to
    the front and differences to the back; after log2(n) times all are where they were.
    """
    n = transform_size(x.shape[-1])
    x = x.unflatten(-1, (-1, n))
    for _ in range(n.bit_length() - 1):
        a, b, x = x[..., 0::2], x[..., 1::2], torch.empty_like(x, memory_format=torch.contiguous_format)
        torch.add(a, b, out=x[..., : n // 2])
        torch.sub(a, b, out=x[..., n // 2 :])
    return x.flatten(-2)


def append(new: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor | None, at: torch.Tensor) -> None:
    """Writes new [B, T, G, D] to the positions at [B, T] of a cache, quantised where it has scales.

    Keys come rotated, and for an int8 cache transformed.
    """
    rows = torch.arange(len(at), device=at.device)[:, None]
    if scales is not None:
        new, new_scales = quantize(new.float())
        scales.transpose(1, 2)[rows, at] = new_scales
    cache.transpose(1, 2)[rows, at] = new.to(cache.dtype)


def reference(
    q,
    k,
    v,
    k_cache,
    v_cache,
    lengths,
    k_scale=None,
    v_scale=None,
    cos=None,
    sin=None,
    starts=None,
    scale=None,
    window=0,
    softcap=0.0,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The op in plain torch, the caches written too. Computes in fp32, or in `dtype`, which is then also the result's."""
    wide = dtype or torch.float32
    (b, t, h, d), (g, positions) = q.shape, k_cache.shape[1:3]
    at = lengths.long()[:, None] + torch.arange(t, device=q.device)
    queries, new_keys = rotate(q, cos, sin, wide), rotate(k, cos, sin, wide)
    if k_scale is not None:
        queries, new_keys = hadamard(queries) / transform_size(d), hadamard(new_keys)
    append(new_keys, k_cache, k_scale, at)
    append(v.to(wide), v_cache, v_scale, at)
    keys, values = k_cache.to(wide), v_cache.to(wide)
    if k_scale is not None:
        keys, values = keys * k_scale.to(wide)[..., None], values * v_scale.to(wide)[..., None]
    position = torch.arange(positions, device=q.device)
    visible = position <= at[..., None]  # [B, T, L]
    if window:
        visible &= position > at[..., None] - window
    if starts is not None:
        visible &= position >= starts[:, None, None]
    values = values.masked_fill(~visible.any(1)[:, None, :, None], 0)  # 0 · NaN would be NaN
    queries = queries.reshape(b, t, g, h // g, d).permute(0, 2, 3, 1, 4).reshape(b, g, h // g * t, d)
    scores = (queries @ keys.transpose(-1, -2)).view(b, g, h // g, t, positions)
    scores = scores * (d**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = ~visible[:, None, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0)
    y = (weights.view(b, g, h // g * t, positions) @ values).view(b, g, h // g, t, d)
    return y.permute(0, 3, 1, 2, 4).reshape(b, t, h, d).to(dtype or q.dtype).contiguous()


@register_fake(NAME)
def _(q, k, v, k_cache, v_cache, lengths, k_scale, v_scale, cos, sin, starts, scale, window, softcap):
    return q.new_empty(q.shape)
