"""Sets of sorted and of sparse units."""

from collections.abc import Callable

import numpy as np
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc
from cases._case import Case

Reference = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def ordered(axis: int, sign: int = 1) -> Reference:
    """Reference for sorted units; sign -1 for falling ones."""

    def project(w: np.ndarray) -> np.ndarray:
        return sign * np.apply_along_axis(isotonic_regression, axis, sign * w)

    def outside(w: np.ndarray) -> np.ndarray:
        falls = np.max(-np.diff(sign * w, axis=axis), axis=axis, initial=0)
        return np.max(falls / np.maximum(np.max(np.abs(w), axis=axis), 1e-300))

    return project, outside


def largest(k: int, units: Callable[[np.ndarray], np.ndarray]) -> Reference:
    """Reference for at most k nonzeros in each row of a view that `units` makes."""

    def project(w: np.ndarray) -> np.ndarray:
        out = w.copy()
        view = units(out)
        assert np.shares_memory(view, out)
        for row, order in zip(view, np.argsort(-np.abs(view), axis=1, kind="stable"), strict=True):
            row[order[k:]] = 0
        return out

    def outside(w: np.ndarray) -> np.ndarray:
        return np.maximum(np.max(np.count_nonzero(units(w), axis=1)) - k, 0)

    return project, outside


def _groups(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, 4)


CASES = [
    Case(oc.monotone(), *ordered(0), adds=True),
    Case(oc.monotone(axis=-2, increasing=False), *ordered(1, -1), adds=True, shape=(2, 19, 3)),
    Case(oc.top_k(10), *largest(10, lambda w: w.reshape(1, -1))),
    Case(oc.top_k(0.4, axis=(1, 2)), *largest(6, lambda w: w.reshape(len(w), -1))),
    Case(oc.nm(axis=-1), *largest(2, _groups), shape=(3, 5, 8)),
    Case(oc.nm(1, 4, axis=2), *largest(1, _groups), shape=(2, 3, 4)),
]
