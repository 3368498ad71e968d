# `make` lists the targets. Each does its own set-up: .venv, install, run.
PYTHON ?= python3
VENV   ?= .venv
RUNS   ?= runs
# More words for every `pip install`; for torch's CPU build on a machine without a GPU (smaller by gigabytes):
#   make demo PIP_ARGS="--extra-index-url URL" with the index of torch's CPU builds
PIP_ARGS ?=
PYTEST_ARGS ?= -n auto --maxprocesses 4

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
READY     := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test test-slow lint typecheck reference bench ablations ci clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# The stamps make a second call quick; a changed pyproject.toml or constraints.txt installs again.
$(READY): pyproject.toml constraints.txt
	@echo "== install: vit and what it needs, into $(VENV) (once; torch is large, so this can take minutes)"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"vit needs Python 3.11 or newer, found {v[0]}.{v[1]}; say make PYTHON=python3.12")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
	@$(PIP) -c constraints.txt -e .
	@touch $@

$(READY_DEV): $(READY)
	@echo "== install: what the tests and checks need, into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

install: $(READY)  ## install vit into .venv
	@echo "vit is installed: $(BIN)/vit --help, or: . $(BIN)/activate"

install-dev: $(READY_DEV)  ## install vit and the development tools into .venv

demo: $(READY)  ## pretrain, fine-tune and evaluate in about 10 minutes on 2 CPU cores
	@$(BIN)/python scripts/demo.py --runs $(RUNS)

test: $(READY_DEV)  ## the default test suite
	@echo "== test"
	@$(BIN)/python -m pytest $(PYTEST_ARGS)

test-slow: $(READY_DEV)  ## the slow tests
	@echo "== slow tests"
	@$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(READY_DEV)  ## style and formatting
	@echo "== lint"
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

typecheck: $(READY_DEV)  ## static types
	@echo "== typecheck"
	@$(BIN)/mypy

reference: $(READY)  ## docs/reference/ from the command line and the schema
	@$(BIN)/python scripts/make_reference.py

bench: $(READY)  ## images per second: corpus, training step, forward pass
	@$(BIN)/python scripts/bench_corpus.py
	@$(BIN)/python scripts/bench.py

ablations: $(READY)  ## the paper's ablations, small, and their tables in docs/results: about an hour on 2 CPU cores
	@PATH="$(abspath $(BIN)):$$PATH" scripts/ablations.sh $(RUNS)/ablations

ci: lint typecheck test demo  ## what .ci/run checks, in the environment at hand

clean:  ## remove .venv and caches, but no runs
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests scripts -name __pycache__ -prune -exec rm -rf {} +
