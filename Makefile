VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A process a core, a file of tests each; torch's threads do not spin while they wait for each other.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses auto --dist loadfile

.PHONY: demo test test-slow lint benchmarks notebooks clean

demo: $(INSTALLED)
	$(BIN)/approxconv demo --out demo_results

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(INSTALLED)
	$(PYTEST) -m "slow and not gpu"
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

notebooks: $(INSTALLED)
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 --overwrite notebooks

benchmarks: $(INSTALLED)
	$(BIN)/python -m benchmarks

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[cuda12,demo,test]'
	touch $@

clean:
	rm -rf $(VENV) demo_results
