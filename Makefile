# Everything sets itself up: `make demo` and `make test` need Python 3.10-3.13 with venv, and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-fast test test-slow lint bench clean

demo: $(READY)
	$(BIN)/orin-kit demo --out demo-out --overwrite

demo-fast: $(READY)
	$(BIN)/orin-kit demo --out demo-out --overwrite --fast

test: $(READY)
	$(BIN)/python -m pytest

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python tools/full_size.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[host,dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) demo-out
