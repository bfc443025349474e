# Everything lives in .venv; the exact versions are those of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Idle threads sleep: where other work runs too, spinning ones make torch ten times slower.
export OMP_WAIT_POLICY ?= PASSIVE
DATA ?= /usr/share/datasets/fashion-mnist

.PHONY: demo test test-all check format zoo benchmark clean

demo: $(VENV)/bench
	$(BIN)/queryfoil bench quick --out runs/quick

test: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto

test-all: $(VENV)/dev
	$(BIN)/python -m pytest -q -n auto -m ''

check: $(VENV)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Train the shipped weights again (some hours on two cores; a killed run continues); DATA is a folder with the IDX files.
zoo: $(VENV)/bench
	for recipe in src/queryfoil/shipped/recipes/fashion-*.toml; do \
		$(BIN)/queryfoil train $$recipe --data $(DATA) --out src/queryfoil/shipped/zoo || exit 1; \
	done

benchmark: $(VENV)/peers
	$(BIN)/python benchmarks/engine.py
	$(BIN)/python benchmarks/disguise.py

clean:
	rm -rf $(VENV) runs

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt pip

$(VENV)/%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench$(if $(filter-out bench,$*),$(comma)$*)]'
	@touch $@

comma := ,
