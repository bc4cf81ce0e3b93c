# Everything a person does here begins with `make`. The environment is .venv, made once and kept while
# pyproject.toml and constraints.txt stay as they are.
#
#   PYTHON=python3.12   the interpreter that makes .venv (3.11 or newer)
#   TORCH_INDEX=URL     take torch, and torch alone, from another package index, such as
#                       https://download.pytorch.org/whl/cpu; everything else comes from pip's usual index;
#                       it is read when .venv is made: `make clean` before changing it

PYTHON ?= python3
TORCH_INDEX ?=
RECIPE ?= tiny

BIN := .venv/bin
PROTO := shoal/jobs/serve/proto/shoal/v1/inference.proto
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
# pip compiles everything on one core. This compiles, on all of them, what is not plainly unused; the rest is compiled
# when it is imported, so a failure here costs time only.
UNUSED := /(tests?|testing|rllib|networkx|pip|setuptools|physics|lexers|fx_passes|codegen|ray/data|ray/llm|ray/tune)/
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '$(UNUSED)' .venv/lib || true

.DEFAULT_GOAL := help
.PHONY: help install dev train serve test test-all check lint types imports proto megablocks format clean
.DELETE_ON_ERROR:

help:  ## list what can be made
	@sed -n 's/^\([a-z-]*\):.*##  */\1|/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "  make %-10s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=python3.12 (interpreter), TORCH_INDEX=URL (index for torch alone), RECIPE=tiny (for train)"

train: .venv/installed  ## install what a run needs, and train the tiny recipe here, on the CPU if need be
	$(BIN)/shoal train --recipe $(RECIPE)

serve: .venv/installed-serve  ## install what serving needs as well, and serve the run that `make train` made
	$(BIN)/shoal serve $(RECIPE)

# Two files at a time: much of a test's time is waiting for processes to start.
test: .venv/installed-dev  ## install the tools as well, and run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: .venv/installed-dev  ## the tests that take minutes too: fuzzing, kill loops, whole runs
	HYPOTHESIS_PROFILE=slow $(BIN)/python -m pytest -m ""

check: lint types imports  ## ruff, mypy and import-linter (`make -k check`: all of them, even after a failure)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy -p shoal
	$(BIN)/mypy --allow-untyped-defs --allow-incomplete-defs --allow-any-generics tests

imports: .venv/installed-dev
	$(BIN)/lint-imports

# Generated code refuses older packages than its own generator: hence an old one, in an environment of its own.
proto:  ## generate the gRPC code again, after a change of inference.proto
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/pip install --quiet grpcio-tools==1.66.2 'protobuf<5.28' 'setuptools<80'
	.venv-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. $(PROTO)
	rm -rf .venv-proto

# MegaBlocks pins an older torch, hence --no-deps, and is built for Hopper with this torch (CUDA's compiler is needed).
# CUDA 13's cub has no `debug_synchronous` any more: it goes from the two calls that pass it on.
NVCC_PIP := TORCH_CUDA_ARCH_LIST=9.0 $(PIP) --no-deps --no-build-isolation --force-reinstall --no-cache-dir
MEGABLOCKS := megablocks-0.10.0

megablocks: .venv/installed  ## build MegaBlocks, for moe.backend = "megablocks" and its benchmark (on a CUDA machine)
	@command -v nvcc > /dev/null && $(BIN)/python -c 'import torch; exit(torch.version.cuda is None)' || { echo \
	  "make megablocks needs nvcc in PATH and a CUDA build of torch in .venv: see TORCH_INDEX in make help." >&2; exit 1; }
	$(PIP) setuptools wheel ninja
	$(NVCC_PIP) stanford-stk grouped_gemm
	mkdir -p build
	cd build && ../$(BIN)/python -m pip download --quiet --no-deps --no-build-isolation --no-binary :all: $(subst -,==,$(MEGABLOCKS))
	tar -xzf build/$(MEGABLOCKS).tar.gz -C build
	sed -i -z 's/,[[:space:]]*debug_synchronous));/));/g' build/$(MEGABLOCKS)/csrc/cumsum.h
	$(NVCC_PIP) build/$(MEGABLOCKS)

format: .venv/installed-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: .venv/installed  ## only make .venv, with what a run needs

dev: .venv/installed-dev  ## make .venv with the tools, and hook the checks into git
	$(BIN)/pre-commit install

clean:  ## remove .venv and every cache; runs/ and data/ stay
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interrupted install leaves no stamp, and the next `make` goes on where it stopped.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	  "Shoal needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 | head -1): name another with 'make PYTHON=python3.12'." >&2; exit 1; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

# torch goes first and by itself, so that TORCH_INDEX serves nothing else. A CUDA build of torch requires one exact
# triton of its own: the pin in constraints.txt is then left out.
.venv/constraints.txt: constraints.txt | $(BIN)/python
	$(PIP) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	@if $(BIN)/python -c 'import importlib.metadata as m; exit(not any(r.startswith("triton") for r in m.requires("torch")))'; \
	then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi > $@

.venv/installed: pyproject.toml .venv/constraints.txt
	$(PIP) -c .venv/constraints.txt -e .
	@$(COMPILE)
	@touch $@

.venv/installed-serve: pyproject.toml .venv/constraints.txt
	$(PIP) -c .venv/constraints.txt -e ".[serve]"
	@$(COMPILE)
	@touch .venv/installed $@

.venv/installed-dev: pyproject.toml .venv/constraints.txt
	$(PIP) -c .venv/constraints.txt -e ".[dev]"
	@$(COMPILE)
	@touch .venv/installed .venv/installed-serve $@
