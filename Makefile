PYTHON ?= python3
# Two processes with a thread each; more threads than cores slow small tensors down.
export OMP_NUM_THREADS ?= 1

BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-slow test-peers test-gpu test-triton bench bench-flowjax bench-scaling benchmark-density bench-vi bench-vi-numpyro bench-mcmc bench-sbi bench-sbi-peer bench-vae lint format types doctest docs clean

demo: $(READY)
	$(BIN)/pyroflows demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

test-slow: $(READY)
	$(BIN)/python -m pytest -q -n 2 -m slow

test-peers: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m pytest -q -m peers

# Everything on a GPU; torch must be a build for one.
test-gpu: $(READY)
	$(BIN)/python -m pytest -q --device cuda
	$(BIN)/python -m pytest -q --device cuda --dtype float64 tests/test_properties.py

# The kernels for GPUs, on a CPU: by Triton's interpreter, and compiled for a card that is not there.
# In a folder of its own, so that nothing else sees Triton.
test-triton: $(READY)
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/triton triton==3.9.0
	PYTHONPATH=build/triton TRITON_INTERPRET=1 $(BIN)/python -m pytest -q tests/test_triton.py

bench: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -W ignore -m tests.benchmarks.speed --threads 2 --budget 10
	$(BIN)/python -W ignore -m tests.benchmarks.speed --page

bench-scaling: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers,demo]'
	$(BIN)/python -W ignore -m tests.benchmarks.speed.scaling

# flowjax in an environment of its own, for bench to run beside.
bench-flowjax:
	$(PYTHON) -m venv build/flowjax
	build/flowjax/bin/pip install --quiet flowjax

benchmark-density: $(READY)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[peers]'
	$(BIN)/python -m tests.benchmarks.density

bench-vi: $(READY)
	$(BIN)/python -m tests.benchmarks.vi

bench-mcmc: $(READY)
	$(BIN)/python -m tests.benchmarks.mcmc

bench-sbi: $(READY)
	$(BIN)/python -m tests.benchmarks.sbi --page $(if $(wildcard build/sbi),--peer build/sbi/bin/python)

bench-vae: $(READY)
	$(BIN)/python -m tests.benchmarks.vae --page

# The package sbi in an environment of its own, for bench-sbi to run beside.
bench-sbi-peer:
	$(PYTHON) -m venv build/sbi
	build/sbi/bin/pip install --quiet sbi

# NumPyro in an environment of its own, for bench-vi to run beside.
bench-vi-numpyro:
	$(PYTHON) -m venv build/numpyro
	build/numpyro/bin/pip install --quiet numpyro

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

# The tests' conftest.py also seeds the examples and clears the param store around each.
doctest: $(READY)
	$(BIN)/python -m pytest -q -n 2 -p tests.conftest --doctest-modules pyroflows

docs: $(READY)
	$(BIN)/sphinx-build -q -W --keep-going docs docs/_build/html

clean:
	rm -rf .venv build dist demo docs/_build *.egg-info .hypothesis .*_cache

# torch goes first and pinned: an open range would fetch gigabytes of CUDA libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
