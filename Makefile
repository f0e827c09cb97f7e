# make demo   - set up, train MODEL on real photographs, evaluate, write pictures
# make test   - set up, lint, build, run the test suite
# make docs   - the site from docs/ and the docstrings, in build/site
# make compat - build with the oldest supported torch, under PYTHON, and try its build and the newest torch's in each other
# make wheel  - build dist/*.whl: one with the kernels for Linux (CUDA for WHEEL_ARCHS), one of Python alone
# make wheel-check - try both in new environments under PYTHON
# make cuda-archs - compile the CUDA kernels for every architecture that is supported
# make rehearsal - call `make gpu`'s script with the oldest torch on a fake GPU
# make gpu    - on a machine with a GPU: build for it, CUDA tests, sanitizer, benchmarks, profile: see docs/gpu.md
# make gpu-package - lay what such a machine needs, if it has no network, into .gpu: libraries for GPU_ARCH, packages for GPU_PYTHON
PYTHON ?= python3
MODEL ?= efficientdet_lite0
VENV := .venv
BIN := $(VENV)/bin
NATIVE := $(shell find csrc setup.py pyproject.toml -type f)
# Without a GPU one architecture is enough to see that the CUDA kernels compile; with one, setup.py builds for it.
ifeq ($(shell command -v nvidia-smi),)
export TORCH_CUDA_ARCH_LIST ?= 9.0
endif

.PHONY: demo test test-full lint types build docs compat rehearsal wheel wheel-check cuda-archs gpu gpu-package clean

$(VENV)/ready: requirements/test.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -r requirements/build.txt -r requirements/test.txt -c requirements/constraints.txt
	touch $@

# Built in place and installed editable, so that the tests see the sources. pip alone would compile every file anew each time.
$(VENV)/built: $(VENV)/ready $(NATIVE)
	$(BIN)/python setup.py -q build_ext --inplace
	EFFDET_FAST_EXTENSION=0 $(BIN)/pip install -q --no-build-isolation --no-deps -e .
	$(BIN)/effdet-fast doctor
	touch $@

build: $(VENV)/built

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests benchmarks -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror

types: $(VENV)/ready
	$(BIN)/mypy

# One process per core, one thread each: threads that share a core with another process wait for each other.
# Files in order, not by their number of tests: those that compile have few, and would be left to one core at the end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=15

test: lint types build
	$(PYTEST) -m "not slow" --cov=effdet_fast --cov-report=term --cov-fail-under=90 tests

test-full: lint types build
	$(PYTEST) tests

# The notice that is switched off announces another tool.
docs: $(VENV)/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

demo: build
	$(BIN)/python examples/neon_trees.py --model $(MODEL)

# The newest torch's environment has its own Python, whatever PYTHON is here.
compat:
	env -u MAKEFLAGS -u PYTHON $(MAKE) build
	tests/compat.sh $(BIN) $(if $(filter python3,$(PYTHON)),python3.12,$(PYTHON))

rehearsal:
	env -u MAKEFLAGS -u PYTHON $(MAKE) build
	tests/compat.sh $(BIN) $(if $(filter python3,$(PYTHON)),python3.12,$(PYTHON)) rehearsal

CUDA_ARCHS := 7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX
cuda-archs: $(VENV)/ready
	EFFDET_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$(CUDA_ARCHS)" $(BIN)/python setup.py -q build_ext \
		--build-temp build/cuda-archs --build-lib build/cuda-archs

# SOURCE_DATE_EPOCH, the commit's time, keeps the time of the build out of the wheels.
WHEEL_ARCHS ?= $(CUDA_ARCHS)
WHEEL := $(BIN)/python -W ignore setup.py -q build --build-base build/wheel bdist_wheel --dist-dir
wheel: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || date +%s)
wheel: export EFFDET_FAST_CUDA ?= 1
wheel: $(VENV)/ready
	rm -rf build/wheel/lib* build/wheel/unaudited dist/effdet_fast-*.whl
	EFFDET_FAST_WHEEL=1 TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHS)" $(WHEEL) build/wheel/unaudited
	$(BIN)/python -m tests.wheels --repair build/wheel/unaudited/*.whl dist
	EFFDET_FAST_EXTENSION=0 $(WHEEL) dist
	$(BIN)/python -m tests.wheels dist/*.whl

wheel-check:
	for wheel in dist/*.whl; do tests/wheel.sh $$wheel $(PYTHON) || exit; done

gpu:
	$(PYTHON) benchmarks/gpu.py

GPU_ARCH ?= 9.0
GPU_PYTHON ?= 3.12
gpu-package: $(VENV)/ready
	rm -rf .gpu
	EFFDET_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST="$(GPU_ARCH)" $(BIN)/python setup.py -q build_ext --build-lib .gpu/built
	mv .gpu/built/effdet_fast/kernels_*.so .gpu/
	rm -r .gpu/built
	TORCH_CUDA_ARCH_LIST="$(GPU_ARCH)" $(BIN)/python -m benchmarks.variants .gpu/variants
	$(BIN)/pip install -q --target .gpu/site --no-deps --no-compile --only-binary :all: --implementation cp \
		--python-version $(GPU_PYTHON) --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 -r requirements/gpu.txt -c requirements/constraints.txt
	$(BIN)/python -m benchmarks.gpu_package

clean:
	rm -rf build dist .gpu $(VENV) .venv-compat-* effdet_fast/*.so
