# Every target except bench-gpu, test-oldest and test-newest creates .venv and installs what it needs. A newcomer needs
# `make demo` and `make test`.
# Options for every benchmark: make bench BENCH="--quick --clock cpu"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo demo-smollm2 smollm2 test test-oldest test-newest test-all style lint format docs build bench bench-gpu compare recipes-check clean

demo: $(READY)  ## edit 24 facts in the bundled model and print a report
	$(BIN)/lightning run recipes/quickstart.yaml

smollm2: $(READY)  ## download a pretrained model with 135 M parameters into .models/smollm2
	$(BIN)/python recipes/smollm2/fetch.py

demo-smollm2: smollm2  ## edit 20 facts in the pretrained model (the default recipe) and print a report; about 5 minutes on 2 cores
	$(BIN)/lightning run recipes/kedit_default.yaml --model.name .models/smollm2 --data.path recipes/smollm2/facts.jsonl --data.texts recipes/smollm2/keep.txt

test: style  ## what continuous integration runs; under 10 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# PyPI has only CUDA builds of most torch versions, so each environment takes about 6 GB.
# To use another Python: make test-oldest VERSIONS="--python python3.11"
# To use an environment that exists: make test-oldest VERSIONS="--no-install"
test-oldest:  ## the tests with the oldest supported versions, in .venv-oldest; writes the result into docs/versions.md
	$(PYTHON) .ci/versions.py oldest $(VERSIONS)

test-newest:  ## the tests with the newest versions of everything, in .venv-newest; writes the result into docs/versions.md
	$(PYTHON) .ci/versions.py newest $(VERSIONS)

test-all: lint  ## the same with the heavy repetitions
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint: style  ## style, types, and the types that users of the package see; pyright takes more than a minute
	$(BIN)/pyright
	$(BIN)/python .ci/public_types.py

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(READY)  ## build the sdist and the wheel into dist/ and try the wheel; BUILD=--clean installs its dependencies anew
	$(BIN)/python .ci/build.py $(BUILD)

docs: $(READY)  ## build the site of the documentation into runs/docs; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file docs/site/mkdocs.yml
	@echo "Open runs/docs/index.html, or serve the site with its search: $(BIN)/python -m http.server -d runs/docs"

bench: $(READY)  ## compare with what a user would run instead and write tests/benchmarks/RESULTS.md; about 20 minutes
	$(BIN)/python tests/benchmarks/equal_reliability.py $(BENCH)
	$(BIN)/python tests/benchmarks/equal_reliability.py --model factlm $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py $(BENCH)
	$(BIN)/python tests/benchmarks/integrity.py $(BENCH)
	$(BIN)/python tests/benchmarks/head_memory.py $(BENCH)
	$(BIN)/python tests/benchmarks/quickstart.py $(BENCH)
	$(BIN)/python tests/benchmarks/evaluation.py $(BENCH)
	$(BIN)/python tests/benchmarks/profile_run.py $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --model wide --rounds 5 $(BENCH)
	$(BIN)/python tests/benchmarks/scaling.py $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --memory $(BENCH)
	$(BIN)/python tests/benchmarks/step_time.py --memory --model wide $(BENCH)

# This target does not use .venv, because a machine with a GPU often has its own torch and no network. Missing packages can come
# from a folder of wheels: make bench-gpu WHEELS=folder (pip download --no-deps trl datasets dill multiprocess).
bench-gpu:  ## time steps and runs of Llama shapes with 1 B and 8 B parameters on one GPU; at most 8 minutes
	$(if $(WHEELS),$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target runs/site $(WHEELS)/*.whl)
	PYTHONPATH="$(CURDIR):$(CURDIR)/runs/site" PYTHONUNBUFFERED=1 $(PYTHON) tests/benchmarks/gpu.py $(BENCH)

compare: $(READY)  ## run every recipe on the same edits and write docs/results.md; skips what compare.jsonl holds (5 hours from nothing)
	$(BIN)/python tests/benchmarks/compare.py $(COMPARE)

recipes-check: $(READY)  ## run every recipe and compare with the numbers in its header; about 10 minutes on 2 cores
	$(BIN)/python tests/benchmarks/recipes_check.py $(CHECK)

# torch is installed first, because its pinned version can be a CPU build; a range would bring a CUDA build.
$(READY): pyproject.toml constraints.txt kedit_train/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) runs dist .pytest_cache .ruff_cache
