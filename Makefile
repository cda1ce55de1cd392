# Each target is one command on a fresh machine: it builds .venv from constraints.txt first.
#
#   make demo    train a rectified flow on real handwritten digits and sample from it
#   make test    the tests (add PYTEST_ARGS="-m slow" for the long ones)
#   make check   lint, types, doctests
#
# PYTHON=python3.12   the interpreter to build .venv with (3.11 to 3.13)
# TORCH=cpu           take PyTorch's CPU build (on Linux, PyPI's default is a CUDA build of gigabytes)

PYTHON ?= python3
TORCH ?= default
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

TORCH_INDEX_default :=
TORCH_INDEX_cpu := --index-url https://download.pytorch.org/whl/cpu

.PHONY: demo test check lint types doctest clean

demo: $(VENV)/.installed
	$(BIN)/python train.py demo
	$(BIN)/ndeflow sample runs/demo n=64 steps=20

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

check: lint types doctest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/pyright --pythonpath $(BIN)/python

doctest: $(VENV)/.installed
	$(BIN)/python -m pytest --doctest-modules ndeflow

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, this is %d.%d; use make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(TORCH_INDEX_$(TORCH)) torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
