# Each command works alone on a machine with Python 3.11 and a C++ compiler; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CXX_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Folders too: their time changes when a file is removed.
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc)

# Read by pip and by its isolated builds, so the build tools are pinned as well (newer pip reads the second name).
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench lint format clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

demo: $(STAMP)  ## environment, build, and a picture drawn by the bundled model
	$(BIN)/var-ext sample

test: $(STAMP)  ## environment, build, tests
	$(BIN)/python -m pytest -q $(TESTS)

bench: $(STAMP)  ## all benchmarks; writes benchmarks/RESULTS.md
	$(BIN)/python -m pytest -q benchmarks/bench_*.py --benchmark-only --benchmark-quiet --benchmark-json=benchmarks/latest.json
	$(BIN)/python benchmarks/render.py benchmarks/latest.json

lint: $(STAMP)  ## ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy var_ext

format: $(STAMP)  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:  ## remove the environment, builds and caches
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  f"var_ext needs Python 3.10 or newer, got {sys.version.split()[0]}; name another with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) and building; PyTorch makes the first time slow."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
