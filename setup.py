"""Builds the two native libraries: CPU always, CUDA where nvcc is found.

Both are LibTorch stable-ABI libraries (no Python, c10 or ATen C++ symbols), so one wheel serves every
Python >= 3.10 and torch >= 2.10. Environment:
  FASTINFER_CUDA=0      build the CPU library alone;  =1  fail if nvcc is missing
  TORCH_CUDA_ARCH_LIST  e.g. "9.0a" for a quick build; default: every architecture we support that nvcc knows
  MAX_JOBS              parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
PYTHON_TARGET = "0x030A0000"
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
DEFINES = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-DPy_LIMITED_API={PYTHON_TARGET}"]
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", *DEFINES]


def sources(folder: str, *suffixes: str) -> list[str]:
    """Source files below csrc/<folder>, relative to the project, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for s in suffixes for p in (ROOT / "csrc" / folder).glob(f"*{s}"))


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder, or None where it is switched off or absent."""
    wanted = os.environ.get("FASTINFER_CUDA", "")
    if wanted == "0":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(home, "bin", "nvcc") if home else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if nvcc.exists():
        return nvcc.resolve().parent.parent
    if wanted == "1":
        raise SystemExit("FASTINFER_CUDA=1, but no nvcc: set CUDA_HOME to the CUDA toolkit's folder")
    return None


def nvcc_output(home: Path, flag: str) -> str:
    return subprocess.run([home / "bin" / "nvcc", flag], capture_output=True, text=True, check=True).stdout


def arch_flags(home: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, or for all of CUDA_ARCHS that this nvcc knows (the last also as PTX)."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    known = nvcc_output(home, "--list-gpu-code")
    default = [a for a in CUDA_ARCHS if "sm_" + a.rstrip("a").replace(".", "") in known]
    flags = []
    for arch in [a for a in listed if a] or [*default[:-1], default[-1] + "+PTX"]:
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def stub_libtorch_cuda() -> str:
    """A folder with an empty libtorch_cuda.so to link against.

    The library must name libtorch_cuda as needed, also when it is built from a CPU-only torch: the stable ABI's
    stream functions are defined there.
    """
    folder = tempfile.mkdtemp(prefix="fastinfer-stub-")
    name = "libtorch_cuda.so"
    command = ["gcc", "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}", "-o", f"{folder}/{name}"]
    subprocess.run(command, check=True)
    return folder


def extensions() -> list:
    cpu = cpp_extension.CppExtension(
        "fastinfer._cpu",
        ["csrc/ops.cpp", *sources("cpu", ".cpp")],
        include_dirs=[str(ROOT / "csrc")],
        depends=[*sources("cpu", ".h"), *sources("common", ".h")],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=["-Wl,--exclude-libs,ALL", "-s"],
        py_limited_api=True,
    )
    home = find_cuda()
    if home is None:
        return [cpu]
    cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch has none
    cuda = cpp_extension.CppExtension(
        "fastinfer._cuda",
        sources("cuda", ".cu", ".cpp"),
        include_dirs=[str(ROOT / "csrc"), str(home / "include")],
        depends=[*sources("cuda", ".cuh", ".h"), *sources("common", ".h", ".cuh")],
        library_dirs=[stub_libtorch_cuda(), str(home / "lib64")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-DUSE_CUDA", "--threads=2", "--expt-relaxed-constexpr", "-lineinfo"]
            + ["-Xptxas=-v,-warn-spills", *DEFINES, *arch_flags(home)],
        },
        extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed", "-Wl,--exclude-libs,ALL", "-s"],
        py_limited_api=True,
    )
    return [cpu, cuda]


class BuildExtension(cpp_extension.BuildExtension):
    """Torch's ninja build; a failed CUDA build says how to go on without it."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except Exception as error:
            if ext.name != "fastinfer._cuda":
                raise
            raise SystemExit(
                f"fastinfer: the CUDA library did not compile with {cpp_extension.CUDA_HOME}/bin/nvcc:\n{error}\n"
                "Set FASTINFER_CUDA=0 to build the CPU library alone, CUDA_HOME to use another toolkit (13.0 or newer), "
                "or TORCH_CUDA_ARCH_LIST to choose architectures."
            ) from error


def version() -> str:
    """The version, with a +cuNNN or +cpu label on everything but source distributions."""
    base = re.search(r'__version__ = "(.+)"', (ROOT / "fastinfer" / "__init__.py").read_text()).group(1)
    if {"sdist", "egg_info"} & set(sys.argv):
        return base
    home = find_cuda()
    if home is None:
        return base + "+cpu"
    release = re.search(r"release (\d+)\.(\d+)", nvcc_output(home, "--version"))
    return f"{base}+cu{release.group(1)}{release.group(2)}"


building = {"bdist_wheel", "build_ext", "build", "editable_wheel", "develop", "install"} & set(sys.argv)
setup(
    version=version(),
    ext_modules=extensions() if building else [],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
