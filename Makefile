# `make demo` and `make test` are README.md's commands; the others serve work on the code.
.PHONY: demo test nightly lint mutants static bench gpu
.DELETE_ON_ERROR:

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
OLDEST := .venv-oldest
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check
PINNED := $(INSTALL) --constraint constraints.txt

# DEVICE=cpu, cuda, mps or xpu; without it the demo takes the best one that torch finds.
demo: $(VENV)/demo.stamp
	$(RUN) examples/minilm.py $(if $(DEVICE),--device $(DEVICE))

# One thread a worker: the workers share the cores. One of the tests runs a subset under triton 3.6.0.
test: $(VENV)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal

# Hours: every test, every mutation, whether the committed static table is that of these kernels, and the operators under
# the oldest supported torch, which takes 7 GB of disk.
nightly: $(VENV)/test.stamp $(OLDEST)/test.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal -m ""
	$(RUN) tests/mutants.py
	$(RUN) -m bench.static --check
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) --dist worksteal tests/runtime/test_operators.py \
		tests/api/test_nested.py tests/backends/test_gradcheck.py tests/spec/test_torch_internals.py

lint: $(VENV)/test.stamp
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

# Breaks one line at a time and shows a test going red for each.
mutants: $(VENV)/test.stamp
	$(RUN) tests/mutants.py

# Compiles every shipped kernel and configuration for six targets, without a GPU, under the GPU reference's triton.
static: $(VENV)/test.stamp
	PYTHONPATH=$(VENV)/triton36 $(RUN) -m bench.static

# Ours and every peer on this machine, what a call costs its host, pictures; and the documents' figures of them.
bench: $(VENV)/test.stamp
	$(RUN) -m bench.run --device cpu
	$(RUN) -m bench.ragged
	$(RUN) -m bench.host
	$(RUN) -m bench.plot
	$(RUN) -m bench.plot bench/results/ragged.csv
	$(RUN) -m bench.report

# For a GPU machine: uses its own torch and triton and installs nothing.
gpu:
	$(PYTHON) -m bench.gpu

# torch by its exact pin and before everything else: an open range may bring several GB of CUDA packages.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'constraints.txt needs Python 3.11 or newer, and $(PYTHON) is ' + sys.version.split()[0] + ': make $(or $(MAKECMDGOALS),demo) PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(PINNED) torch setuptools
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp setup.py pyproject.toml
	$(PINNED) --no-build-isolation --editable '.[triton,demo]'
	touch $@

$(VENV)/test.stamp: $(VENV)/demo.stamp
	$(PINNED) --no-build-isolation --editable '.[triton,demo,test,bench]'
	$(INSTALL) --upgrade --no-deps --target $(VENV)/triton36 triton==3.6.0
	touch $@

$(OLDEST)/test.stamp: constraints.txt constraints-oldest.txt setup.py pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	{ cat constraints-oldest.txt; grep --invert-match --extended-regexp '^(torch|triton)==' constraints.txt; } > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt torch numpy setuptools
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(OLDEST)/constraints.txt --no-build-isolation --editable '.[test]'
	touch $@
