# `make demo` and `make test` need nothing but python3 and make: they create .venv and install
# what they need, once.
PYTHON ?= python3
BIN := .venv/bin
# Two test workers, or two benchmarks, share the cores: threads of OpenBLAS would wait for one
# another, and a singular value decomposition take seconds.
export OPENBLAS_NUM_THREADS := 1

# What depends on the dtype runs in float64, too.
FLOAT64 := $(addprefix tests/test_,$(addsuffix .py,numerics simplex order matrix spectral \
	elementwise combinators tangent known_answers project memory properties pytrees modes))

.PHONY: demo test test-floor bench mutants lint clean

demo: .venv/.demo
	$(BIN)/python notebooks/demo.py

test: .venv/.tests lint
	$(BIN)/python -m pytest -n 2 --dist worksteal
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(FLOAT64)

lint: .venv/.tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# The same tests on the lowest versions that pyproject.toml allows, in float32.
test-floor: .venv-floor/.tests
	.venv-floor/bin/python -m pytest -n 2 --dist worksteal -m "not slow" -k "not float16" tests

bench: .venv/.tests
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/sets.py

mutants: .venv/.tests
	$(BIN)/python benchmarks/mutants.py

.venv/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[$*]'
	touch $@

.venv-floor/.tests: pyproject.toml tests/floors.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install -q -e '.[tests]' -c tests/floors.txt
	touch $@

clean:
	rm -rf .venv .venv-floor .compilation_cache build dist *.egg-info
