# Every target sets up what it needs by itself; a second `make setup` is instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHELL_SCRIPTS := .ci/run $(wildcard scripts/*.sh scripts/*/*.sh benchmarks/*/*.sh)
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1  # else pyright asks the network for its newest version

.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## create .venv: the requirements, this project (editable) and the tools of `make lint`

$(READY): $(wildcard requirements*.txt) pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev,report]'
	@touch $@

demo: $(READY)  ## the whole protocol on the embedded data: finetune, oracle, forget, evaluate, one table
	PYTHON=$(BIN)/python scripts/demo.sh

test: $(READY)  ## the tests, but for the slow ones and those that need a GPU
	$(BIN)/python -m pytest

test-all: $(READY)  ## all tests
	$(BIN)/python -m pytest -m ''

lint: $(READY)  ## ruff, shellcheck, codespell, pyright; no weights, no large files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck $(SHELL_SCRIPTS)
	$(BIN)/codespell
	$(BIN)/pyright --pythonpath $(BIN)/python
	git ls-files -z | xargs -0 scripts/check_files.sh

clean:  ## remove the environment and the built tiny model; runs stay
	rm -rf $(VENV) data/tiny

.PHONY: help setup demo test test-all lint clean
