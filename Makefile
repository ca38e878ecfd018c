# Everything a developer types. A target makes what it needs; nothing has to be installed by hand but
# Python 3.11+ with venv, pip, a C++ compiler and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: chat test test-fast sanitize check fix bench clean

chat: $(VENV)/.run        ## install, then chat with cria, the embedded model
	@$(BIN)/puna run

# One thread for each of the processes: torch would start one per core in each, and they would wait for one another.
test test-fast: export OMP_NUM_THREADS = 1

test: $(VENV)/.test       ## install, then run all tests
	$(BIN)/python -m pytest --numprocesses 2

test-fast: $(VENV)/.test  ## the same without the tests that take more than a few seconds
	$(BIN)/python -m pytest --numprocesses 2 -m "not slow"

# A build beside the installed one, which takes a quarter of an hour. -S: no .pth file, so that `puna` is not the
# editable one. libstdc++: else the sanitizer does not see exceptions that torch throws.
SANITIZED := build/sanitize
SANITIZED_TESTS := tests/kernels tests/weights/test_quant.py tests/engine/test_paged_cache.py
# It measures memory, which the sanitizer does not give back at once.
SANITIZED_TESTS += --deselect tests/engine/test_paged_cache.py::test_a_context_of_131072_takes_no_score_matrix

sanitize: $(VENV)/.test   ## test the kernels built with checks of addresses and undefined behaviour
	$(PIP) --no-deps --upgrade --target $(SANITIZED)/site -Cbuild-dir=$(SANITIZED)/cmake \
		-Ccmake.define.PUNA_SANITIZE=ON .
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 PUNA_KERNELS=cpu \
		PYTHONPATH=$(SANITIZED)/site:$$(echo $(VENV)/lib/python3*/site-packages) \
		$(BIN)/python -S -m pytest $(SANITIZED_TESTS)

check: $(VENV)/.check     ## lint, format and types, as CI does
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/.check       ## mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test      ## measure Puna beside Transformers on a 1B-shaped model
	$(BIN)/python benchmarks/generation.py

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.pip:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	@touch $@

$(VENV)/.run: $(VENV)/.pip pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@echo "Installing Puna into $(VENV) (torch is large: some minutes) ..."
	$(PIP) --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) --group test
	@touch $@

$(VENV)/.check: $(VENV)/.test
	$(PIP) --group check
	@touch $@
