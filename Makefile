PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check bench clean

# Everything below starts from a bare machine: the stamp holds the virtual environment with the pinned packages.
$(VENV)/installed: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/installed
	$(BIN)/python -m actcompile demo

test: $(VENV)/installed
	$(BIN)/pytest

check: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	# The folders passes and triton_kernels are packages of actcompile only once they are installed.
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(VENV)/checked .
	cd $(VENV)/checked && ../bin/mypy --config-file ../../setup.cfg

clean:
	rm -rf $(VENV) build dist demo *.egg-info
