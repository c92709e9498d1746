# Everything runs in .venv, which is made from pyproject.toml with the versions of constraints.txt.
# Another Python: `make demo PYTHON=python3.12`. TORCH_INDEX=ADDRESS installs torch from that package index first, such as
# the one of PyTorch's CPU builds; the pin accepts every build of its version.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# the first Python on the path that is new enough
PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OFFICIAL := runs/demo/official.safetensors

.PHONY: help
help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@[ -n "$(PYTHON)" ] || { echo "no Python >= 3.11 found; name one: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@[ -z "$(TORCH_INDEX)" ] || $(BIN)/python -m pip install --quiet -c constraints.txt -i "$(TORCH_INDEX)" torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,emoji,tensorboard,8bit]'
	@touch $@

.PHONY: venv
venv: $(STAMP) ## make .venv with the pinned dependencies and this package in it

.PHONY: demo
demo: $(STAMP) ## erase the cat from the bundled model into runs/demo; print the rates and where the report is
	$(BIN)/python -m esd.train experiment=erase_thing 'concepts=[cat]' run_dir=runs/demo
	@[ -e $(OFFICIAL) ] || $(BIN)/python -m esd.files export runs/demo --format official --out $(OFFICIAL)
	@$(BIN)/python -m esd.compare runs/demo
	@$(BIN)/python -m esd.report runs/demo --out runs/demo/report.html

.PHONY: test
test: $(STAMP) ## style, types and the quick tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto

.PHONY: test-slow
test-slow: $(STAMP) ## the slow tests: an erasure from end to end, and what else takes minutes
	$(BIN)/python -m pytest -n auto --maxschedchunk=1 -m slow

.PHONY: clean
clean: ## remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
