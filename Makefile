# The two commands of the README are `make demo` and `make test`; everything makes .venv first.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export DO_NOT_TRACK := true
export MLFLOW_DISABLE_TELEMETRY := true

.PHONY: venv demo test test-slow lint bench bench-learning bench-gpu clean

venv: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -n "$(PYTHON)" || { echo 'Python 3.11 or 3.12 with venv was not found; install it or call make PYTHON=/path/to/python3.11'; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -c 'from medmamba.ops.backend import native_isa; print("scan kernel:", *native_isa())'
	touch $@

demo: venv
	$(BIN)/medmamba demo

test: venv
	$(BIN)/pytest

test-slow: venv
	$(BIN)/pytest -m slow

lint: venv
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: venv
	for name in scan reversible inference change; do $(BIN)/python benchmarks/$$name.py || exit 1; done

bench-learning: venv # an hour on two cores; finished runs are kept, so it may be stopped
	$(BIN)/python benchmarks/learning.py

bench-gpu: venv
	$(BIN)/python benchmarks/scan_gpu.py

clean:
	rm -rf .venv build dist *.egg-info
