"""Which linears are merged: what a block does is watched, because structure can lie."""

import copy

import pytest
import torch
from architectures import build
from merged_cases import assert_merged, both, replaced, siblings_of
from torch import nn

import fastinfer
from fastinfer.rules import merging

pytestmark = pytest.mark.models


class Block(nn.Module):
    def __init__(self, bias=False, n=32):
        super().__init__()
        self.a, self.b = nn.Linear(32, n, bias), nn.Linear(32, n, bias)
        self.c = nn.Linear(n, 32, bias)
        self.norm, self.act = nn.LayerNorm(n), nn.SiLU()

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


def variant(body, **settings):
    return type("Variant", (Block,), {"forward": body})(**settings)


def in_place(self, x):
    q = self.a(x)
    q *= 3
    k = self.b(x)
    k.add_(1)
    return self.c(q + k)


def changed_between(self, x):
    x = x.clone()
    q = self.a(x)
    return self.c(q + self.b(x.mul_(2)))


def viewed(self, x):
    q, k = self.a(x), self.b(x)
    return self.c(q.view(*x.shape[:-1], 2, -1).flatten(-2) @ k.transpose(-1, -2) @ k)


def tupled(self, x):
    h = self.act(self.a(x)) * self.b(x)
    return self.c(h), h


LIES = {
    "gate and up the other way round": (lambda s, x: s.c(s.a(x) * s.act(s.b(x))), ("b", "a"), "silu_mul"),
    "gelu": (lambda s, x: s.c(nn.functional.gelu(s.a(x)) * s.b(x)), ("a", "b"), "gelu_mul"),
    "relu": (lambda s, x: s.c(s.a(x).relu() * s.b(x)), ("a", "b"), "none"),
    "both activated": (lambda s, x: s.c(s.act(s.a(x)) * s.act(s.b(x))), ("a", "b"), "none"),
    "a norm between": (lambda s, x: s.c(s.norm(s.act(s.a(x)) * s.b(x))), ("a", "b"), "none"),
    "clipped": (lambda s, x: s.c(s.act(s.a(x).clamp(-0.5, 0.5)) * s.b(x)), ("a", "b"), "none"),
    "scaled after": (lambda s, x: s.c(s.act(s.a(x)) * s.b(x)) * 2, ("a", "b"), "none"),
    "a tuple": (tupled, ("a", "b"), "none"),
    "a residual": (lambda s, x: x + s.c(s.act(s.a(x)) * s.b(x)), ("a", "b"), "none"),
    "in place": (in_place, ("a", "b"), "none"),
    "views": (viewed, ("a", "b"), "none"),
    "input scaled between": (lambda s, x: s.c(s.act(s.a(x)) * s.b(x * 2)), None, None),
    "input changed between": (changed_between, None, None),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("body", "members", "activation"), LIES.values(), ids=LIES)
def test_structure_is_proven(body, members, activation, bias):
    original = nn.ModuleDict({"block": variant(body, bias=bias)}).eval()
    apart = fastinfer.patch(copy.deepcopy(original), merge=False, activations="keep")
    merged = fastinfer.patch(original, merge=True, activations="keep")
    rows = fastinfer.report(merged).merged
    assert [(row.members, row.activation) for row in rows] == ([(members, activation)] if members else [])
    x = torch.randn(3, 5, 32)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            one, other = apart["block"](x), merged["block"](x)
            for got, expected in zip(*((v,) if torch.is_tensor(v) else v for v in (other, one)), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [Block.forward, in_place], ids=["gated", "in place"])
@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_missing_bias_is_zeros(missing, body):
    original = nn.ModuleDict({"block": variant(body, bias=True)}).eval()
    getattr(original["block"], missing).bias = None
    apart = fastinfer.patch(copy.deepcopy(original), merge=False)
    merged = fastinfer.patch(original, merge=True)
    assert_merged(merged)
    x = torch.randn(3, 32)
    torch.testing.assert_close(merged["block"](x), apart["block"](x), rtol=1e-4, atol=1e-5)


def test_a_block_that_uses_different_inputs_after_all_is_left_apart(matmuls):
    body = lambda s, x, y=None: s.c(s.a(x) + s.b(x if y is None else y))  # noqa: E731
    original = nn.ModuleDict({"block": variant(body)}).eval()
    apart = fastinfer.patch(copy.deepcopy(original), merge=False, activations="keep")
    merged = fastinfer.patch(original, merge=True, activations="keep")
    x, y = torch.randn(2, 3, 32)
    with torch.no_grad():
        for _ in range(4):
            matmuls.clear()
            assert torch.equal(merged["block"](x, y), apart["block"](x, y))
    assert matmuls == [32, 32, 32] * 2
    report = fastinfer.report(merged)
    assert not report.merged and [row.reason for row in report.apart] == ["called on different inputs"]
    assert fastinfer.report(merged).apart == report.apart and not any(s._rounds for s in siblings_of(merged))


def test_an_exception_in_a_block_leaves_no_round_open():
    def body(self, x, fail=False):
        q = self.a(x)
        if fail:
            raise RuntimeError("in the middle")
        return self.c(q + self.b(x))

    merged = fastinfer.patch(nn.ModuleDict({"block": variant(body)}).eval(), merge=True, activations="keep")
    x = torch.randn(3, 32)
    expected = merged["block"](x)
    with pytest.raises(RuntimeError, match="in the middle"):
        merged["block"](x, fail=True)
    assert not any(s._rounds for s in siblings_of(merged)) and torch.equal(merged["block"](x), expected)


def test_on_by_default_on_cuda_alone(monkeypatch):
    assert not fastinfer.patch(build("llama"), dry_run=True).merged
    monkeypatch.setattr(merging, "pays", lambda device: True)
    assert fastinfer.patch(build("llama"), dry_run=True).merged


def test_what_is_left_of_a_pair_computes_from_the_whole(matmuls):
    _, merged = both("llama")
    mlp, x = merged.model.layers[0].mlp, torch.randn(2, 64)
    expected = mlp.up_proj(x)
    mlp.gate_proj = replaced(mlp.gate_proj)
    for _ in range(3):
        mlp(x)
    matmuls.clear()
    assert torch.equal(mlp.up_proj(x), expected) and matmuls == [192]


def test_a_block_that_needs_contiguous_results_stays_apart():
    body = lambda s, x: s.c(s.a(x).view(-1).view(x.shape) + s.b(x))  # noqa: E731
    late = lambda s, x: s.c(s.b(x) + s.a(x).flip(0).view(-1).view(x.shape) + s.b(x).view(-1).view(x.shape))  # noqa: E731
    for forward in (body, late):
        model = fastinfer.patch(nn.ModuleDict({"block": variant(forward)}).eval(), merge=True, activations="keep")
        assert not fastinfer.report(model).merged and model["block"](torch.randn(3, 5, 32)).shape == (3, 5, 32)


def test_odd_rows_stay_apart():
    model = fastinfer.patch(nn.ModuleDict({"block": variant(Block.forward, n=40)}).eval(), merge=True)
    (row,) = fastinfer.report(model).apart
    assert "not a multiple of 16" in row.reason and not fastinfer.report(model).merged


def test_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    model = build("llama").train()
    torch.manual_seed(5)
    fastinfer.patch(model, merge=True)
    assert torch.equal(torch.randn(3), expected)
