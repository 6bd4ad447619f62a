# Every target sets up what it needs by itself; a second `make setup` is instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:[^#]*## /\t/' | expand -t 12

setup: $(READY)  ## create .venv and install requirements.txt into it

$(READY): requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: $(READY)  ## the whole protocol on the embedded data: finetune, oracle, forget, evaluate, one table
	PYTHON=$(BIN)/python scripts/demo.sh

test: $(READY)  ## the tests, but for the slow ones and those that need a GPU
	$(BIN)/python -m pytest

test-all: $(READY)  ## all tests
	$(BIN)/python -m pytest -m ''

lint: $(READY)  ## ruff: rules and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:  ## remove the environment and the built tiny model; runs stay
	rm -rf $(VENV) data/tiny

.PHONY: help setup demo test test-all lint clean
