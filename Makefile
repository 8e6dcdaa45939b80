# `make help` lists the targets. Everything is installed into .venv, nothing outside this folder.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: help setup test test-all check fmt clean
help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  %-10s %s\n", $$1, $$2}'

$(VENV)/.installed: pyproject.toml constraints.txt CMakeLists.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt \
	  'scikit-build-core>=0.10' 'pybind11>=2.13' 'cmake>=3.24' ninja \
	  pytest hypothesis torch transformers peft safetensors numpy xxhash ruff mypy clang-format==19.1.7
	touch $@

setup: $(VENV)/.installed ## make .venv and build the C++ engine into it
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m pip install -q --disable-pip-version-check \
	  --no-build-isolation --no-deps -C cmake.define.LORASERVE_BUILD_TESTS=ON -e .

test: setup ## the tests (any machine, no GPU)
	$(PY) -m pytest tests

test-all: test ## everything the project tests

check: $(VENV)/.installed ## format, lint, types
	$(VENV)/bin/ruff format --check loraserve tests
	$(VENV)/bin/ruff check loraserve tests
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cc')
	$(VENV)/bin/mypy

fmt: $(VENV)/.installed ## format the sources in place
	$(VENV)/bin/ruff format loraserve tests
	$(VENV)/bin/ruff check --fix -q loraserve tests
	$(VENV)/bin/clang-format -i $$(git ls-files -co --exclude-standard 'csrc/*.h' 'csrc/*.cc')

clean: ## remove everything that was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
