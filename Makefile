# `make demo` and `make test` need nothing but python3 and make: they create .venv and install
# what they need, once.
PYTHON ?= python3
BIN := .venv/bin
# Two test workers, or two benchmarks, share the cores: threads of OpenBLAS would wait for one
# another, and a singular value decomposition take seconds.
export OPENBLAS_NUM_THREADS := 1

tests = $(addprefix tests/test_,$(addsuffix .py,$(1)))
PYTEST := python -m pytest -n 2 --dist worksteal
# Compiling takes most of the time of the tests. `make test` has everything compiled with less
# optimization, and `make test-all` has the promises of all sets compiled as users compile them.
QUICKLY := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false \
	--xla_cpu_parallel_codegen_split_count=1
PROMISES := $(call tests,numerics feasible)
SOLVERS := $(call tests,simplex section order sequence polyhedron matrix transport spectral scaled)
# What `make test` leaves to `make test-all`, beside slow tests and float16: solvers and families of
# sets beside those of others, unusual modes and inputs, training, layers, other optimizers and
# libraries, processes, pictures and commands.
LATER := $(SOLVERS) $(call tests,around combinators elementwise operator pattern modes hostile faults \
	cones straight_through conformance properties pytrees stats distributed resume clients \
	composition training_networks networks train_lm known_answers projected unit_adam fused_adam \
	kept_params keras keras_parity flax_linen flax_nnx flax_bridge flax_signatures private plot \
	html cli)
# What may come out otherwise with other versions of JAX, Optax and Flax; and with older ones.
VERSIONS := $(call tests,project memory wrappers composition resume private package layout \
	flax_linen flax_nnx flax_bridge flax_signatures)
OLDER := $(call tests,numerics projected pytrees stats straight_through tangent first_steps)
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

.PHONY: demo test test-all test-left-out test-float64 test-floor test-newest
.PHONY: test-newer test-ecosystem bench bench-accelerators bench-peers mutants docs lint clean

demo: .venv/.demo
	$(BIN)/python notebooks/demo.py

# Runs the tests with a Python, compiled quickly. A JAX that does not know a flag stops at once: then
# with the first one alone, which all of them know.
quickly = flags="$(QUICKLY)"; \
	XLA_FLAGS="$$flags" $(1)/python -c "import jax; jax.devices()" 2>/dev/null || \
	flags="$(firstword $(QUICKLY))"; \
	XLA_FLAGS="$$flags" $(1)/$(PYTEST)

# Pyright takes a minute of one core: it runs beside the tests, and what it says is shown when
# they end.
test: .venv/.tests
	log=$$(mktemp); trap 'rm -f "$$log"' EXIT; \
	{ $(LINT); } >"$$log" 2>&1 & lint=$$!; \
	$(call quickly,$(BIN)) -m "not slow and not float16" $(addprefix --ignore=,$(LATER)); tests=$$?; \
	wait $$lint; linted=$$?; cat "$$log"; \
	test $$tests = 0 && test $$linted = 0

# What `make test` leaves out; the two together are everything.
test-all: test-left-out test-float64 test-floor test-newest test-ecosystem

test-left-out: .venv/.tests
	$(BIN)/$(PYTEST) -k "not float16 and not eager and not jvp and not vmap" $(PROMISES)
	$(call quickly,$(BIN)) -m "slow or float16" \
		$(filter-out $(LATER),$(sort $(wildcard tests/test_*.py))) optax_constraints
	$(call quickly,$(BIN)) $(LATER)

test-float64: .venv/.tests
	export JAX_ENABLE_X64=1; $(call quickly,$(BIN)) -m "not slow" -k "not eager" \
		$(call tests,numerics properties known_answers project) $(SOLVERS)

# On the lowest versions that pyproject.toml allows, in float32.
test-floor: .venv-floor/.tests
	$(call quickly,.venv-floor/bin) -m "not slow" -k "not float16 and not eager" \
		$(VERSIONS) $(OLDER)

# And on the newest versions, which need a newer Python than python3 may be: the newest one on
# this machine is taken. If there is none, .venv has the newest versions already.
KNOWN := $(shell sed -n 's/.*Python :: \(3\.[0-9]*\).*/\1/p' pyproject.toml)
NEWEST = $(shell $(BIN)/python tests/newer_python.py $(KNOWN))
test-newest: .venv/.tests
	$(if $(NEWEST),$(MAKE) test-newer NEWEST=$(NEWEST),@echo "No Python here is newer than \
	that of .venv, which has the newest versions already.")

test-newer: .venv-newest/.tests
	$(call quickly,.venv-newest/bin) -m "not slow" -k "not float16 and not eager" $(VERSIONS)

# Inside of other libraries, which are large: see docs/ecosystem.md.
test-ecosystem: .venv-ecosystem/.ecosystem
	$(call quickly,.venv-ecosystem/bin) $(call tests,ecosystem)

lint: .venv/.tests
	$(LINT)

# The site, in docs/_build/html: without a network once installed, and no warning passes.
docs: .venv-docs/.docs
	.venv-docs/bin/python -m sphinx -W --keep-going -b html docs docs/_build/html

bench: .venv/.tests
	$(BIN)/python benchmarks/training_step.py
	$(BIN)/python benchmarks/sets.py

# Programs for accelerators, compiled without one, in environments of their own.
bench-accelerators: .venv-cuda/.made .venv-tpu/.made
	PYTHONPATH=. .venv-cuda/bin/python benchmarks/accelerators.py cuda
	PYTHONPATH=. .venv-tpu/bin/python benchmarks/accelerators.py tpu

# Beside other libraries: see docs/peers.md.
bench-peers: .venv-peers/.peers
	.venv-peers/bin/python benchmarks/peers.py --markdown

mutants: .venv/.tests
	$(BIN)/python benchmarks/mutants.py

.venv/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -e '.[$*]'
	touch $@

.venv-docs/.docs: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -e '.[docs]'
	touch $@

.venv-ecosystem/.ecosystem: pyproject.toml
	test -x .venv-ecosystem/bin/python || $(PYTHON) -m venv .venv-ecosystem
	.venv-ecosystem/bin/python -m pip install -q -e '.[ecosystem]'
	touch $@

.venv-peers/.peers: pyproject.toml
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q -e '.[peers]'
	touch $@

.venv-cuda/.made:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install -q jax==0.10.2 jax-cuda12-plugin==0.10.2 \
		jax-cuda12-pjrt==0.10.2 nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12 \
		nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12 optax flax
	touch $@

.venv-tpu/.made:
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install -q jax==0.10.2 libtpu==0.0.52 optax flax
	touch $@

.venv-floor/.tests: pyproject.toml tests/floors.txt
	test -x .venv-floor/bin/python || $(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install -q -e '.[tests]' -c tests/floors.txt
	touch $@

.venv-newest/.tests: pyproject.toml
	test -x .venv-newest/bin/python || $(NEWEST) -m venv .venv-newest
	.venv-newest/bin/python -m pip install -q -e '.[tests]'
	touch $@

clean:
	rm -rf .venv .venv-* docs/_build docs/_generated docs/reference docs/notebooks docs/project .compilation_cache build dist *.egg-info
