"""What was given, as errors show it, and where warnings point."""

import itertools
import operator
import sys
import warnings
from typing import Any


def shown(value: object) -> str:
    """The repr of a value, cut to a line; also of one that is too deep or too long for it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def as_int(value: Any) -> int:
    """An integer of any type, of NumPy or JAX too; TypeError for anything else, and for a bool."""
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def describe(path: str | None, shape: tuple[int, ...]) -> str:
    """A leaf: its path, where there is one, and its shape."""
    return f"{path!r} of shape {shape}" if path else f"an array of shape {shape}"


def warn(text: str) -> None:
    """Warns at the line that called this library, be it through Optax, JAX or Flax."""
    frame = sys._getframe(1)
    for level in itertools.count(2):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package not in ("optax_constraints", "optax", "jax", "flax") or frame.f_back is None:
            return warnings.warn(text, stacklevel=level)
        frame = frame.f_back
