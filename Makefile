# Everything sets itself up in .venv; `make demo` and `make test` are all a newcomer needs.
# Options for every benchmark: make bench BENCH="--quick --clock cpu"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test lint format bench compare recipes-check clean

demo: $(READY)  ## edit 24 facts of the embedded world and report
	$(BIN)/lightning run recipes/quickstart.yaml

test: lint  ## what continuous integration runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## measure against what a user would run instead, into tests/benchmarks/RESULTS.md; some 20 minutes
	$(BIN)/python tests/benchmarks/equal_reliability.py $(BENCH)
	$(BIN)/python tests/benchmarks/equal_reliability.py --model factlm $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py $(BENCH)
	$(BIN)/python tests/benchmarks/head_memory.py $(BENCH)
	$(BIN)/python tests/benchmarks/quickstart.py $(BENCH)
	$(BIN)/python tests/benchmarks/evaluation.py $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --model wide --rounds 5 $(BENCH)
	$(BIN)/python tests/benchmarks/scaling.py $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --memory $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --memory --model wide $(BENCH)

compare: $(READY)  ## every recipe on the same edits, three draws, into recipes/README.md; what compare.jsonl has is not measured again (all of it: some five hours on 2 cores)
	$(BIN)/python tests/benchmarks/compare.py $(COMPARE)

recipes-check: $(READY)  ## does every recipe keep the numbers that it promises? some ten minutes on 2 cores
	$(BIN)/python tests/benchmarks/recipes_check.py $(CHECK)

# torch first: its pinned version may be a CPU build that pip already knows, and a later range would bring another one.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache
