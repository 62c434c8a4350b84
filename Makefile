# make demo: train and attack four small networks, end with a table and two plots (4 minutes)
# make test: everything CI runs (ruff, then pytest)
.PHONY: demo test lint bench clean

PYTHON ?= python3
BIN := .venv/bin

demo: .venv/ready
	$(BIN)/python -m bench compare --demo

test: lint
	$(BIN)/python -m pytest

lint: .venv/ready
	$(BIN)/ruff check .

bench: .venv/ready
	$(BIN)/python -m pytest tests/test_speed.py --benchmark-enable --benchmark-only

clean:
	rm -rf .venv runs

# torch and torchvision come from one index in one call: their builds must match
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77"
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[bench,test,recipes]"
	touch $@
