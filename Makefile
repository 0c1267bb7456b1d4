# make demo | make test | make lint | make static | make bench | make gpu OUT=DIR | make wheels OUT=DIR
PYTHON ?= python3
OUT ?= bench/results
BIN := .venv/bin

.PHONY: demo test lint static bench gpu wheels clean
.DEFAULT_GOAL := demo

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; call: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The trainers that tests/parity compares with, apart from the venv's packages: no user needs them.
.venv/.peers: .venv/.installed tests/parity/peers.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .venv/peers -r tests/parity/peers.txt
	touch $@

# Where it is installed, transformers imports it, and it prints: apart, too.
.venv/.torchao: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade -c constraints.txt --target .venv/torchao torchao
	touch $@

# Trackers, which are windows on a run and no part of it.
.venv/.track: .venv/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv/track trackio tensorboard
	touch $@

demo: .venv/.installed
	$(BIN)/grpo-fast train --config examples/demo.yaml $(ARGS)

test: .venv/.installed .venv/.peers .venv/.torchao .venv/.track
	$(BIN)/pytest $(ARGS)

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

static: .venv/.installed
	$(BIN)/grpo-fast bench --static

# Every table at small sizes, with pictures: bench/quick/README.md
bench: .venv/.installed .venv/.peers
	PYTHONPATH=.venv/peers $(BIN)/grpo-fast bench --all --quick $(ARGS)

# The peers for a GPU machine without a network: make gpu ARGS="--wheels DIR"
wheels:
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest $(OUT) -r tests/parity/peers.txt

# No network and no .venv: the machine's own Python, torch, triton and transformers are measured.
# In pieces: make gpu OUT=DIR ARGS="--only kernels --only timing"
gpu:
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation .
	$(PYTHON) bench/gpu.py --out $(OUT) $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info
