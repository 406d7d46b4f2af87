# The two commands of a newcomer: `make quickstart` and `make test`. Both set up .venv when needed.
# Needs Python >= 3.11, make and a C++ compiler; nothing else, and no settings in the home directory.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROJECTS := $(wildcard core/pyproject.toml kernels/pyproject.toml \
	plugins/*/pyproject.toml plugins/*/*/pyproject.toml)
EDITABLE := $(foreach project,$(PROJECTS),--editable $(dir $(project)))

.PHONY: help setup test lint format docs quickstart clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/.complete  ## create .venv with torch, the development tools and all packages

.venv/.complete: constraints.txt pyproject.toml $(PROJECTS)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v >= (3, 11) else \
	    "Python 3.11 or newer is needed, this is %d.%d; run: make setup PYTHON=python3.11" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet --constraint constraints.txt pip
	$(PIP) install --quiet --constraint constraints.txt torch --group dev
	$(PIP) install --quiet --constraint constraints.txt --no-build-isolation $(EDITABLE)
	@touch $@

test: setup  ## run the whole suite: every package alone, then all together
	$(BIN)/python tools/run_suite.py

lint: setup  ## check format, lint, types and import contracts
	$(BIN)/tox run -e lint

format: setup  ## format the code and fix what ruff can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup  ## build the documentation site into site/
	$(BIN)/tox run -e docs

quickstart: setup  ## train a small GPT on real text with two ranks (ARGS=--resume to go on)
	$(BIN)/drivetrain run --nproc 2 examples/train_gpt.py --config examples/gpt.json $(ARGS)

clean:  ## remove everything that the other commands made
	rm -rf .venv .tox .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -rf build dist site runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
