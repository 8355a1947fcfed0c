# One command each: `make demo`, `make test`. Everything needed is brought into .venv, with uv from PATH or one of its own.
export UV_SYSTEM_CERTS ?= 1
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
RUN := .venv/bin/python

.PHONY: demo test test-slow test-faults reference check format bench clean

demo: .venv/runtime
	.venv/bin/boxwright demo

test: .venv/dev
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 -m "not slow and not faults"

test-slow: .venv/dev
	$(RUN) -m pytest -m slow

test-faults: .venv/dev
	$(RUN) -m pytest -m faults

reference: .venv/dev
	$(RUN) docs/make_reference.py

check: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/pyright
	.venv/bin/lint-imports

format: .venv/dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: .venv/dev
	for script in benchmarks/*.py; do $(RUN) $$script || exit 1; done

# The pins of constraints.txt are versions that were tried together; pyproject.toml has the open ranges.
.venv/runtime: pyproject.toml constraints.txt | .venv/bin/python
	$(UV) pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable .
	touch $@

.venv/dev: pyproject.toml constraints.txt | .venv/bin/python
	$(UV) pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable ".[dev]"
	touch $@ .venv/runtime

.venv/bin/python: | $(UV)
	$(UV) venv --quiet --python $(PYTHON) .venv

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/pip install --quiet --disable-pip-version-check uv

clean:
	rm -rf .venv .uv outputs
