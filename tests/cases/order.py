"""Sets of sorted and of sparse units."""

import itertools
from collections.abc import Callable

import numpy as np
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc
from cases._case import Case, norms

Reference = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], np.ndarray]]


def ordered(axis: int, sign: int = 1) -> Reference:
    """Reference for sorted units; sign -1 for falling ones."""

    def project(w: np.ndarray) -> np.ndarray:
        return sign * np.apply_along_axis(isotonic_regression, axis, sign * w)

    def outside(w: np.ndarray) -> np.ndarray:
        falls = np.max(-np.diff(sign * w, axis=axis), axis=axis, initial=0)
        return np.max(falls / np.maximum(np.max(np.abs(w), axis=axis), 1e-300))

    return project, outside


def lattice(*shape: int) -> Reference:
    """Reference for lattices along the first axes: the best upper set against the best lower set.

    An entry is the largest, over the upper sets that hold it, of the least mean over what they
    share with a lower set that holds it.
    """
    pairs = [
        (i, j)
        for i, j in itertools.product(np.ndindex(shape), repeat=2)
        if sum(j) == sum(i) + 1 and all(a <= b for a, b in zip(i, j, strict=True))
    ]
    cells = list(np.ndindex(shape))
    below, above = (np.array([cells.index(pair[k]) for pair in pairs]) for k in (0, 1))
    every = np.array(list(itertools.product([0.0, 1.0], repeat=len(cells))))
    upper = every[np.all(every[:, below] <= every[:, above], axis=1)]
    both = upper[:, None] * (1 - upper)[None]
    sizes = np.maximum(np.sum(both, axis=-1), 1)
    shared = [
        (np.flatnonzero(upper[:, cell] == 1), np.flatnonzero(upper[:, cell] == 0))
        for cell in range(len(cells))
    ]

    def one(w: np.ndarray) -> np.ndarray:
        if not np.all(np.isfinite(w)):
            return np.full_like(w, np.nan)
        means = both @ w / sizes
        return np.array([np.max(np.min(means[np.ix_(*sets)], axis=1)) for sets in shared])

    def project(w: np.ndarray) -> np.ndarray:
        units = w.reshape(len(cells), -1)
        return np.stack([one(unit) for unit in units.T], axis=1).reshape(w.shape)

    def outside(w: np.ndarray) -> np.ndarray:
        units = w.reshape(len(cells), -1)
        falls = np.max(units[below] - units[above], axis=0)
        return np.maximum(falls, 0) / np.maximum(np.max(np.abs(units), axis=0), 1e-300)

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


def _largest_columns(k: int) -> Reference:
    """Reference for at most k columns of the first axis that are not zero."""

    def project(w: np.ndarray) -> np.ndarray:
        columns = w.reshape(len(w), -1).copy()
        with np.errstate(invalid="ignore"):
            size = np.nan_to_num(norms(columns, 0)[0], nan=np.inf)  # that of infinities
        dropped = np.argsort(-size, kind="stable")[k:]
        columns[:, dropped] = 0
        return columns.reshape(w.shape)

    def outside(w: np.ndarray) -> np.ndarray:
        return np.maximum(np.count_nonzero(np.any(w != 0, axis=0)) - k, 0)

    return project, outside


def _groups(w: np.ndarray) -> np.ndarray:
    return w.reshape(-1, 4)


CASES = [
    Case(oc.monotone(), *ordered(0), adds=True),
    Case(oc.monotone(axis=-2, increasing=False), *ordered(1, -1), adds=True, shape=(2, 19, 3)),
    Case(oc.monotone(axis=(0, 1)), *lattice(3, 3), adds=True, near=1e-6, shape=(3, 3, 2)),
    Case(oc.top_k(10), *largest(10, lambda w: w.reshape(1, -1))),
    Case(oc.top_k(0.4, axis=(1, 2)), *largest(6, lambda w: w.reshape(len(w), -1))),
    Case(oc.top_k(4, axis=0, of="units"), *_largest_columns(4), unit=(0, 1, 2)),
    Case(oc.nm(axis=-1), *largest(2, _groups), shape=(3, 5, 8)),
    Case(oc.nm(1, 4, axis=2), *largest(1, _groups), shape=(2, 3, 4)),
]
