# The commands of this project. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_DIR ?= runs/demo
# The TPU compiler is installed for the tests; without this JAX would look for TPUs and complain on standard error.
export JAX_PLATFORMS ?= cpu

.PHONY: install demo test test-all lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(RUN) -m tools.demo --workdir $(DEMO_DIR)

test: install
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-all: install
	$(RUN) -m pytest --numprocesses 2 --dist loadfile

lint: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info runs
