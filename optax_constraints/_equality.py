"""Values that are equal or not, and hash, also if there are arrays in them."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from optax_constraints._numerics import is_array, is_readable


class Compared:
    """A value of a field, which is equal to others and hashes also if there are arrays in it."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compared) and _equal(self.value, other.value)

    def __hash__(self) -> int:
        # Of an array not what it holds: that may be large, and on a device.
        if is_array(self.value):
            return hash((np.shape(self.value), str(jnp.result_type(self.value))))
        if isinstance(self.value, (tuple, list)):
            return hash(tuple(map(Compared, self.value)))
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


class Held(Compared):
    """One that always hashes: what does not by itself is equal to itself alone."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Held):
            return False
        return self.value is other.value or (hash(self) == hash(other) and super().__eq__(other))

    def __hash__(self) -> int:
        try:
            return super().__hash__()
        except TypeError:
            return id(self.value)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if is_array(a) and is_array(b):
        if a.shape != b.shape or a.dtype != b.dtype or not (is_readable(a) and is_readable(b)):
            return False
        try:
            return np.asarray(a).tobytes() == np.asarray(b).tobytes()
        except (RuntimeError, TypeError):  # deleted, or a random key
            return False
    if is_array(a) or is_array(b):
        return False
    return a == b
