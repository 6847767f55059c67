"""advance: what a step leaves behind, over several turns of the ring, and errors that change nothing."""

import pytest
import torch

from fastinfer.ops import advance
from fastinfer.ops.launch import dependent_launch


def make(b, slots, device):
    def one(number):
        return torch.tensor([number], device=device)

    return {
        "tokens": torch.randint(0, 1 << 40, (b,), device=device),
        "ids": torch.zeros(b, 1, dtype=torch.int64, device=device),
        "lengths": torch.arange(b, dtype=torch.int32, device=device),
        "offset": one(-(2**40)),
        "ring": torch.full((slots, b), -1, device=device),
        "steps": one(0),
    }


def check_turns(b, slots, device, step):
    given = make(b, slots, device)
    history, state = [], {k: t for k, t in given.items() if k != "tokens"}
    for n in range(1, 2 * slots + 3):
        given["tokens"].copy_(torch.randint(0, 1000, (b,)))
        history.append(given["tokens"].clone())
        step(given["tokens"], **state)
        assert torch.equal(state["ids"][:, 0], history[-1])
        assert torch.equal(state["lengths"].cpu(), torch.arange(b, dtype=torch.int32) + n)
        assert state["offset"].item() == -(2**40) + n and state["steps"].item() == n
        for slot, row in enumerate(state["ring"]):
            last = [h for i, h in enumerate(history) if i % slots == slot][-1:]
            assert torch.equal(row, last[0]) if last else (row == -1).all()


@pytest.mark.parametrize("b", [0, 1, 3, 300])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_fills_the_ring_and_counts(b, slots, device, native):
    check_turns(b, slots, device, advance)


def test_reference_does_the_same(device):
    from fastinfer.ops.advance import reference

    check_turns(4, 3, device, reference)


def test_runs_in_a_captured_graph():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    given, graph = make(5, 4, "cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), dependent_launch():
        for _ in range(3):
            advance(**given)
    graph.replay()
    graph.replay()
    assert given["steps"].item() == 6 and given["lengths"].tolist() == [6, 7, 8, 9, 10]
    assert (given["ring"] == given["tokens"]).all()


BAD = [
    ("tokens", TypeError, lambda t: t.int()),
    ("tokens", ValueError, lambda t: t[None]),
    ("ids", ValueError, lambda t: t[:, 0]),
    ("ids", TypeError, lambda t: t.int()),
    ("lengths", TypeError, lambda t: t.long()),
    ("lengths", ValueError, lambda t: t[1:]),
    ("offset", ValueError, lambda t: t.repeat(2)),
    ("ring", ValueError, lambda t: t[:0]),
    ("ring", ValueError, lambda t: t[:, 1:]),
    ("ring", ValueError, lambda t: t.repeat(1, 2)[:, ::2]),
    ("steps", TypeError, lambda t: t.float()),
    ("steps", ValueError, lambda t: t[:0]),
]


@pytest.mark.parametrize(("name", "error", "spoil"), BAD)
def test_names_the_bad_argument_and_changes_nothing(name, error, spoil, device, native):
    given = make(3, 4, device)
    given[name] = spoil(given[name])
    before = {k: t.clone() for k, t in given.items()}
    with pytest.raises(error, match=rf"advance: {name}\b"):
        advance(**given)
    with pytest.raises(RuntimeError, match=rf"advance: (?:{name}|ids|ring)\b"):  # a bad batch shows in another argument
        torch.ops.fastinfer.advance(**given)
    assert all(torch.equal(given[k], t) for k, t in before.items())


@pytest.mark.parametrize("name", ["ids", "lengths", "offset", "ring", "steps"])
def test_names_what_is_on_another_device(name):
    given = make(3, 4, "cpu")
    with pytest.raises(ValueError, match=rf"advance: {name} must be on cpu"):
        advance(**given | {name: given[name].to("meta")})


def test_opcheck(device, native):
    torch.library.opcheck(torch.ops.fastinfer.advance.default, tuple(make(3, 4, device).values()))
