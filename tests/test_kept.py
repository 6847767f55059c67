"""Float linears on one buffer: values, addresses, what parts them."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastinfer.modules.kept import KeptSiblings

pytestmark = pytest.mark.models


def linears(biases=(True, True, True), sizes=(32, 16, 8)):
    return [nn.Linear(24, n, bias=bias) for n, bias in zip(sizes, biases, strict=True)]


@pytest.mark.parametrize("biases", [(True,) * 3, (False,) * 3, (False, True, False)])
def test_merged_as_each_alone(biases):
    members, x = linears(biases), torch.randn(5, 24)
    expected = [one(x) for one in members]
    parameters = [p for one in members for p in one.parameters()]
    kept = KeptSiblings(members)
    assert kept.why_apart() is None and not kept.intact()
    kept.join()
    assert kept.intact() and kept.weight().shape == (56, 24)
    torch.testing.assert_close(nn.functional.linear(x, kept.weight(), kept.bias()), torch.cat(expected, -1))
    assert all(torch.equal(one(x), y) for one, y in zip(members, expected, strict=True))
    assert all(a is b for a, b in zip(parameters, [p for one in members for p in one.parameters()], strict=True))
    kept.part()
    assert not kept.intact() and all(torch.equal(one(x), y) for one, y in zip(members, expected, strict=True))
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)


def test_joined_once():
    kept = KeptSiblings(linears())
    kept.join()
    address = kept.weight().data_ptr()
    kept.join()
    assert kept.weight().data_ptr() == address


@pytest.mark.parametrize(
    "change",
    [
        lambda one: setattr(one, "weight", nn.Parameter(one.weight.detach().clone())),
        lambda one: setattr(one.weight, "data", one.weight.detach().clone()),
        lambda one: setattr(one.bias, "data", one.bias.detach().clone()),
        lambda one: one.double(),
    ],
)
def test_a_change_is_seen(change):
    kept = KeptSiblings(linears())
    kept.join()
    change(kept.linears[1])
    assert not kept.intact()


def test_values_written_in_place_are_the_merged_ones():
    kept = KeptSiblings(linears())
    kept.join()
    with torch.no_grad():
        kept.linears[1].weight.fill_(7)
    assert kept.intact() and bool((kept.weight()[32:48] == 7).all())


def test_why_apart():
    first, second, third = linears()
    second.weight = first.weight
    assert "share a weight" in KeptSiblings([first, second]).why_apart()
    assert "dtype or device" in KeptSiblings([first, third.half()]).why_apart()
    assert "input features" in KeptSiblings([first, nn.Linear(8, 16)]).why_apart()
    assert "no plain tensor" in KeptSiblings([first, nn.Linear(24, 16, device="meta")]).why_apart()
    with torch.inference_mode():
        frozen = nn.Linear(24, 16)
    assert "inference mode" in KeptSiblings([first, frozen]).why_apart()
    mixed = linears()[0]
    mixed.bias.data = mixed.bias.data.half()
    assert "biases" in KeptSiblings([first, mixed]).why_apart()


def test_a_conv1d_alone_becomes_its_rows():
    conv, x = Conv1D(16, 24), torch.randn(5, 24)
    expected, weight = conv(x), conv.weight.detach().clone()
    kept = KeptSiblings([conv])
    kept.join()
    assert kept.intact() and kept.weight().is_contiguous() and torch.equal(kept.weight(), weight.T)
    torch.testing.assert_close(conv(x), expected)
    kept.part()
    assert conv.weight.is_contiguous() and torch.equal(conv.weight, weight)
