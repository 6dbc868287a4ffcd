# `make leaderboard` and `make test` set up .venv themselves; nothing but python3 (3.11 or later), make and git is needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MACHINE_OPTION := $(if $(MACHINE),--machine $(MACHINE),)

.PHONY: leaderboard test check soak format clean

leaderboard: $(STAMP)
	$(BIN)/prunebench run quickstart $(MACHINE_OPTION)
	$(BIN)/prunebench report --out leaderboard.md
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

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prunebench needs Python 3.11 or later")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
