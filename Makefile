# make demo   fetch a small model, quantize it, measure it, write demo-out/report.html
# make test   lint, format, types, tests (FAST=1 leaves out the tests on a real model)
# make check  lint, format and types only

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TASKS := $(VENV)/.ready-tasks

.PHONY: demo test check clean

demo: $(READY)
	$(BIN)/fewbit demo demo-out

test: check $(TASKS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --durations 15 $(if $(FAST),-m "not real_model")

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("fewbit needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[hf,report,dev]'
	touch $@

# lm-eval with what it brings, 600 MB, and ray, 240 MB; only the tests want them.
$(TASKS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tasks,ray]'
	touch $@

clean:
	rm -rf $(VENV) demo-out .pytest_cache .mypy_cache .ruff_cache
