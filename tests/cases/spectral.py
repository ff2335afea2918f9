"""Sets of singular values."""

from collections.abc import Callable

import numpy as np

import optax_constraints as oc
from cases._case import Case

Spectrum = Callable[[np.ndarray], np.ndarray]


def by_matrix(axis: int | tuple[int, ...] | None, function: Callable[[np.ndarray], np.ndarray]):
    """Calls a function on each matrix; of one that is not finite it makes NaN."""

    def one(a: np.ndarray) -> np.ndarray:
        return function(a) if np.all(np.isfinite(a)) else np.full_like(a, np.nan)

    def every(w: np.ndarray) -> np.ndarray:
        if axis is None:
            return np.stack([one(a) for a in w.reshape(-1, *w.shape[-2:])]).reshape(w.shape)
        rows = np.atleast_1d(axis)
        moved = np.moveaxis(w, rows, range(len(rows)))
        height = int(np.prod(moved.shape[: len(rows)]))
        out = one(moved.reshape(height, -1)).reshape(moved.shape)
        return np.moveaxis(out, range(len(rows)), rows)

    return every


def singular(axis: int | tuple[int, ...] | None, f: Spectrum):
    """The projection that puts `f` of the singular values in their place."""

    def project(a: np.ndarray) -> np.ndarray:
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        return (u * f(s)) @ vt

    return by_matrix(axis, project)


def measured(axis: int | tuple[int, ...] | None, f: Callable[[np.ndarray], float]):
    """How far outside by the singular values, beyond their own rounding, for each entry."""

    def outside(a: np.ndarray) -> np.ndarray:
        return np.full_like(a, max(f(np.linalg.svd(a, compute_uv=False)) - 1e-15, 0))

    return by_matrix(axis, outside)


def simplex(radius: float) -> Spectrum:
    """Lowers sorted values by what makes their sum `radius`."""

    def f(s: np.ndarray) -> np.ndarray:
        if np.sum(s) <= radius:
            return s
        # What is left of the largest; beside 1e30 the threshold itself has no digits for it.
        low, high = 0.0, min(radius, float(s[0]))
        for _ in range(200):
            middle = (low + high) / 2
            if np.sum(np.maximum(middle - (s[0] - s), 0)) > radius:
                high = middle
            else:
                low = middle
        return np.maximum(low - (s[0] - s), 0)

    return f


def first(rank: int) -> Spectrum:
    return lambda s: s * (np.arange(len(s)) < rank)


def signed_units() -> np.ndarray:
    """Seven matrices (5, 3) whose columns are three different unit vectors."""
    w = np.zeros((7, 5, 3))
    for i in range(7):
        w[i, [i % 5, (i + 2) % 5, (i + 4) % 5], [0, 1, 2]] = [1, -1, 1]
    return w


def tall_units() -> np.ndarray:
    """One matrix (35, 3) with columns of 2 e_i, as an array (7, 5, 3)."""
    w = np.zeros((35, 3))
    w[[4, 17, 30], [0, 1, 2]] = [2, -2, 2]
    return w.reshape(7, 5, 3)


def of_rank_two() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.integers(-3, 4, (7, 5, 2)) @ rng.integers(-3, 4, (7, 2, 3))).astype(float)


MATRIX = (-2, -1)

CASES = [
    Case(
        oc.orthogonal(),
        singular(None, np.sign),
        measured(None, lambda s: np.max(np.abs(s - 1))),
        allowed=signed_units,
        unit=MATRIX,
        near=1e-6,
        slack=8,
        adds=True,
    ),
    Case(
        oc.orthogonal(2.0, axis=(0, 1)),
        singular((0, 1), lambda s: 2 * np.sign(s)),
        measured((0, 1), lambda s: np.max(np.abs(s / 2 - 1))),
        allowed=tall_units,
        unit=(0, 1, 2),
        near=1e-6,
        slack=8,
        adds=True,
    ),
    Case(
        oc.max_spectral_norm(),
        singular(None, lambda s: np.minimum(s, 1)),
        measured(None, lambda s: s[0] - 1),
        unit=MATRIX,
        near=1e-6,
        slack=8,
        adds=True,
    ),
    Case(
        oc.max_spectral_norm(0.5, axis=0),
        singular(0, lambda s: np.minimum(s, 0.5)),
        measured(0, lambda s: s[0] / 0.5 - 1),
        unit=(0, 1, 2),
        near=1e-6,
        slack=8,
        adds=True,
    ),
    Case(
        oc.nuclear_norm_ball(2.0),
        singular(None, simplex(2)),
        measured(None, lambda s: np.sum(s) / 2 - 1),
        unit=MATRIX,
        near=1e-6,
        slack=8,
        adds=True,
    ),
    Case(
        oc.low_rank(2),
        singular(None, first(2)),
        measured(None, lambda s: s[2] / max(s[0], np.finfo(float).tiny)),
        allowed=of_rank_two,
        unit=MATRIX,
        near=2e-6,
        slack=8,
        adds=True,
    ),
]
