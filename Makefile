# `make fit` and `make test` are all that a clean machine needs; both install what they use into $(VENV).

PYTHON ?= python3
VENV ?= .venv
RECIPE ?= recipes/digits.yaml
# Further arguments: make fit FIT_ARGS="--trainer.max_steps 20", make test TEST_ARGS="tests/layers -x"
FIT_ARGS ?=
TEST_ARGS ?=

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: fit test lint docs clean help

help:
	@echo "make fit    install and train $(RECIPE) (FIT_ARGS adds flags)"
	@echo "make test   install the dev extra and run the test suite (TEST_ARGS adds arguments)"
	@echo "make lint   ruff check, ruff format --check and mypy"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove the virtual environment and what tools left"

# Installed once per change of pyproject.toml or constraints.txt; the stamps say so.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/.installed
	$(INSTALL) --editable ".[docs]"
	touch $@

fit: $(VENV)/.installed
	$(BIN)/hybridvl fit --config $(RECIPE) $(FIT_ARGS)

# One thread per worker: with two workers that is three times faster than torch's default on two cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TEST_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
