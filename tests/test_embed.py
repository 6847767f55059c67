"""embed: the bits of the reference and of Int8Embedding, every layout, rotary rows, ids out of range, errors."""

import importlib

import pytest
import torch
from matmul_cases import DTYPES
from torch import nn

from fastinfer.modules.embedding import Int8Embedding
from fastinfer.ops import embed
from fastinfer.ops.launch import dependent_launch
from fastinfer.ops.layout import PANEL16, ROW, TILE_W8A8, TILE_W8A16, convert, gather_rows

op = importlib.import_module("fastinfer.ops.embed")
LAYOUTS = [ROW, PANEL16, TILE_W8A16, TILE_W8A8]


def weights(v, k, device):
    w = torch.randint(-128, 128, (v, k), device=device).to(torch.int8)
    return w, torch.rand(v, device=device) * 0.02 + 1e-4


def tables(device, *shape):
    return [torch.randn(*shape, device=device) for _ in range(2)]


def assert_same(out, expected):
    assert len(out) == len(expected)
    for a, b in zip(out, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("factor", [1.0, 25.298221281347036])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [0, 1, 7, 640, 4096, 5000])
@pytest.mark.parametrize(("b", "t"), [(0, 1), (1, 1), (3, 1), (2, 5)])
def test_gives_the_rows_of_float_weights(b, t, k, dtype, factor, device, native, poisoned):
    w, ids = torch.randn(50, k, device=device).to(dtype), torch.randint(0, 50, (b, t), device=device)
    x, cos, sin = embed(ids, w, factor=factor)
    expected = nn.functional.embedding(ids, w)
    if factor != 1:  # as Gemma's embedding does
        expected = expected * torch.tensor(factor, device=device).to(dtype)
    assert cos is None and sin is None and x.dtype == dtype
    assert_same([x, x], [expected, op.reference(ids, w, factor=factor)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("v", "k"), [(16, 128), (37, 128), (50, 640), (100, 4224)])
def test_gives_the_rows_of_int8_weights(v, k, layout, dtype, device, native, poisoned):
    w, w_scale = weights(v, k, device)
    packed, ids = convert(w, ROW, layout), torch.randperm(v, device=device)[None]
    assert torch.equal(gather_rows(packed, ids, layout), w[ids])
    module = Int8Embedding(nn.Parameter(packed, requires_grad=False), w_scale, like=dtype, layout=layout, factor=3.3)
    for factor in (1.0, 3.3):
        x, _, _ = embed(ids, packed, w_scale, factor, layout, dtype)
        expected = (w[ids].float() * w_scale[ids][..., None]).to(dtype)
        assert_same([x], [expected if factor == 1 else expected * torch.tensor(factor, device=device).to(dtype)])
    assert_same([x], [module(ids)])


@pytest.mark.parametrize("k", [1, 30, 100])
def test_gives_the_rows_of_int8_weights_of_odd_width(k, device, native):
    w, w_scale = weights(33, k, device)
    ids = torch.arange(33, device=device)[:, None]
    for layout in (ROW, PANEL16)[: 2 if k % 4 == 0 else 1]:
        x, _, _ = embed(ids, convert(w, ROW, layout), w_scale, 1.0, layout, torch.float32)
        assert torch.equal(x[:, 0], w.float() * w_scale[:, None])


@pytest.mark.parametrize("shape", [(100, 64), (100, 6), (3, 100, 128), (1, 100, 1000)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("t", [1, 4])
def test_gives_the_rotary_rows_of_each_position(t, padded, shape, device, native, poisoned):
    w, ids = torch.randn(9, 16, device=device), torch.randint(0, 9, (4, t), device=device)
    cos, sin = tables(device, *shape)
    lengths = torch.tensor([0, 7, 60, 90], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 7, 3, 0], dtype=torch.int32, device=device) if padded else None
    x, cos_rows, sin_rows = out = embed(ids, w, cos=cos, sin=sin, lengths=lengths, starts=starts)
    assert torch.equal(x, w[ids])
    for b, first in enumerate([0, 0, 57, 90] if padded else [0, 7, 60, 90]):
        assert torch.equal(cos_rows[..., b, :, :], cos[..., first : first + t, :])
        assert torch.equal(sin_rows[..., b, :, :], sin[..., first : first + t, :])
    assert_same(out, op.reference(ids, w, cos=cos, sin=sin, lengths=lengths, starts=starts))


def test_positions_beyond_the_tables_take_their_ends(device, native):
    w, ids = torch.randn(9, 16, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    cos, sin = tables(device, 10, 4)
    lengths, starts = (torch.tensor(n, dtype=torch.int32, device=device) for n in ([0, 9], [2, 0]))
    out = embed(ids, w, cos=cos, sin=sin, lengths=lengths, starts=starts)
    assert torch.equal(out[1], cos[torch.tensor([[0, 0, 0], [9, 9, 9]], device=device)])
    assert_same(out, op.reference(ids, w, cos=cos, sin=sin, lengths=lengths, starts=starts))


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_ids_out_of_range(bad, device, native):
    w, ids = torch.randn(50, 8, device=device), torch.tensor([[3, bad]], device=device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match=rf"embed: ids must be from 0 to 49, got {bad}"):
            embed(ids, w)
        with pytest.raises(IndexError):
            op.reference(ids, w)
    else:
        assert torch.equal(embed(ids, w)[0][0], w[[3, min(max(bad, 0), 49)]])
        assert torch.equal(op.reference(ids, w), embed(ids, w)[0])


def test_runs_in_a_captured_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    w, w_scale = weights(50, 4096, "cuda")
    ids, (cos, sin) = torch.zeros(2, 1, dtype=torch.int64, device="cuda"), tables("cuda", 20, 64)
    lengths, graph = torch.zeros(2, dtype=torch.int32, device="cuda"), torch.cuda.CUDAGraph()
    given = ids, w, w_scale, 2.0, ROW, torch.bfloat16, cos, sin, lengths
    with torch.cuda.graph(graph), dependent_launch():
        out = embed(*given)
    for step in range(3):
        ids.fill_(7 * step)
        lengths.fill_(5 * step)
        graph.replay()
        assert_same(out, op.reference(*given))


def good(device, int8=True):
    w, w_scale = weights(32, 128, device)
    given = {"ids": torch.zeros(2, 3, dtype=torch.int64, device=device), "w": w, "w_scale": w_scale, "factor": 1.0}
    given |= {"layout": ROW, "out_dtype": torch.float32}
    if not int8:
        given |= {"w": w.float(), "w_scale": None, "out_dtype": None}
    cos, sin = tables(device, 10, 4)
    zeros = torch.zeros(2, dtype=torch.int32, device=device)
    return given | {"cos": cos, "sin": sin, "lengths": zeros, "starts": zeros.clone()}


BAD = [
    ("ids", TypeError, lambda a: a["ids"].int()),
    ("ids", ValueError, lambda a: a["ids"][0]),
    ("ids", ValueError, lambda a: a["ids"].repeat(1, 2)[:, ::2]),
    ("w", TypeError, lambda a: a["w"].int()),
    ("w", ValueError, lambda a: a["w"][:0]),
    ("w", ValueError, lambda a: a["w"].T.contiguous().T),
    ("w_scale", ValueError, lambda a: None),
    ("w_scale", ValueError, lambda a: a["w_scale"][1:]),
    ("out_dtype", TypeError, lambda a: None),
    ("layout", ValueError, lambda a: "tile_w4a16"),
    ("cos", TypeError, lambda a: a["cos"].half()),
    ("cos", ValueError, lambda a: a["cos"][0]),
    ("cos", ValueError, lambda a: a["cos"][:, ::2]),
    ("sin", ValueError, lambda a: a["sin"][1:]),
    ("lengths", TypeError, lambda a: a["lengths"].long()),
    ("lengths", ValueError, lambda a: a["lengths"][1:]),
    ("starts", TypeError, lambda a: a["starts"].long()),
    ("starts", ValueError, lambda a: a["starts"][1:]),
]


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument(name, error, spoil, device, native):
    given = good(device)
    given[name] = spoil(given)
    with pytest.raises(error, match=rf"embed: .*\b{name}\b"):
        embed(**given)
    with pytest.raises(RuntimeError, match=r"embed: "):
        torch.ops.fastinfer.embed.rotary(**given)


def test_names_what_does_not_go_together(device, native):
    for name in ("cos", "sin", "lengths"):
        with pytest.raises(ValueError, match=rf"embed: {name} must be given"):
            embed(**good(device) | {name: None})
    for more in ({"w_scale": torch.ones(32, device=device)}, {"layout": PANEL16}):
        with pytest.raises(ValueError, match=rf"embed: {next(iter(more))}"):
            embed(**good(device, int8=False) | more)
    w = torch.zeros(8, 128, dtype=torch.int8, device=device)
    with pytest.raises(ValueError, match="embed: layout 'tile_w8a16' takes w"):
        embed(
            torch.zeros(1, 1, dtype=torch.int64, device=device),
            w,
            w[:, 0].float().contiguous(),
            1.0,
            TILE_W8A16,
            torch.half,
        )


@pytest.mark.parametrize("name", ["ids", "w_scale", "cos", "sin", "lengths", "starts"])
def test_names_what_is_on_another_device(name):
    given = good("cpu")
    with pytest.raises(ValueError, match=rf"embed: {name} must be on cpu"):
        embed(**given | {name: given[name].to("meta")})


@pytest.mark.parametrize("int8", [False, True])
def test_opcheck(int8, device, native):
    given = good(device, int8)
    torch.library.opcheck(torch.ops.fastinfer.embed.rotary, tuple(given.values()))
    torch.library.opcheck(torch.ops.fastinfer.embed.default, tuple(given.values())[:6])


def test_compiles_in_one_graph(device, native):
    given = good(device)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    assert_same(compiled(**given), embed(**given))
