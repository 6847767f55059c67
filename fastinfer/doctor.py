"""`fastinfer doctor`: what is installed, what will run where, and what to do about what is missing."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastinfer
from fastinfer import _native, ops
from fastinfer.tuning import plans

CPUINFO = Path("/proc/cpuinfo")
CPU_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_bf16")
SETTINGS = ("FASTINFER_NATIVE", "FASTINFER_CPU_ISA", "FASTINFER_PLANS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET")
OLDEST = {"torch": (2, 10), "transformers": (5, 17)}
STALE = "missing in the library"
REBUILD = "pip install --no-build-isolation -e .   (or pip install .), in fastinfer's source folder"


def collect() -> dict[str, Any]:
    """Everything that `render` prints, as plain data for JSON."""
    gpus = _gpus()
    found = {
        "versions": _versions(),
        "torch_cuda": torch.version.cuda,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "cpu": _cpu(),
        "gpus": gpus,
        "driver_gpus": _driver_gpus(),
        "libraries": dict(_native.status),
        "ops": {op: {device: _runs(op, device) for device in ("cpu", *gpus)} for op in ops.__all__},
    }
    found["ok"] = all(how == "native" for row in found["ops"].values() for how in row.values())
    found["advice"] = advice(found)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    return {
        "fastinfer": _version("fastinfer") or fastinfer.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
        "triton": _version("triton"),
    }


def parse_cpuinfo(text: str) -> dict[str, Any]:
    """The CPU's name and which of CPU_FEATURES it has, from the text of /proc/cpuinfo."""
    fields = dict(re.findall(r"^([^\t:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE))
    flags = set(fields.get("flags", "").split())
    return {"name": fields.get("model name", "unknown"), "features": {name: name in flags for name in CPU_FEATURES}}


def _cpu() -> dict[str, Any]:
    text = CPUINFO.read_text(errors="replace") if CPUINFO.exists() else ""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **parse_cpuinfo(text),
        "machine": platform.machine(),
        "kernels_use": _native.cpu_isa(),
        "cores": available,
        "threads": torch.get_num_threads(),
    }


def _gpus() -> dict[str, dict[str, Any]]:
    """The GPUs that torch can use, by device name."""
    gpus = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus[f"cuda:{index}"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 1e9, 1),
        }
        if (properties.major, properties.minor) == (9, 0) and _native.status["cuda"] == "loaded":
            gpus[f"cuda:{index}"]["plans"] = str(plans.find(plans.Device.of(index)))
    return gpus


def _driver_gpus() -> list[dict[str, str]]:
    """The GPUs that the NVIDIA driver lists, whether torch can use them or not."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rsplit(",", 1) for line in lines if "," in line]
    return [{"name": name.strip(), "driver": driver.strip()} for name, driver in rows]


def _runs(op: str, device: str) -> str:
    """How `op` runs on `device`: "native", "triton", "reference", or STALE where a library that loaded lacks it."""
    used = _native.backend(torch.device(device))
    if used == "native":
        key = "CPU" if device == "cpu" else "CUDA"
        known = hasattr(torch.ops.fastinfer, op)
        if not known or not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastinfer::{op}", key):
            return STALE
    return used


def _older(version: str, minimum: tuple[int, int]) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < minimum


def advice(found: dict[str, Any]) -> list[str]:
    """What to do about what is missing, most fundamental first; empty where nothing is."""
    todo = []
    for package, minimum in OLDEST.items():
        version = found["versions"][package]
        if version is None or _older(version, minimum):
            wanted = f"{package}>={minimum[0]}.{minimum[1]}"
            todo.append(f"{package} is {version or 'not installed'}: pip install -U '{wanted}'")
    todo += _cpu_advice(found)
    todo += _gpu_advice(found)
    stale = sorted({op for op, row in found["ops"].items() if STALE in row.values()})
    if stale:
        todo.append(f"a library is older than the Python files: it lacks {', '.join(stale)}. Rebuild: {REBUILD}")
    return todo


def _cpu_advice(found: dict[str, Any]) -> list[str]:
    status, cpu = found["libraries"]["cpu"], found["cpu"]
    if status.startswith("switched off"):
        return ["the libraries are switched off: unset FASTINFER_NATIVE"]
    if status != "loaded":
        return [f"the CPU library is {status}. Everything runs on plain torch, slowly. Build it (with gcc): {REBUILD}"]
    if cpu["kernels_use"] == "none":
        return ["this CPU has no AVX2 with FMA and F16C, which the kernels need: models run on plain torch"]
    if cpu["kernels_use"] == "avx2" and "FASTINFER_CPU_ISA" in found["settings"] and cpu["features"]["avx512_vnni"]:
        return ["this CPU has AVX512-VNNI, but the kernels are held to AVX2: unset FASTINFER_CPU_ISA"]
    return []


def _gpu_advice(found: dict[str, Any]) -> list[str]:
    gpus, listed = found["gpus"], found["driver_gpus"]
    if not gpus:
        if not listed or "CUDA_VISIBLE_DEVICES" in found["settings"]:
            return []
        name, driver = listed[0]["name"], listed[0]["driver"]
        if found["torch_cuda"] is None:
            return [f"there is a GPU ({name}), but this torch is a build without CUDA: install one with CUDA"]
        needs = f"torch's CUDA {found['torch_cuda']}"
        return [f"torch cannot use the GPU ({name}): driver {driver} may be too old for {needs}; update the driver"]
    todo = []
    able = {device for device, gpu in gpus.items() if not _older(gpu["capability"], _native.MIN_CAPABILITY)}
    for device in sorted(set(gpus) - able):
        capability = gpus[device]["capability"]
        todo.append(f"{device} has compute capability {capability}; the kernels need 8.0: it runs on plain torch")
    status = found["libraries"]["cuda"]
    if able and status != "loaded" and not status.startswith("switched off"):
        instead = "Triton kernels" if found["versions"]["triton"] else "plain torch (or: pip install triton)"
        todo.append(
            f"the CUDA library is {status}. Until it is there, GPUs run on {instead}. "
            f"Install the CUDA toolkit (nvcc), then: FASTINFER_CUDA=1 {REBUILD}"
        )
    return todo


def render(found: dict[str, Any]) -> str:
    """`collect()`'s findings as text."""
    versions, cpu, gpus = found["versions"], found["cpu"], found["gpus"]
    features = " ".join(name for name, there in cpu["features"].items() if there) or "none of those we know"
    drivers = sorted({gpu["driver"] for gpu in found["driver_gpus"]})
    lines = [
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items())),
        ("", f"torch's CUDA: {found['torch_cuda'] or 'none'}"),
        ("CPU", f"{cpu['name']} ({cpu['machine']}), {cpu['cores']} cores, {cpu['threads']} torch threads"),
        ("", f"has {features}; the kernels use {cpu['kernels_use']}"),
        *[
            ("GPU", f"{device}: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gb']} GB")
            for device, gpu in gpus.items()
        ],
        *([] if gpus else [("GPU", "none that torch can use")]),
        *[("plans", f"{device}: {gpu['plans']}") for device, gpu in gpus.items() if "plans" in gpu],
        *([("", f"driver {', '.join(drivers)}")] if drivers else []),
        *[("library", f"{name}: {status}") for name, status in found["libraries"].items()],
        *[("setting", f"{name}={value}") for name, value in found["settings"].items()],
    ]
    text = [f"{title:<10}{value}" for title, value in lines]
    devices = ["cpu", *gpus]
    width = max([len(op) for op in found["ops"]] + [12]) + 2
    text += ["", "runs on".ljust(width) + "".join(device.ljust(12) for device in devices)]
    text += [op.ljust(width) + "".join(row[d].ljust(12) for d in devices) for op, row in found["ops"].items()]
    text += ["", "native: fastinfer's library. triton: Triton kernels. reference: plain torch, slow."]
    text += ["", *(f"→ {line}" for line in found["advice"])]
    if found["ok"]:
        text.append("All is well: native kernels on every device here.")
    return "\n".join(line.rstrip() for line in text)


def main(as_json: bool = False) -> int:
    """Prints the findings; 0 where native kernels serve the CPU and every GPU, else 1."""
    found = collect()
    print(json.dumps(found, indent=1) if as_json else render(found))
    return 0 if found["ok"] else 1
