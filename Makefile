# Every target needs only Python 3.11 (or newer) and pip: the environment in .venv is made once, on first use.
# pip's own settings apply, so e.g. `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test` picks another torch.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz zoo lint types lines bench peer accuracy latency loader hessian study clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

demo: $(READY)  ## prune, fine-tune and compare a small ViT by five criteria at 50, 75 and 95 %
	$(BIN)/secateur demo

test: $(READY)  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

fuzz: SEED ?= $(shell date +%s)
fuzz: EXAMPLES ?= 3000
fuzz: $(READY)  ## cut EXAMPLES=3000 random networks at random; SEED=… draws the same ones again
	@echo "make fuzz EXAMPLES=$(EXAMPLES) SEED=$(SEED)"
	FUZZ=$(EXAMPLES) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 tests/test_random_networks.py --hypothesis-seed=$(SEED)

lint: $(READY)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)  ## check types
	$(BIN)/pyright

lines: $(READY)  ## print the line counts and hold them to their budgets
	$(BIN)/python scripts/line_counts.py

bench: $(READY)  ## time and memory of analysis and pruning beside Torch-Pruning
	$(BIN)/python scripts/bench.py --write docs/benchmark-table.md

zoo: $(READY)  ## examine every architecture of timm, transformers and torchvision (half an hour); writes docs/zoo.md
	cd scripts && OMP_NUM_THREADS=1 ../$(BIN)/python -m zoo

peer: $(READY)  ## prune a member of every timm family with both libraries (an hour; goes on where it stopped)
	$(BIN)/python scripts/peer_coverage.py

accuracy: $(READY)  ## accuracy at equal MACs beside Torch-Pruning (hours; goes on where it stopped)
	cd scripts && OMP_NUM_THREADS=1 ../$(BIN)/python -m accuracy

latency: $(READY)  ## latency budgets asked for and measured; wants a quiet machine
	$(BIN)/python scripts/latency_budgets.py --write docs/latency-table.md

loader: $(READY)  ## images per second of the loaders beside what a ViT consumes in fine-tuning
	$(BIN)/python scripts/loader_rates.py

hessian: $(READY)  ## time of Hessian scores beside Torch-Pruning's example
	$(BIN)/python scripts/hessian_speed.py

study: $(READY)  ## the paper's study in miniature, 320 runs (an hour; goes on where it stopped), and its report
	$(BIN)/secateur sweep digits --out runs/digits --workers 2
	$(BIN)/secateur report runs/digits --out docs/digits-study

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist src/*.egg-info
