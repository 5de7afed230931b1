# PYTHON creates the environment in the folder VENV; both can be set: make test PYTHON=python3.12 VENV=/path/to/venv
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
JOBS := -n auto --maxprocesses 8 --dist worksteal
# without the theme's notice of its end of life; pyproject.toml has the date
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-fast lint typecheck format docs docs-serve check-results bench clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{ printf "%-22s%s\n", $$1, $$2 }'

setup: $(STAMP)  ## Install everything into VENV (.venv), unless the requirements are unchanged

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
		|| { echo "lit_scale needs Python 3.11 or newer, and '$(PYTHON)' is not; name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(BIN)/python -m pip install -e '.[test,lint,docs]' -c constraints.txt
	@touch $@

demo: setup  ## Train a small BERT with progressive stacking
	$(BIN)/python recipes/bert_progressive_stack.py

check: lint typecheck check-results test-fast  ## What to run before a commit; make -k check goes on after a failure

test: setup  ## Run every test, the slow ones last
	$(BIN)/python -m pytest $(JOBS)

test-fast: setup  ## Run the tests that are not slow
	$(BIN)/python -m pytest $(JOBS) -m "not slow"

lint: setup  ## Check format, style and types
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

typecheck: setup  ## Check the types of benchmarks, recipes and tests too
	$(BIN)/python -m mypy lit_scale benchmarks recipes tests

format: setup  ## Format the code and apply ruff's fixes
	$(BIN)/python -m ruff check --fix-only .
	$(BIN)/python -m ruff format .

docs: setup  ## Build the documentation into site/; a broken link fails
	$(MKDOCS) build --strict

docs-serve: setup  ## Serve the documentation locally while it is edited
	$(MKDOCS) serve

check-results: setup  ## Check that the stored results were made with the present code
	$(BIN)/python benchmarks/check.py

bench: setup  ## List what has been measured; benchmarks/clock.py measures
	$(BIN)/python benchmarks/clock.py list

clean:  ## Remove build outputs and caches, but not the environment and runs/
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.git -prune -o -path './$(VENV)' -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +
