"""Fixtures that several files share."""

import pytest

from optax_constraints import _constraint


@pytest.fixture
def registry():
    """Starts a test with the library's own names, and forgets what it registers."""
    registry = _constraint._registry
    before = dict(registry)
    for name, thing in before.items():
        if thing not in _constraint._builtin:
            del registry[name]
    yield registry
    registry.clear()
    registry.update(before)
