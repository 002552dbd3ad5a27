# Everything sets itself up in .venv: a fresh machine needs Python (3.11 or newer) and pip only.
#
#   make demo    fine-tunes the embedded base, shows before and after, saves the adapter
#   make test    every test except timings and GPU
#   make check   style, types, import direction, generated documentation
#   make bench   timings against the peers, alternately in one process
#   make docs    regenerates the tables in README and docs

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test check bench docs setup clean

help:
	@sed -n 's/^#   //p' Makefile

setup: $(INSTALLED)

# Where a system splits ensurepip off, the outer pip installs into the new environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "inlay needs Python 3.11 or newer; name it with PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python install pip; }

# torch comes first and by itself: where a CPU build lies beside pip's index, it is the one taken.
$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check -q $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(BIN)/inlay demo --out runs/demo

test: $(INSTALLED)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/generate_docs.py --check
	$(BIN)/python -m pytest -q tests/unit/test_imports.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.peft_comparison

docs: $(INSTALLED)
	$(BIN)/python scripts/generate_docs.py

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis runs/demo
