"""kv_attention against fp64 and torch's own attention; what it writes, what it may not read, errors."""

import contextlib
import importlib

import pytest
import tolerance
import torch
from matmul_cases import DTYPES
from torch import nn

from fastinfer import _native
from fastinfer.ops import kv_attention
from fastinfer.ops.launch import dependent_launch

op = importlib.import_module("fastinfer.ops.kv_attention")
NAN = float("nan")
KINDS = [*DTYPES, torch.int8]  # of the cache; beside int8 the rest is bf16
SCHEMA = ("q", "k", "v", "k_cache", "v_cache", "lengths", "k_scale", "v_scale", "cos", "sin", "starts")
# H, G, D
HEADS = [(1, 1, 8), (4, 4, 64), (4, 2, 80), (8, 2, 96), (8, 2, 128), (7, 1, 128), (16, 1, 64), (4, 1, 256), (6, 2, 72)]


def rotary(b, t, r, dtype, device):
    angle = torch.randn(b, t, r // 2, device=device) * 3
    angle = torch.cat([angle, angle], -1)
    return {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}


def merged(b, t, h, g, d, dtype, device):
    """q, k, v as views of one projection's output."""
    out = torch.randn(b, t, (h + 2 * g) * d, device=device).to(dtype).unflatten(-1, (-1, d))
    return dict(zip("qkv", out.split([h, g, g], 2)))


def make(lengths, t, heads, kind, device, r=None, spare=3, **more):
    """Arguments, with a cache that is NaN beyond what is filled; int8 has its NaN in the scales."""
    h, g, d = heads
    b, dtype = len(lengths), torch.bfloat16 if kind == torch.int8 else kind
    positions = max(lengths) + t + spare
    a = merged(b, t, h, g, d, dtype, device)
    empty = torch.arange(positions, device=device) >= torch.tensor(lengths, device=device)[:, None]
    for name in ("k", "v"):
        filled = torch.randn(b, g, positions, d, device=device)
        if kind == torch.int8:
            a[f"{name}_cache"] = (filled * 40).clamp(-127, 127).to(torch.int8)
            a[f"{name}_scale"] = (torch.rand(b, g, positions, device=device) / 20).masked_fill(empty[:, None], NAN)
        else:
            a[f"{name}_cache"] = filled.to(dtype).masked_fill(empty[:, None, :, None], NAN)
    a["lengths"] = torch.tensor(lengths, dtype=torch.int32, device=device)
    if r != 0:
        a |= rotary(b, t, r or d, torch.float32, device)
    return a | more


def copy(a, dtype=None):
    """The arguments with caches of their own; what is float in `dtype` where that is given."""
    caches = {name: t.clone() for name, t in a.items() if name.endswith(("cache", "_scale")) and t is not None}
    a = a | caches
    if dtype is None:
        return a
    return {n: t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for n, t in a.items()}


def run(a):
    order = "q", "k", "v", "k_cache", "v_cache", "lengths"
    return kv_attention(*(a[name] for name in order), **{n: t for n, t in a.items() if n not in order})


def widened(a):
    """What an int8 cache stands for, in fp64."""
    wide = {n: t for n, t in a.items() if not n.endswith("_scale")}
    for name in ("k", "v"):
        wide[f"{name}_cache"] = a[f"{name}_cache"].double() * a[f"{name}_scale"].double()[..., None]
    wide["k_cache"] = turned(wide["k_cache"]) / op.transform_size(a["q"].shape[-1])
    return wide


def turned(x):
    """H x by blocks, from the definition: element (i, j) of H is −1 where i and j share an odd number of ones."""
    n = next(n for n in (256, 128, 64, 32, 16, 8) if x.shape[-1] % n == 0)
    signs = [[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return (x.unflatten(-1, (-1, n)) @ torch.tensor(signs, dtype=x.dtype, device=x.device)).flatten(-2)


def check(a):
    """Holds y to the rule and the caches to the reference's bits; returns y. Leaves `a` as it was."""
    ours, theirs = copy(a), copy(a)
    y, dtype = run(ours), a["q"].dtype
    expected = op.reference(**theirs)
    assert y.dtype == dtype and y.is_contiguous()
    for name in ("k_cache", "v_cache", "k_scale", "v_scale"):
        if name in a:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
    values = a["v"].double().abs().max().item() if y.numel() else 0.0
    if "k_scale" in a:  # what attention sees is what the cache holds
        exact = attend(widened(ours))
        tolerance.assert_within(y, exact, expected, values)
    else:
        exact = op.reference(**copy(a, torch.float64), dtype=torch.float64)
        plain = expected if dtype == torch.float32 else op.reference(**copy(a), dtype=dtype)
        tolerance.assert_within(y, exact, plain, values)
    return y


def attend(a):
    """The reference in fp64 over caches that hold the new tokens already."""
    at = a["lengths"].long()[:, None] + torch.arange(a["q"].shape[1], device=a["q"].device)
    rows = torch.arange(len(at), device=at.device)[:, None]
    q = op.rotate(a["q"], a.get("cos"), a.get("sin"), torch.float64)
    k, v = (a[name].transpose(1, 2)[rows, at] for name in ("k_cache", "v_cache"))
    rest = {n: t for n, t in a.items() if n not in ("q", "k", "v", "cos", "sin")}
    return op.reference(q, k, v, **rest, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("t", [1, 2, 5, 16])
def test_against_fp64(t, heads, kind, device, native, poisoned):
    check(make([0, 1, 37], t, heads, kind, device))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 1, 256), (3, 3, 40)], ids=str)
def test_long_contexts_in_pieces(heads, kind, device, native, poisoned):
    for t, lengths in ((1, [255, 256, 1000, 3]), (4, [2047, 510, 0, 253]), (70, [300, 0])):
        check(make(lengths, t, heads, kind, device))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("r", [0, 2, 10, 32, 64])
def test_rotates_the_first_dimensions(r, kind, device, native):
    check(make([5, 9], 3, (4, 2, 64), kind, device, r=r))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_takes_one_rotation_for_all_rows_and_in_the_dtype_of_q(dtype, device, native):
    a = make([5, 9], 3, (4, 2, 64), dtype, device)
    one = rotary(1, 3, 48, dtype, device)
    alike = check(a | one)
    assert torch.equal(alike, check(a | {n: t.expand(2, -1, -1) for n, t in one.items()}))
    assert torch.equal(alike, check(a | {n: t.float().repeat(2, 1, 1) for n, t in one.items()}))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "more", [{"window": 1}, {"window": 7}, {"window": 300}, {"softcap": 2.0}, {"scale": 0.3}], ids=str
)
def test_window_softcap_and_scale(more, kind, device, native):
    check(make([0, 20, 700], 4, (4, 2, 64), kind, device, **more))
    starts = torch.tensor([0, 18, 350], dtype=torch.int32, device=device)
    check(make([0, 20, 700], 4, (4, 2, 64), kind, device, starts=starts, softcap=30.0) | more)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("window", [0, 50])
def test_left_padding_equals_alone(window, kind, device, native):
    """A row that starts later holds NaN before; the same row without padding, alone in its batch, has the same bits."""
    length, t, pad, heads = 300, 3, 11, (4, 2, 64)
    alone = make([length], t, heads, kind, device, window=window)
    lengths, starts = [length + pad, 5], torch.tensor([pad, 0], dtype=torch.int32, device=device)
    both = make(lengths, t, heads, kind, device, starts=starts, window=window)
    for name, tensor in alone.items():
        if name.endswith(("cache", "_scale")):
            if tensor.is_floating_point():
                both[name][0, :, :pad] = NAN
            both[name][0, :, pad:] = tensor[0]
        elif name in ("q", "k", "v", "cos", "sin"):
            both[name][0] = tensor[0]
    assert torch.equal(check(both)[0], check(alone)[0])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(kind, device, native):
    a = make([0, 400, 77, 1], 2, (8, 2, 64), kind, device)
    whole = run(copy(a))
    for i in range(4):
        row = {n: t[i : i + 1] if torch.is_tensor(t) else t for n, t in a.items()}
        assert torch.equal(run(copy(row))[0], whole[i])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("window", [0, 900])
def test_neither_the_batch_nor_the_capacity_shows_in_a_bit(window, kind, device, native):
    """A GPU's blocks divide the keys of few rows and of many differently, and know the capacity alone when they start."""
    lengths = [0, 63, 64, 511, 512, 700, 1100, 2300] * 2
    a = make(lengths, 1, (16, 8, 64), kind, device, window=window)
    whole = check(a)
    for i in range(8):
        row = {n: t[i : i + 1].clone() if torch.is_tensor(t) else t for n, t in a.items()}
        for name in [n for n in a if n.endswith(("cache", "_scale"))]:
            room = torch.full_like(row[name], NAN if row[name].is_floating_point() else 77)
            row[name] = torch.cat([row[name], room, room], 2)
        assert torch.equal(run(row)[0], whole[i])


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("heads", [(4, 2, 64), (16, 1, 128)], ids=str)
def test_caches_and_tokens_at_any_address(heads, kind, device, native):
    """Memory that is aligned to its elements alone takes other paths than what `make` gives."""
    a = make([5, 700], 2, heads, kind, device)
    expected = check(a)

    def moved(t):
        out = t.new_empty(t.numel() + 1)[1:].view(t.shape)
        return out.copy_(t)

    moved_all = a | {n: moved(a[n]) for n in ("q", "k", "v", "cos", "sin")}
    assert torch.equal(run(copy(moved_all)), expected)
    check_moved = {n: moved(t) for n, t in a.items() if n.endswith("cache")}
    y = run(a | check_moved | {n: a[n].clone() for n in a if n.endswith("_scale")})
    tolerance.assert_within(y, expected.double(), expected)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("early", [False, True])
def test_a_captured_graph_follows_the_lengths(early, kind, device, native):
    """Layer after layer, each reading what the one before wrote; the same bits as outside of a graph."""
    if device == "cpu":
        pytest.skip("CPUs have no graphs")
    layers = [make([2900, 40], 1, (8, 2, 64), kind, device) for _ in range(5)]
    layers = [
        {n: t.nan_to_num() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in a.items()} for a in layers
    ]
    lengths = layers[0]["lengths"]

    def step():
        outs = [layers[0]["q"]]
        for a in layers:
            outs.append(run(a | {"q": outs[-1], "lengths": lengths}))
        return outs[1:]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), dependent_launch() if early else contextlib.nullcontext():
        captured = step()
    for now in ([0, 0], [511, 3], [512, 40], [2900, 1], [1024, 7]):
        lengths.copy_(torch.tensor(now, dtype=torch.int32))
        for _ in range(3):
            for out in captured:
                out.fill_(NAN)
            graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(got, want) for got, want in zip(captured, step(), strict=True))


def test_writes_nothing_but_the_new_positions(device):
    for kind in KINDS:
        a = make([4, 0], 2, (4, 2, 64), kind, device)
        after = copy(a)
        run(after)
        for name in [n for n in a if n.endswith(("cache", "_scale"))]:
            for row, length in enumerate((4, 0)):
                for part in (slice(0, length), slice(length + 2, None)):
                    torch.testing.assert_close(
                        after[name][row, :, part], a[name][row, :, part], rtol=0, atol=0, equal_nan=True
                    )
        assert after["lengths"].tolist() == [4, 0]


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_takes_strided_and_dense_q_k_v_alike(kind, device, native):
    a = make([5, 9], 3, (4, 2, 80), kind, device)
    dense = a | {name: a[name].contiguous() for name in "qkv"}
    heads_first = a | {name: a[name].transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    assert not a["q"].is_contiguous() and torch.equal(run(copy(a)), run(copy(dense)))
    assert torch.equal(run(copy(a)), run(copy(heads_first)))


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 1, 3, 2], [12]])
def test_steps_equal_one_long_reference(pieces, kind, device):
    a = make([0, 0], 12, (4, 2, 64), kind, device)
    exact = op.reference(**copy(a, torch.float64), dtype=torch.float64)
    plain = op.reference(**copy(a), dtype=kind)
    at, out, state = 0, [], copy(a)
    for t in pieces:
        step = {n: state[n][:, at : at + t] for n in ("q", "k", "v", "cos", "sin")}
        out.append(run(state | step | {"lengths": torch.full((2,), at, dtype=torch.int32, device=device)}))
        at += t
    tolerance.assert_within(torch.cat(out, 1), exact, plain, a["v"].abs().max().item())


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(8, 2, 128), (4, 1, 256), (7, 1, 64)], ids=str)
def test_agrees_with_scaled_dot_product_attention(heads, kind, device):
    a = make([300], 4, heads, kind, device, r=0, spare=0)
    y = run(a)
    mask = torch.ones(4, 304, dtype=torch.bool, device=device).tril(300)
    q, k, v = a["q"].transpose(1, 2), a["k_cache"], a["v_cache"]

    def sdpa(dtype):
        out = nn.functional.scaled_dot_product_attention(
            q.to(dtype), k.to(dtype), v.to(dtype), attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2)

    tolerance.assert_within(y, sdpa(torch.float64), sdpa(kind), v.abs().max().item())


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(kind, device, native):
    a = make([3000, 17], 2, (8, 2, 64), kind, device)
    first, threads = run(copy(a)), torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(run(copy(a)), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_spoils_its_heads_alone(name, kind, device, native):
    a = make([40, 40], 1, (4, 2, 64), kind, device)
    clean = run(copy(a))
    a[name][0, 0, 1, 5] = NAN
    y = run(copy(a))
    spoiled = torch.zeros(2, 1, 4, dtype=torch.bool, device=device)
    spoiled[0, 0, [1] if name == "q" else [2, 3]] = True
    assert y[spoiled].isnan().any(-1).all() and torch.equal(y[~spoiled], clean[~spoiled])


def test_a_query_that_sees_nothing_is_zero(device):
    for kind in KINDS:
        starts = torch.tensor([6, 30], dtype=torch.int32, device=device)
        a = make([4, 20], 4, (4, 2, 64), kind, device, starts=starts, spare=10)
        y = check(a)
        assert not y[0, :2].any() and y[0, 2:].any() and not y[1].any()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_stays_inside_of_the_cache(kind, device, native):
    """Lengths and starts that are refused on the CPU, and that other devices keep to themselves."""
    if device == "cpu":
        pytest.skip("refused on the CPU")
    check_positions(make([700, 700], 2, (4, 2, 64), kind, device, spare=0), run)


def check_positions(a, attend):
    """Values far outside count as the nearest ones inside; the caches get the same. `a` is filled but for T positions."""
    most = a["lengths"][0].item()
    for lengths, starts in [([most + 90, most], [-5, -(2**31)]), ([-3, 2**31 - 1], [0, 0])]:
        inside = [min(max(n, 0), most) for n in lengths], [max(n, 0) for n in starts]
        both = [
            copy(a) | {n: a["lengths"].new_tensor(v) for n, v in zip(("lengths", "starts"), values, strict=True)}
            for values in ((lengths, starts), inside)
        ]
        assert torch.equal(attend(both[0]), attend(both[1]))
        for name in [n for n in a if n.endswith(("cache", "_scale"))]:
            torch.testing.assert_close(both[0][name], both[1][name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("b", "t"), [(0, 1), (2, 0)])
def test_nothing_to_do(b, t, device):
    a = make([3] * max(b, 1), t, (4, 2, 64), torch.float32, device)
    a = {n: x[:b] if torch.is_tensor(x) and b == 0 else x for n, x in a.items()}
    assert run(a).shape == (b, t, 4, 64)


def test_large_scores_stay_finite(device, native):
    a = make([50], 1, (4, 2, 64), torch.float32, device, scale=1e4)
    check(a)
    check(a | {"softcap": 1e-3})


# ---- int8 keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 40, 64, 80, 96, 104, 128, 200, 256])
def test_int8_keys_are_transformed(d, dtype, device, native):
    """By the definition, to half a code; and to the reference's bits."""
    a = make([5, 300], 3, (4, 2, d), torch.int8, device)
    a |= {name: a[name].to(dtype) for name in "qkv"}
    check(a)
    run(a)
    at = a["lengths"].long()[:, None] + torch.arange(3, device=device)
    rows = torch.arange(2, device=device)[:, None]
    codes, scales = (a[name].transpose(1, 2)[rows, at].double() for name in ("k_cache", "k_scale"))
    want = turned(op.rotate(a["k"], a["cos"], a["sin"], torch.float64))
    assert ((codes - want / scales[..., None]).abs() < 0.5 + 1e-4).all() and (codes.abs().amax(-1) == 127).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_channel_that_stands_out_leaves_the_others_their_codes(dtype, device):
    """With values that are a unit vector each, y is the weights, whose logarithm is the scores but for a constant."""
    d = 64
    a = make([0], d, (1, 1, d), torch.int8, device, r=0, spare=0)
    a |= {name: a[name].to(dtype) for name in "qk"}
    a["k"][..., 5] *= 30
    a["v"] = torch.eye(d, dtype=dtype, device=device)[None, :, None]
    q, k = a["q"][0, -1, 0].double(), a["k"][0, :, 0].double()
    codes, scales = op.quantize(a["k"][0, :, 0].float())

    def error(scores):
        off = scores - q @ k.T / d**0.5
        return (off - off.mean()).norm()

    plain = error(q @ (codes.double() * scales[:, None]).T / d**0.5)
    assert error(run(a)[0, -1, 0].double().log()) < plain / 3


# ---- errors ---------------------------------------------------------------------------------------------------------

BAD = [
    ("q", TypeError, lambda a: a["q"].int()),
    ("q", ValueError, lambda a: a["q"][0]),
    ("q", ValueError, lambda a: a["q"][..., :60]),
    ("q", ValueError, lambda a: a["q"].repeat(1, 1, 1, 5)),
    ("q", ValueError, lambda a: a["q"].transpose(1, 3).contiguous().transpose(1, 3)),
    ("k", TypeError, lambda a: a["k"].half()),
    ("k", ValueError, lambda a: a["k"][:, :1]),
    ("k", ValueError, lambda a: a["k"][:, :, :0]),
    ("k", ValueError, lambda a: a["k"].transpose(1, 3).contiguous().transpose(1, 3)),
    ("v", TypeError, lambda a: a["v"].double()),
    ("v", ValueError, lambda a: a["v"][:, :, :1]),
    ("v", ValueError, lambda a: a["v"].transpose(1, 3).contiguous().transpose(1, 3)),
    ("k_cache", TypeError, lambda a: a["k_cache"].half()),
    ("k_cache", ValueError, lambda a: a["k_cache"][:, :1]),
    ("k_cache", ValueError, lambda a: a["k_cache"][:, :, :1].contiguous()),
    ("k_cache", ValueError, lambda a: a["k_cache"][0]),
    ("k_cache", ValueError, lambda a: a["k_cache"][:, :, 1:]),
    ("v_cache", TypeError, lambda a: a["v_cache"].to(torch.int8)),
    ("v_cache", ValueError, lambda a: a["v_cache"][:, :, 1:].contiguous()),
    ("v_cache", ValueError, lambda a: a["v_cache"].transpose(0, 1).contiguous().transpose(0, 1)),
    ("k_scale", ValueError, lambda a: torch.ones(a["k_cache"].shape[:3], device=a["q"].device)),
    ("lengths", TypeError, lambda a: a["lengths"].long()),
    ("lengths", ValueError, lambda a: a["lengths"][:1]),
    ("lengths", ValueError, lambda a: a["lengths"].repeat_interleave(2)[::2]),
    ("starts", TypeError, lambda a: a["lengths"].long()),
    ("starts", ValueError, lambda a: a["lengths"][:1]),
    ("cos", TypeError, lambda a: a["cos"].half()),
    ("cos", ValueError, lambda a: a["cos"][:, :1]),
    ("cos", ValueError, lambda a: a["cos"][..., :3]),
    ("cos", ValueError, lambda a: a["cos"].repeat(1, 1, 2)),
    ("cos", ValueError, lambda a: None),
    ("sin", ValueError, lambda a: None),
    ("sin", ValueError, lambda a: a["sin"][..., :32]),
    ("sin", ValueError, lambda a: a["sin"].transpose(1, 2).contiguous().transpose(1, 2)),
    ("window", ValueError, lambda a: -1),
    ("softcap", ValueError, lambda a: -1.0),
]
BAD_INT8 = [
    ("k_scale", lambda a: None),
    ("v_scale", lambda a: None),
    ("v_scale", lambda a: a["v_scale"].double()),
    ("k_scale", lambda a: a["k_scale"][:, :, 1:].contiguous()),
    ("v_scale", lambda a: a["v_scale"].transpose(0, 1).contiguous().transpose(0, 1)),
]
BAD_VALUES = [("lengths", [5, 6]), ("lengths", [-1, 0]), ("starts", [0, 10]), ("starts", [-1, 0])]


def native_call(a):
    """The op itself, past the wrapper's checks."""
    a = {"k_scale": None, "v_scale": None, "cos": None, "sin": None, "starts": None} | a
    rest = a.get("scale", 0.1), a.get("window", 0), a.get("softcap", 0.0)
    return torch.ops.fastinfer.kv_attention(*(a[name] for name in SCHEMA), *rest)


def refused(a, name, error):
    before = copy(a)
    with pytest.raises(error, match=rf"kv_attention: .*\b{name}\b"):
        run(a)
    if _native.backend(a["q"].device) == "native":
        with pytest.raises(RuntimeError, match=rf"kv_attention: .*\b{name}\b"):
            native_call(a)
    for cache in ("k_cache", "v_cache"):
        torch.testing.assert_close(a[cache], before[cache], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument_and_writes_nothing(name, error, spoil, device):
    a = make([4, 0], 2, (4, 2, 64), torch.float32, device)
    refused(a | {name: spoil(a)}, name, error)


@pytest.mark.parametrize(("name", "spoil"), BAD_INT8)
def test_names_a_bad_scale(name, spoil, device):
    a = make([4, 0], 2, (4, 2, 64), torch.int8, device)
    refused(a | {name: spoil(a)}, name, ValueError)


@pytest.mark.parametrize(("name", "values"), BAD_VALUES)
def test_refuses_positions_outside_of_the_cache_on_the_cpu(name, values):
    a = make([2, 0], 4, (4, 2, 64), torch.float32, "cpu")  # L = 9
    refused(a | {name: torch.tensor(values, dtype=torch.int32)}, name, ValueError)


def test_names_an_argument_on_another_device():
    a = make([4, 0], 2, (4, 2, 64), torch.float32, "cpu", starts=torch.zeros(2, dtype=torch.int32))
    for name in ("k", "v", "k_cache", "v_cache", "lengths", "starts", "cos", "sin"):
        with pytest.raises(ValueError, match=rf"kv_attention: {name} must be on cpu"):
            run(a | {name: a[name].to("meta")})


# ---- the op in torch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.float32, torch.int8], ids=str)
def test_opcheck(kind, native, device):
    a = make([4, 0], 2, (4, 2, 64), kind, device, spare=0)
    a = {n: t.nan_to_num() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in a.items()}
    arguments = (*(a.get(name) for name in SCHEMA), 0.125, 0, 0.0)
    torch.library.opcheck(torch.ops.fastinfer.kv_attention.default, arguments)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.int8], ids=str)
def test_compiles_into_one_graph(kind, device):
    a = make([4, 0], 2, (4, 2, 64), kind, device)
    ours, theirs = copy(a), copy(a)
    y = torch.compile(lambda a: run(a) + 1, fullgraph=True, backend="aot_eager")(ours)
    assert torch.equal(y, run(theirs) + 1)
    for name in [n for n in a if n.endswith(("cache", "_scale"))]:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, equal_nan=True)
