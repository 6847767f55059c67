"""What a build holds, and that its libraries are tied to no version of Python or torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from symbols import foreign, needed, undefined

import fastinfer

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fastinfer.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("_*.abi3.so"))
KERNELS = sorted(p.name for p in (PACKAGE / "kernels").glob("*.py"))

in_source_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
with_binutils = pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")


def run(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    """Runs a command; an environment variable given as None is taken away."""
    merged = {name: value for name, value in {**os.environ, **env}.items() if value is not None}
    return subprocess.run([str(c) for c in command], cwd=cwd, env=merged, capture_output=True, text=True)


def setup_py(*command, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    return run(sys.executable, "setup.py", *command, cwd=cwd, **env)


def fake_toolkit(folder: Path, script: str) -> str:
    """A CUDA toolkit of which only nvcc is there, and that is a shell script."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)
    return str(folder)


# --- the libraries


@with_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_library_wants_no_symbol_of_python_or_of_torchs_cpp(library):
    symbols = undefined(library)
    assert any(s.startswith(("torch_", "aoti_torch_")) for s in symbols), "wants nothing of torch: is this our library?"
    assert foreign(symbols) == []


@with_binutils
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_library_needs_only_what_every_torch_brings(library):
    names = [name.split(".so")[0] for name in needed(library)]
    assert not {"libpython", "libtorch_python", "libcudart"} & {re.sub(r"[\d.]+$", "", name) for name in names}
    assert ("libtorch_cuda" in names) == (library.name == "_cuda.abi3.so")


@with_binutils
@pytest.mark.parametrize(
    "symbol",
    [
        "PyObject_Call",
        "_PyLong_AsInt",
        "_Py_Dealloc",
        "c10::Error::what() const",
        "at::_ops::add_Tensor::call(at::Tensor const&, at::Tensor const&, c10::Scalar const&)",
        "typeinfo for c10::Error",
        "std::vector<at::Tensor, std::allocator<at::Tensor> >::push_back(at::Tensor&&)",
        "torch::Library::Library(torch::Library::Kind)",
    ],
)
def test_symbol_check_finds(symbol):
    assert foreign([symbol]) == [symbol]


def test_symbol_check_lets_stable_symbols_through():
    stable = ["aoti_torch_empty_strided", "torch_library_impl", "std::__throw_length_error(char const*)", "Pyramid"]
    assert foreign([*stable, "fastinfer::at_least(int)", "pthread_create@GLIBC_2.34"]) == []


# --- what a source distribution lists


@pytest.fixture(scope="module")
def listed(tmp_path_factory) -> set[str]:
    """The files that an sdist would hold."""
    folder = tmp_path_factory.mktemp("egg")
    done = setup_py("-q", "egg_info", "--egg-base", folder)
    assert done.returncode == 0, done.stderr
    return set((folder / "fastinfer.egg-info" / "SOURCES.txt").read_text().splitlines())


def in_tree(folder: str, *patterns: str) -> set[str]:
    """Files of the checkout below `folder`, in hidden folders or caches aside."""
    found = (p for pattern in patterns for p in (ROOT / folder).rglob(pattern) if p.is_file())
    return {str(p.relative_to(ROOT)) for p in found if "__pycache__" not in p.parts}


@in_source_tree
def test_sdist_lists_native_sources_and_layouts(listed):
    sources = in_tree("csrc", "*.cpp", "*.h", "*.cu", "*.cuh", "*.md")
    assert "csrc/ops.cpp" in sources and "csrc/LAYOUTS.md" in sources
    assert sources - listed == set()


@in_source_tree
def test_sdist_lists_every_package_and_kernel(listed):
    assert in_tree("fastinfer", "*.py", "*.txt", "*.json") - listed == set()
    assert {f"fastinfer/kernels/{name}" for name in KERNELS} - listed == set()


@in_source_tree
def test_sdist_lists_what_a_build_needs_and_no_library(listed):
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} - listed == set()
    assert [name for name in listed if name.endswith((".so", ".pyc"))] == []


# --- the version's label, and a toolkit that does not work


@in_source_tree
def test_version_says_which_libraries_a_build_holds(tmp_path):
    answer = 'case "$1" in --version) echo "Cuda compilation tools, release 12.8, V12.8.1";; esac'
    home = fake_toolkit(tmp_path, answer)
    assert setup_py("--version", FASTINFER_CUDA="0").stdout.strip() == fastinfer.__version__ + "+cpu"
    assert setup_py("--version", CUDA_HOME=home, FASTINFER_CUDA=None).stdout.strip() == fastinfer.__version__ + "+cu128"


@in_source_tree
def test_version_from_an_sdist_is_the_one_in_its_name(tmp_path):
    (tmp_path / "fastinfer").mkdir()
    for name in ("setup.py", "fastinfer/__init__.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "PKG-INFO").touch()
    assert setup_py("--version", cwd=tmp_path).stdout.strip() == fastinfer.__version__


@in_source_tree
@pytest.mark.parametrize(
    "script, message",
    [
        (None, "FASTINFER_CUDA=1, but there is no"),
        ("exit 127", "Set FASTINFER_CUDA=0 to build the CPU library alone"),
    ],
)
def test_a_toolkit_that_does_not_work_is_named(tmp_path, script, message):
    home = fake_toolkit(tmp_path, script) if script else str(tmp_path)
    done = setup_py("--version", CUDA_HOME=home, FASTINFER_CUDA="1")
    assert done.returncode != 0
    assert message in done.stderr and home in done.stderr and "Traceback" not in done.stderr


# --- real builds: minutes (make test-packaging)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    done = setup_py("-q", "sdist", "--dist-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder / f"fastinfer-{fastinfer.__version__}.tar.gz"


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel built from the sdist, with both libraries where there is nvcc."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, sdist]
    arch = os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0a")
    done = run(sys.executable, *command, TORCH_CUDA_ARCH_LIST=arch)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("fastinfer-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh_python(wheel, tmp_path_factory) -> Path:
    """An environment that holds the wheel, and takes its dependencies from this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, with_pip=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # not its .pth files: no checkout
    done = run(folder / "bin" / "python", "-m", "pip", "install", "--no-deps", "--ignore-installed", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "bin" / "python"


@pytest.mark.packaging
@pytest.mark.timeout(1800)
@in_source_tree
def test_wheel_from_sdist_holds_libraries_kernels_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    cuda = os.environ.get("FASTINFER_CUDA") != "0" and (
        shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    )
    assert "-cp310-abi3-linux_" in wheel.name
    assert "fastinfer/_cpu.abi3.so" in names
    assert ("fastinfer/_cuda.abi3.so" in names) == bool(cuda)
    assert {f"fastinfer/kernels/{name}" for name in KERNELS} - names == set()
    assert in_tree("fastinfer", "*.py", "*.txt", "*.json") - names == set()
    assert [name for name in names if not name.startswith(("fastinfer/", "fastinfer-"))] == []


@pytest.mark.packaging
@in_source_tree
def test_sdist_holds_the_sources(sdist, listed):
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {name for name in listed if "egg-info" not in name} - names == set()


@pytest.mark.packaging
@in_source_tree
def test_wheel_runs_in_a_fresh_environment(fresh_python, tmp_path):
    code = """
import pathlib, sys, torch, fastinfer
from fastinfer import _native, ops
here = pathlib.Path(fastinfer.__file__).parent
assert here.is_relative_to(sys.prefix), here
assert _native.status["cpu"] == "loaded", _native.status
w, scale = torch.ones(16, 8, dtype=torch.int8), torch.ones(16)
assert torch.equal(ops.int8_matmul(torch.ones(2, 8), w, scale), torch.full((2, 16), 8.0))
print(*sorted(p.name for p in (here / "kernels").glob("*.py")))
"""
    done = run(fresh_python, "-c", code, cwd=tmp_path, PYTHONPATH=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == KERNELS


@pytest.mark.packaging
@in_source_tree
def test_command_line_in_a_fresh_environment(fresh_python, tmp_path):
    done = run(fresh_python.with_name("fastinfer"), "doctor", cwd=tmp_path, PYTHONPATH=None)
    assert "cpu: loaded" in done.stdout, done.stdout + done.stderr


@pytest.mark.packaging
@pytest.mark.timeout(1800)
@in_source_tree
def test_a_failed_cuda_build_says_why_and_how_to_go_on(sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    answers = 'case "$*" in --version) echo release 13.0;; --list-gpu-code) echo sm_90;; *dryrun*) exit 0;;'
    home = fake_toolkit(tmp_path / "cuda", answers + " *) echo this compiler is too old >&2; exit 1;; esac")
    (tree,) = tmp_path.glob("fastinfer-*")
    done = setup_py("build_ext", cwd=tree, CUDA_HOME=home, FASTINFER_CUDA=None, TORCH_CUDA_ARCH_LIST="9.0a")
    assert done.returncode != 0
    assert "this compiler is too old" in done.stdout + done.stderr
    assert "the CUDA library did not build" in done.stderr and "FASTINFER_CUDA=0" in done.stderr
