# `make leaderboard` and `make test` set up .venv themselves; nothing but python3 (3.11 or later), make and git is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.installed-docs
MACHINE_OPTION := $(if $(MACHINE),--machine $(MACHINE),)

.PHONY: leaderboard test check soak docs format clean

leaderboard: $(STAMP)
	$(BIN)/prunebench run quickstart $(MACHINE_OPTION)
	$(BIN)/prunebench report --out leaderboard.md --covers results
	$(BIN)/prunebench report --only evaluation.txt --picture results/board.svg >/dev/null

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not soak"

soak: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m soak

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prunebench needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,dev-kernels]'
	touch $(STAMP)

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $(DOCS_STAMP)

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
