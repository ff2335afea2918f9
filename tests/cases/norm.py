"""Sets that bound the norm of each unit."""

import numpy as np

import optax_constraints as oc
from cases._case import Case, norms


def within(axis: int | tuple[int, ...] | None, low: float, high: float):
    """Reference for norms in an interval: the projection, and how far outside."""

    def project(w: np.ndarray) -> np.ndarray:
        n = norms(w, axis)
        n = np.where(n == 0, 1, n)
        return w * np.clip(n, low, high) / n

    def outside(w: np.ndarray) -> np.ndarray:
        n = norms(w, axis)
        below = np.where(n > 0, (low - n) / (low or 1), 0)
        return np.maximum(np.maximum(n / high - 1, below), 0)

    return project, outside


def one_hot(*axes: int):
    """Units with one entry of -1."""

    def allowed() -> np.ndarray:
        w = np.zeros((7, 5, 3))
        w[tuple(0 if i in axes else slice(None) for i in range(3))] = -1
        return w

    return allowed


CASES = [
    Case(oc.max_norm(2.0), *within(0, 0, 2)),
    Case(oc.max_norm(0.5, axis=(0, 1)), *within((0, 1), 0, 0.5)),
    Case(oc.max_norm(1.0, axis=None), *within(None, 0, 1)),
    Case(oc.min_max_norm(0.5, 1.5), *within(0, 0.5, 1.5)),
    Case(oc.min_max_norm(0.0, 1.0, axis=-1), *within(-1, 0, 1)),
    Case(oc.unit_norm(), *within(0, 1, 1), allowed=one_hot(0)),
    Case(oc.unit_norm(axis=(0, 2)), *within((0, 2), 1, 1), allowed=one_hot(0, 2)),
    Case(oc.fixed_norm(3.0), *within(None, 3, 3), allowed=lambda: 3 * one_hot(0, 1, 2)()),
    Case(oc.fixed_norm(0.5, axis=1), *within(1, 0.5, 0.5), allowed=lambda: one_hot(1)() / 2),
    Case(
        oc.fixed_rms(0.5),
        *within(None, 0.5 * np.sqrt(105), 0.5 * np.sqrt(105)),
        allowed=lambda: np.full((7, 5, 3), 0.5),
    ),
    Case(oc.max_rms(0.75), *within(None, 0, 0.75 * np.sqrt(105))),
    Case(oc.max_rms(1.5, axis=0), *within(0, 0, 1.5 * np.sqrt(7))),
]
