# `make help` lists the targets. Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
BIN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
PIP := $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt
STRESS_REQUESTS ?= 1500
FUZZ_ROUNDS ?= 200000
CXX_FILES = $(shell git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.inc' 'csrc/*.cc' 'csrc/*.cu' 'tests/cpp/*.cc' 'bench/cpp/*.h' 'bench/cpp/*.cc' 'bench/cpp/*.cu')
PY_DIRS := loraserve tests tools bench

FUZZ ?= 15
FUZZ_TESTS = $(shell grep -lE '^from fuzz_budget' tests/python/*.py)
FUZZ_LONGEST = tests/python/test_openapi_requests.py

.PHONY: help setup demo test test-all stress fuzz soak clients check cuda-build stubs openapi tidy spills bench bench-cpp fmt clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

# What runs the product and what builds it.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "LoRAServe needs Python 3.10 or newer; set PYTHON=..."; exit 1; }
	@command -v c++ >/dev/null || { echo "LoRAServe needs a C++20 compiler (Debian: apt install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) 'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.24' ninja grpcio-tools
	$(PIP) $$($(PY) tools/requirements.py)
	touch $@

# What only tests and checks want: PyTorch, transformers, PEFT, linters.
$(VENV)/.test: $(VENV)/.runtime
	$(PIP) $$($(PY) tools/requirements.py test check sim)
	@$(PIP) $$($(PY) tools/requirements.py transfer) || \
	  echo "no wheels of UCX here: loraserve-transfer is not built and its tests are skipped"
	touch $@

# Rebuilds what changed in csrc/ and proto/; quick when nothing did.
setup: $(VENV)/.runtime ## make .venv and build the engine into it
	@echo "building the engine (some minutes the first time)"
	$(BIN) $(PIP) --no-build-isolation --no-deps -C cmake.define.LORASERVE_BUILD_TESTS=ON -e .
	$(PY) tools/generate_protos.py . >/dev/null

demo: setup ## start a small cluster and watch it answer
	$(PY) -m loraserve.cli demo $(DEMO_ARGS)

test: $(VENV)/.test setup ## the tests (any machine, no GPU)
	$(PY) tools/run_tests.py -rs tests

stress: $(VENV)/.runtime ## engine and transfer under address, undefined-behaviour and thread sanitizers
	$(BIN) cmake --preset asan >/dev/null && $(BIN) cmake --build --preset asan
	UBSAN_OPTIONS=halt_on_error=1 timeout 600 build/asan/stress_engine $(STRESS_REQUESTS)
	UBSAN_OPTIONS=halt_on_error=1 timeout 600 build/asan/stress_cuda_kernels 40
	UBSAN_OPTIONS=halt_on_error=1 timeout 600 build/asan/fuzz_transfer $(FUZZ_ROUNDS)
	$(BIN) cmake --preset tsan >/dev/null && $(BIN) cmake --build --preset tsan
	timeout 600 $$(setarch -R true 2>/dev/null && echo setarch -R) build/tsan/stress_engine $(STRESS_REQUESTS)

fuzz: $(VENV)/.test setup ## the readers and state machines against far more hostile input
	@# Two at a time: the longest, which waits for a cluster's answers, beside all others.
	@# No second run: it would draw other inputs, and what was found once would pass.
	LORASERVE_FUZZ=$(FUZZ) $(PY) -m pytest -p no:cacheprovider $(FUZZ_LONGEST) & \
	  longest=$$!; LORASERVE_FUZZ=$(FUZZ) $(PY) -m pytest -p no:cacheprovider $(filter-out $(FUZZ_LONGEST),$(FUZZ_TESTS)); \
	  others=$$?; wait $$longest && exit $$others

soak: $(VENV)/.test setup ## a cluster under churn and kills, a thousand loads
	$(PY) -m pytest tests -m long -rs

clients: $(VENV)/.test setup ## clients of other projects, unmodified; nightly: it installs them
	$(PY) -m pytest -m "long or clients" -rs tests/integration/test_client_*.py

test-all: test stress fuzz soak ## everything the project tests

check: $(VENV)/.test setup ## format, lint, types, stubs, layers
	$(VENV)/bin/ruff format --check $(PY_DIRS)
	$(VENV)/bin/ruff check $(PY_DIRS)
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)
	$(VENV)/bin/mypy
	$(PY) tools/check_stubs.py
	$(PY) -m pytest tests/test_layers.py
	$(MAKE) cuda-build
	$(MAKE) tidy
	$(MAKE) spills

cuda-build: $(VENV)/.runtime ## compile the CUDA backend for sm_80 and sm_90a and look at its machine code
	@if ! command -v nvcc >/dev/null; then echo "cuda-build: skipped, there is no nvcc on PATH"; else \
	  $(BIN) nice cmake --preset cuda >/dev/null && \
	  $(BIN) nice cmake --build --preset cuda --target loraserve_backend && \
	  $(PY) tools/check_sass.py build/cuda; fi

tidy: $(VENV)/.test ## clang-tidy over the engine
	$(BIN) cmake --preset cpu >/dev/null
	$(BIN) $(PY) tools/run_tidy.py

spills: $(VENV)/.test ## the CPU kernels as built: accumulators in registers, no shared functions (needs binutils)
	$(BIN) cmake --preset cpu >/dev/null
	$(BIN) cmake --build --preset cpu --target loraserve_backend
	$(PY) tools/check_spills.py build/cpu/libloraserve_backend.a

CXX_BENCHES := attention gemm paged_tiles scheduler engine_step pages
bench-cpp: $(VENV)/.test ## kernels, scheduler and pages one by one (needs Google Benchmark)
	@echo '#include <benchmark/benchmark.h>' | c++ -E -x c++ - >/dev/null 2>&1 || \
	  { echo "bench-cpp needs Google Benchmark (Debian: apt install libbenchmark-dev)"; exit 1; }
	$(BIN) cmake --preset cpu -B build/bench -DLORASERVE_BUILD_BENCH=ON >/dev/null
	$(BIN) cmake --build build/bench $(CXX_BENCHES:%=--target bench_%)
	@set -e; for name in $(CXX_BENCHES); do build/bench/bench_$$name; done

stubs: setup ## rewrite the type stubs of the extension
	$(PY) tools/check_stubs.py --write

openapi: setup ## rewrite docs/openapi.json
	$(PY) -m loraserve.gateway.openapi > docs/openapi.json

bench: $(VENV)/.test setup ## measure against transformers and PEFT; JSON under bench/results
	$(PY) bench/engine_vs_transformers.py --out bench/results/engine_vs_transformers.json

fmt: $(VENV)/.test ## format the sources in place
	$(VENV)/bin/ruff format $(PY_DIRS)
	$(VENV)/bin/ruff check --fix -q $(PY_DIRS)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean: ## remove everything that was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis loraserve/v1/*_pb2*
