# Two commands are enough: `make demo` and `make test`. Both make .venv and install the locked dependencies when needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Tests compare with its files. Installed without its dependencies, which are large and not needed for that.
ORACLE := megatron-core==0.16.1

.PHONY: help setup demo test test-slow test-extended check-models faults gpu-check gpu-wheels lint types docs site format clean

help:
	@echo "make demo       the main job on real text, on this machine, in some minutes"
	@echo "make test       the test suite"
	@echo "make test-slow  the long runs that make test leaves out"
	@echo "make test-extended  before a release: every model type, layout and configuration of which make test-slow tries some"
	@echo "make check-models  each model type against transformers: train, resume, export; TYPES=olmo2 checks one"
	@echo "make faults     kills, full disks, damaged files and more against real runs: 200 cases, an hour or less"
	@echo "make gpu-check  tests, kernels and steps on a CUDA machine, next to peers, in 760 seconds; PART=1 or 2: one half"
	@echo "make gpu-wheels  download the packages that gpu-check installs on a machine without a network"
	@echo "make lint       ruff, format check, mypy and the site without warnings (make types: mypy only)"
	@echo "make docs       the pages that are made from the code: docs/configuration_reference.md"
	@echo "make site       the documentation as a site, in build/site"
	@echo "make format     let ruff format the code"
	@echo "make clean      remove the environment and what the demo wrote"

setup: $(BIN)/.installed

$(BIN)/.installed: requirements.lock setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: $(ORACLE) \
		|| echo "$(ORACLE) has no wheel for this machine: the tests that compare with it are skipped"
	@touch $@

demo: setup
	rm -rf demo_run
	$(BIN)/python tools/demo/run.py --folder demo_run

# Tests of one file share ranks that are started once, so files are dealt out whole. Each worker starts its own.
WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not extended" -n $(WORKERS) --dist loadfile

test-extended: setup
	$(BIN)/python -m pytest -m extended -n $(WORKERS) --dist loadfile

# Writes docs/models.md if all types are checked.
TYPES ?= --all --write-docs
check-models: setup
	$(BIN)/python tests/models/check.py $(TYPES)

# What goes wrong is left in the folder fault_report, with the logs; --only repeats single cases.
CASES ?= 200
SEED ?= 1
faults: setup
	rm -rf fault_report
	$(BIN)/python tests/faults/run.py --cases $(CASES) --seed $(SEED) --output fault_report $(FAULT_OPTIONS)

# Without `setup`: on a GPU machine PyTorch and its libraries are those of the machine. PART=1 or PART=2 runs only one.
GPU_WHEELS ?= $(wildcard build/gpu_wheels)
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(PART),--part $(PART)) $(if $(GPU_WHEELS),--wheels $(GPU_WHEELS)) --output gpu_check

# The packages that such a machine lacks, downloaded where there is a network.
gpu-wheels: setup
	$(BIN)/python benchmarks/gpu_check.py --download-wheels build/gpu_wheels

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types site

types: setup
	@mkdir -p build/mypy && ln -sfn ../.. build/mypy/retemper
	cd build/mypy && ../../$(BIN)/mypy --config-file ../../pyproject.toml

# Pages that are made from the code.
docs: setup
	$(BIN)/python tools/config_reference.py

# Warnings are errors: links and anchors that lead nowhere are among them. With --quiet, mkdocs would not count warnings.
# The variable turns off an advertisement.
site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo_run gpu_check fault_report
