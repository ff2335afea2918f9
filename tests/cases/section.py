"""Boxes cut by a plane, or by a half space."""

import numpy as np

import optax_constraints as oc
from cases._case import Case
from cases.simplex import NORMAL, flat, units


def section(axis: int | tuple[int, ...] | None, lower, upper, normal, value, half=False):
    """The multiplier of each unit by halving, in float64."""

    def one(w: np.ndarray) -> np.ndarray:
        if not np.all(np.isfinite(w)):
            return np.full(w.shape, np.nan)

        def point(steps: float) -> np.ndarray:
            return np.clip(w - steps * normal, lower, upper)

        if half and normal @ point(0) <= value:
            return point(0)
        low, high = -1.0, 1.0
        while normal @ point(low) < value:
            low *= 2
        while normal @ point(high) > value:
            high *= 2
        for _ in range(300):
            middle = (low + high) / 2
            low, high = (middle, high) if normal @ point(middle) > value else (low, middle)
        # Where their steps are far too long for an entry between its bounds.
        first, last = point(low), point(high)
        over, under = normal @ first - value, value - normal @ last
        return first + over / (over + under) * (last - first) if over + under > 0 else first

    def project(w: np.ndarray) -> np.ndarray:
        return np.array([one(unit) for unit in w.reshape(-1, w.shape[-1])]).reshape(w.shape)

    def outside(w: np.ndarray) -> np.ndarray:
        beyond = w @ normal - value
        beyond = np.maximum(beyond, 0) if half else np.abs(beyond)
        scale = np.abs(w) @ np.abs(normal)
        apart = np.maximum(np.max(w - upper, axis=-1), np.max(lower - w, axis=-1))
        far = np.maximum(beyond / np.where(scale > 0, scale, 1), apart)
        return far[..., None] + 0 * w

    return flat(axis, project), flat(axis, outside)


ONES = np.ones(7)
UPPER = np.linspace(0.25, 1.75, 7)

CASES = [
    Case(
        oc.box_section(0.0, 0.5),
        *section(0, 0, 0.5, ONES, 1),
        allowed=units(0, 0, 0.5, 0.25, 0, 0.25),
        adds=True,
    ),
    Case(
        oc.box_section(-1.0, UPPER, NORMAL, 0.5),
        *section(0, -1, UPPER, NORMAL, 0.5),
        allowed=units(0, 0.25, 0.5, 0.75, 0.25, 0.5),
        near=1e-6,
        adds=True,
    ),
    Case(
        oc.box_section(None, 0.25, value=-0.5, axis=(0, 2), equality=False),
        *section((0, 2), -np.inf, 0.25, np.ones(21), -0.5, half=True),
        allowed=units((0, 2), -3, 0.25, 0.25, 0.125),
        adds=True,
    ),
]
