# Every target sets up what it needs; nothing outside this folder is written but package caches.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help

.PHONY: help
help: ## show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

.PHONY: install
install: $(STAMP) ## make .venv with everything in it (about 4 minutes, 7.5 GB)

.PHONY: demo
demo: $(STAMP) ## from audio files to trained, compared models (goes on where it stopped)
	$(BIN)/pal demo --out runs/demo

.PHONY: test
test: $(STAMP) ## the tests that CI runs
	$(BIN)/python -m pytest

.PHONY: test-all
test-all: $(STAMP) ## all tests, the slow ones too
	$(BIN)/python -m pytest -m "not gpu"

.PHONY: test-gpu
test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: check
check: $(STAMP) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: ui
ui: $(STAMP) ## the MLflow UI on the demo's runs, http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db --host 127.0.0.1 --port 5000

.PHONY: clean
clean: ## remove runs and caches, keep .venv
	rm -rf runs .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find pipeline data_prep tests -name __pycache__ -type d -prune -exec rm -rf {} +
