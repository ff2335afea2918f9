"""Sets that are given by a pattern."""

import numpy as np

import optax_constraints as oc
from cases._case import Case

_RNG = np.random.default_rng(3)
_FREE = _RNG.random((5, 3)) < 0.5
_EYE = np.eye(5, dtype=bool)
_SIGNS = _RNG.integers(-1, 2, (7, 1, 3))
# Within each column of the first axis, so that these are units: labels 0, 1 and 2 there.
_LABELS = np.arange(7)[:, None, None] % 3 + 3 * np.arange(15).reshape(5, 3)


def _signed(w: np.ndarray) -> np.ndarray:
    return np.where(_SIGNS > 0, np.maximum(w, 0), np.where(_SIGNS < 0, np.minimum(w, 0), w))


def _mean_of_labels(w: np.ndarray) -> np.ndarray:
    out = np.empty_like(w)
    for label in np.unique(_LABELS):
        out[label == _LABELS] = np.mean(w[label == _LABELS])
    return out


def _apart(w: np.ndarray) -> float:
    spread = [np.ptp(w[label == _LABELS]) for label in np.unique(_LABELS)]
    return max(spread) / max(np.max(np.abs(w)), 1e-300)


CASES = [
    Case(oc.mask(_FREE), lambda w: np.where(_FREE, w, 0), lambda w: np.abs(np.where(_FREE, 0, w))),
    Case(
        oc.zero_diagonal(),
        lambda w: np.where(_EYE, 0, w),
        lambda w: np.abs(np.where(_EYE, w, 0)),
        shape=(4, 5, 5),
    ),
    Case(oc.sign(_SIGNS), _signed, lambda w: np.maximum(-w * _SIGNS, 0)),
    Case(oc.tied(_LABELS), _mean_of_labels, _apart, unit=(0,), slack=1, adds=True),
]
