# Two commands do everything on a fresh machine with Python 3.11 and a compiler:
#   make demo    set-up, then the main job on real input
#   make test    set-up, then the suite
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint format setup clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# torch first and pinned: left to itself pip takes the CUDA build of several GB.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt scikit-build-core
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cpu,dev]'
	touch $@

demo: setup
	$(BIN)/ibnorm-export demo --out demo

test: setup lint
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck
	mkdir -p build/typecheck
	cp -r ibnorm_export pyproject.toml build/typecheck/
	cp -r cli models build/typecheck/ibnorm_export/
	cd build/typecheck && ../../$(BIN)/mypy ibnorm_export

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist demo
