# On a fresh machine with Python 3.11 and a C++ compiler:
#   make demo    sets up, then does the main job on real input
#   make test    sets up, then lints and runs the core suite
# Other suites, each of which sets up what it needs (.ci/run runs all but test-fuzz, test-older-processors, test-qemu and
# test-compat):
#   make test-generation   cached decoding, text generation, quantised weights
#   make test-faults       planted faults, each of which verification must name
#   make test-families     every model family and grouping, and timm's checkpoint folders
#   make test-runtimes     OpenVINO, older versions of ONNX Runtime, and ONNX Runtime in Node and WebAssembly, where Node is installed
#   make test-browser      the HTML reports in a headless Chromium, where one is installed
#   make test-docs         the documentation: its site built strictly, its layout in Chromium, and every console example run
#   make test-targets      what exports for other runtimes compute there, and the examples in C++ and for a browser
#   make test-processors   the CPU kernels on an emulated arm64, and on an x86-64 without AVX, where qemu-user is installed;
#                          the tests of test-qemu at full speed with newer instruction sets hidden, where CPUID can be masked
#   make test-cuda         the CUDA kernels on a CPU emulator
#   make test-tensorrt     the TensorRT plugin, and engines for TensorRT-RTX, without a GPU
#   make test-serving      a real Triton and the text endpoint, on loopback
#   make test-fuzz         damaged and hostile files for every reader, for MINUTES (5)
#   make test-older-processors  all tests of the operator, the graph, the runtimes and verification, with newer instruction
#                          sets hidden: at full speed where CPUID can be masked, else test-qemu
#   make test-qemu         one test of every kind of computation on emulated older processors, where qemu-user is installed
#   make test-harness      models in EleutherAI's evaluation harness
#   make test-wheels       what a release publishes, each wheel installed where there is no compiler
#   make test-compat       the library's tests on ONNX Runtime 1.20.1
# Documentation:
#   make docs          builds the site into build/site; nothing is loaded from another host
# Native libraries:
#   make native        sets up, then builds the libraries in build/native and for the development install
#   make native-cuda   builds the library with the CUDA kernels in build/native-cuda; needs nvcc, no GPU
#   make sanitize      runs the kernels under AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer
#   make mutants       plants kernel bugs, which the tests must catch, and removes checks of verification, one at a time
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CMAKE  := $(BIN)/cmake

# Every Python process that a target starts reads and leaves bytecode, whatever the environment asks for: without it
# each one compiles torch and transformers again, which takes ten seconds.
unexport PYTHONDONTWRITEBYTECODE

# Installs requirements and compiles what is new among them, on all cores (pip would use one), but for the tests that
# packages ship. Some packages ship files that are not valid Python for every version: compileall reports failure for
# them, and nothing imports them.
PIP     := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests/'
install  = $(PIP) $(1) && { $(COMPILE) $(VENV)/lib/python3*/site-packages || true; }
# torch first and pinned: left to itself pip takes the CUDA build of several GB. The editable install reads
# ibnorm_export/lib, which is git-ignored and filled by `library`, so it compiles nothing itself.
EDITABLE := --no-build-isolation --config-settings=wheel.cmake=false --editable
EXTRAS   := cpu,genai,serve,demo,evaluate,dev
# One of the seven architectures that are shipped; `make test-cuda` compiles for another. One takes over a minute of one
# core, and CI has no time for seven.
CUDA_ARCHITECTURES ?= 80-real

# One worker for each core, each with one thread: 0.6 of the time of one worker with two threads. Each worker takes a run
# of consecutive tests, because the tests of a file share exported models, and takes from the other when it has finished.
# A folder for models that several suites use: with SHARED=--shared-folder=PATH each is exported once for all of them.
SHARED ?=
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SHARED) -n auto --maxprocesses 4 --dist worksteal
CPP := $(shell find custom_ops tests -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test-cuda-tensorrt test-generation-faults test-processors demo runtimes test-runtimes library test test-fuzz test-generation test-faults test-families test-browser test-docs docs families training-checkpoints test-targets test-cuda test-tensorrt test-serving test-older-processors test-qemu test-harness test-wheels extras core-tests lint format setup native native-cuda sanitize test-compat mutants clean test-tools
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.tools: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt scikit-build-core cmake ninja
	touch $@

# The project's own bytecode names the hash of its source, not the time: a file that is edited, restored or checked out
# within the same second is compiled again.
$(VENV)/.ready: $(VENV)/.tools pyproject.toml
	$(PIP) torch
	$(call install,$(EDITABLE) '.[$(EXTRAS)]')
	$(BIN)/python -m compileall -qq -j 0 --invalidation-mode checked-hash ibnorm_export cli models tests benchmarks
	touch $@

# The packages of an optional suite, once for each pyproject.toml.
$(VENV)/.extra-%: $(VENV)/.ready
	$(call install,$(EDITABLE) '.[$*]')
	touch $@
# Triton's own binary (150 MB). Its package asks for NumPy 1, for an interface that is not used here: hence --no-deps.
$(VENV)/.triton: $(VENV)/.ready
	$(PIP) --no-deps nvidia-pytriton
	touch $@

# A machine without a compiler is not a failure: CMake reports what is missing and builds nothing.
library: $(VENV)/.tools
	$(PYTHON) scripts/fetch_headers.py || echo "library: continuing without fetched headers"
	$(CMAKE) -S custom_ops -B build/native -DIBNORM_TESTING=ON
	$(CMAKE) --build build/native --parallel
	if [ -e build/native/libibnorm_ort.so ]; then \
	  mkdir -p ibnorm_export/lib && cp build/native/libibnorm_ort.so ibnorm_export/lib/new.$$$$ && \
	  mv -f ibnorm_export/lib/new.$$$$ ibnorm_export/lib/libibnorm_ort.so; fi  # several targets may do this at once

# Both at once: one waits for the network and the disk, the other for the compiler.
native:
	$(MAKE) --no-print-directory --jobs=2 setup library

# The CPU kernels of build/native, which take 80 s of one core to compile, where there are any.
CPU_KERNELS = $$(ls $(CURDIR)/build/native/libibnorm_cpu.a 2> /dev/null)

native-cuda: native
	$(CMAKE) -S custom_ops -B build/native-cuda -DIBNORM_CUDA=ON "-DIBNORM_CPU_KERNELS=$(CPU_KERNELS)" \
	  "-DCMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
	$(CMAKE) --build build/native-cuda --parallel

sanitize: setup
	$(PYTHON) scripts/fetch_headers.py
	for set in address,undefined thread; do \
	  $(CMAKE) -S custom_ops -B build/sanitize-$$set -DIBNORM_TESTING=ON -DIBNORM_SANITIZE=$$set && \
	  $(CMAKE) --build build/sanitize-$$set --parallel --target ibnorm_sanitize ibnorm_sanitize_session && \
	  build/sanitize-$$set/ibnorm_sanitize && build/sanitize-$$set/ibnorm_sanitize_session || exit 1; \
	done

# The oldest ONNX Runtime that is supported, in a separate folder.
test-compat: native
	$(BIN)/python -m pip install --quiet --no-compile --no-deps --upgrade --target build/onnxruntime-1.20 onnxruntime==1.20.1
	$(COMPILE) build/onnxruntime-1.20
	PYTHONPATH=build/onnxruntime-1.20 $(BIN)/python -c "import onnxruntime as o; assert o.__version__ == '1.20.1', o.__version__"
	PYTHONPATH=build/onnxruntime-1.20 $(BIN)/python -m pytest -q tests/custom_ops/ort/test_ort_library.py

# Compiles the kernels for each processor, and calls them through a pipe (Debian: g++-aarch64-linux-gnu, qemu-user). Then
# the tests of test-qemu without it.
test-processors: native
	$(BIN)/python -m pytest $(SHARED) tests/custom_ops/emulated tests/processors
	if $(BIN)/python -m tests.processors.run --possible; then \
	  $(MAKE) --no-print-directory --old-file=native older-tests-avx2 older-tests-sse4.2 "OLDER_TESTS=$(QEMU_TESTS)"; fi

test-harness: native $(VENV)/.extra-lm-eval-test
	$(BIN)/python -m pytest $(SHARED) tests/evaluation/harness

# The compiler works for a minute. A wheel for arm64 is built where aarch64-linux-gnu-g++ is installed.
test-wheels: native $(VENV)/.extra-wheel-test
	$(BIN)/python -m pytest $(SHARED) tests/packaging

mutants: native
	$(BIN)/python -m tests.custom_ops.ort.mutants --record benchmarks/results/mutants.json
	$(BIN)/python -m tests.verifier.faults.mutants --record benchmarks/results/verifier_mutants.json

demo: native
	$(BIN)/ibnorm-export demo --out demo

test: native
	$(MAKE) --no-print-directory --jobs=2 lint core-tests

core-tests:
	$(PYTEST) --junit-xml=build/test-results/core.xml $(addprefix --ignore=tests/,docs evaluation/harness generation runtimes/others verifier/faults models/families browser packaging targets custom_ops/cuda custom_ops/emulated custom_ops/tensorrt processors serving)

# Cached decoding, generation in every form, and quantised weights. Most of the time is export.
test-generation: native
	$(PYTEST) tests/generation

# Both in one run, whose workers import PyTorch once.
test-generation-faults: native
	$(PYTEST) tests/generation tests/verifier/faults

# Planted faults must fail and be named, and correct exports must pass. The whole tables take half an hour:
# python -m benchmarks.run planted_faults --record
test-faults: native
	$(PYTEST) tests/verifier/faults

# Each case has a number, from which it is made again: python -m benchmarks.run fuzz --reader NAME --case NUMBER
MINUTES ?= 5
test-fuzz: native
	$(BIN)/python -m benchmarks.run fuzz --minutes $(MINUTES)

# timm needs torchvision, whose wheels are built for CUDA and cannot be imported beside a CPU build of torch; transformers
# then fails too. Both go into a separate folder, and `vision_operators` defines the operators that are missing.
VISION := PYTHONPATH=build/vision:.
build/vision/.ready: $(VENV)/.tools constraints.txt
	$(PIP) --no-deps --upgrade --target build/vision timm torchvision pillow
	$(COMPILE) build/vision || true  # as above
	touch $@

test-families: native build/vision/.ready
	$(VISION) $(PYTEST) -p tests.support.vision_operators tests/models/families tests/models/importers/test_timm_train.py \
	  tests/evaluation/test_vision.py

# Checkpoints of eight training codes, written by their own functions: benchmarks/results/training_checkpoints.json. litgpt
# asks for older versions of packages that it works with, hence --no-deps.
build/training/.ready: $(VENV)/.tools constraints.txt
	$(PIP) --no-deps --upgrade --target build/training lightning pytorch-lightning lightning-utilities torchmetrics \
	  litgpt jsonargparse docstring_parser typeshed_client accelerate psutil fsspec requests urllib3 charset_normalizer \
	  idna certifi timm torchvision pillow
	$(COMPILE) build/training || true  # as above
	touch $@

training-checkpoints: native build/training/.ready
	PYTHONPATH=build/training:. $(BIN)/python -m benchmarks.run training_checkpoints

# benchmarks/results/families.md: every preset of the paper with random weights. Takes hours; recorded rows are kept.
families: native build/vision/.ready
	$(VISION) $(BIN)/python -c "import sys, tests.support.vision_operators; from benchmarks.run import main; sys.exit(main())" \
	  families --record --table benchmarks/results/families.md

# The reports in Chromium (Debian: apt-get install chromium); the test lets it reach no network.
test-browser: native $(VENV)/.extra-browser-test
	$(BIN)/python -m pytest $(SHARED) tests/browser

# A warning is an error. Pages of the reference are written from the code: scripts/site_hooks.py
docs: $(VENV)/.extra-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --clean

test-docs: native $(VENV)/.extra-docs $(VENV)/.extra-browser-test
	$(BIN)/python -m pytest $(SHARED) tests/docs

# The packages that run exports in Node and in a browser (450 MB), where npm is installed. Their scripts, which would fetch
# more, do not run.
build/node/.ready: tests/node/package.json
	mkdir -p build/node && cp tests/node/package.json build/node/
	if command -v npm > /dev/null; then \
	  npm install --prefix build/node --ignore-scripts --no-package-lock --no-audit --no-fund --loglevel=error && touch $@; \
	else \
	  echo "build/node: npm is not installed, so tests in Node are skipped"; \
	fi

# What exports for other runtimes compute there, and the program of examples/cpp, built and run. Without npm, what needs
# Node is skipped; without Chromium, what needs a browser.
test-targets: native $(VENV)/.extra-browser-test $(VENV)/.extra-litert $(VENV)/.extra-openvino build/node/.ready
	$(BIN)/python -m pytest $(SHARED) tests/targets

# Older versions of ONNX Runtime, each in its own environment.
OLDER := $(addprefix build/runtimes/onnxruntime-,1.18.1 1.20.1 1.22.1 1.24.4)
.PRECIOUS: build/runtimes/%/.ready
build/runtimes/onnxruntime-%/.ready: $(VENV)/.tools
	$(PYTHON) -m venv --without-pip $(@D)
	$(BIN)/python -m pip --python $(@D)/bin/python install --quiet --no-compile onnxruntime==$* numpy==1.26.4
	touch $@
runtimes: $(addsuffix /.ready,$(OLDER)) build/node/.ready

# Files in other runtimes. What takes hours or other packages is recorded: python -m benchmarks.run runtimes
test-runtimes: native $(VENV)/.extra-openvino runtimes
	$(BIN)/python -m pytest $(SHARED) tests/runtimes/others

# What simplifiers, quantisers and converters do to an exported file.
test-tools: native $(VENV)/.extra-tools-test
	$(BIN)/python -m benchmarks.run tools

# The source of the CUDA kernels, compiled by g++ and run on a CPU emulator. Where nvcc is installed, also what it makes of
# them, and a proof that they have no race. No GPU is needed.
test-cuda: $(VENV)/.extra-cuda-test
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) tests/custom_ops/cuda

# The plugin on the same emulator, in the registries of TensorRT (lean runtime) and of TensorRT-RTX, and engines that
# TensorRT-RTX builds. No GPU is needed; the packages take 140 MB.
test-tensorrt: $(VENV)/.extra-tensorrt-test
	$(BIN)/python scripts/fetch_headers.py
	$(PYTEST) tests/custom_ops/tensorrt

# Both in one run, whose workers import PyTorch once and build the emulated kernels once.
test-cuda-tensorrt: $(VENV)/.extra-cuda-test $(VENV)/.extra-tensorrt-test
	$(BIN)/python scripts/fetch_headers.py
	PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) tests/custom_ops/cuda tests/custom_ops/tensorrt

# Triton on the generated repositories, and the text endpoint, called by their usual clients.
test-serving: native $(VENV)/.extra-serve-test $(VENV)/.triton
	$(BIN)/python -m pytest $(SHARED) tests/serving

# With newer instruction sets hidden from every library: tests/processors/run.py. Everything that computes is tested, and
# each process of a run makes sure that it sees the older processor.
OLDER_TESTS := tests/op tests/custom_ops/ort tests/graph tests/runtimes tests/verifier \
  --ignore=tests/runtimes/others --ignore=tests/verifier/faults
test-older-processors: native
	if $(BIN)/python -m tests.processors.run --possible; then \
	  $(MAKE) --no-print-directory older-tests-avx2 older-tests-sse4.2; \
	else \
	  $(MAKE) --no-print-directory test-qemu; \
	fi

older-tests-%:
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.processors.run $* env $(PYTEST) --processor=$* \
	  --junit-xml=build/test-results/older-$*.xml $(OLDER_TESTS)

# The judge of instructions that a processor does not have, which a mask does not forbid (Debian: apt-get install
# qemu-user): Haswell has AVX2, Nehalem SSE4.2. Everything runs ten times slower there, so these are few: the accuracy of
# the operator in PyTorch and ONNX Runtime, the kernels of each instruction set, and a whole model against PyTorch. The
# model is traced here and only runs there.
QEMU_TESTS := $(addprefix tests/op/test_torch_op.py::test_,float32_accuracy half_accuracy) \
  $(addprefix tests/op/test_onnx_functions.py::test_,float32_accuracy half_accuracy) \
  $(addprefix tests/custom_ops/ort/test_kernels.py::test_,accuracy denormal_tiny_and_huge skip_is_bit_equal_to_the_pair) \
  tests/custom_ops/ort/test_ort_library.py::test_every_type_runs_fused tests/verifier/test_verify.py::test_good_files_pass
QEMU_PYTEST = $(BIN)/python -m pytest -v -p no:cacheprovider -p no:xdist --shared-folder=build/qemu/shared --few-widths \
  -k "not onnx.reference" $(QEMU_TESTS)
test-qemu: native
	if command -v qemu-x86_64 > /dev/null; then \
	  rm -rf build/qemu && mkdir -p build/qemu && OMP_NUM_THREADS=1 $(QEMU_PYTEST) && \
	  $(MAKE) --no-print-directory --jobs=2 qemu-tests-Haswell qemu-tests-Nehalem; \
	else \
	  echo "test-qemu: skipped, because qemu-x86_64 is not installed (Debian: apt-get install qemu-user)"; \
	fi

# Without the features that qemu lacks, each of which is a warning at every start. Output is not buffered, so that a slow
# run shows where it is.
qemu-tests-Haswell: PROCESSOR := avx2
qemu-tests-Nehalem: PROCESSOR := sse4.2
qemu-tests-%:
	OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 qemu-x86_64 -cpu $*,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm \
	  $(QEMU_PYTEST) --processor=$(PROCESSOR) --junit-xml=build/test-results/qemu-$*.xml

# The packages of all optional suites, in one call of pip. They are not compiled: a suite compiles what it imports.
OPTIONAL := browser-test cuda-test docs litert lm-eval-test openvino serve-test tensorrt-test tools-test wheel-test
comma := ,
space := $(subst ,, )
extras: $(VENV)/.extras $(VENV)/.triton build/vision/.ready
$(VENV)/.extras: $(VENV)/.ready
	$(PIP) $(EDITABLE) '.[$(subst $(space),$(comma),$(OPTIONAL))]'
	touch $@ $(addprefix $(VENV)/.extra-,$(OPTIONAL))

# mypy checks a copy that is laid out as the installed package is.
lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	rm -rf build/typecheck
	mkdir -p build/typecheck
	cp -r ibnorm_export pyproject.toml build/typecheck/
	cp -r cli models build/typecheck/ibnorm_export/
	cd build/typecheck && ../../$(BIN)/mypy --cache-dir=../mypy-cache ibnorm_export

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) build dist demo
