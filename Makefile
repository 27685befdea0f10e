PYTHON ?= python

.PHONY: lint test nightly bench format

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(dir $(shell command -v $(PYTHON)))lint-imports

test:
	$(PYTHON) -m pytest

nightly:
	$(PYTHON) -m pytest -m nightly

bench:
	$(PYTHON) -m jobs.bench
	$(PYTHON) -m jobs.bench_rank

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
