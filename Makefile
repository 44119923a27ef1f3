# Every target installs what it needs. Nothing outside this folder is written except package caches.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
# Exact versions of every dependency: one file for this Makefile, CI and the image (`make lock` rewrites it).
PINS := cluster/constraints.txt

.DEFAULT_GOAL := help

.PHONY: help
help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml $(PINS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint $(PINS) --editable .
	@touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --constraint $(PINS) --editable ".[dev]"
	@touch $@

.PHONY: install
install: $(DEV) ## create .venv with the pinned versions and the development tools (about 4 minutes, 7.5 GB)

.PHONY: demo
demo: $(STAMP) ## from audio files to trained and compared models (resumes where it stopped)
	$(BIN)/pal demo --out runs/demo

.PHONY: drill
drill: $(STAMP) ## inject faults into a real run and report how it recovered, under runs/drill (about 5 minutes)
	rm -rf runs/drill
	$(BIN)/pal drill --out runs/drill --json runs/drill.json

SCALING := runs/scaling
SIX_TASKS := sound.count sound.first music.highest music.tempo speech.count speech.speaker

# A part that exists is not rebuilt; the sweep resumes with the trials that are not finished.
$(SCALING)/corpus/synth.json: $(STAMP)
	$(BIN)/pal synth $(@D) --clips 2400 --seed 1

$(SCALING)/corpus/six_%.jsonl: $(SCALING)/corpus/synth.json
	$(BIN)/python -c 'import json, sys; print(*(json.dumps({**row, "questions": [q for q in row["questions"] \
		if q["task"] in sys.argv[1:]]}) for row in map(json.loads, sys.stdin)), sep="\n")' \
		$(SIX_TASKS) < $(@D)/$*.jsonl > $@

$(SCALING)/features/%/features.json: $(SCALING)/corpus/six_%.jsonl
	$(BIN)/pal prepare demo_prepare manifest=$< output=$(@D)

$(SCALING)/language_model_32/config.json: SIZE := --set hidden_size=32 intermediate_size=85
$(SCALING)/language_model_96/config.json: SIZE := --set hidden_size=96 intermediate_size=256
$(SCALING)/language_model_%/config.json: $(SCALING)/corpus/synth.json
	$(BIN)/pal scratch scaling_language_model $(@D) $(<D)/train.jsonl $(SIZE)

.PRECIOUS: $(SCALING)/corpus/six_%.jsonl

.PHONY: scaling
scaling: $(DEV) $(patsubst %,$(SCALING)/features/%/features.json,train test)
scaling: $(patsubst %,$(SCALING)/language_model_%/config.json,32 64 96)
scaling: ## the scaling experiments, from scratch to pipeline/results/scaling.md (about 50 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pal sweep scaling
	OMP_NUM_THREADS=1 $(BIN)/pal bench plan $(SCALING)/plan.md
	$(BIN)/pal report scaling --uri sqlite:///$(SCALING)/trials/mlflow.db --out $(SCALING)/report \
		--answers pipeline/results/scaling.md --append $(SCALING)/plan.md --command "make scaling"

.PHONY: real
real: $(DEV) ## SmolLM2 and Whisper on recordings, to pipeline/results/real.md (2 to 4 hours; Debian; resumes where it stopped)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.real $(REAL)

.PHONY: test
test: $(DEV) ## run the tests that CI runs
	$(BIN)/python -m pytest

.PHONY: test-all
test-all: $(DEV) ## run all tests, including the slow ones
	$(BIN)/python -m pytest -m "not gpu and not slurm"

.PHONY: test-gpu
test-gpu: $(DEV) ## run the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: test-slurm
test-slurm: $(DEV) ## run the scripts of cluster/slurm on a real two-node Slurm (Debian: slurm-wlm munge; as root)
	$(BIN)/python -m pytest -m slurm

# A pin goes stale without a failing test; this target shows whether today's releases still work.
NEWEST := .venv-newest

.PHONY: test-newest
test-newest: ## run the tests with the newest releases that pyproject.toml allows, in .venv-newest (CI does not run it)
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/pip install --quiet --editable ".[dev]"
	$(NEWEST)/bin/python -m pytest

# uv resolves for every platform and Python version at once, which pip does not, and keeps the pins that still resolve.
LOCK := .venv-lock
UPGRADE :=

$(LOCK)/bin/uv:
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/pip install --quiet "uv>=0.9"

.PHONY: lock
lock: $(LOCK)/bin/uv ## pin every dependency in cluster/constraints.txt, keeping pins that still resolve (UPGRADE=--upgrade: all newest)
	$(LOCK)/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-annotate --quiet \
		--custom-compile-command "make lock" $(UPGRADE) --output-file $(PINS)

T5 := .transformers-5
MODEL_TESTS := tests/parity/test_oracle.py tests/parity/test_oracle_language_model.py tests/model

# In a folder of its own: mosaicml-streaming declares transformers<5, so pip refuses both in one environment.
# The packages are listed one by one; with dependencies, pip would shadow the environment's versions with newer ones.
$(T5)/.installed: $(DEV) Makefile
	rm -rf $(T5)
	$(BIN)/pip install --quiet --target $(T5) --no-deps \
		"transformers==5.23.0" "huggingface-hub>=1.31,<3" "tokenizers>=0.23.1" \
		"httpx2>=2,<3" "httpcore2>=2,<3" truststore
	@touch $@

.PHONY: test-transformers-5
test-transformers-5: $(T5)/.installed ## run the model's tests with transformers 5
	PYTHONPATH=$(T5) $(BIN)/python -c "import transformers; assert transformers.__version__ == '5.23.0', transformers"
	PYTHONPATH=$(T5) $(BIN)/python -m pytest $(MODEL_TESTS)

.PHONY: check
check: $(DEV) ## check format, lint, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: bench
bench: $(STAMP) ## measure integrations, preparation and the training loop on this machine, under runs/bench
	mkdir -p runs/bench
	$(BIN)/pal bench integration --batch 8 --questions 1 6 --json runs/bench/integration.json --plot runs/bench/cost.png
	$(BIN)/pal bench prepare --json runs/bench/prepare.json
	$(BIN)/pal bench train --nproc 2 --json runs/bench/train.json

.PHONY: ui
ui: $(STAMP) ## open the demo's runs in MLflow, http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db --host 127.0.0.1 --port 5000

.PHONY: clean
clean: ## remove runs, caches and secondary environments; keep .venv
	rm -rf runs $(T5) $(NEWEST) $(LOCK) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find pipeline data_prep tests -name __pycache__ -type d -prune -exec rm -rf {} +
