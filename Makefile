# One verb per command. `make demo` and `make test` set everything up by themselves, once.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# One thread for each small SVD: OpenBLAS's threads spin, which on a busy machine costs seconds.
export OPENBLAS_NUM_THREADS ?= 1

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/installed
DOCS_INSTALLED := $(VENV)/installed-docs
# Type checkers and the docs read files and do not follow the folder mapping: they get a plain install.
PLAIN := build/plain
SOURCES := $(shell find jaxopt_suite optimizers parallel scaling_laws -name '*.py')

.PHONY: help demo test quick exhaustive check format docs bench wheel clean

help:
	@echo 'make demo     install if need be, compare optimizers on real text, write runs/demo/report.html'
	@echo 'make test     install if need be, run the test suite'
	@echo 'make quick    the tests without the slow ones'
	@echo 'make exhaustive    the cases that make test leaves out'
	@echo 'make check    lint, formatting, types'
	@echo 'make format   put the formatting right'
	@echo 'make docs     build the site into site/, warnings are errors'
	@echo 'make bench    measure step times and re-measure the claims'
	@echo 'make wheel    build dist/*.whl'
	@echo 'make clean    remove everything made here except runs/'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKERS=$(WORKERS)'

$(INSTALLED): pyproject.toml
	@echo 'Installing into $(VENV) (the first time only; it takes a minute or two) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	@$(PIP) install --editable '.[docs]'
	@touch $@

$(PLAIN): $(INSTALLED) $(SOURCES)
	@rm -rf build/lib $(PLAIN)
	@$(PIP) install --no-deps --no-build-isolation --target $(PLAIN) .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/jaxopt-suite compare --optimizers adamw,grams,adam_sn,adam_snsm,muon \
	    --preset nano --steps 200 --seeds 2 --out runs/demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS)

quick: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m 'not slow and not exhaustive'

exhaustive: $(INSTALLED)
	$(BIN)/python -m pytest -q -n $(WORKERS) -m exhaustive

check: $(PLAIN)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(PLAIN) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_INSTALLED) $(PLAIN)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks.step_time
	$(BIN)/python -m benchmarks.claims

wheel: $(INSTALLED)
	@rm -rf build/lib dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
