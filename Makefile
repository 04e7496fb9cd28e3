# Every target sets itself up: all it needs is Python 3.11 or newer with pip, and make.

PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
SET_UP := .venv/.set-up

export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check slow docs bench format clean

help:
	@echo "make demo    record a small training run, explain it, write demo/index.html"
	@echo "make test    check, then the tests and doctests (WORKERS=$(WORKERS) processes)"
	@echo "make check   ruff and pyright"
	@echo "make slow    retraining, crash tests and examples"
	@echo "make docs    docs/_build/html/index.html"
	@echo "make bench   the quick form of every benchmark"
	@echo "make format  let ruff fix and format"
	@echo "make clean   remove everything that make made, .venv included"

$(SET_UP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(SET_UP)
	$(BIN)/retrograd demo --output demo

check: $(SET_UP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

test: check
	$(BIN)/pytest -n $(WORKERS)

slow: $(SET_UP)
	$(BIN)/pytest -n $(WORKERS) -m slow

docs: $(SET_UP)
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs docs/_build/html
	@echo docs/_build/html/index.html

bench: $(SET_UP)
	set -e; for benchmark in benchmarks/*.py; do $(BIN)/python $$benchmark --quick; done

format: $(SET_UP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf .venv build dist demo docs/_build docs/examples .pytest_cache .ruff_cache .hypothesis
