# `make help` lists the targets. Everything runs from .venv, which `make install` makes.

PYTHON ?= python3
PIP_FLAGS ?=
ARGS ?=
JOBS ?= 2

VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart quickstart-api test test-all lint format types docs bench build clean

help: ## List the targets
	@echo "usage: make [target] [VARIABLE=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "variables: PYTHON=$(PYTHON) (3.11 to 3.14), PIP_FLAGS (for pip install),"
	@echo "           ARGS (for the recipe, pytest or the benchmark), JOBS=$(JOBS) (test processes)"

install: $(STAMP) ## Make .venv and install the pinned set (again when a pin changed)

quickstart: install ## Train SmolLM2-135M on one-digit sums: about five minutes on two cores
	$(LAUNCH) recipes/grpo.py --config recipes/configs/quickstart.yaml $(ARGS)

quickstart-api: install ## The same, with its reward served by another process on this machine
	@$(PY) -c "import socket; socket.create_server(('127.0.0.1', 8000)).close()" 2>/dev/null || \
		{ echo "port 8000 is taken, where the reward would be served: stop what listens there"; exit 1; }
	$(VENV)/bin/trl-grpo-ext serve-reward --reward last_number & trap "kill $$!" EXIT; \
	$(LAUNCH) recipes/grpo.py --config recipes/configs/quickstart_api.yaml $(ARGS)

test: install ## Run the tests, without those marked slow
	$(PYTEST) -m "not slow" $(ARGS)

test-all: install ## Run all tests
	$(PYTEST) $(ARGS)

lint: install ## Check style and format with ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: install ## Format the code and apply the safe fixes
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: install ## Check the types of the package with mypy --strict
	$(PY) -m mypy --strict trl_grpo_ext

docs: install ## Build the site in site/; a broken link or a warning fails it
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict $(ARGS)

bench: install ## Measure a training step against plain TRL: about an hour on two cores
	$(PY) benchmarks/step_time.py $(ARGS)

build: install ## Make the sdist and the wheel in dist/
	$(PY) -m build

clean: ## Remove what was built and the caches; .venv and outputs/ stay
	rm -rf build dist site *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Each test process has one thread (tests/conftest.py); the tests of a file share its fixtures.
PYTEST = $(PY) -m pytest -n $(JOBS) --dist loadfile

# One process on one device, whatever `accelerate config` says, and said in full so that accelerate
# does not warn about its defaults. Left alone it would also give torch a single CPU thread.
# Ctrl-C is for the run, which saves a checkpoint: the launcher ignores it and waits. --quiet keeps
# the launcher's own traceback away from what the run says last.
LAUNCH = trap '' INT; CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES-0} $(VENV)/bin/accelerate launch --quiet \
	--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $$($(PY) -c 'import torch; print(torch.get_num_threads())')

$(STAMP): setup.cfg pyproject.toml constraints.txt $(PY)
	@$(call check_python,$(PY))
	$(PY) -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

# A venv without pip (Debian without python3-venv) fails here, and .DELETE_ON_ERROR takes it back.
$(PY):
	@$(call check_python,$(PYTHON))
	$(PYTHON) -m venv $(VENV)

check_python = found=$$($(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])') || \
	{ echo "error: '$(1)' does not run. Install Python 3.11 to 3.14, or say where it is: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	case $$found in 3.11|3.12|3.13|3.14) ;; \
	*) echo "error: '$(1)' is Python $$found, and the pinned packages need 3.11 to 3.14. Name another one: make PYTHON=python3.12$(if $(filter $(PY),$(1)), (and remove $(VENV) first))" >&2; exit 1;; esac
