# every target sets up what it needs in .venv; nothing is expected of the machine but Python 3.11+ and make
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types bench netlab study study-quick setup clean

demo: setup
	$(BIN)/lioncub train --method lion --method lioncub --workers 4 --layers 4 --context 64 --batch 8 \
		--steps 300 --eval-every 30 --checkpoint-every 0 --out runs/demo --overwrite

test: setup
	$(BIN)/python -m pytest

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# a type checker does not follow the package map of an editable install, so it is given an installed copy
types: setup
	rm -rf build/types
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --package lioncub

bench: setup
	mkdir -p runs
	$(BIN)/python -m pytest bench --quiet --benchmark-json=runs/bench.json
	$(BIN)/python bench/report.py runs/bench.json docs/benchmarks.md

# needs root, iproute2 and iperf3, and the machine to itself for up to an hour
netlab: setup
	$(BIN)/python bench/netlab matrix --runs runs/netlab --out docs

# an interrupted study goes on where it was; runs of other code do not count
study: setup
	$(BIN)/python bench/convergence run --runs runs/study --out docs --hours 2.9

study-quick: setup
	$(BIN)/python bench/convergence run --quick

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself and first, at the pinned version: resolved with the rest it could be a newer one
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
