# `make demo` answers a question, `make test` runs the tests that take minutes, `make test-all` every
# test, `make lint` the checks of style, types and imports, `make docs` writes docs/cli.md and the
# tables of README.md and docs/. All set up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint docs install clean
demo: install
	$(BIN)/mlxquant generate smollm2-135m --max-tokens 160 \
	    --prompt "What is gravity? Answer in three sentences."

# Files in their own order: those with few tests take longest, and would else come last.
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: install
	$(PYTEST) -m "not slow"

test-all: install
	$(PYTEST) --durations 25

lint: install
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: install
	$(BIN)/python docs/make_cli.py
	$(BIN)/python benchmarks/readme.py

install: .venv/.installed

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "mlxquant needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

clean:
	rm -rf .venv
