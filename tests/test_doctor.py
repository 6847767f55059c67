"""`fastinfer doctor`: true about this machine, and the right advice for machines that are not at hand."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from fastinfer import _native, doctor, ops

WELL = {
    "versions": {
        "fastinfer": "0.1.0+cu130",
        "python": "3.12.1",
        "torch": "2.11.0+cu130",
        "transformers": "5.23.0",
        "triton": "3.6",
    },
    "torch_cuda": "13.0",
    "settings": {},
    "cpu": {
        "name": "Some CPU",
        "machine": "x86_64",
        "features": dict.fromkeys(doctor.CPU_FEATURES, True),
        "kernels_use": "avx512_vnni",
        "cores": 8,
        "threads": 8,
    },
    "gpus": {"cuda:0": {"name": "Some GPU", "capability": "9.0", "memory_gb": 80.0}},
    "driver_gpus": [{"name": "Some GPU", "driver": "580.1"}],
    "libraries": {"cpu": "loaded", "cuda": "loaded"},
    "ops": {"int8_matmul": {"cpu": "native", "cuda:0": "native"}},
    "ok": True,
    "advice": [],
}


def found(**changes) -> dict:
    """The findings on a machine where all is well, but for `changes` ("libraries.cuda" style, dots as __)."""
    result = copy.deepcopy(WELL)
    for path, value in changes.items():
        *parents, name = path.split("__")
        at = result
        for parent in parents:
            at = at[parent]
        at[name] = value
    result["advice"] = doctor.advice(result)
    return result


def test_collect_is_true_about_this_machine():
    here = doctor.collect()
    assert json.loads(json.dumps(here)) == here
    assert here["versions"]["torch"] == torch.__version__
    assert here["libraries"] == _native.status
    assert list(here["ops"]) == list(ops.__all__)
    assert list(here["gpus"]) == [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    for row in here["ops"].values():
        assert row["cpu"] == _native.backend(torch.device("cpu"))
    assert here["ok"] == all(how == "native" for row in here["ops"].values() for how in row.values())
    if _native.cpu_isa() != "none":
        assert here["cpu"]["features"]["avx2"]


def test_render_names_every_op_device_and_library():
    text = doctor.render(found())
    for part in ("fastinfer 0.1.0+cu130", "torch 2.11.0+cu130", "Some GPU", "capability 9.0", "580.1", "avx512_vnni"):
        assert part in text
    (row,) = [line for line in text.splitlines() if line.startswith("int8_matmul")]
    assert row.split() == ["int8_matmul", "native", "native"]
    assert "All is well" in text and "→" not in text


def test_render_says_which_plans_are_in_use():
    assert "plans     cuda:0: plans_h100.json" in doctor.render(found(**{"gpus__cuda:0__plans": "plans_h100.json"}))
    assert "plans" not in doctor.render(found())


def test_nothing_to_do_where_all_is_well():
    assert found()["advice"] == []


def test_nothing_to_do_without_a_gpu():
    assert found(gpus={}, driver_gpus=[], libraries__cuda="not built: …", torch_cuda=None)["advice"] == []


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"versions__torch": "2.9.1+cpu"}, ["torch is 2.9.1", "pip install -U 'torch>=2.10'"]),
        ({"versions__transformers": None}, ["transformers is not installed", "'transformers>=5.17'"]),
        ({"versions__transformers": "5.16.2"}, ["transformers is 5.16.2"]),
        ({"libraries__cpu": "not built: …"}, ["CPU library is not built", "pip install --no-build-isolation -e ."]),
        ({"libraries__cpu": "failed to load: undefined symbol"}, ["failed to load: undefined symbol", "pip install"]),
        ({"libraries__cpu": "switched off by FASTINFER_NATIVE=0"}, ["unset FASTINFER_NATIVE"]),
        ({"cpu__kernels_use": "none"}, ["no AVX2"]),
        (
            {"cpu__kernels_use": "avx2", "settings__FASTINFER_CPU_ISA": "avx2"},
            ["AVX512-VNNI", "unset FASTINFER_CPU_ISA"],
        ),
        ({"libraries__cuda": "not built: …"}, ["CUDA library is not built", "Triton", "nvcc", "FASTINFER_CUDA=1"]),
        ({"libraries__cuda": "not built: …", "versions__triton": None}, ["pip install triton"]),
        ({"gpus__cuda:0__capability": "7.5"}, ["cuda:0", "7.5", "plain torch"]),
        ({"gpus": {}, "torch_cuda": None}, ["Some GPU", "build without CUDA"]),
        ({"gpus": {}}, ["Some GPU", "580.1", "CUDA 13.0", "driver"]),
        ({"ops__int8_matmul__cpu": doctor.STALE}, ["older than the Python files", "int8_matmul", "Rebuild"]),
    ],
)
def test_advice_for_what_is_missing(changes, parts):
    result = found(**changes)
    (line,) = result["advice"]
    for part in parts:
        assert part in line
    assert f"→ {line}" in doctor.render(result)


def test_a_hidden_gpu_is_no_fault():
    assert found(gpus={}, settings__CUDA_VISIBLE_DEVICES="")["advice"] == []


def test_cpuinfo():
    flags = "flags\t\t: fpu avx2 amx_int8\n"
    text = f"processor\t: 0\nmodel name\t: Fast CPU @ 3: 2\n{flags}\nprocessor\t: 1\n{flags}"
    parsed = doctor.parse_cpuinfo(text)
    assert parsed["name"] == "Fast CPU @ 3: 2"
    assert [name for name, there in parsed["features"].items() if there] == ["avx2", "amx_int8"]
    assert doctor.parse_cpuinfo("")["name"] == "unknown"


def test_a_library_that_lacks_an_op_is_stale(monkeypatch):
    monkeypatch.setattr(_native, "backend", lambda device: "native")
    assert doctor._runs("no_such_op", "cpu") == doctor.STALE


def test_exit_code_and_output_without_the_libraries():
    command = [sys.executable, "-W", "error", "-m", "fastinfer.cli", "doctor"]
    env = {**os.environ, "FASTINFER_NATIVE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert "reference" in done.stdout and "→ the libraries are switched off" in done.stdout
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, env=env)
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["ok"] is False


def test_exit_code_here(capsys):
    ok = doctor.collect()["ok"]
    assert doctor.main() == (0 if ok else 1)
    assert ("All is well" in capsys.readouterr().out) == ok
