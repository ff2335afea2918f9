"""Sets given by a sum over each unit."""

import numpy as np

import optax_constraints as oc
from cases._case import Case

SHAPE = (7, 5, 3)
NORMAL = np.array([1.0, -2.0, 0.0, 3.0, 1.0, 0.5, -1.0])


def flat(axis: int | tuple[int, ...] | None, f):
    """`f` on units as the last axis of an array, for one on axes of the leaf."""

    def on_units(w: np.ndarray) -> np.ndarray:
        axes = tuple(range(w.ndim)) if axis is None else np.atleast_1d(axis)
        last = tuple(range(w.ndim - len(axes), w.ndim))
        moved = np.moveaxis(w, axes, last)
        units = f(moved.reshape(*moved.shape[: last[0]], -1))
        return np.moveaxis(units.reshape(moved.shape), last, axes)

    return on_units


def onto_simplex(total: float):
    """The threshold by sorting, in float64."""

    def project(w: np.ndarray) -> np.ndarray:
        z = w - np.max(w, axis=-1, keepdims=True)
        falling = -np.sort(-z, axis=-1)
        thresholds = (np.cumsum(falling, axis=-1) - total) / np.arange(1, w.shape[-1] + 1)
        last = np.sum(falling > thresholds, axis=-1, keepdims=True) - 1
        return np.maximum(z - np.take_along_axis(thresholds, last, -1), 0)

    return project


def onto_l1_ball(radius: float):
    def project(w: np.ndarray) -> np.ndarray:
        inside = np.sum(np.abs(w), axis=-1, keepdims=True) <= radius
        return np.where(inside, w, np.sign(w) * onto_simplex(radius)(np.abs(w)))

    return project


def simplex(axis: int | tuple[int, ...] | None, total: float):
    def outside(w: np.ndarray) -> np.ndarray:
        return np.maximum(np.max(-w), np.abs(np.sum(w, axis=axis) - total)) / total

    return flat(axis, onto_simplex(total)), outside


def l1_ball(axis: int | tuple[int, ...] | None, radius: float):
    def outside(w: np.ndarray) -> np.ndarray:
        return np.maximum(np.sum(np.abs(w), axis=axis) / radius - 1, 0)

    return flat(axis, onto_l1_ball(radius)), outside


def plane(axis: int | tuple[int, ...] | None, normal: np.ndarray, offset: float, half=False):
    """Reference for planes and half spaces; the normal is as it stands beside a leaf."""
    normal = np.broadcast_to(normal, SHAPE)

    def excess(w: np.ndarray) -> np.ndarray:
        above = np.sum(normal * w, axis=axis, keepdims=True) - offset
        return np.maximum(above, 0) if half else above

    def project(w: np.ndarray) -> np.ndarray:
        return w - normal * excess(w) / np.sum(normal**2, axis=axis, keepdims=True)

    def outside(w: np.ndarray) -> np.ndarray:
        scale = np.sum(np.abs(normal * w), axis=axis, keepdims=True)
        return np.abs(excess(w)) / np.where(scale > 0, scale, 1)

    return project, outside


def units(axis: int | tuple[int, ...] | None, *entries: float):
    """Units that start with these entries, and go on with zeros."""

    def allowed() -> np.ndarray:
        def fill(w: np.ndarray) -> np.ndarray:
            w = np.zeros(w.shape)
            w[..., : len(entries)] = entries
            return w

        return flat(axis, fill)(np.zeros(SHAPE))

    return allowed


CASES = [
    Case(oc.simplex(), *simplex(0, 1), allowed=units(0, 0.5, 0.25, 0, 0.25), adds=True),
    Case(oc.simplex(3.0, axis=(0, 2)), *simplex((0, 2), 3), allowed=units((0, 2), 1, 2), adds=True),
    Case(oc.l1_ball(), *l1_ball(0, 1), adds=True),
    Case(oc.l1_ball(0.5, axis=None), *l1_ball(None, 0.5), near=1e-6, adds=True),
    Case(oc.sum_to(2.0), *plane(0, np.ones(1), 2), allowed=units(0, 3, -1.5, 0.5), adds=True),
    Case(
        oc.center_around(0.25),
        *plane(None, np.ones(1), 0.25 * 105),
        allowed=lambda: np.resize([0.0, 0.25, 0.5], SHAPE),
        adds=True,
    ),
    Case(
        oc.hyperplane(NORMAL, 0.5),
        *plane(0, NORMAL[:, None, None], 0.5),
        allowed=units(0, 1, 0.25),
        adds=True,
    ),
    Case(
        oc.half_space(NORMAL.reshape(7, 1)[:, [0, 0, 0]].tolist(), 1.0, axis=(0, 2)),
        *plane((0, 2), NORMAL[:, None, None], 1.0, half=True),
        adds=True,
    ),
]
