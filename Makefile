# make demo    quantize the bundled model, print an accuracy table, generate text (minutes)
# make accuracy    measure every row of docs/accuracy.md and write it anew (hours)
# make test    run the tests
# make sanitize    run the C++ kernels' tests under the address and undefined-behaviour sanitizers
# make emulate-amx    run the amx kernels' own machine code on a processor that has AVX-512 but no AMX
# make check-native    test the kernels on this machine's processor without Python
# make emulate-arm    likewise on emulated Arm processors
# make gpu-check   everything there is for GPUs, checked and measured on this machine's (8 minutes)
# make lint    ruff, mypy, formats of Python and C++      make format   rewrite in place
# make clean   remove caches and the demo's output (keeps .venv; `rm -r .venv` starts afresh)
#
# The others but gpu-check first make .venv in this folder, with qoq in editable mode and its C++
# extension compiled; it is compiled again when its sources change.

# The Python to build .venv with: 3.11 or newer.
PYTHON ?= python3

# What to hand to `pip install` for PyTorch. On Linux the default package index serves builds with
# CUDA inside (several GB). On a machine without an NVIDIA GPU the CPU build is enough; PyTorch's
# "Get Started" page shows the index that serves it, and it can be given here:
#     make test TORCH="torch==2.13.0 --index-url <that index>"
# A torch that is already in .venv and fits the version is left alone.
TORCH ?= torch==2.13.0

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := $(wildcard src/qoq/kernels/cpu/*.cpp src/qoq/kernels/cpu/*.h)
FORMATTED := $(SOURCES) $(wildcard tests/amx/*.cpp tests/arm/*.cpp tests/arm/*.h)

.PHONY: demo accuracy test gpu-check sanitize emulate-amx check-native emulate-arm lint format clean
.DEFAULT_GOAL := test

demo: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/demo.sh

accuracy: $(STAMP)
	$(BIN)/qoq eval table examples/books-llama --rows full --resume \
	    --calibration examples/books-llama/calibration.txt --save benchmarks/results/accuracy.json
	$(BIN)/qoq eval render benchmarks/results/accuracy.json --into docs/accuracy.md --into README.md

test: $(STAMP)
	$(BIN)/python -m pytest

# Needs no C++ extension: .venv's Python if there is one, else $(PYTHON), on the sources as they lie.
# Options: make gpu-check CHECK="--only gemm --resume"
CHECK ?=
gpu-check:
	PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m qoq gpu-check $(CHECK)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

# The extension built apart from .venv's: $(call build_apart,folder,CMake option).
define build_apart
	$(BIN)/python -m pip install --quiet nanobind cmake ninja
	$(BIN)/cmake -S . -B $(1) -G Ninja -D$(2)=ON -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	    -Dnanobind_DIR=$$($(BIN)/python -m nanobind --cmake_dir)
	$(BIN)/cmake --build $(1)
endef

# The kernels' tests on a build that stops at bad memory accesses and undefined behaviour.
SANITIZE := build/sanitize
sanitize: $(STAMP)
	$(call build_apart,$(SANITIZE),QOQ_SANITIZE)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 QOQ_NATIVE=$$(ls $(SANITIZE)/_C*.so) PYTHONPATH=tests \
	    $(BIN)/python -m pytest -p helpers.native tests/kernels/cpu

# The amx kernels' tests on a build where tests/amx/emulator.cpp carries out tile instructions, and
# the emulator's own.
EMULATE := build/emulate-amx
emulate-amx: $(STAMP)
	$(call build_apart,$(EMULATE),QOQ_EMULATE_AMX)
	QOQ_TEST_AMX=only QOQ_ISA=amx QOQ_NATIVE=$$(ls $(EMULATE)/_C*.so) PYTHONPATH=tests \
	    QOQ_AMX_EMULATOR=$(CURDIR)/$(EMULATE)/libamx_emulator.so \
	    $(BIN)/python -m pytest --capture=sys -p helpers.native tests/amx tests/kernels/cpu

# The kernels without Python (tests/arm): for this machine, and for Arm on a processor with I8MM, one
# with dot products alone, and one with neither.
NEEDS = @for tool in $(1); do command -v $$tool >/dev/null || { \
    echo "$$tool is missing; on Debian or Ubuntu: apt install $(2)"; exit 1; }; done
check-native:
	$(call NEEDS,cmake,cmake)
	cmake -S . -B build/check -DQOQ_CHECK=ON
	cmake --build build/check --parallel
	build/check/check

ARM := build/arm
ARM_CXX := aarch64-linux-gnu-g++
ARM_PROCESSORS := max:i8mm neoverse-n1:dotprod cortex-a53:neon
emulate-arm:
	$(call NEEDS,cmake $(ARM_CXX) qemu-aarch64,cmake g++-aarch64-linux-gnu qemu-user)
	cmake -S . -B $(ARM) -DQOQ_CHECK=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=$(ARM_CXX) -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build $(ARM) --parallel
	for it in $(ARM_PROCESSORS); do \
	    echo "$${it%:*}" && qemu-aarch64 -cpu $${it%:*} $(ARM)/check $${it#*:} || exit 1; done

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

clean:
	rm -rf demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml CMakeLists.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "qoq needs Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null 2>&1; then \
	    echo "No NVIDIA GPU found: the CPU build of PyTorch is enough here."; \
	    echo "If pip starts to fetch gigabytes of CUDA packages, stop it and see TORCH in the Makefile."; \
	fi
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@
