# Everything runs in .venv, which each target makes or completes. PYTHON=python3.12 make install picks the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The distribution was once called dejavu. Both own the same files, so the old one goes first; -qq hides that there is none.
# Modules are compiled as they are first imported: pip compiles 19,000, two minutes of an install, and few are ever used.
PIP_INSTALL := $(PIP) uninstall -qq --yes dejavu && $(PIP) install -q --no-compile -c constraints.txt
FIRST_RUN := PYTHONDONTWRITEBYTECODE= $(BIN)/dejavu generate opt-mini --prompt Once --max-new-tokens 1 > /dev/null
NATIVE := CMakeLists.txt $(wildcard native/*.h native/src/*)
# An editable install has a map of the modules, so another list of them is another install: the stamp's name is the list's checksum.
MODULES := $(VENV)/.modules-$(firstword $(shell find src/dejavu -name '*.py' | LC_ALL=C sort | cksum))
PROJECT := pyproject.toml constraints.txt src/dejavu/version.py $(NATIVE)

.PHONY: install demo test lint bench tables native native-sanitize native-arm64 clean

install: $(VENV)/.installed-all

demo: $(VENV)/.installed-base
	$(BIN)/dejavu demo

# Neighbours share what they train and load, so each process takes half of the files, and what the other has not begun. The programs
# that tests start find compiled modules.
test: lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed-all
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

bench: $(VENV)/.installed-all
	$(BIN)/dejavu bench opt-mini

# Fill the tables of README and docs from results/, and draw the pictures of docs.
tables: $(VENV)/.installed-all
	$(BIN)/python recipes/tables.py render
	$(BIN)/python recipes/pictures.py

# The native engine alone, for a source tree used with PYTHONPATH=src: into build/native, where it is found.
native:
	cmake -S . -B build/native -DCMAKE_BUILD_TYPE=Release
	cmake --build build/native

# Its code under the address and undefined-behaviour sanitizers: a driver runs models of many shapes through the C interface. GCC 13
# misaligns vectors of AVX-512 on the stack that finds uses after return.
native-sanitize:
	cmake -S . -B build/sanitize -DDEJAVU_SANITIZE=ON
	cmake --build build/sanitize
	ASAN_OPTIONS=allocator_may_return_null=1:detect_stack_use_after_return=0 build/sanitize/dejavu_driver

# The driver for AArch64, without sanitizers, under an emulator: NEON against scalar. Takes zig (pip install ziglang) and qemu-user.
native-arm64:
	cmake -S . -B build/arm64 -DDEJAVU_DRIVER=ON -DCMAKE_TOOLCHAIN_FILE=native/sanitize/aarch64.cmake
	cmake --build build/arm64
	$(or $(shell command -v qemu-aarch64),qemu-aarch64-static) build/arm64/dejavu_driver

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(MODULES): | $(VENV)/.created
	rm -f $(VENV)/.modules-*
	touch $@

$(VENV)/.installed-base: $(PROJECT) $(MODULES) | $(VENV)/.created
	$(PIP_INSTALL) -e .
	$(FIRST_RUN)
	touch $@

$(VENV)/.installed-all: $(PROJECT) $(MODULES) | $(VENV)/.created
	$(PIP_INSTALL) -e ".[serve,eval,bench,dev]"
	$(FIRST_RUN)
	touch $(VENV)/.installed-base $@
