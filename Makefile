# make demo    fetch a small model, quantize it, measure it, write demo-out/report.html
# make test    lint, format, types, tests; QUICK=1 leaves out the tests that take long
# make test-interop  run our files in llama.cpp, vLLM, GPTQModel and MLX, in environments of their own (over an hour;
#              DATA=FILE: the text); test-interop-llama-cpp, -transformers, -vllm, -gptq and -mlx run one of them
# make check   lint, format and types only
# make dist    build the wheel and the source package into dist/

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Most modules of torch and transformers are never imported: those that are get compiled then.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# Each command installs what it needs and no more: the demo no tools for tests.
FOR_DEMO := $(VENV)/.ready-demo
FOR_TESTS := $(VENV)/.ready-tests
NEEDS := pyproject.toml constraints.txt
# The tests start a hundred processes that import torch: each would compile all of its modules again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-interop test-interop-llama-cpp test-interop-transformers test-interop-vllm test-interop-gptq \
    test-interop-mlx check dist clean

demo: $(FOR_DEMO)
	$(BIN)/fewbit demo demo-out

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
	    --durations 15 $(if $(QUICK),-m "not slow and not real_model")

INTEROP := llama-cpp transformers vllm gptq mlx

test-interop:
	@failed=; for part in $(INTEROP); do $(MAKE) --no-print-directory test-interop-$$part || failed="$$failed $$part"; done; \
	    if [ -n "$$failed" ]; then echo "test-interop: FAILED:$$failed"; exit 1; fi; \
	    echo "test-interop: passed: $(INTEROP) (a part that was skipped says why)"

test-interop-llama-cpp: $(FOR_TESTS)
	TQDM_DISABLE=1 $(BIN)/python benchmarks/llama_cpp.py --data $(or $(DATA),topics) --out .interop-llama-cpp.json \
	    --model smollm2-135m --windows 4 --grid none --grid q4_0 --grid iq4_nl
	TQDM_DISABLE=1 $(BIN)/python benchmarks/llama_cpp.py --data $(or $(DATA),topics) --out .interop-llama-cpp.json \
	    --model gemma3-270m --windows 2 --grid none --grid iq4_nl
	LLAMA_CPP_PYTHON=$(CURDIR)/.venv-llama-cpp/bin/python $(BIN)/python -m pytest tests/exports/test_in_llama_cpp.py

test-interop-vllm: $(FOR_TESTS)
	TQDM_DISABLE=1 $(BIN)/python benchmarks/vllm_client.py --data $(or $(DATA),topics) --out .interop-vllm.json \
	    --model smollm2-135m --kind none --kind int4-64 --kind w8a8 --kind smoothquant --kind gptq

test-interop-transformers: $(FOR_TESTS)
	OMP_NUM_THREADS=1 TQDM_DISABLE=1 $(BIN)/python benchmarks/integer_readers.py --format compressed-tensors --dtype float32 \
	    --data $(or $(DATA),topics) --results .interop-transformers --method rtn --windows 2 \
	    --bits 8 --bits 4 --bits 3 --bits 2 --grid fp8 --grid w8a8

test-interop-gptq test-interop-mlx: test-interop-%:
	$(PYTHON) benchmarks/interop.py $* --data $(or $(DATA),topics)

check: $(FOR_TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: $(FOR_TESTS)
	rm -rf dist
	$(BIN)/python -m build --no-isolation

$(FOR_DEMO): $(NEEDS) | $(BIN)/python
	$(PIP) --editable '.[hf,report,fast]'
	touch $@

$(FOR_TESTS): $(NEEDS) | $(BIN)/python
	$(PIP) --editable '.[hf,report,tasks,ray,dev]'
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit("fewbit needs Python 3.10 or newer" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .venv-llama-cpp .venv-vllm .venv-gptq .venv-mlx .interop-* demo-out dist build .pytest_cache .mypy_cache .ruff_cache
