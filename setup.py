"""Builds the two native libraries: CPU always, CUDA where nvcc is found.

Both are LibTorch stable-ABI libraries (no Python, c10 or ATen C++ symbols), so one wheel serves every
Python >= 3.10 and torch >= 2.10. Sources are found by folder: a new kernel needs no change here. Environment:
  FASTINFER_CUDA=0      build the CPU library alone;  =1  fail where there is no nvcc
  CUDA_HOME             the CUDA toolkit to use, where it is not the one of the nvcc on PATH
  TORCH_CUDA_ARCH_LIST  e.g. "9.0a" for a quick build; default: every architecture we support that nvcc knows
  MAX_JOBS              parallel compile jobs
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"]
OBJECTS = "build/native"  # one place for every command, so that ninja compiles only what changed
STUBS = OBJECTS + "/stubs"
CXX_FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
CXX_FLAGS += ["-Wno-maybe-uninitialized"]  # gcc 12 raises it inside its own AVX-512 headers
CXX_FLAGS += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
NVCC_FLAGS = ["-O3", "-std=c++17", "--threads=2", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas=-warn-spills"]
NVCC_FLAGS += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DUSE_CUDA"]
LINK_FLAGS = ["-Wl,--exclude-libs,ALL", "-s"]
BUILDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
WITHOUT_CUDA = (
    "Set FASTINFER_CUDA=0 to build the CPU library alone, CUDA_HOME to use another toolkit, "
    "or TORCH_CUDA_ARCH_LIST to choose architectures."
)


def sources(folder: str, *suffixes: str) -> list[str]:
    """Source files below csrc/<folder>, relative to the project, in a fixed order."""
    return sorted(str(p.relative_to(ROOT)) for s in suffixes for p in (ROOT / "csrc" / folder).rglob(f"*{s}"))


def ask(nvcc: Path, *arguments: str) -> str:
    """What nvcc answers; its dry runs answer on stderr."""
    try:
        done = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"fastinfer: {nvcc} does not run: {error}\n{WITHOUT_CUDA}") from error
    return done.stdout + done.stderr


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder, or None where it is switched off or absent."""
    wanted = os.environ.get("FASTINFER_CUDA", "")
    if wanted == "0":
        return None
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = Path(named, "bin", "nvcc") if named else Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    if nvcc.exists():
        top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-E", "-x", "cu", os.devnull), re.MULTILINE)
        return Path(top.group(1).strip()).resolve() if top else nvcc.resolve().parents[1]
    if wanted == "1":
        raise SystemExit(f"fastinfer: FASTINFER_CUDA=1, but there is no {nvcc}: set CUDA_HOME to the toolkit's folder")
    if named:
        print(f"fastinfer: no {nvcc}, so the CUDA library is left out; correct or unset CUDA_HOME", file=sys.stderr)
    return None


def arch_flags(nvcc: Path) -> list[str]:
    """-gencode flags for TORCH_CUDA_ARCH_LIST, or for all of CUDA_ARCHS that this nvcc knows (the last also as PTX)."""
    listed = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    known = ask(nvcc, "--list-gpu-code")
    default = [a for a in CUDA_ARCHS if "sm_" + a.rstrip("a").replace(".", "") in known]
    flags = []
    for arch in [a for a in listed if a] or [*default[:-1], default[-1] + "+PTX"]:
        number = arch.removesuffix("+PTX").replace(".", "")
        number = "90a" if number == "90" else number  # the kernels of 9.0 use what plain 9.0 lacks
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def write_stub() -> None:
    """Makes an empty libtorch_cuda.so to link against.

    The library must name libtorch_cuda as needed, also when it is built from a CPU-only torch: the stable ABI's
    stream functions are defined there.
    """
    os.makedirs(STUBS, exist_ok=True)
    name = "libtorch_cuda.so"
    command = [os.environ.get("CC", "gcc"), "-shared", "-x", "c", os.devnull, f"-Wl,-soname,{name}"]
    subprocess.run([*command, "-o", f"{STUBS}/{name}"], check=True)


def drop_stale_objects() -> None:
    """Removes CUDA objects that are older than a header: torch's ninja rule for nvcc does not track headers."""
    headers = [p for s in ("*.h", "*.cuh") for p in (ROOT / "csrc").rglob(s)]
    newest = max(p.stat().st_mtime for p in headers)
    for built in (ROOT / OBJECTS / "csrc" / "cuda").glob("*.o"):
        if built.stat().st_mtime < newest:
            built.unlink()


def native() -> dict:
    """setup()'s arguments for the libraries. Torch is imported here: an sdist or the metadata do not need it."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """Torch's ninja build; a failed CUDA build says how to go on without it."""

        at = None

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = OBJECTS

        def build_extension(self, ext):
            self.at = ext.name
            if ext.name == "fastinfer._cuda":
                write_stub()
                drop_stale_objects()
            super().build_extension(ext)

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if self.at == "fastinfer._cpu" or len(self.extensions) == 1:
                    raise
                nvcc = f"{cpp_extension.CUDA_HOME}/bin/nvcc"
                raise SystemExit(
                    f"fastinfer: the CUDA library did not build with {nvcc}:\n{error}\n{WITHOUT_CUDA}"
                ) from error

    cpu = cpp_extension.CppExtension(
        "fastinfer._cpu",
        ["csrc/ops.cpp", *sources("cpu", ".cpp")],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": CXX_FLAGS},
        extra_link_args=LINK_FLAGS,
        py_limited_api=True,
    )
    modules = [cpu]
    home = find_cuda()
    if home is not None:
        cpp_extension.CUDA_HOME = str(home)  # a CPU-only torch has none
        cuda = cpp_extension.CppExtension(
            "fastinfer._cuda",
            sources("cuda", ".cu", ".cpp"),
            include_dirs=[str(ROOT / "csrc"), str(home / "include")],
            library_dirs=[STUBS, str(home / "lib64"), str(home / "lib")],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            extra_compile_args={
                "cxx": [*CXX_FLAGS, "-DUSE_CUDA"],
                "nvcc": [*NVCC_FLAGS, *arch_flags(home / "bin" / "nvcc")],
            },
            extra_link_args=["-Wl,--no-as-needed", "-ltorch_cuda", "-Wl,--as-needed", *LINK_FLAGS],
            py_limited_api=True,
        )
        modules.append(cuda)
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


def version() -> str:
    """The version, with a +cuNNN or +cpu label that says which libraries a build holds.

    Without one in an sdist and in what is built from it: pip expects the version that the sdist's name promised.
    """
    base = re.search(r'__version__ = "(.+)"', (ROOT / "fastinfer" / "__init__.py").read_text()).group(1)
    if "sdist" in sys.argv or (ROOT / "PKG-INFO").exists():
        return base
    home = find_cuda()
    if home is None:
        return base + "+cpu"
    release = re.search(r"release (\d+)\.(\d+)", ask(home / "bin" / "nvcc", "--version"))
    return f"{base}+cu{release.group(1)}{release.group(2)}"


os.chdir(ROOT)
if "bdist_wheel" in sys.argv:
    shutil.rmtree("build/lib", ignore_errors=True)  # no file of an earlier build in this wheel
setup(
    version=version(),
    options={"build": {"build_lib": "build/lib"}, "bdist_wheel": {"py_limited_api": "cp310"}},
    **(native() if BUILDS & set(sys.argv) else {}),
)
