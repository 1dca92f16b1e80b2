# Every target sets itself up in .venv; a machine needs Python >= 3.11, pip and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
SETUP := pyproject.toml constraints.txt

.PHONY: demo test faults check bench dev wheel clean

demo: $(VENV)/.demo wheel  ## record the embedded model over the standard library, probe it, draw a picture
	$(BIN)/tensortape demo

test: $(VENV)/.test wheel check  ## lint, types, and all tests against the built wheel
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

faults: $(VENV)/.test wheel  ## the fault suite in full: kills, failing and full disks, power loss, damage, long random use; prints its table
	cd tests && HF_HUB_OFFLINE=1 ../$(BIN)/python -m faults.report
	TENSORTAPE_FAULTS=long $(BIN)/python -m pytest --timeout 0 tests/stores/test_repair.py tests/stores/test_sealing.py \
	    tests/stores/test_checkpoints.py tests/stores/test_leftovers.py tests/stores/test_state_machine.py

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p tensortape
	$(BIN)/mypy tests/typing

bench: $(VENV)/.bench wheel  ## speed, memory and overhead beside others; prints the tables of benchmarks/results/
	$(BIN)/python benchmarks/bench_write.py
	$(BIN)/python benchmarks/bench_read.py
	$(BIN)/python benchmarks/bench_open.py
	$(BIN)/python benchmarks/bench_memory.py
	$(BIN)/python benchmarks/bench_attention.py
	$(BIN)/python benchmarks/bench_overhead.py
	$(BIN)/python benchmarks/bench_training.py

dev: $(VENV)/.test  ## an editable install, for working on the code
	$(PIP) --no-deps --editable .

wheel:
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .
	$(PIP) --no-deps --force-reinstall dist/*.whl

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.venv $(SETUP)
	$(PIP) ".[plots]"
	touch $@

$(VENV)/.test: $(VENV)/.venv $(SETUP)
	$(PIP) ".[test,dev]"
	touch $@

$(VENV)/.bench: $(VENV)/.venv $(SETUP)
	$(PIP) ".[bench]"
	touch $@

clean:
	rm -rf $(VENV) build dist demo
