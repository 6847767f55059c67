"""Every op has all its parts, under one stem."""

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from fastinfer import _native, ops

ROOT = Path(__file__).parent.parent
SECTIONS = ["Args:", "Returns:", "Raises:", "Backends:", "Numerics:", "Source:"]
TABLE = re.sub(r'"\s*\n\s*"', "", (ROOT / "csrc" / "ops.cpp").read_text())  # long strings stand in pieces
SCHEMAS = dict(re.findall(r'm\.def\(\s*"(\w+)\(([^)]*)\)', TABLE))
NOT_OPS = {"cpu_isa", "dependent_launch", "set_tile_plans", "force_tile_plan", "tile_plan_candidates"}
TORCH_IS_THE_FALLBACK = {"linear", "sample"}  # a Triton kernel would be slower, or serve where nothing is fast anyway
NO_CUDA_YET = {"sample"}  # its reference runs there


def module_of(op):
    return importlib.import_module(f"fastinfer.ops.{op}")


def test_every_schema_is_a_public_op():
    assert set(SCHEMAS) - NOT_OPS == set(ops.__all__)


@pytest.mark.parametrize("op", ops.__all__)
def test_has_every_file(op):
    files = [f"csrc/cpu/{op}.cpp", f"tests/test_{op}.py"]
    files += [] if op in NO_CUDA_YET else [f"csrc/cuda/{op}.cu"]
    for file in files + ([] if op in TORCH_IS_THE_FALLBACK else [f"kernels/{op}.py"]):
        assert (ROOT / file).is_file(), f"{op} has no {file}"


@pytest.mark.parametrize("op", ops.__all__)
def test_docstring_has_every_section_and_argument(op):
    text = inspect.getdoc(getattr(ops, op))
    assert [s for s in SECTIONS if s not in text] == []
    for name in inspect.signature(getattr(ops, op)).parameters:
        assert re.search(rf"^\s+{name}: ", text, re.M), f"{op}: {name} is not described"


@pytest.mark.parametrize("op", ops.__all__)
def test_wrapper_reference_and_schema_take_the_same_arguments(op):
    in_schema = [part.split()[-1] for part in SCHEMAS[op].split(", ")]
    assert list(inspect.signature(getattr(ops, op)).parameters) == in_schema
    assert list(inspect.signature(module_of(op).reference).parameters) == [*in_schema, "dtype"]


@pytest.mark.parametrize("op", ops.__all__)
def test_registers_itself_for_both_devices(op):
    for folder, key, suffix in (("cpu", "CPU", "cpp"), ("cuda", "CUDA", "cu")):
        if folder == "cuda" and op in NO_CUDA_YET:
            continue
        text = (ROOT / "csrc" / folder / f"{op}.{suffix}").read_text()
        assert f"STABLE_TORCH_LIBRARY_IMPL(fastinfer, {key}, m)" in text
        assert re.search(rf'm\.impl\("{op}", TORCH_BOX\(&[\w:]*{op}_{folder}\)\)', text)


@pytest.mark.parametrize("op", ops.__all__)
def test_has_kernels_and_a_fake_when_built(op):
    if _native.status["cpu"] != "loaded":
        pytest.skip(_native.status["cpu"])
    name = f"fastinfer::{op}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
    if _native.status["cuda"] == "loaded":
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
    out = getattr(torch.ops.fastinfer, op)
    assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None and out


@pytest.mark.parametrize("op", ops.__all__)
def test_has_a_benchmark(op):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        assert op in importlib.import_module("registry").OPS
    finally:
        sys.path.pop(0)
