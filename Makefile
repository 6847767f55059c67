# One word each; all of them set up what they need in .venv, and only once.

PYTHON   ?= python3
VENV     ?= .venv
# Installed before anything that depends on torch, so that no other build of it is pulled in. May hold pip options.
TORCH    ?= torch==2.13.0
OLDEST   ?= transformers==5.17.0
# This machine's GPUs, as TORCH_CUDA_ARCH_LIST wants them; empty without one.
GPU_ARCH := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | sort -u | sed 's/^9\.0$$/9.0a/' | paste -sd';')
DEV_ARCH ?= $(or $(GPU_ARCH),9.0a)
ARGS     ?=
# Tests run in as many processes, of one thread each.
WORKERS  ?= $(shell nproc)
PYTEST   := -m pytest -n $(WORKERS) --dist worksteal

export MAX_JOBS ?= $(shell nproc)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

BIN      := $(VENV)/bin
PIP      := $(BIN)/python -m pip install -qq
HAS_TORCH := $(VENV)/.have-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' '-')
LINTERS  := $(shell sed -n 's/^lint = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
CXX_ALL  := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
NATIVE   := setup.py pyproject.toml $(shell find csrc -type f ! -name '*.md')

.PHONY: help demo test test-oldest test-packaging memcheck lint format wheel sdist bench clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo            the main job on a real model: installs it, builds the library for this machine, runs it'
	@echo 'make test            the tests, on the newest transformers; ARGS="-k int4" and the like'
	@echo 'make test-oldest     the tests of models, on $(OLDEST)'
	@echo 'make test-packaging  sdist → wheel → import in a fresh environment (minutes)'
	@echo 'make memcheck        the CUDA kernels under compute-sanitizer (needs a GPU)'
	@echo 'make lint            ruff, mypy, clang-format;  make format  mends what can be mended'
	@echo 'make wheel           dist/fastinfer-*.whl;  make sdist  the source distribution'
	@echo 'make bench           benchmarks/run.py'
	@echo 'make clean           removes all that was built, .venv included'

demo: $(VENV)/.demo
	$(BIN)/fastinfer demo $(ARGS)

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) $(ARGS)

test-oldest: $(VENV)/.oldest
	OMP_NUM_THREADS=1 $(VENV)/oldest/bin/python $(PYTEST) -m models $(ARGS)

test-packaging: $(VENV)/.dev
	$(BIN)/python -m pytest -m packaging tests/test_packaging.py $(ARGS)

memcheck: $(VENV)/.dev
	compute-sanitizer --tool memcheck --error-exitcode 9 $(BIN)/python tests/memcheck.py

lint: $(VENV)/.lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_ALL)

format: $(VENV)/.lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_ALL)

wheel: $(HAS_TORCH)
	$(BIN)/python -m pip wheel -qq --no-build-isolation --no-deps -w dist .
	@ls dist/*.whl

sdist: $(HAS_TORCH)
	$(BIN)/python setup.py -q sdist
	@ls dist/*.tar.gz

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info fastinfer/*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp is newer than what it was made from, so a second run does nothing.

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(HAS_TORCH): | $(VENV)/.made
	@echo 'installing $(TORCH) …'
	$(PIP) 'setuptools>=77' ninja $(TORCH)
	@rm -f $(VENV)/.have-*; touch $@

# Without a GPU the demo needs the CPU library alone, which compiles in a minute or two.
$(VENV)/.demo: $(NATIVE) $(HAS_TORCH)
	@echo 'building the libraries and installing what the demo needs …'
	$(if $(GPU_ARCH),TORCH_CUDA_ARCH_LIST='$(GPU_ARCH)',FASTINFER_CUDA=0) $(PIP) --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(NATIVE) $(HAS_TORCH)
	@echo 'building the libraries (CUDA for $(DEV_ARCH), where there is nvcc) and installing what the tests need …'
	TORCH_CUDA_ARCH_LIST='$(DEV_ARCH)' $(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.made
	$(PIP) $(LINTERS)
	@touch $@

# A second environment that sees the first one's packages, and has the oldest transformers in front of them.
$(VENV)/.oldest: pyproject.toml | $(VENV)/.dev
	$(BIN)/python -m venv $(VENV)/oldest
	$(BIN)/python -c 'import pathlib, sysconfig; here = sysconfig.get_path("purelib"); \
	  there = next(pathlib.Path("$(VENV)/oldest/lib").glob("python*/site-packages")); \
	  (there / "newest.pth").write_text(f"import site; site.addsitedir({here!r})\n")'
	$(VENV)/oldest/bin/python -m pip install -qq $(OLDEST)
	@touch $@
