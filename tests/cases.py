"""One entry for each set of the library, over which the tests of its promises run."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import optax_constraints as oc

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@dataclasses.dataclass(frozen=True)
class Case:
    """A constraint, and what a slow and obvious NumPy program says of it in float64."""

    constraint: oc.Constraint
    project: Callable[[np.ndarray], np.ndarray]
    """The nearest allowed array."""
    outside: Callable[[np.ndarray], np.ndarray]
    """How far each unit is outside, relative to its bound."""

    def __str__(self) -> str:
        return repr(self.constraint)


def norms(w: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """Norms in float64, by scaling with the largest entry."""
    largest = np.max(np.abs(w), axis=axis, keepdims=True)
    largest = np.where(largest == 0, 1, largest)
    return largest * np.sqrt(np.sum((w / largest) ** 2, axis=axis, keepdims=True))


def _within(axis: int | tuple[int, ...] | None, low: float, high: float):
    def project(w: np.ndarray) -> np.ndarray:
        n = norms(w, axis)
        n = np.where(n == 0, 1, n)
        return w * np.clip(n, low, high) / n

    def outside(w: np.ndarray) -> np.ndarray:
        n = norms(w, axis)
        below = np.where(n > 0, (low - n) / (low or 1), 0)
        return np.maximum(np.maximum(n / high - 1, below), 0)

    return project, outside


_NOT_NEGATIVE = (lambda w: np.maximum(w, 0), lambda w: np.maximum(-w, 0))

CASES = [
    Case(oc.max_norm(2.0), *_within(0, 0, 2)),
    Case(oc.max_norm(0.5, axis=(0, 1)), *_within((0, 1), 0, 0.5)),
    Case(oc.max_norm(1.0, axis=None), *_within(None, 0, 1)),
    Case(oc.min_max_norm(0.5, 1.5), *_within(0, 0.5, 1.5)),
    Case(oc.min_max_norm(0.0, 1.0, axis=-1), *_within(-1, 0, 1)),
    Case(oc.unit_norm(), *_within(0, 1, 1)),
    Case(oc.unit_norm(axis=(0, 2)), *_within((0, 2), 1, 1)),
    Case(oc.non_neg(), *_NOT_NEGATIVE),
    Case(oc.Stacked(oc.max_norm(1.0)), *_within(1, 0, 1)),
    Case(oc.Stacked(oc.unit_norm(), axis=(0, -1)), *_within(1, 1, 1)),
    Case(oc.Stacked(oc.non_neg(), axis=1), *_NOT_NEGATIVE),
]


@dataclasses.dataclass(frozen=True, eq=False)
class Interval(oc.Constraint):
    """A user's own elementwise set: each entry in an interval."""

    elementwise = True
    low: float
    high: float

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        w = jnp.asarray(w)
        return jnp.clip(w, jnp.asarray(self.low, w.dtype), jnp.asarray(self.high, w.dtype))


def float64(x: jax.typing.ArrayLike) -> np.ndarray:
    """The values of an array of any floating dtype."""
    return np.asarray(jnp.asarray(x)).astype(np.float64)


def bits(x: jax.typing.ArrayLike) -> bytes:
    """What two arrays share that are equal to the bit."""
    return np.asarray(x).tobytes()
