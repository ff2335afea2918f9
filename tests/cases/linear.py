"""Sets given by several linear equations for each unit."""

import numpy as np

import optax_constraints as oc
from cases._case import Case
from cases.simplex import flat

# The last row follows from the others.
A = np.array(
    [
        [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 1.0, -1.0, 2.0, 0.0, 1.0],
        [1.0, 1.0, 2.0, -2.0, 4.0, 0.0, 2.0],
    ]
)
B = np.array([1.0, 0.5, 2.0])


def equations(a: np.ndarray, b: np.ndarray, axis: int | tuple[int, ...]):
    a = a.reshape(len(a), -1)
    inverse = np.linalg.pinv(a)

    def project(w: np.ndarray) -> np.ndarray:
        return w - (w @ a.T - b) @ inverse.T

    def outside(w: np.ndarray) -> np.ndarray:
        scale = np.max(np.abs(w), axis=-1, keepdims=True) * np.sum(np.abs(a), axis=1)
        return np.max(np.abs(w @ a.T - b) / np.maximum(scale, 1), axis=-1, keepdims=True) + 0 * w

    return flat(axis, project), flat(axis, outside)


def solution(axis: int | tuple[int, ...], *entries: float):
    def allowed() -> np.ndarray:
        return flat(axis, lambda w: np.resize(entries, w.shape[-1]) + 0 * w)(np.zeros((7, 5, 3)))

    return allowed


CASES = [
    Case(
        oc.affine(A, B),
        *equations(A, B, 0),
        allowed=solution(0, 0.75, 0.25, 0.5, 1, 0.25, 3, 0.5),
        adds=True,
    ),
    Case(
        oc.affine(np.repeat(A[:2, :, None], 3, axis=2), axis=(0, 2)),
        *equations(np.repeat(A[:2], 3, axis=1), np.zeros(2), (0, 2)),
        allowed=solution((0, 2), *np.repeat([1.0, -1, 2, 1, 0, 4, -1], 3)),
        adds=True,
    ),
]
