# demo and test need only Python 3.11 and make; both build .venv themselves.
PYTHON ?= python3.11
BIN := .venv/bin
CONSTRAINTS := -c constraints.txt

.PHONY: demo demo-merge demo-pipeline demo-arche test check bench bench-merge clean

# The stamps make an install happen once, and again when a dependency changes.
.venv/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) torch
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) -e .
	touch $@

.venv/.dev: .venv/.base
	$(BIN)/pip install -q --disable-pip-version-check $(CONSTRAINTS) -e '.[dev]'
	touch $@

demo: .venv/.base
	$(BIN)/moesaic demo

demo-merge: .venv/.base
	$(BIN)/moesaic demo-merge

demo-pipeline: .venv/.base
	$(BIN)/moesaic demo-pipeline

demo-arche: .venv/.base
	$(BIN)/moesaic demo-arche

bench-merge: .venv/.dev
	$(BIN)/python benchmarks/merge_roles.py ../shared/data/experts

test: .venv/.dev
	$(BIN)/python -m pytest -n 2

check: test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.dev
	$(BIN)/python benchmarks/makemoe_step.py
	$(BIN)/python benchmarks/makemoe_decode.py
	$(BIN)/python benchmarks/cpu_choices.py
	$(BIN)/python benchmarks/olmoe_layer.py
	$(BIN)/python benchmarks/olmoe_decode.py
	$(BIN)/python benchmarks/expert_count.py

clean:
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache
