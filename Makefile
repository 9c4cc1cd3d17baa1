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

# A process a core; the tests of a file stay in one, where they share costly fixtures. OpenMP's threads sleep while they
# wait: by default they spin, and take the cores from the other processes.
PARALLEL := -n auto --dist loadfile
FAST := -m "not slow"
test test-all sanitize: export OMP_WAIT_POLICY := passive

.PHONY: help demo test test-all sanitize attack bench gpu gpu-versus docs lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

demo: $(STAMP)  ## environment, build, and a picture drawn by the bundled model
	$(BIN)/var-ext sample

test: $(STAMP)  ## environment, build, tests
	$(BIN)/python -m pytest -q $(PARALLEL) $(FAST) $(TESTS)

test-all: $(STAMP)  ## the same and the slow tests: long repetitions of what the others cover in small
	$(BIN)/python -m pytest -q $(PARALLEL) $(TESTS)

# A tree and an interpreter of their own, with the packages of $(VENV) but not its build of var_ext. The interpreter
# itself is not instrumented, so the runtimes are loaded first, and what it never frees is no leak of ours.
SANITIZED := build/sanitized
RUNTIMES = $(shell $(CXX) -print-file-name=libasan.so):$(shell $(CXX) -print-file-name=libubsan.so)
sanitize: $(STAMP)  ## fast op tests under the address and undefined-behaviour sanitizers
	rm -rf $(SANITIZED)
	$(BIN)/python -m pip install --quiet --no-deps --target $(SANITIZED) \
	  --config-settings=cmake.define.VAR_EXT_SANITIZE=ON --config-settings=cmake.define.VAR_EXT_CUDA=OFF \
	  --config-settings=cmake.build-type=RelWithDebInfo .
	cp -r tests pyproject.toml $(SANITIZED)
	$(BIN)/python -m venv --without-pip $(SANITIZED)/venv
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$($(SANITIZED)/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	cd $(SANITIZED) && LD_PRELOAD=$(RUNTIMES) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  venv/bin/python -m pytest -q $(PARALLEL) $(FAST) tests/ops

bench: $(STAMP)  ## all benchmarks; writes benchmarks/RESULTS.md
	$(BIN)/python benchmarks/time_ops.py

# Whatever Python and torch the GPU's machine has: nothing is installed or fetched. RESULTS names another folder.
GPU = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(if $(DRY),--dry) $(if $(RESULTS),--results $(RESULTS))
gpu:  ## on a GPU: build, tests, sanitizers, samplings, op timings; writes benchmarks/results/CHIP-COMMIT.json
	$(GPU)

gpu-versus:  ## on a GPU: beside the published code (OFFICIAL=DIR, a checkout of it) and DiT
	@test -n "$(OFFICIAL)" || { echo "name a checkout of github.com/FoundationVision/VAR: make gpu-versus OFFICIAL=DIR"; exit 2; }
	$(GPU) --official $(OFFICIAL)

# By default the same files everywhere, or fewer where a minute is over before.
ATTACK = $(if $(HOURS),--seconds $(shell echo $$(( $(HOURS) * 3600 ))),--seconds 60 --cases 1500)
attack: $(STAMP)  ## mutated files against every reader, for a minute; HOURS=1 for more, SEED=1 for others
	$(BIN)/python -m tests.attack.fuzz_files --seed $(or $(SEED),0) $(ATTACK)

docs: $(STAMP)  ## the pages with the API into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

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
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): $(BUILD_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and \
	  f"var_ext needs Python 3.10 or newer, got {sys.version.split()[0]}; name another with: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) and building; PyTorch makes the first time slow."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
