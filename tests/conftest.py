"""Fixtures that several files share, and what makes compiling and tracing quick."""

import functools
import gc
import os
from pathlib import Path

import pytest

# Most of the time goes into compiling. What one worker or run has compiled, the next one finds.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".compilation_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Nobody reads where in the source an operation of a compiled program came from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Keras looks for TensorFlow if nobody says so.
os.environ.setdefault("KERAS_BACKEND", "jax")

import jax.numpy as jnp
from jax._src.interpreters import mlir

from optax_constraints import _config, _constraint

# JAX loads all dialects of MLIR anew for each program, which for a small one takes longer than
# to find it in the cache. Here programs share what was loaded.
if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = functools.cache(mlir.make_ir_context)


def pytest_collection_finish():
    """Has the garbage collector leave alone what stays until the end, and look less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(items):
    """Marks each test that has float16 among its parameters."""
    for item in items:
        given = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(value is jnp.float16 for value in given):
            item.add_marker("float16")


@pytest.fixture
def registry():
    """Starts a test with the library's own names, and forgets what it registers."""
    registry = _config._registry
    before = dict(registry)
    for name, thing in before.items():
        if thing not in _constraint.own_classes:
            del registry[name]
    yield registry
    registry.clear()
    registry.update(before)


def pytest_terminal_summary(terminalreporter):
    """Says how many cases went through how many modes."""
    modes: dict[str, set[str]] = {}
    failed = 0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            file, _, name = report.nodeid.partition("::")
            if file.endswith("test_modes.py") and report.when == "call":
                mode, _, case = name.partition("[")
                modes.setdefault(mode, set()).add(case)
                failed += outcome == "failed"
    if modes:
        cases = sum(map(len, modes.values()))
        terminalreporter.write_line(f"modes: {len(modes)}, with cases: {cases}, failed: {failed}")
        for mode, found in sorted(modes.items()):
            terminalreporter.write_line(f"  {mode}: {len(found)}")
