# every target sets up what it needs in .venv; nothing is expected of the machine but Python 3.11+ and make
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types docs copy endurance bench bench-save bench-compare gpu-test gpu-bench gpu-report triton-versions netlab netlab-shards study study-quick setup clean

# without OMP_NUM_THREADS torchrun warns that it sets it
demo: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc-per-node 4 bench/demo --out runs/demo

# two processes, each with whole files: most tests have one busy process, or wait for several
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: setup types docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: copy
	cd build/copy && ../../$(BIN)/python -m mypy --config-file ../../pyproject.toml --package lioncub

# a site in build/docs; a broken link, a name that does not exist or a docstring that does not fit its function fails
docs: copy
	$(BIN)/python -m mkdocs build --quiet

# type checker and reference do not follow the package map of an editable install, so they read an installed copy
copy: setup
	rm -rf build/copy
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --target build/copy .

# random schedules of steps and faults, ends of processes, leaks; MINUTES=20 unless given
endurance: setup
	OMP_NUM_THREADS=1 $(BIN)/python bench/endurance --minutes $(or $(MINUTES),20)

# a quarter of an hour, with the machine to itself; ONLY="/cpu/ 16Mi" times a part and writes no tables
bench: setup
	$(BIN)/python bench/speed run $(if $(ONLY),--only $(ONLY))
	$(if $(ONLY),,$(BIN)/python bench/speed report)

bench-save: setup
	$(BIN)/python bench/speed save $(NAME)

# fails where something takes longer, in streams, than it did; OLD=FOLDER of another checkout times both by turns
bench-compare: setup
	$(BIN)/python bench/speed compare $(if $(OLD),--old $(OLD)) $(if $(NEW),--new $(NEW)) \
		$(if $(ONLY),--only $(ONLY)) $(if $(TOLERANCE),--tolerance $(TOLERANCE))

# on a machine with a GPU: real kernels against the reference, then figures from it in runs/gpu
gpu-test: setup
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

gpu-bench: setup
	$(BIN)/python bench/gpu run $(if $(STAGES),--stages $(STAGES)) --out runs/gpu

# what every Triton kernel compiles to on each GPU, without one; a quarter of an hour
gpu-report: setup
	$(BIN)/python bench/gpu_report --jobs 2

# every kernel for every GPU with the versions of Triton that torch 2.11 and later pin; an hour
triton-versions: setup
	$(BIN)/python bench/gpu_report --versions --jobs 2

# needs root and iproute2, and the machine to itself for an hour
netlab: setup
	$(BIN)/python bench/netlab matrix

# sharded models on 2 hosts of 2 workers, under the same conditions; half an hour
netlab-shards: setup
	$(BIN)/python bench/netlab shards

# an interrupted study goes on where it was; KEEP_OLD=1 adds to runs of another commit
study: setup
	$(BIN)/python bench/study --hours 2.9 $(if $(KEEP_OLD),--keep-old)

study-quick: setup
	$(BIN)/python bench/study --quick

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	# torch by itself and first, at the pinned version: resolved with the rest it could be a newer one
	$(BIN)/python -m pip install --quiet torch -c constraints.txt
	$(BIN)/python -m pip install --quiet --editable ".[dev]" -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
