# Two commands do everything on a fresh machine with Python 3.11 and a compiler:
#   make demo    set-up, then the main job on real input
#   make test    set-up, then the suite (make test-cuda: the CUDA kernels on a CPU emulator)
# and for the native libraries:
#   make native     headers, then the libraries, in build/native and in the development install
#   make sanitize   the kernels under AddressSanitizer + UndefinedBehaviorSanitizer, then ThreadSanitizer
#   make mutants    planted kernel bugs, each of which the tests must catch
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CMAKE  := $(BIN)/cmake

.PHONY: demo test test-cuda lint format setup native sanitize mutants clean
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

# torch first and pinned: left to itself pip takes the CUDA build of several GB.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt scikit-build-core cmake ninja
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[cpu,genai,dev]'
	touch $@

# A library that cannot be built for want of a compiler is no failure: CMake says what is missing.
# The editable install reads ibnorm_export/lib, which is git-ignored.
native: setup
	$(PYTHON) scripts/fetch_headers.py || echo "native: going on without fetched headers"
	$(CMAKE) -S custom_ops -B build/native -DIBNORM_TESTING=ON
	$(CMAKE) --build build/native --parallel
	if [ -e build/native/libibnorm_ort.so ]; then \
	  mkdir -p ibnorm_export/lib && cp build/native/libibnorm_ort.so ibnorm_export/lib/; fi

sanitize: setup
	for set in address,undefined thread; do \
	  $(CMAKE) -S custom_ops -B build/sanitize-$$set -DIBNORM_TESTING=ON -DIBNORM_SANITIZE=$$set && \
	  $(CMAKE) --build build/sanitize-$$set --parallel --target ibnorm_sanitize && \
	  build/sanitize-$$set/ibnorm_sanitize || exit 1; \
	done

mutants: native
	$(BIN)/python tests/native/mutants.py

demo: setup
	$(BIN)/ibnorm-export demo --out demo

test: native lint
	$(BIN)/python -m pytest --ignore=tests/cuda

# The CUDA kernels' own source, compiled by g++ and run on a CPU emulator; no GPU needed.
test-cuda: setup
	$(BIN)/python -m pytest tests/cuda -n 2

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
