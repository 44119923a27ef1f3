# Every target sets up what it needs; nothing outside this folder is written but package caches.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help

.PHONY: help
help: ## show the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	@touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --editable ".[dev]"
	@touch $@

.PHONY: install
install: $(DEV) ## make .venv with everything in it (about 4 minutes, 7.5 GB)

.PHONY: demo
demo: $(STAMP) ## from audio files to trained, compared models (goes on where it stopped)
	$(BIN)/pal demo --out runs/demo

.PHONY: drill
drill: $(STAMP) ## inject faults into a real run and print what became of it, under runs/drill (about 5 minutes)
	rm -rf runs/drill
	$(BIN)/pal drill --out runs/drill --json runs/drill.json

SCALING := runs/scaling
SIX_TASKS := sound.count sound.first music.highest music.tempo speech.count speech.speaker

# Each part is left as it is once it is there; the sweep goes on with the trials that are not finished.
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
	OMP_NUM_THREADS=1 $(BIN)/python tests/cost/test_predictions_measured.py $(SCALING)/plan.md
	$(BIN)/pal report scaling --uri sqlite:///$(SCALING)/trials/mlflow.db --out $(SCALING)/report \
		--answers pipeline/results/scaling.md --append $(SCALING)/plan.md --command "make scaling"

.PHONY: test
test: $(DEV) ## the tests that CI runs
	$(BIN)/python -m pytest

.PHONY: test-all
test-all: $(DEV) ## all tests, the slow ones too
	$(BIN)/python -m pytest -m "not gpu and not slurm"

.PHONY: test-gpu
test-gpu: $(DEV) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

.PHONY: test-slurm
test-slurm: $(DEV) ## the scripts of cluster/slurm on a real Slurm of two nodes (Debian: slurm-wlm munge; root)
	$(BIN)/python -m pytest -m slurm

T5 := .transformers-5
MODEL_TESTS := tests/parity/test_oracle.py tests/parity/test_oracle_language_model.py tests/model

# Beside the environment and not in it: mosaicml-streaming declares transformers<5, so pip would not have both.
# Named one by one, or pip would put newer copies of what the environment has in front of it.
$(T5)/.installed: $(DEV) Makefile
	rm -rf $(T5)
	$(BIN)/pip install --quiet --target $(T5) --no-deps \
		"transformers==5.23.0" "huggingface-hub>=1.31,<3" "tokenizers>=0.23.1" \
		"httpx2>=2,<3" "httpcore2>=2,<3" truststore
	@touch $@

.PHONY: test-transformers-5
test-transformers-5: $(T5)/.installed ## the model's tests with transformers 5
	PYTHONPATH=$(T5) $(BIN)/python -c "import transformers; assert transformers.__version__ == '5.23.0', transformers"
	PYTHONPATH=$(T5) $(BIN)/python -m pytest $(MODEL_TESTS)

.PHONY: check
check: $(DEV) ## format, lint, types, imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: bench
bench: $(STAMP) ## cost of integrations, preparation and the training loop on this machine, under runs/bench
	mkdir -p runs/bench
	$(BIN)/pal bench integration --batch 8 --questions 1 6 --json runs/bench/integration.json --plot runs/bench/cost.png
	$(BIN)/pal bench prepare --json runs/bench/prepare.json
	$(BIN)/pal bench train --nproc 2 --json runs/bench/train.json

.PHONY: ui
ui: $(STAMP) ## the MLflow UI on the demo's runs, http://127.0.0.1:5000
	$(BIN)/mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db --host 127.0.0.1 --port 5000

.PHONY: clean
clean: ## remove runs and caches, keep .venv
	rm -rf runs $(T5) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache build dist *.egg-info
	find pipeline data_prep tests -name __pycache__ -type d -prune -exec rm -rf {} +
