"""Sets in which each entry is bounded by itself."""

import numpy as np

import optax_constraints as oc
from cases._case import Case

NOT_NEGATIVE = (lambda w: np.maximum(w, 0), lambda w: np.maximum(-w, 0))
_TERNARY = np.array([-1.0, 0.0, 1.0])
_FIXED_POINT = np.arange(-64, 64) / 32


def _nearest(values: np.ndarray):
    def project(w: np.ndarray) -> np.ndarray:
        # The smaller magnitude comes first among those that are equally near.
        candidates = values[np.argsort(np.abs(values), kind="stable")]
        w = np.clip(w, np.min(values) - 1, np.max(values) + 1)
        return candidates[np.argmin(np.abs(w[..., None] - candidates), axis=-1)]

    return project, lambda w: np.min(np.abs(w[..., None] - values), axis=-1)


CASES = [
    Case(oc.non_neg(), *NOT_NEGATIVE),
    Case(
        # What every dtype holds exactly.
        oc.box(-0.25, 0.0078125),
        lambda w: np.clip(w, -0.25, 0.0078125),
        lambda w: np.maximum(np.maximum(-0.25 - w, w - 0.0078125), 0),
    ),
    Case(
        oc.box(lower=np.array([-np.inf, -0.5, 0.0])),
        lambda w: np.maximum(w, [-np.inf, -0.5, 0]),
        lambda w: np.maximum([-np.inf, -0.5, 0] - w, 0),
    ),
    Case(
        oc.grid([-1, 0, 1]),
        *_nearest(_TERNARY),
        allowed=lambda: np.random.default_rng(0).choice(_TERNARY, (7, 5, 3)),
    ),
    Case(
        oc.grid(_FIXED_POINT),
        *_nearest(_FIXED_POINT),
        allowed=lambda: np.random.default_rng(0).choice(_FIXED_POINT, (7, 5, 3)),
    ),
]
