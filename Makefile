# Everything a newcomer needs: `make demo` and `make test`. Both set up .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
.PHONY: demo test lint clean

demo: $(READY)
	$(BIN)/statezoo fit --config demo.yaml
	$(BIN)/statezoo generate --model runs/demo/export --prompt "The for statement" --max-new-tokens 300 --temperature 0.7 --seed 1

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# torch first and exactly pinned: a bare `torch` would bring the newest build and gigabytes of CUDA.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "statezoo needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv runs build dist
