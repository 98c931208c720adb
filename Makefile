# The task runner. `make demo` and `make test` need nothing but make and a Python >= 3.11: .venv is made on the way.

PYTHONS ?= python3.13 python3.12 python3.11 python3 python
JOBS ?= 2
OUT ?= runs/demo
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread per test process: with more, the processes fight over the cores and everything takes longer.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-slurm check format bench clean

help:  ## list the targets
	@echo "quietvit: make TARGET"
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1@\2/p' Makefile | awk -F@ '{ printf "  %-12s%s\n", $$1, $$2 }'

setup: $(STAMP)  ## make .venv and install quietvit into it, with what its tests need

# Candidates are run, not just looked up: a version manager's python3.13 may be a stub, and Debian ships python3 without venv.
$(STAMP): setup.py constraints.txt pyproject.toml
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    found=; old=; \
	    for python in $(PYTHONS); do \
	        "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
	        "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1 && { found="$$python"; break; }; \
	        old="$${old:-$$python}"; \
	    done; \
	    if [ -z "$$found" ] && [ -n "$$old" ]; then \
	        version=$$("$$old" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	        echo "$$old has no venv module. Debian and Ubuntu: sudo apt-get install $$version-venv" >&2; exit 1; \
	    elif [ -z "$$found" ]; then \
	        echo "No Python >= 3.11 among: $(PYTHONS)." >&2; \
	        echo "Debian 12+, Ubuntu 24.04+: sudo apt-get install python3 python3-venv" >&2; \
	        echo "Ubuntu 22.04:              sudo apt-get install python3.11 python3.11-venv" >&2; \
	        echo "Elsewhere:                 make setup PYTHONS=/path/to/python3.11" >&2; exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv --clear $(VENV) || exit 1; \
	    echo "First install: about 2 GB to download and 6 GB on disk (PyTorch brings its CUDA libraries). It takes minutes."; \
	fi
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## pretrain on the built-in scenes and look at the features, on whatever is here, in minutes
	$(BIN)/quietvit demo --out "$(OUT)"

test: $(STAMP)  ## every test; needs no GPU
	$(PYTEST)

test-fast: $(STAMP)  ## the tests that take under 20 seconds each
	$(PYTEST) -m "not slow"

test-slurm: $(STAMP)  ## runs on a real Slurm of this machine alone; root on Debian or Ubuntu, which it may install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

check: $(STAMP)  ## formatting, lint, layers of imports, types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

format: $(STAMP)  ## put the code into the house's format
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(STAMP)  ## every benchmark, with its defaults
	@set -e; for name in augment classification quickstart scenes stem step; do echo "$$name"; $(BIN)/python "benchmarks/$$name.py"; done

clean:  ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
