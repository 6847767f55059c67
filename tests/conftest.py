"""Fixtures: devices, seeded generators, and memory that shows when it was not written."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from fastinfer import _native, ops
from fastinfer.modules import capture
from fastinfer.ops.layout import TILE_W4A16, native_layout

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture
def native(device):
    """Skips where the op would run on the reference: comparing it with itself proves nothing."""
    if _native.backend(torch.device(device)) == "reference":
        pytest.skip(f"no kernels for {device}: {_native.status}")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """torch.empty is full of NaN, so that an output element that no kernel wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiles(device, native):
    """For tests of the tile layouts; all their shapes fit."""
    if native_layout(torch.device(device), "w4a16", 16, 128, torch.bfloat16) != TILE_W4A16:
        pytest.skip("no tile kernels for this device")


@pytest.fixture
def matmuls(monkeypatch):
    """The rows of weights in each matmul that runs."""
    rows = []
    for name in ("int8_matmul", "int8_scaled_matmul", "int4_matmul"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda x, w, *rest, op=op, **named: rows.append(len(w)) or op(x, w, *rest, **named)
        )
    return rows


@pytest.fixture
def recording(monkeypatch):
    """Calls of encoders are recorded on the CPU, by a stand-in for CUDA graphs."""
    from graph_cases import Closures

    monkeypatch.setitem(capture.RECORDERS, "cpu", Closures)


@pytest.fixture(params=["at once", "late"])
def pace(request, monkeypatch):
    """Tokens that the host sees at once, as on the CPU, or one step late with captured steps, as on a GPU."""
    from generating import late

    if request.param == "late":
        late(monkeypatch)


@pytest.fixture
def pair(monkeypatch, pace):
    """A model, and the same one with our loop."""
    from generating import long, patched

    model = long(monkeypatch, "llama")
    return model, patched(model)
