"""Sets given by several inequalities for each unit."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize

import optax_constraints as oc
from cases._case import Case
from cases.simplex import flat

Reference = tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray], Any]]


def by_faces(g: np.ndarray, h: np.ndarray, axis: int | tuple[int, ...]) -> Reference:
    """Reference for ``g @ unit <= h``, by trying every set of rows that may be equalities."""
    m, n = g.shape
    inverses = []
    for rows in itertools.product([0.0, 1.0], repeat=m):
        face = np.array(rows)[:, None] * g
        inverses.append((np.linalg.pinv(face), face, np.array(rows) * h))
    size = np.linalg.norm(g, axis=1)

    def nearest(w: np.ndarray) -> np.ndarray:
        if not np.all(np.isfinite(w)):
            return np.full_like(w, np.nan)
        points = np.stack([w - inverse @ (face @ w - bound) for inverse, face, bound in inverses])
        scale = np.max(np.abs(w)) + np.max(np.abs(h))
        above = np.max((points @ g.T - h) / size, axis=1)
        distances = np.linalg.norm((points - w) / max(scale, 1e-300), axis=1)
        distances[above > 1e-10 * scale] = np.inf
        return points[np.argmin(distances)]

    def project(w: np.ndarray) -> np.ndarray:
        return np.stack([nearest(unit) for unit in w.reshape(-1, n)]).reshape(w.shape)

    def outside(w: np.ndarray) -> Any:
        units = np.moveaxis(w, axis, range(len(np.atleast_1d(axis)))).reshape(n, -1)
        scale = np.abs(h)[:, None] + np.linalg.norm(g, axis=1)[:, None] * np.max(
            np.abs(units), axis=0
        )
        return np.max(np.maximum(g @ units - h[:, None], 0) / np.maximum(scale, 1e-300))

    return flat(axis, project), outside


def by_nnls(w: np.ndarray, g: np.ndarray, h: np.ndarray) -> np.ndarray:
    """The nearest columns with ``g @ column <= h``, as SciPy's non-negative least squares.

    C. Lawson and R. Hanson, "Solving Least Squares Problems", 1974, chapter 23: least distance
    programming.
    """

    def nearest(w: np.ndarray) -> np.ndarray:
        excess = g @ w - h
        scale = max(np.max(np.abs(excess)), 1e-300)
        system = np.concatenate([-g.T, excess[None] / scale])
        target = np.eye(len(w) + 1)[-1]
        rest = system @ scipy.optimize.nnls(system, target)[0] - target
        return w - scale * rest[:-1] / rest[-1]

    return np.stack([nearest(column) for column in w.T], axis=1)


_G = np.array([[1.0, 2, 0, -1], [0, 1, 1, 0], [-1, 0, 0, 0], [1, 1, 1, 1], [2, 4, 0, -2]])
_H = np.array([0.5, 1.0, 0.25, 1.0, 1.0])
_CONE = np.array([[1.0, -1, 0, 0, 0, 0], [0, 1, 0, -1, 0, 2], [0, 0, -1, 0, 0, 0]])


def _corners() -> np.ndarray:
    """Units inside, on one plane, and where planes meet."""
    units = [[0, 0.25, 0, 0], [-0.25, 0, 1, 0], [0, 0, 1, 0], [0.5, 0, 0, 0], [0.75, 0, 0, 0.25]]
    return np.repeat(np.array(units).T[..., None], 3, axis=2)


CASES = [
    Case(
        oc.polyhedron(_G, _H),
        *by_faces(_G, _H, 0),
        shape=(4, 5, 3),
        adds=True,
        near=1e-6,
        allowed=_corners,
    ),
    Case(
        oc.polyhedron(_CONE, 0.0, axis=(0, 2)),
        *by_faces(_CONE, np.zeros(3), (0, 2)),
        shape=(2, 4, 3),
        adds=True,
        near=1e-6,
        allowed=lambda: np.broadcast_to(
            np.array([[0.0, 1.0, 0.0], [3.0, 2.0, 1.0]])[:, None], (2, 4, 3)
        ),
    ),
]
