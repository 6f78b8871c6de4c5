# On a machine with nothing but Python >= 3.10:
#     make demo       train a small model on Python's standard library, then let it write
#     make test       every claim once: 2 to 5 minutes on two cores
#     make test-all   every test that needs no GPU: 10 to 15 minutes on two cores
#     make lint       ruff and mypy
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint bench clean

demo: $(BIN)/ready
	$(BIN)/python train.py --resume --sample-every 50
	$(BIN)/python generate.py --model runs/demo --prompt "def " --max-new-tokens 120 --temperature 0.7 --seed 1

test: $(BIN)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow"

test-all: $(BIN)/ready
	$(BIN)/python -m pytest -n auto --dist worksteal

lint: $(BIN)/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(BIN)/ready
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python -m benchmarks.convert
	! $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || $(BIN)/python -m benchmarks.kernels

# torch comes first and alone: so a build of it that the machine already offers is taken, and nothing replaces it after
$(BIN)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "nanollm needs Python 3.10 or later; make PYTHON=python3.11 … names another")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test,train,lint]"
	touch $@

clean:
	rm -rf .venv
