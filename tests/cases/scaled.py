"""Matrices that are scaled by their largest singular value."""

import numpy as np

import optax_constraints as oc
from cases._case import Case
from cases.spectral import MATRIX, by_matrix, measured, signed_units


def scaled(axis: int | None, low: float, high: float):
    """The matrix times what takes its largest singular value into an interval."""

    def project(a: np.ndarray) -> np.ndarray:
        largest = np.linalg.svd(a, compute_uv=False)[0]
        return a * (np.clip(largest, low, high) / (largest or 1))

    return by_matrix(axis, project)


CASES = [
    Case(
        oc.fixed_spectral_norm(1.0),
        scaled(None, 1, 1),
        measured(None, lambda s: s[0] and abs(s[0] - 1)),
        allowed=signed_units,
        unit=MATRIX,
        near=1e-6,
        slack=8,
    ),
    Case(
        oc.max_spectral_norm(0.5, axis=0, method="scale"),
        scaled(0, 0, 0.5),
        measured(0, lambda s: s[0] / 0.5 - 1),
        unit=(0, 1, 2),
        near=1e-6,
        slack=8,
        nearest=False,
    ),
]
