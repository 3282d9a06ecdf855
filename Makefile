# Two commands do all set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# An index for CPU-only torch, where the default one would bring CUDA libraries.
TORCH_INDEX ?=
PIP_FLAGS := --disable-pip-version-check -q -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup setup-dev demo test test-fast check format wheel studies bench bench-quick \
	quality quality-quick clean

setup: $(VENV)/.setup
setup-dev: $(VENV)/.setup-dev

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.setup: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "setting up $(VENV): torch and a few libraries. Where the index gives torch with CUDA"
	@echo "libraries (several GB) and you need none: make $(or $(MAKECMDGOALS),setup) TORCH_INDEX=URL, PyTorch's CPU index"
	$(BIN)/pip install $(PIP_FLAGS) torch==2.13.0
	$(BIN)/pip install $(PIP_FLAGS) -e .
	@touch $@

$(VENV)/.setup-dev: $(VENV)/.setup
	$(BIN)/pip install $(PIP_FLAGS) -e '.[dev,tensorboard]'
	@touch $@

# The main job on real data: train on digits, sample, evaluate, report.
demo: setup
	$(BIN)/undiffuse demo

test: setup-dev
	$(BIN)/pytest -n 2 --dist loadfile --durations 20 --durations-min 5

# The inner loop: without the longer tests.
test-fast: setup-dev
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow"

check: setup-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest tests/test_architecture.py

format: setup-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Build the wheel and try it in a clean environment.
wheel: setup-dev
	scripts/check-wheel $(BIN)/python

# Measure the claims of docs/studies.md again; goes on where it was interrupted.
studies: setup
	$(BIN)/python studies/run.py

# Speed and memory against other projects; everything is added to benchmarks/results and drawn into
# docs/performance.md. Checkouts of peers: make bench BENCH_FLAGS='--peer-path DIR'
BENCH_FLAGS ?=
bench: setup-dev
	$(BIN)/python -m benchmarks.run $(BENCH_FLAGS)
	$(BIN)/python benchmarks/page.py

# The headline figures, one line of JSON each, in less than ten minutes on two cores.
bench-quick: setup-dev
	@$(BIN)/python -m benchmarks.run --quick $(BENCH_FLAGS)

# What the networks reach beside what is possible; hours, goes on where it was interrupted. A part of
# it: make quality QUALITY_FLAGS='--only ablation/digits --seeds 0'
QUALITY_FLAGS ?=
quality: setup-dev
	$(BIN)/python -m quality.run $(QUALITY_FLAGS); held=$$?; $(BIN)/python -m quality.page && exit $$held

# The headline figures for one seed, one line of JSON each, in less than ten minutes on two cores.
quality-quick: setup-dev
	@$(BIN)/python -m quality.run --quick --seeds 0 $(QUALITY_FLAGS)

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis
