# Two commands on a fresh machine: `make quickstart` and `make test`. PYTHON picks the interpreter of the environment.
PYTHON ?= python3
VENV   := .venv
# Processes that run the tests; each takes one core.
WORKERS ?= 2

.PHONY: setup quickstart test

setup: $(VENV)/ready

$(VENV)/ready: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

quickstart: setup
	$(VENV)/bin/python -m recipes.quickstart

test: setup
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
