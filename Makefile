# agentpool: `make demo` and `make test` are all that a new clone needs. Wants Python 3.11 or later with venv, and make.
#
#   PYTHON=/path/to/python3.12   the interpreter that a new environment is made with; otherwise the first that works
#   VENV=folder                  another environment than .venv
#   OUT=folder                   where the demo writes the tests that it generates
#   PYTEST_ARGS="-x -k name"     handed to pytest
#   QUICK=1                      a short run of the benchmark, which leaves docs/benchmarks.md alone
#   BENCH_ARGS="--cases noop"    handed to the benchmark
#   STRESS_ARGS="--seed 7"       handed to the stress run
#   MUTANTS="--again survived 'crew.*'"  which mutants to try once more; otherwise all that have no result yet

VENV ?= .venv
OUT ?= generated-tests
PYTEST_ARGS ?=
QUICK ?=
BENCH_ARGS ?=
STRESS_ARGS ?=
MUTANTS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test setup lint types core coverage bench stress mutants acceptance conformance core313 conformance313 python313 clean

# Prints the first interpreter of the versions $(1) that runs and can make an environment. A name on PATH proves nothing:
# pyenv's shims exist for versions that are not selected, and Debian's python3 comes without venv.
find_python = for version in $(1); do \
	  IFS=:; for folder in $$PATH:$$HOME/.pyenv/shims; do unset IFS; \
	    for candidate in "$$folder/python$$version" "$${folder%/shims}"/versions/"$$version".*/bin/"python$$version"; do \
	      [ -x "$$candidate" ] && "$$candidate" -c 'import ensurepip, sys, venv; \
	        assert sys.version_info >= (3, 11); print(sys.executable)' 2>/dev/null && exit 0; \
	    done; \
	  done; \
	done; true

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@python="$(PYTHON)"; [ -n "$$python" ] || python="$$($(call find_python,3.11 3.12 3.13 3))"; \
	if [ -z "$$python" ]; then \
	  echo "No Python 3.11 or later with venv was found on PATH; name one: make PYTHON=/path/to/python3" >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$python"; "$$python" -m venv "$(VENV)"

# The stamps are newer than pyproject.toml where the environment has what it asks for: a second call installs nothing.
$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "installing agentpool and what its tests need into $(VENV)"
	@$(PIP) install --editable '.[test]'
	@touch $(VENV)/.installed-all $@

# Only one of the two is needed: `test` includes `all`.
$(VENV)/.installed-all: pyproject.toml | $(BIN)/python
	@echo "installing agentpool into $(VENV)"
	@$(PIP) install --editable '.[all]'
	@touch $@

$(VENV)/.installed-bench: pyproject.toml | $(BIN)/python
	@echo "installing agentpool, other pools and what plots need into $(VENV)"
	@$(PIP) install --editable '.[bench]'
	@touch $@

demo: $(VENV)/.installed-all ## three real agents review the installed tenacity package
	$(BIN)/agentpool orchestrate "Review this code" \
	  --path "$$($(BIN)/python -c 'import os, tenacity; print(os.path.dirname(tenacity.__file__))')" --out "$(OUT)"

test: $(VENV)/.installed-test ## the whole suite, two files at a time
	$(BIN)/python -m pytest $(if $(PYTEST_ARGS),$(PYTEST_ARGS),-n 2 --dist loadfile)

setup: $(VENV)/.installed-test ## make the environment, with what the tests need

lint: $(VENV)/.installed-test ## ruff
	$(BIN)/ruff check .

types: $(VENV)/.installed-test ## mypy, strict, both packages and stress
	$(BIN)/mypy

core: $(VENV)/.installed-test ## the tests that start no process
	$(BIN)/python -m pytest tests/unit tests/property $(PYTEST_ARGS)

coverage: $(VENV)/.installed-test ## branch coverage of the core by those tests
	$(BIN)/python -m pytest tests/unit tests/property --cov --cov-report=term-missing:skip-covered $(PYTEST_ARGS)

$(VENV)/.installed-stress: pyproject.toml | $(BIN)/python
	@echo "installing agentpool, its command line, other pools and what plots need into $(VENV)"
	@$(PIP) install --editable '.[stress]'
	@touch $@

# What it measured is kept in stress/out; a quick run writes its page there too.
bench: $(VENV)/.installed-bench ## agentpool beside other pools: docs/benchmarks.md (about 25 minutes; QUICK=1: 2)
	@rm -f stress/out/bench.json
	$(BIN)/python -m stress.bench --json stress/out/bench.json $(if $(QUICK),--quick) \
	  --write $(if $(QUICK),stress/out,docs)/benchmarks.md $(BENCH_ARGS)

stress: $(VENV)/.installed-stress ## every stress scenario briefly, with faults: stress/out/REPORT.md (about 2 minutes)
	$(BIN)/python -m stress run all --brief $(STRESS_ARGS)

$(VENV)/.installed-mutants: pyproject.toml | $(BIN)/python
	@echo "installing agentpool, its tests and mutmut into $(VENV)"
	@$(PIP) install --editable '.[mutants]'
	@touch $(VENV)/.installed-test $(VENV)/.installed-all $@

# Interrupted, it goes on where it stopped; after a change it tries again what the change concerns.
mutants: $(VENV)/.installed-mutants ## mutation testing of agentpool/core, results in mutants/ (about an hour on one core)
	CI=1 nice -n 19 $(BIN)/python -m stress.mutants run $(MUTANTS)
	$(BIN)/python -m stress.mutants

# Installs into .acceptance what can be had, and skips the rest with the reason.
acceptance: $(VENV)/.installed-test ## real agent programs (claude, codex, llm, ...) against a local API, loopback only
	$(BIN)/python tests/acceptance/install.py .acceptance
	$(BIN)/python tests/acceptance/in_namespace.py $(BIN)/python -m pytest tests/acceptance -rs $(PYTEST_ARGS)

conformance: $(VENV)/.installed-test ## CPython's own executor tests, where this interpreter or AGENTPOOL_CPYTHON_SUITE has them
	$(BIN)/python -m pytest tests/conformance $(PYTEST_ARGS)

# `make -s python313` prints a Python 3.13, or nothing.
python313:
	@$(call find_python,3.13)

core313: ## the tests that start no process, on Python 3.13 where PATH or pyenv has it
core313 conformance313:
	@python="$$($(call find_python,3.13))"; \
	if [ -z "$$python" ]; then echo "skipped: no Python 3.13 with venv on PATH or in pyenv"; exit 0; fi; \
	$(MAKE) --no-print-directory VENV=.venv-3.13 PYTHON="$$python" $(@:313=)

conformance313: ## CPython 3.13's own executor tests

clean: ## remove the environments, caches and what the demo wrote
	rm -rf mutants .venv .venv-3.13 .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov build dist generated-tests
	find agentpool workers tests stress -name __pycache__ -type d -prune -exec rm -rf {} +
