# Everything runs in .venv, which each target makes or completes. PYTHON=python3.12 make install picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
PROJECT := pyproject.toml constraints.txt CMakeLists.txt src/dejavu/version.py

.PHONY: install demo test lint bench tables clean

install: $(VENV)/.installed-all

demo: $(VENV)/.installed-base
	$(BIN)/dejavu demo

test: lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: $(VENV)/.installed-all
	$(BIN)/dejavu bench opt-mini

# Fill the tables of README and docs from results/.
tables: $(VENV)/.installed-all
	$(BIN)/python recipes/tables.py render

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed-base: $(PROJECT) | $(VENV)/.created
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/.installed-all: $(PROJECT) | $(VENV)/.created
	$(PIP_INSTALL) -e ".[serve,eval,bench,dev]"
	touch $(VENV)/.installed-base $@
