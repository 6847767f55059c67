"""Kernels that start before the previous one has finished."""

import pytest
import torch
from test_int4_matmul import make

from fastinfer.ops import int4_matmul, rms_norm
from fastinfer.ops.launch import dependent_launch
from fastinfer.ops.layout import ROW, TILE_W4A16, convert


def test_does_nothing_without_a_gpu():
    x, *packed, bias = make(2, 32, 64, 32, torch.float32, "cpu")
    with dependent_launch():
        out = int4_matmul(x, *packed, bias)
    assert torch.equal(out, int4_matmul(x, *packed, bias))


@pytest.mark.parametrize("m", [1, 16, 40])
def test_a_captured_chain_gives_the_same_bits(m, device, tiles):
    """Every kernel reads what the one before wrote, through memory that is overwritten with NaN before each replay."""
    layers = []
    for _ in range(6):
        _, *packed, _ = make(m, 1024, 1024, 128, torch.bfloat16, device)
        packed[1] = packed[1] * 0.02
        layers.append([convert(t, ROW, TILE_W4A16) for t in packed])
    x = torch.randn(m, 1024, device=device).bfloat16()

    def chain():
        outs = [x]
        for layer in layers:
            outs.append(int4_matmul(outs[-1], *layer, layout=TILE_W4A16))
        return outs[1:]

    check_chain(chain)


@pytest.mark.parametrize("m", [16, 128])
def test_what_follows_rows_behind_the_tiles_waits_for_them(m, device, tiles):
    """Every other weight has 17 rows: a kernel for tiles, one for the last row, and then one that may start early."""
    layers = []
    for n in (17, 1024) * 3:
        _, *packed, _ = make(m, n, 128, 128, torch.bfloat16, device)
        packed[1] = packed[1] * 0.1
        layers.append([convert(t, ROW, TILE_W4A16) for t in packed])
    x = torch.randn(m, 128, device=device).bfloat16()
    rows = 17 * m // 128

    def chain():
        outs = [x]
        for layer, tokens in zip(layers, (m, rows) * 3, strict=True):
            outs.append(int4_matmul(outs[-1].view(-1)[: tokens * 128].view(tokens, 128), *layer, layout=TILE_W4A16))
        return outs[1:]

    check_chain(chain)


@pytest.mark.parametrize("k", [128, 1000, 4096, 16384, 16392])
def test_a_chain_of_norms_gives_the_same_bits(k, device, tiles):
    """Each takes the norm of the one before and adds it to that one's sum."""
    x, weight = torch.randn(9, k, device=device).bfloat16(), torch.rand(k, device=device)

    def chain():
        outs = [x, x]
        for _ in range(6):
            outs += rms_norm(outs[-2], weight, 1e-6, outs[-1])
        return outs[2:]

    check_chain(chain)


def check_chain(chain):
    """The same bits from a captured chain, replayed, as from its kernels one by one."""
    plain = chain()
    assert all(torch.isfinite(out).all() for out in plain)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), dependent_launch():
        chain()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with dependent_launch(), torch.cuda.graph(graph):
        chained = chain()
    for _ in range(200):
        for out in chained:
            out.fill_(float("nan"))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(plain, chained, strict=True))
