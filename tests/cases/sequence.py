"""Sets of sequences."""

from typing import Any

import numpy as np

import optax_constraints as oc
from cases._case import Case
from cases.polyhedron import Reference, by_faces


def bent(n: int, axis: int, sign: int = 1, knots: list[float] | None = None) -> Reference:
    """Reference for slopes that do not fall; sign -1 for those that do not rise."""
    places = np.arange(n, dtype=float) if knots is None else np.array(knots)
    slopes = np.diff(np.eye(n), axis=0) / np.diff(places)[:, None]
    g = -sign * np.diff(slopes, axis=0)
    project, _ = by_faces(g, np.zeros(n - 2), axis)

    def outside(w: np.ndarray) -> Any:
        units = np.moveaxis(w, axis, 0).reshape(n, -1)
        largest = np.maximum(np.max(np.abs(units), axis=0), 1e-300)
        return np.max(np.maximum(g @ units, 0) / np.max(np.abs(g), axis=1)[:, None] / largest)

    return project, outside


def peaked(n: int, axis: int, peak: int | None = None) -> Reference:
    """Reference for units with one peak: the nearest of those for each place of it."""
    places = range(n) if peak is None else [peak]
    rises = np.diff(np.eye(n), axis=0)
    steps = [np.where(np.arange(n - 1) < p, -1, 1)[:, None] * rises for p in places]
    references = [by_faces(g, np.zeros(n - 1), axis)[0] for g in steps]

    def project(w: np.ndarray) -> np.ndarray:
        points = np.stack([project(w) for project in references])
        largest = np.max(np.abs(w), axis=axis, keepdims=True)
        away = (points - w) / np.where(largest > 0, largest, 1)
        distance = np.sum(np.square(away), axis=axis + 1)
        best = np.argmin(np.expand_dims(distance, axis + 1), axis=0)
        return np.take_along_axis(points, best[None], axis=0)[0]

    def outside(w: np.ndarray) -> Any:
        units = np.moveaxis(w, axis, 0).reshape(n, -1)
        wrong = [np.max(np.maximum(g @ units, 0), axis=0) for g in steps]
        return np.max(np.min(wrong, axis=0) / np.maximum(np.max(np.abs(units), axis=0), 1e-300))

    return project, outside


CASES = [
    Case(
        oc.convex_sequence(),
        *bent(6, 0),
        shape=(6, 3, 2),
        adds=True,
        near=4e-6,
        allowed=lambda: (
            np.stack([[4, 1, 0, 1, 4, 9], [3, 2, 1, 0, 0, 0], [-1, -1, -1, -1, -1, 2]] * 2, -1)
            .reshape(6, 3, 2)
            .astype(float)
        ),
    ),
    Case(
        oc.concave_sequence(axis=-1, knots=[0.0, 1.0, 3.0, 4.0, 8.0]),
        *bent(5, 2, -1, [0.0, 1.0, 3.0, 4.0, 8.0]),
        shape=(2, 3, 5),
        adds=True,
        near=4e-6,
        allowed=lambda: np.broadcast_to([0.0, 2.0, 6.0, 7.0, 3.0], (2, 3, 5)),
    ),
    Case(
        oc.unimodal(),
        *peaked(5, 0),
        shape=(5, 3, 2),
        adds=True,
        near=4e-6,
        allowed=lambda: (
            np.stack([[0, 1, 3, 3, -1], [4, 2, 2, 1, 0], [0, 0, 0, 1, 2]] * 2, -1)
            .reshape(5, 3, 2)
            .astype(float)
        ),
    ),
    Case(
        oc.unimodal(axis=1, peak=1),
        *peaked(5, 1, 1),
        shape=(3, 5, 2),
        adds=True,
        near=4e-6,
        allowed=lambda: np.repeat(np.repeat([[[0.0], [3], [2], [2], [-1]]], 3, 0), 2, 2),
    ),
]
