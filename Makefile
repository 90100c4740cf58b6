# make run    install everything, then fine-tune, evaluate, export and report the store assistant
# make test   install everything, then run every test (FRESH=1 starts from an empty environment)
# make lab    JupyterLab on the notebooks          make docs   the site, in _docs/
# make workshop   one zip for a class, in dist/: notebooks with and without answers, the teacher's page, ftnb itself
#                 (WORKSHOP_FLAGS="--with-wheels wheels" puts in all that a room without a network needs)
# make clean  remove what can be made again        (PYTHON=python3.12 make run picks an interpreter)

SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3.14 python3 python; do \
  if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)
INSTALL_FLAGS ?=
RUN_FLAGS ?=
WORKSHOP_FLAGS ?=
TEST_FLAGS ?= -n logical --maxprocesses 4 --dist loadscope

export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Where containers forbid bytecode, each process compiles all that it imports anew: torch, transformers, trl, 4,000 files
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install run test lab docs readme workshop clean

help:
	@sed -n '1,6p' Makefile

install:
	@if [ -z "$(PYTHON)" ]; then echo "ftnb needs Python 3.11 or newer: none found (install one, or make $(MAKECMDGOALS) PYTHON=/path/to/python3.11)" >&2; exit 1; fi
	@"$(PYTHON)" tools/install.py --venv "$(VENV)" $(if $(FRESH),--fresh) $(INSTALL_FLAGS)

run: install
	@$(BIN)/ftnb run $(RUN_FLAGS)

test: install
	@$(BIN)/python tools/audit.py
	@HF_HUB_OFFLINE=1 $(BIN)/python -m pytest $(TEST_FLAGS)

lab: install
	@$(BIN)/jupyter lab --notebook-dir=nbs

docs: install
	@$(BIN)/python tools/site.py

readme: install
	@$(BIN)/python tools/readme.py

workshop: install
	@$(BIN)/python tools/workshop.py $(WORKSHOP_FLAGS)

clean:
	rm -rf .venv .venv-ci _docs _proc build dist *.egg-info .hypothesis .ruff_cache .pytest_cache nbs/sidebar.yml
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
