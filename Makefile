# Everything a developer runs. `make` alone lists the targets; each installs what it needs first.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench static abi abi-check wheel clean
# Targets share .venv and the package manager's lock.
.NOTPARALLEL:

SETUP := tests/tools/setup.sh
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

venv: ## make .venv with .venv/bin/edge in it
	@$(SETUP) venv

demo: ## install what is missing, then show everything in namespaces with real mail (root)
	@$(SETUP) demo
	@$(BIN)/edge lab

test: ## install what is missing, then check and test everything (root)
	@$(SETUP) test
	@$(MAKE) --no-print-directory static
	$(PYTEST)

check: ## format, lint, types, layout and the unit tests: under a minute, no root
	@$(SETUP) check
	@$(MAKE) --no-print-directory static
	$(PYTEST) -m "not root and not slow"

bench: ## install what is missing, then measure beside the alternatives: minutes, in namespaces (root); ARGS=--json
	@$(SETUP) bench
	@$(BIN)/python -m tests.bench $(ARGS)

# What needs no test run. Expects .venv.
static:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tests/tools/gen_abi.py --check
	$(BIN)/python tests/tools/check_layout.py

abi: ## write edge/abi.py from bpf/abi.h
	@$(SETUP) check
	@$(BIN)/python tests/tools/gen_abi.py > edge/abi.py.new && mv edge/abi.py.new edge/abi.py

abi-check: ## does edge/abi.py match bpf/abi.h?
	@$(SETUP) check
	@$(BIN)/python tests/tools/gen_abi.py --check && echo "edge/abi.py matches bpf/abi.h"

wheel: ## build dist/*.whl and dist/*.tar.gz
	@$(SETUP) check
	$(BIN)/python -m build --no-isolation --outdir dist .

clean: ## remove .venv, dist and caches
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
