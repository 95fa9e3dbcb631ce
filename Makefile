# SPDX-License-Identifier: Apache-2.0
# Everything is a target away from a bare checkout: Python 3.11 or newer, make and a C++ compiler are all that it takes.
# `make` alone lists the targets. The environment is made by the first target that needs it, and again when it is stale.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Options of the one command that installs torch, such as the index that has its CPU builds.
TORCH_OPTIONS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENGINE := $(VENV)/.engine
# Twice quiet hides pip's warnings (a package index that a machine lists but lacks, say) and shows its errors.
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check

.PHONY: help install demo test lint types levels pytest gradual reconstruct comb quantize zoo engine-zoo sanitize fuzz aarch64 clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

# What the engine is made of: a change of any makes it anew, and only what depends on it is compiled.
ENGINE_SOURCES := $(shell find engine -name 'build*' -prune -o -type f ! -name '*.so' ! -name '*.pyc' -print)

install: $(INSTALLED) ## Make .venv with everything that development needs

$(INSTALLED): pyproject.toml constraints.txt | $(ENGINE)
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@# torch first and alone: any other spelling, or torch as a dependency, may bring a build with gigabytes of CUDA.
	@$(PIP_INSTALL) $(TORCH_OPTIONS) "$$(grep '^torch==' constraints.txt)"
	@$(PIP_INSTALL) -c constraints.txt setuptools
	@$(PIP_INSTALL) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(ENGINE): $(ENGINE_SOURCES)
	@command -v $${CXX:-c++} >/dev/null || { echo "The engine needs a C++ compiler, and there is none named $${CXX:-c++}: install one (Debian, Ubuntu: apt-get install g++), or set CXX" >&2; exit 1; }
	@echo "Building the engine (a minute or two the first time)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) -c constraints.txt scikit-build-core nanobind cmake ninja
	@PATH="$(abspath $(BIN)):$$PATH" $(PIP_INSTALL) --no-build-isolation --no-deps --force-reinstall ./engine
	@touch $@

demo: $(INSTALLED) ## Train, prune, pack, export, measure and report a small network: about a minute
	@$(BIN)/featherweight demo

test: lint types levels pytest ## Everything that CI checks, stopping at the first failure

lint: $(INSTALLED) ## Style: ruff
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED) ## Types: mypy, strict
	$(BIN)/mypy

levels: $(INSTALLED) ## Which room may import which: import-linter
	$(BIN)/lint-imports --no-logo

pytest: $(INSTALLED) ## Tests, doctests, and the code blocks of README and docs, a process a core
	$(BIN)/python -m pytest -n auto --dist loadfile

gradual: $(INSTALLED) ## The README's figures on gradual pruning, measured anew
	$(BIN)/python -m benchmarks.gradual all

reconstruct: $(INSTALLED) ## The figures on compression after training: hours, and packages that are fetched
	for one in pruning quantization joint speed cost; do $(BIN)/python -m benchmarks.reconstruct.solvers $$one; done
	for one in metric order flops training cost; do $(BIN)/python -m benchmarks.reconstruct.networks $$one; done
	$(BIN)/python -m benchmarks.reconstruct.tables

comb: $(INSTALLED) ## The figures on pruned channels and heads: two hours, and packages that are fetched
	for one in train headline curve kd classes importances pretrained latency; do $(BIN)/python -m benchmarks.comb.$$one; done

quantize: $(INSTALLED) ## The figures on fewer bits: two hours, and packages that are fetched
	for one in weights integers; do $(BIN)/python -m benchmarks.quantize.networks $$one; done
	$(BIN)/python -m benchmarks.quantize.tables
	$(BIN)/python -m benchmarks.quantize.qat
	for one in train compress pretrained tables; do $(BIN)/python -m benchmarks.deep_compression $$one; done

zoo: $(INSTALLED) ## Every small network of the zoo, combed, cut, trained, saved, loaded and exported: about an hour
	$(BIN)/python -m tests.zoo.speed
	$(BIN)/python -m tests.zoo.run

engine-zoo: $(INSTALLED) ## Every network of the zoo in the engine beside ONNX Runtime: half an hour
	$(BIN)/python -m benchmarks.engine.zoo --again

sanitize: $(INSTALLED) ## The engine's tests under the address, undefined and thread sanitizers: half an hour
	$(BIN)/python -m tests.engine.builds sanitize

SECONDS ?= 600
fuzz: $(INSTALLED) ## Damaged and hostile files for the engine, for SECONDS=600
	$(BIN)/python -m tests.engine.builds fuzz $(SECONDS)

aarch64: $(INSTALLED) ## The engine compiled for aarch64, and its tests under emulation
	$(BIN)/python -m tests.engine.builds aarch64

clean: ## Remove what the checks and builds leave behind, but not .venv
	rm -rf build dist engine/build* engine/dist engine/python/featherweight_engine/*.so src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests benchmarks engine/python -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
