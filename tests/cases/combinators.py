"""Constraints made of others."""

import numpy as np

import optax_constraints as oc
from cases._case import Case, norms
from cases.elementwise import NOT_NEGATIVE
from cases.norm import one_hot, within


def _in_part(project):
    """A reference for the first two of the last axis."""
    return lambda w: np.concatenate([project(w[..., :2]), w[..., 2:]], axis=-1)


def _non_negative_in_ball(w: np.ndarray) -> np.ndarray:
    # A cone with its tip at the centre of a ball: one projection and then the other.
    return within(0, 0, 1)[0](np.maximum(w, 0))


def _outside_non_negative_ball(w: np.ndarray) -> np.ndarray:
    return np.maximum(np.max(-w), np.maximum(norms(w, 0) - 1, 0))


_PROJECT, _OUTSIDE = within(0, 0, 1)
# What every dtype holds exactly, and with a difference of small whole numbers, too.
_CENTER = np.random.default_rng(5).integers(-4, 5, (7, 5, 3)) / 4
_NEAR = np.random.default_rng(6).integers(-1, 2, (7, 5, 3)) / 8

CASES = [
    Case(oc.Stacked(oc.max_norm(1.0)), *within(1, 0, 1)),
    Case(oc.Stacked(oc.unit_norm(), axis=(0, -1)), *within(1, 1, 1), allowed=one_hot(1)),
    Case(oc.Stacked(oc.non_neg(), axis=1), *NOT_NEGATIVE),
    # What a smaller rate does is in test_combinators: it keeps no promise but that of the set.
    Case(oc.Soft(oc.max_norm(1.0), rate=1.0), *within(0, 0, 1), unit=(0,)),
    Case(
        oc.Part(oc.max_norm(1.0), np.s_[..., :2]),
        _in_part(_PROJECT),
        lambda w: _OUTSIDE(w[..., :2]),
        allowed=lambda: one_hot(0)() * [1, 0.5, 3],
        unit=(0,),
    ),
    Case(
        oc.Around(oc.max_norm(1.0), _CENTER),
        lambda w: _CENTER + _PROJECT(w - _CENTER),
        lambda w: _OUTSIDE(w - _CENTER),
        allowed=lambda: _CENTER + _NEAR,
        unit=(0,),
        adds=True,
    ),
    Case(
        oc.Around(oc.box(-0.125, 0.25), _CENTER),
        lambda w: np.clip(w, _CENTER - 0.125, _CENTER + 0.25),
        lambda w: np.maximum(np.maximum(_CENTER - 0.125 - w, w - _CENTER - 0.25), 0),
        allowed=lambda: _CENTER + _NEAR,
    ),
    Case(
        oc.Compose(oc.non_neg(), oc.max_norm(1.0)),
        _non_negative_in_ball,
        _outside_non_negative_ball,
        unit=(0,),
    ),
    Case(
        oc.Intersection(oc.non_neg(), oc.max_norm(1.0)),
        _non_negative_in_ball,
        _outside_non_negative_ball,
        unit=(0,),
        near=1e-6,
        adds=True,
    ),
]
