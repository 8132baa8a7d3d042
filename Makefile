# On a fresh machine: `make quickstart`, `make test` and `make lint`. PYTHON picks the interpreter of the environment.
PYTHON ?= python3
VENV   := .venv
# Processes that run the tests; each takes one core.
WORKERS ?= 2

.PHONY: setup quickstart lint test

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

quickstart: setup
	$(VENV)/bin/python -m recipes.quickstart

# Format, lint and types: what must pass before the tests run.
lint: setup
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/mypy .

test: setup
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
