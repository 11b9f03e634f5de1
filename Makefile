# `make demo` and `make test` do all their set-up themselves; they need python3 and nothing else.
# On Linux, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves PyTorch's CUDA libraries, 3 GB.

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= test
WORKERS ?= 2

BIN := $(VENV)/bin
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) $(TESTS)
NONE_SELECTED = [ $$? -eq 5 ]# pytest's exit status when a selection holds no test

.PHONY: demo test test-fast test-slow test-tpu test-full test-latest lint types format benchmark help

demo: $(VENV)/ready
	@$(BIN)/python examples/demo.py

test: lint types test-fast

test-full: lint types $(VENV)/ready
	@$(PYTEST)

# The tests of a file share what they compile.
test-fast: $(VENV)/ready
	@$(PYTEST) --dist loadfile -m "not slow" || $(NONE_SELECTED)

test-slow: $(VENV)/ready
	@$(PYTEST) -m slow || $(NONE_SELECTED)

test-tpu: $(VENV)/ready
	@$(PYTEST) -m "slow and tpu" || $(NONE_SELECTED)

# What is compiled and computed, as far as it needs no PyTorch, with the newest JAX of the supported range, where an
# interpreter for it exists. Only that environment has the compiler for TPUs, so slow tests that need it run here too.
LATEST_TESTS = $(addprefix tests/,qwen2_jax/attention qwen2_jax/moe qwen2_jax/test_dual_chunk.py \
  qwen2_jax/test_generation.py qwen2_jax/test_model.py qwen2_jax/test_projection.py qwen2_jax/test_target.py \
  qwen2_jax/test_yarn.py $(addprefix qwen2_jax/evaluation/,test_bench.py test_outputs.py test_scoring.py) \
  sharding/planner/test_beside_xla.py sharding/planner/test_compiled.py sharding/test_attention.py \
  sharding/test_experts.py sharding/test_tpu.py train/test_guard.py train/test_loss.py train/test_step.py)
test-latest:
	@if [ -n "$(LATEST_PYTHON)" ]; then \
	  $(MAKE) --no-print-directory PYTHON=$(LATEST_PYTHON) VENV=.venv-latest EXTRA=test-latest \
	    TESTS="$(LATEST_TESTS)" test-fast test-tpu; \
	else \
	  echo "test-latest: the newest JAX needs Python 3.12, which was not found; nothing to do"; \
	fi

lint: $(VENV)/ready
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo "run make format"; exit 1; }

types: $(VENV)/ready
	@$(BIN)/mypy --no-error-summary

format: $(VENV)/ready
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

benchmark: $(VENV)/ready
	@$(BIN)/python -m benchmarks

help:
	@echo "make demo         trains a small model, kills and resumes it, and PyTorch answers as it does; 5 minutes"
	@echo "make test         lint, types, and the tests that take seconds"
	@echo "make test-full    the slow tests too"
	@echo "make test-latest  what JAX computes, with the newest one, and what compiles for TPUs (Python 3.12)"
	@echo "make lint, types  parts of make test"
	@echo "make format       lays out the code"
	@echo "make benchmark    speed and memory beside PyTorch"
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS) (test processes)"

$(VENV)/ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("qwen2-jax needs Python 3.11 or newer, $(PYTHON) is %d.%d; name another one: \
	make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@echo "Installing into $(VENV), once; this takes a minute or two ..."
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed (Debian and Ubuntu: apt install python3-venv)"; exit 1; }
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[$(EXTRA)]"
	@touch $@

# pyenv's own python3.12 command answers only where that version is switched on; its folders always do.
PYENV_ROOT ?= $(HOME)/.pyenv
CANDIDATES = python3 python3.12 python3.13 $(wildcard $(PYENV_ROOT)/versions/3.1[23].*/bin/python3)
LATEST_PYTHON = $(firstword $(foreach python,$(CANDIDATES),$(shell $(python) -c \
  'import sys; print(sys.executable if sys.version_info >= (3, 12) else "")' 2>/dev/null)))
