# Every target sets up its own virtual environment; `make demo` and `make test` work in a fresh clone.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
READY := .venv/.ready

.PHONY: demo test test-bare test-servers test-ray test-real slow check bench schema clean

demo: $(INSTALLED)
	$(BIN)/undistill demo

test: $(READY)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

test-bare: $(READY)
	$(BIN)/pytest -m bare

test-servers: $(READY)
	$(BIN)/pytest -m servers

test-ray: $(READY)
	$(BIN)/pytest -m ray

test-real: $(READY)
	$(BIN)/pytest -m real

slow: $(READY)
	$(BIN)/pytest -m slow

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python -m benchmarks.bench

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "undistill needs Python 3.11 or newer; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

schema: $(READY)
	$(BIN)/python -c "import json; from undistill.auditing.schema import Report; print(json.dumps(Report.model_json_schema(), indent=2))" > docs/report.schema.json
	$(BIN)/python -c "import json; from undistill.auditing.comparison import Comparison; print(json.dumps(Comparison.model_json_schema(), indent=2))" > docs/comparison.schema.json
