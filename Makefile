# The commands of this project. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
DEMO_DIR ?= runs/demo
EXPORT_DIR ?= exports
STUDY_DIR ?= runs/study
# The TPU compiler is installed for the tests; without this JAX would look for TPUs and complain on standard error.
export JAX_PLATFORMS ?= cpu

.PHONY: install demo study study-full export test test-all lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(RUN) -m tools.demo --workdir $(DEMO_DIR)

# The studies of VRC and DCL: at most 3 hours on two cores, and at most 12 with the exploratory arms. Their page is STUDY_DIR/study.md.
study: install
	$(RUN) -m tools.study --scale study --workdir $(STUDY_DIR)

study-full: install
	$(RUN) -m tools.study --scale full --workdir $(STUDY_DIR)

# Everything that leaves the trained demo, with its parity tables; then all of it is checked again.
EXPORTED := --checkpoint $(DEMO_DIR)/stage3 --compressor $(DEMO_DIR)/compressor --encoder both
GRAPHS := $(EXPORTED) --data $(DEMO_DIR)/data --items 2 --prefill 64 --slots 256

export: install
	test ! -e $(EXPORT_DIR) || (echo "$(EXPORT_DIR) is there already; remove it or give EXPORT_DIR=DIR" && false)
	$(RUN) -m tools.to_torch $(EXPORTED) --output $(EXPORT_DIR)/torch
	$(RUN) -m tools.export_tflite $(GRAPHS) --precision float32,int8,int4,w8a16 --bundle --output $(EXPORT_DIR)/tflite
	$(RUN) -m tools.export_qnn $(GRAPHS) --precision float16,w8a16,w4a16 --soc sm8750 --output $(EXPORT_DIR)/qnn
	for kind in torch tflite qnn; do $(RUN) -m tools.verify_artifact $(EXPORT_DIR)/$$kind || exit 1; done

test: install
	$(RUN) -m pytest -m "not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-all: install
	$(RUN) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: install
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

format: install
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info runs
