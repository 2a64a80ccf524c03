# Each target creates what it needs, from nothing but a Python from 3.10 to 3.13 and the network.
# The environment is .venv; it is installed again only when pyproject.toml or constraints.txt changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help quickstart test lint docs generate compatibility clean

help:
	@echo "make quickstart  fine-tune a pretrained network on real photos with three methods, and write a report"
	@echo "make test        run the tests"
	@echo "make lint        check style and types"
	@echo "make docs        build the documentation into site/"
	@echo "make generate    write the stub, the tables and the pages that follow from the registered methods and their cards,"
	@echo "               and train methods that are new with every other one, for the page on what goes together"
	@echo "make compatibility  try every method in kinds of projects, beside features of a Trainer and on families of networks, for"
	@echo "               the pages on what works where; what is on record is not tried again, and it can be interrupted"
	@echo "make clean       remove the environment and everything built"

quickstart: $(VENV)/.test
	$(BIN)/lightning-peft run quickstart

# One thread a worker: two workers fill two cores, and more threads would fight. A class stays on one worker (loadscope),
# because the tests of a method share their reference training.
test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

generate: $(VENV)/.test
	$(BIN)/python -m lightning_peft.cli.authors.generate
	OMP_NUM_THREADS=1 $(BIN)/python tests/pairs/composition.py

compatibility: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python tests/pairs/projects_page.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/pairs/features_page.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/pairs/networks_page.py

clean:
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch and everything else in one resolve: a second one could replace what the first installed.
$(VENV)/.test: EXTRAS := all,test
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.docs: EXTRAS := docs
$(VENV)/.dev $(VENV)/.docs: $(VENV)/.test
$(VENV)/.test $(VENV)/.dev $(VENV)/.docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
