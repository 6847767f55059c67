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
SCHEMAS: dict[str, dict[str, str]] = {}  # op → overload → arguments; "default" has no name in the table
for _stem, _overload, _arguments in re.findall(r'm\.def\(\s*"(\w+)(?:\.(\w+))?\((.*?)\) ->', TABLE):
    SCHEMAS.setdefault(_stem, {})[_overload or "default"] = _arguments
NOT_OPS = {"cpu_isa", "dependent_launch", "set_tile_plans", "force_tile_plan", "tile_plan_candidates"}
# A Triton kernel would be slower, or serve where nothing is fast anyway.
TORCH_IS_THE_FALLBACK = {"advance", "embed", "linear", "sample"}


def module_of(op):
    return importlib.import_module(f"fastinfer.ops.{op}")


def test_every_schema_is_a_public_op():
    assert set(SCHEMAS) - NOT_OPS == set(ops.__all__)


@pytest.mark.parametrize("op", ops.__all__)
def test_has_every_file(op):
    files = [f"csrc/cpu/{op}.cpp", f"csrc/cuda/{op}.cu", f"tests/test_{op}.py"]
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
    in_schemas = [[part.split()[-1] for part in arguments.split(", ")] for arguments in SCHEMAS[op].values()]
    in_schema = max(in_schemas, key=len)  # other overloads take the same but for some, in the same order
    assert all(taken == [name for name in in_schema if name in taken] for taken in in_schemas)
    assert list(inspect.signature(getattr(ops, op)).parameters) == in_schema
    assert list(inspect.signature(module_of(op).reference).parameters) == [*in_schema, "dtype"]


@pytest.mark.parametrize("op", ops.__all__)
def test_registers_itself_for_both_devices(op):
    for folder, key, suffix in (("cpu", "CPU", "cpp"), ("cuda", "CUDA", "cu")):
        text = (ROOT / "csrc" / folder / f"{op}.{suffix}").read_text()
        assert f"STABLE_TORCH_LIBRARY_IMPL(fastinfer, {key}, m)" in text
        for overload in SCHEMAS[op]:
            name, function = (op, op) if overload == "default" else (rf"{op}\.{overload}", f"{op}_{overload}")
            assert re.search(rf'm\.impl\("{name}", TORCH_BOX\(&[\w:]*{function}_{folder}\)\)', text)


@pytest.mark.parametrize("op", ops.__all__)
def test_has_kernels_and_a_fake_when_built(op):
    if _native.status["cpu"] != "loaded":
        pytest.skip(_native.status["cpu"])
    for overload in SCHEMAS[op]:
        name = f"fastinfer::{op}" if overload == "default" else f"fastinfer::{op}.{overload}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        if _native.status["cuda"] == "loaded":
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        out = getattr(getattr(torch.ops.fastinfer, op), overload)
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None and out


@pytest.mark.parametrize("op", ops.__all__)
def test_has_a_benchmark(op):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        assert op in importlib.import_module("registry").OPS
    finally:
        sys.path.pop(0)
