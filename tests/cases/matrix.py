"""Sets of square matrices, and kernels with one value a ring."""

import functools
import itertools
from collections.abc import Callable

import numpy as np

from cases._case import Case
from optax_constraints.sets.matrix import (
    PositiveSemidefinite,
    Radial,
    SkewSymmetric,
    Symmetric,
)
from optax_constraints.sets.transport import DoublyStochastic, Transport

Function = Callable[[np.ndarray], np.ndarray]


def each_matrix(function: Callable[[np.ndarray], np.ndarray | float]) -> Function:
    """Maps one matrix after the other; what has a NaN becomes NaN."""

    def over(w: np.ndarray) -> np.ndarray:
        out = [
            function(a) if np.all(np.isfinite(a)) else np.nan * a
            for a in w.reshape(-1, *w.shape[-2:])
        ]
        return np.reshape(np.array(out), w.shape if np.ndim(out[0]) else w.shape[:-2])

    return over


def mirrored(sign: int) -> tuple[Function, Function]:
    def project(w: np.ndarray) -> np.ndarray:
        return w / 2 + sign * np.swapaxes(w, -1, -2) / 2

    def outside(w: np.ndarray) -> np.ndarray:
        return np.abs(w - sign * np.swapaxes(w, -1, -2)) / np.max(np.abs(w))

    return project, outside


def positive(bound: float) -> tuple[Function, Function]:
    def project(a: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh((a + a.T) / 2)
        return (vectors * np.maximum(values, bound)) @ vectors.T

    def outside(a: np.ndarray) -> float:
        values = np.linalg.eigvalsh(a)
        below = (bound - values[0]) / np.max(np.abs(values), initial=1e-300)
        # What NumPy itself cannot tell from 0.
        return max(below if below > 4e-15 else 0, np.max(np.abs(a - a.T)))

    return each_matrix(project), each_matrix(outside)


@functools.cache
def faces(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each set of entries that may be positive the nearest point with the right sums.

    As a linear map, the value at 0, and the entries; those that allow no right sums left out.
    """
    sums = np.array(
        [np.kron(np.eye(n)[i], np.ones(n)) for i in range(n)]
        + [np.kron(np.ones(n), np.eye(n)[i]) for i in range(n)]
    )
    maps, starts, allowed = [], [], []
    for support in itertools.product([0.0, 1.0], repeat=n * n):
        system = sums * support
        inverse = np.linalg.pinv(system)
        start = inverse @ np.ones(2 * n)
        if np.allclose(system @ start, 1):
            linear = np.diag(support) - inverse @ system
            maps.append(np.where(np.abs(linear) > 1e-10, linear, 0))
            starts.append(start)
            allowed.append(support)
    return np.array(maps), np.array(starts), np.array(allowed)


def nearest_plan(a: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The nearest plan, by trying every set of positive entries."""
    m, n = a.shape
    a = a * min(1, 1e4 / max(np.max(np.abs(a)), 1e-300))
    sums = np.vstack([np.kron(np.eye(m), np.ones(n)), np.kron(np.ones(m), np.eye(n))])
    totals = np.concatenate([rows, columns])
    best, least = np.zeros(a.size), np.inf
    for support in itertools.product([0.0, 1.0], repeat=a.size):
        inverse = np.linalg.pinv(sums * support)
        x = support * a.ravel()
        for _ in range(2):  # Once for the bulk, and once for its rounding.
            x = x - inverse @ (sums @ x - totals)
        distance = np.sum(np.square(x - a.ravel()))
        if np.allclose(sums @ x, totals) and np.min(x) >= -1e-12 and distance < least - 1e-12:
            best, least = x, distance
    return np.maximum(best, 0).reshape(a.shape)


def plan_outside(a: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    missed = np.concatenate([np.sum(a, axis=1) - rows, np.sum(a, axis=0) - columns])
    return max(np.max(np.abs(missed)), -np.min(a))


def birkhoff(a: np.ndarray) -> np.ndarray:
    """The nearest doubly stochastic matrix, by trying every set of positive entries."""
    # Far outside, the nearest point is a corner, and the same one for a smaller multiple.
    a = a * min(1, 1e4 / max(np.max(np.abs(a)), 1e-300))
    maps, starts, allowed = faces(len(a))
    points = maps @ a.ravel() + starts
    distances = np.sum(np.square(points - a.ravel()), axis=1)
    distances[np.min(points, axis=1) < -1e-10] = np.inf
    best = points[np.argmin(distances)]
    # The smallest face on which it lies has the smallest rounding.
    face = np.flatnonzero(np.all(allowed == (best > 1e-9), axis=1))[0]
    return np.maximum(maps[face] @ a.ravel() + starts[face], 0).reshape(a.shape)


def birkhoff_outside(a: np.ndarray) -> float:
    sums = np.concatenate([np.sum(a, axis=0), np.sum(a, axis=1)])
    return max(np.max(np.abs(sums - 1)), -np.min(a))


def rings(n: int) -> list[np.ndarray]:
    """The entries of each ring of a window, as masks."""
    distance = np.abs(np.arange(n) - (n - 1) / 2)
    largest = np.maximum(distance[:, None], distance)
    return [largest == r for r in np.unique(largest)]


def radial(w: np.ndarray) -> np.ndarray:
    out = np.empty_like(w)
    for ring in rings(len(w)):
        out[ring] = np.mean(w[ring], axis=0)
    return out


def radial_outside(w: np.ndarray) -> float:
    return max(np.max(np.ptp(w[ring], axis=0)) for ring in rings(len(w))) / np.max(np.abs(w))


def singular() -> np.ndarray:
    """Matrices of small whole numbers with eigenvalues of at least 0, some of them 0."""
    factors = np.random.default_rng(0).integers(-2, 3, size=(3, 3, 2)).astype(float)
    return factors @ np.swapaxes(factors, -1, -2)


def mixture() -> np.ndarray:
    """A mean of permutations, a permutation, and matrices without a zero."""
    mean = np.array([[0.75, 0.25, 0], [0.25, 0.5, 0.25], [0, 0.25, 0.75]])
    inside = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]])
    return np.stack([mean, np.eye(3)[[1, 2, 0]], inside, inside.T])


ROWS, COLUMNS = np.array([1.0, 0.5]), np.array([0.5, 0.5, 0.5])
PLAN = np.array([[0.5, 0.25, 0.25], [0, 0.25, 0.25]])
OTHER = np.array([[0.25, 0.5, 0.25], [0.25, 0, 0.25]])


CASES = [
    Case(Symmetric(), *mirrored(1), shape=(3, 3, 3), unit=(-2, -1), slack=0, adds=True),
    Case(SkewSymmetric(), *mirrored(-1), shape=(3, 3, 3), unit=(-2, -1), slack=0, adds=True),
    Case(
        PositiveSemidefinite(),
        *positive(0),
        shape=(3, 3, 3),
        unit=(-2, -1),
        allowed=singular,
        near=1e-6,
        adds=True,
    ),
    Case(
        PositiveSemidefinite(0.5),
        *positive(0.5),
        shape=(3, 3, 3),
        unit=(-2, -1),
        allowed=lambda: singular() + np.eye(3) / 2,
        near=1e-6,
        adds=True,
    ),
    Case(
        DoublyStochastic(),
        each_matrix(birkhoff),
        each_matrix(birkhoff_outside),
        shape=(4, 3, 3),
        unit=(-2, -1),
        allowed=mixture,
        near=1e-5,
        adds=True,
    ),
    Case(
        Transport(ROWS, COLUMNS),
        each_matrix(lambda a: nearest_plan(a, ROWS, COLUMNS)),
        each_matrix(lambda a: plan_outside(a, ROWS, COLUMNS)),
        shape=(4, 2, 3),
        unit=(-2, -1),
        allowed=lambda: np.stack([PLAN, PLAN[:, [1, 0, 2]], OTHER, PLAN]),
        near=1e-5,
        adds=True,
    ),
    Case(Radial(), radial, radial_outside, shape=(5, 5, 3), unit=(0, 1), adds=True),
]
