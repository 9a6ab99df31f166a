# Everything happens in .venv; a second call of a target finds it set up and is quick.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3.11
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet
SANITIZE := build/sanitize

NATIVE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.PHONY: help setup demo test sweep bench lint format sanitize fuzz wheel-check clean

help:  ## Show the targets.
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

# ---- set-up: a virtual environment, then torch, then the package with its build tools

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	touch $@

# The name of the file holds the torch that was asked for, so that another TORCH is installed anew.
TORCH_MADE := $(VENV)/.torch-$(subst :,_,$(subst /,_,$(subst =,_,$(TORCH))))
$(TORCH_MADE): $(VENV)/.made
	rm -f $(VENV)/.torch-*
	$(PIP) install "$(TORCH)"
	touch "$@"

# Without build isolation the native build keeps its cache, and nothing but torch above decides on torch.
$(VENV)/.built: $(TORCH_MADE) $(NATIVE)
	$(PIP) install cmake ninja $$($(BIN)/python -c 'import tomllib; \
	  print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])')
	$(PIP) install --no-build-isolation --config-settings=cmake.define.HFPP_WERROR=ON \
	  --editable '.[test,lint]' "$(TORCH)"
	touch $@

setup: $(VENV)/.built  ## Make .venv with torch and the package, editable.

# ---- what one does with it

demo: setup  ## Train a small model over four pipeline ranks and check it against the plain model.
	$(BIN)/hfpp train --pp 4 --schedule Interleaved1F1B --verify --out demo --force
	$(BIN)/python -c 'import json; \
	  loss = json.load(open("demo/summary.json"))["result"]["final_nats_per_byte"]; \
	  assert loss < 3.0, f"{loss} nats per byte: byte frequencies alone give 3.26"'

test: setup  ## Run the tests.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

sweep: setup  ## Split every class of transformers, compare, and write docs/architectures.md.
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.sweep

bench: setup  ## Run the benchmarks and write their tables to bench/results.
	@for script in bench/bench_*.py; do \
	  echo "== $$script"; OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python $$script --write || exit 1; done

lint: setup  ## Check format, style, types, stubs and the direction of imports.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.hpp
	$(BIN)/mypy
	$(BIN)/stubtest --allowlist csrc/stubtest-allowlist.txt --ignore-unused-allowlist hfpp._core
	$(BIN)/lint-imports

format: setup  ## Format the sources and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i csrc/*.cpp csrc/*.hpp

# The sanitized module is a wheel in an environment of its own, without torch; the tests are copied
# beside it, so that what they import is the wheel and not the source tree.
sanitize: setup  ## Run the native checks and the table tests under ASan and UBSan.
	cmake=$$(command -v $(BIN)/cmake || command -v cmake); \
	$$cmake -S . -B $(SANITIZE)/core -DCMAKE_BUILD_TYPE=Debug -DHFPP_SANITIZE=ON -DHFPP_WERROR=ON \
	  -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON >/dev/null && \
	$$cmake --build $(SANITIZE)/core --target core_test
	$(SANITIZE)/core/core_test
	test -d $(SANITIZE)/venv || $(BIN)/python -m venv $(SANITIZE)/venv
	$(SANITIZE)/venv/bin/pip --disable-pip-version-check --quiet install pytest pytest-timeout \
	  hypothesis numpy
	$(SANITIZE)/venv/bin/pip --disable-pip-version-check --quiet install --no-deps --force-reinstall \
	  --config-settings=cmake.define.HFPP_SANITIZE=ON --config-settings=cmake.build-type=Debug \
	  --config-settings=build-dir=$(SANITIZE)/module .
	rm -rf $(SANITIZE)/tree && mkdir -p $(SANITIZE)/tree && cp -r tests pyproject.toml $(SANITIZE)/tree/
	cd $(SANITIZE)/tree && ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  ../venv/bin/python -m pytest -p no:cacheprovider -m "not torch" \
	  -k "not memory_is_bounded" \
	  tests/test_core.py tests/plan/test_placement.py tests/plan/test_partition.py \
	  tests/plan/test_tensor_shapes.py tests/plan/partitioning/test_balance.py tests/plan/schedules/test_verifier_faults.py \
	  tests/plan/schedules/test_schedule_files.py

# Five minutes each, from the corpus of the tests; what breaks is left in build/fuzz. Needs Clang.
FUZZ_SECONDS ?= 300
fuzz: setup  ## Fuzz the readers of schedule files under ASan and UBSan.
	cmake=$$(command -v $(BIN)/cmake || command -v cmake); \
	$$cmake -S . -B build/fuzz -DCMAKE_CXX_COMPILER=$${CLANGXX:-clang++} -DCMAKE_BUILD_TYPE=Release \
	  -DHFPP_FUZZ=ON -DCMAKE_DISABLE_FIND_PACKAGE_pybind11=ON >/dev/null && \
	$$cmake --build build/fuzz --target fuzz_csv fuzz_json
	for kind in csv json; do \
	  mkdir -p build/fuzz/$$kind && \
	  build/fuzz/fuzz_$$kind -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=1024 -timeout=10 -max_len=4096 \
	    -artifact_prefix=build/fuzz/ -dict=tests/plan/schedules/corpus/$$kind.dict \
	    build/fuzz/$$kind tests/plan/schedules/corpus/$$kind || exit 1; done

wheel-check: setup  ## Build sdist and wheel, and use the wheel in an empty environment.
	.ci/wheel-check $(BIN)/python

clean:  ## Remove what was built, .venv included.
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find hfpp tests bench -name __pycache__ -type d -prune -exec rm -rf {} +
