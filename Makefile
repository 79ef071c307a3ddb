# Every command a newcomer needs; each sets up what it uses. Needs Python 3.11 or newer and nothing else.
# PYTHON picks the interpreter (3.11 is preferred: the parity tests need a torch that has wheels for it).
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3 python,\
	$(if $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("yes")' 2>/dev/null),$(p))))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PARITY := $(VENV)/.parity
TORCH := torch==2.13.0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup parity quickstart nano test lint typecheck format bench bench-gpu wheel clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv with everything but the parity extra

# Made again when pyproject.toml changes; an interrupted installation leaves no stamp, so the next call finishes it.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or say which with make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian: python3-venv)"; exit 1; }
	$(BIN)/python -m pip install --quiet --editable '.[train,export,dev]'
	@touch $@

# The parity tests compare with the reference implementations; without them those tests skip and say so.
parity: $(PARITY)
$(PARITY): $(STAMP)
	@if $(BIN)/python -c 'import torch, transformers' 2>/dev/null \
		|| { $(BIN)/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
			&& $(BIN)/python -m pip install --quiet '$(TORCH)' --editable '.[train,export,parity,dev]'; }; \
	then touch $@; else echo "torch and transformers cannot be had here: the parity tests will skip"; fi

quickstart: $(STAMP) ## train, evaluate and export a small model from scratch; writes quickstart/report.html (about ten minutes)
	$(BIN)/hypervl quickstart

nano: $(STAMP) ## the same with 64 things and five tasks (hours on two cores)
	$(BIN)/hypervl quickstart --config configs/nano.py --out runs/nano

# glibc's memory as `needs.keep_memory` has it, of everything that tests start too: a fifth of the time.
test: export MALLOC_ARENA_MAX := 1
test: export MALLOC_MMAP_MAX_ := 0
test: export MALLOC_TRIM_THRESHOLD_ := 100000000000
test: parity lint typecheck ## lint, types and all tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## ruff: rewrite in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: $(STAMP) ## pyright
	$(BIN)/pyright

bench: $(STAMP) ## every figure of the documents but those of rescaling; writes benchmarks/results/
	@status=0; for f in tiling_memory load_memory losses resume inference training nano export quantize runtimes paper_size picture_size "vrc --table 2000" "dcl --ablate-names"; do set -- $$f; \
		$(BIN)/python benchmarks/$$1.py $${@:2} || status=1; done; exit $$status

bench-rescale: $(PARITY) ## the figures of rescaling, in hours; pictures and weights are in ../shared, or where HYPERVL_SHARED says
	@status=0; for f in hcd_setting hcd hcd_speed rescale_cost "rescale_train --memory"; do set -- $$f; \
		$(BIN)/python benchmarks/$$1.py $${@:2} || status=1; done; exit $$status

bench-gpu: $(STAMP) ## speed and MFU on a GPU at the paper's sizes, beside transformers where torch is; says so where there is no GPU
	@status=0; for f in inference training; do $(BIN)/python benchmarks/$$f.py --gpu || status=1; done; exit $$status

wheel: $(STAMP) ## build dist/*.whl
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean: ## remove what is built; keeps .venv, runs/ and quickstart/
	rm -rf build dist .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
