"""Properties of random projections, rules and configs."""

import dataclasses
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, bits, float64, norms
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import optax_constraints as oc
from optax_constraints._rules import Binder

pytestmark = pytest.mark.usefixtures("registry")
# Where programs are compiled quickly, `make test-all` has the others.
QUICKLY = "optimization_level=0" in os.environ.get("XLA_FLAGS", "")
many = settings(max_examples=100 if QUICKLY else 300, derandomize=True, deadline=None)


# Sets, and what NumPy says of them.


@dataclasses.dataclass(frozen=True)
class Family:
    """A set for some numbers, and by slow means how far outside it weights are."""

    make: Callable[..., oc.Constraint]
    bounds: tuple[tuple[Any, ...], ...]
    outside: Callable[..., Any]
    """Of weights, axes of a unit and bounds: how far outside, as weights are."""
    inside: Callable[..., Any] | None = None
    """Of random weights, axes and bounds: an allowed array. Given for convex sets."""
    adds: bool = False
    """Whether entries are moved by what others are, and rounded like the largest."""
    axis: bool = True


def _sum(w: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    return np.sum(w, axis=axis, keepdims=True)


def _size(w: np.ndarray, axis: tuple[int, ...]) -> int:
    return math.prod(w.shape[a] for a in axis)


def _shortened(w: np.ndarray, length: np.ndarray, bound: float) -> np.ndarray:
    return w * np.minimum(1, bound / np.where(length > 0, length, 1))


def _shifted(w: np.ndarray, axis: tuple[int, ...], total: float) -> np.ndarray:
    for _ in range(2):  # Once for the bulk, and once for its rounding.
        w = w - (_sum(w, axis) - total) / _size(w, axis)
    return w


def _simplex(w: np.ndarray, axis: tuple[int, ...], total: float) -> np.ndarray:
    share = np.abs(w) / np.maximum(np.max(np.abs(w), axis=axis, keepdims=True), 1e-300) + 0.1
    return total * share / _sum(share, axis)


def _between(w: np.ndarray, axis: tuple[int, ...], low: float, high: float) -> np.ndarray:
    """Units of zeros, and of what has no inverse, have no direction, and are allowed."""
    n = norms(w, axis)
    zero = n < float(jnp.finfo(DTYPES[0]).tiny)
    return np.where(zero, 0, np.maximum(np.maximum(n - high, low - n), 0))


def _beside_grid(w: np.ndarray, axis: tuple[int, ...], *values: float) -> np.ndarray:
    """Subnormal numbers compare as zeros on a CPU under XLA."""
    w = np.where(np.abs(w) < float(jnp.finfo(DTYPES[0]).tiny), 0, w)
    return np.min([np.abs(w - v) for v in values], axis=0)


FAMILIES = {
    "non_neg": Family(
        lambda: oc.non_neg(),
        ((),),
        lambda w, _: np.maximum(-w, 0),
        lambda w, _: np.abs(w),
        axis=False,
    ),
    # What every dtype holds exactly.
    "box": Family(
        oc.box,
        ((-0.5, 0.25), (0.0, 0.0), (None, -1.0), (2.0, None)),
        lambda w, _, low, high: np.maximum(
            0, np.maximum((w if low is None else low) - w, w - (w if high is None else high))
        ),
        lambda w, _, low, high: np.clip(
            w, -np.inf if low is None else low, np.inf if high is None else high
        ),
        axis=False,
    ),
    "max_norm": Family(
        oc.max_norm,
        ((0.0,), (0.3,), (1.0,), (100.0,)),
        lambda w, axis, bound: np.maximum(norms(w, axis) - bound, 0),
        lambda w, axis, bound: _shortened(w, norms(w, axis), bound),
    ),
    "max_rms": Family(
        oc.max_rms,
        ((0.0,), (0.3,), (2.0,)),
        lambda w, axis, bound: np.maximum(norms(w, axis) / _size(w, axis) ** 0.5 - bound, 0),
        lambda w, axis, bound: _shortened(w, norms(w, axis), bound * _size(w, axis) ** 0.5),
    ),
    "l1_ball": Family(
        oc.l1_ball,
        ((0.0,), (0.3,), (2.0,)),
        lambda w, axis, bound: np.maximum(_sum(np.abs(w), axis) - bound, 0),
        lambda w, axis, bound: _shortened(w, _sum(np.abs(w), axis), bound),
        adds=True,
    ),
    "simplex": Family(
        oc.simplex,
        ((0.3,), (1.0,), (3.0,)),
        lambda w, axis, total: np.maximum(np.abs(_sum(w, axis) - total), np.max(-w, initial=0)),
        _simplex,
        adds=True,
    ),
    "sum_to": Family(
        oc.sum_to,
        ((0.0,), (-0.3,), (2.0,)),
        lambda w, axis, total: np.abs(_sum(w, axis) - total),
        lambda w, axis, total: _shifted(w, axis, total),
        adds=True,
    ),
    "center_around": Family(
        oc.center_around,
        ((0.0,), (-0.3,), (2.0,)),
        lambda w, axis, mean: np.abs(_sum(w, axis) - mean * _size(w, axis)),
        lambda w, axis, mean: _shifted(w, axis, mean * _size(w, axis)),
        adds=True,
    ),
    "unit_norm": Family(oc.unit_norm, ((),), lambda w, axis: _between(w, axis, 1, 1)),
    "fixed_norm": Family(
        oc.fixed_norm,
        ((0.0,), (0.3,), (2.0,)),
        lambda w, axis, norm: _between(w, axis, norm, norm),
    ),
    "min_max_norm": Family(
        oc.min_max_norm,
        ((0.5, 1.0), (0.3, 0.3), (0.0, 2.0)),
        _between,
    ),
    "grid": Family(
        lambda *values: oc.grid(values),
        ((-1, 0, 1), (0.25, 0.5, 4.0), (-2.0,)),
        _beside_grid,
        axis=False,
    ),
    "top_k": Family(
        oc.top_k,
        ((0,), (1,), (2,)),
        lambda w, axis, k: np.maximum(_sum(w != 0, axis) - k, 0),
    ),
}
CONVEX = [name for name, family in FAMILIES.items() if family.inside]

SHAPES = [(1,), (4,), (4, 3), (1, 3), (3, 1), (2, 3, 2)]
AXES = [0, -1, None]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A set, and what is needed to check what it does to weights."""

    name: str
    bounds: tuple[Any, ...]
    shape: tuple[int, ...]
    axis: int | None
    dtype: Any

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def constraint(self) -> oc.Constraint:
        own = {"axis": self.axis} if self.family.axis else {}
        return self.family.make(*self.bounds, **own)

    @property
    def unit(self) -> tuple[int, ...]:
        if not self.family.axis:
            return ()
        ranks = range(len(self.shape))
        return tuple(ranks) if self.axis is None else (ranks[self.axis],)

    @property
    def eps(self) -> float:
        return float(jnp.finfo(self.dtype).eps)

    @property
    def tiny(self) -> float:
        return float(jnp.finfo(self.dtype).smallest_subnormal)

    def outside(self, w: np.ndarray) -> np.ndarray:
        return self.family.outside(w, self.unit, *self.bounds)

    def allowed(self, w: np.ndarray) -> np.ndarray:
        assert self.family.inside is not None
        return self.family.inside(w, self.unit, *self.bounds)

    def length(self, w: np.ndarray) -> np.ndarray:
        return norms(w, self.unit)

    def size(self, w: np.ndarray) -> np.ndarray:
        """What the rounding of a unit goes by: its norm, or the sum of its magnitudes."""
        return _sum(np.abs(w), self.unit) if self.family.adds else self.length(w)

    def rounding(self, size: np.ndarray) -> np.ndarray:
        """That of a result to its dtype, and what counts as inside: 8 eps of a sum over it."""
        entries = math.prod(self.shape[a] for a in self.unit)
        wide = jnp.finfo(DTYPES[0])  # Bounds count as its smallest normal number at least.
        relative = self.eps + 8 * float(wide.eps)
        return relative * size + entries * self.tiny + float(wide.tiny)


@st.composite
def drawn_sets(draw: st.DrawFn, names: list[str]) -> Drawn:
    name = draw(st.sampled_from(names))
    shape = draw(st.sampled_from(SHAPES))
    axis = draw(st.sampled_from(AXES))
    bounds = draw(st.sampled_from(FAMILIES[name].bounds))
    return Drawn(name, bounds, shape, axis, draw(st.sampled_from(DTYPES)))


def _values(dtype: Any) -> st.SearchStrategy[float]:
    """Finite values of ordinary and of extreme magnitudes."""
    large, small = (1e4, 1e-4) if dtype == jnp.float16 else (1e30, 1e-30)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    special = [0.0, -0.0, 1.0, -1.0, 0.5, large, -large, small, -small, tiny, -tiny, 3 * tiny]
    return st.one_of(st.floats(-4, 4, width=16), st.sampled_from(special))


@st.composite
def weights(
    draw: st.DrawFn, found: Drawn, values: st.SearchStrategy[float] | None = None
) -> jax.Array:
    """Weights of a set's shape and dtype: any, constant, one-hot, repeated, or nearly allowed."""
    values = _values(found.dtype) if values is None else values
    size = math.prod(found.shape)
    kind = draw(st.sampled_from(["any", "near", "constant", "one-hot", "repeated"]))
    if kind in ("any", "near"):
        flat = draw(st.lists(values, min_size=size, max_size=size))
    elif kind == "constant":
        flat = [draw(values)] * size
    elif kind == "one-hot":
        flat = [0.0] * size
        flat[draw(st.integers(0, size - 1))] = draw(values)
    else:
        flat = np.resize(draw(st.lists(values, min_size=2, max_size=2)), size)
    wide = np.array(flat, np.float64).reshape(found.shape)
    w = jnp.asarray(wide.astype(jnp.dtype(found.dtype)))
    if kind == "near":
        # NumPy rounds as JAX does, and compiles nothing for each shape. So it is below.
        factor = np.asarray(1 + draw(st.integers(-64, 64)) * found.eps, w.dtype)
        with np.errstate(over="ignore"):
            w = jnp.asarray(np.asarray(found.constraint(w)) * factor)
    return w


ordinary = st.floats(-4, 4, width=16) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 100.0, -1e-3])


@many
@given(st.data())
def test_projections_are_feasible(data):
    found = data.draw(drawn_sets(list(FAMILIES)))
    w = data.draw(weights(found))
    out = found.constraint(w)
    assert (out.shape, out.dtype) == (w.shape, w.dtype)
    assert np.all(np.isfinite(float64(out)))
    exact = found.constraint.elementwise or found.name == "top_k"
    outside = found.outside(float64(out))
    assert np.all(outside <= (0 if exact else found.rounding(found.size(float64(out)))))


@many
@given(st.data())
def test_projecting_twice_changes_at_most_2_ulps(data):
    found = data.draw(drawn_sets(list(FAMILIES)))
    once = found.constraint(data.draw(weights(found)))
    twice = found.constraint(once)
    if found.constraint.elementwise:
        assert bits(twice) == bits(once)
    else:
        size = np.abs(np.asarray(once))
        if found.family.adds:
            size = np.max(size, axis=found.unit, keepdims=True)
        ulp = float64(np.nextafter(size, np.asarray(np.inf, once.dtype))) - float64(size)
        assert np.all(np.abs(float64(twice) - float64(once)) <= 2 * np.maximum(ulp, found.tiny))


@many
@given(st.data())
def test_allowed_weights_come_back_bit_for_bit(data):
    # What lies on a plane is seldom there to the bit once it is rounded.
    found = data.draw(drawn_sets(["non_neg", "box", "max_norm", "max_rms", "l1_ball"]))
    inside = found.allowed(float64(data.draw(weights(found, ordinary))))
    w = jnp.asarray(inside.astype(jnp.dtype(found.dtype)))
    assume(np.all(found.outside(float64(w)) == 0))
    # A zero may lose its sign.
    zero = np.zeros((), w.dtype)
    assert bits(np.asarray(found.constraint(w)) + zero) == bits(np.asarray(w) + zero)


def test_arrays_without_entries():
    for name, family in FAMILIES.items():
        for axis in AXES if family.axis else [0]:
            found = Drawn(name, family.bounds[0], (0, 3), axis, DTYPES[0])
            w = jnp.zeros(found.shape, found.dtype)
            out = found.constraint(w)
            assert (out.shape, out.dtype) == (w.shape, w.dtype)


@many
@given(st.data())
def test_nothing_allowed_is_nearer_than_the_projection(data):
    found = data.draw(drawn_sets(CONVEX))
    w = data.draw(weights(found))
    other = found.allowed(float64(data.draw(weights(found, ordinary))))
    assert np.all(found.outside(other) <= found.rounding(found.size(other)))
    wide, got = float64(w), float64(found.constraint(w))
    size = found.size(got) + (found.size(wide) if found.family.adds else 0)
    assert np.all(found.length(wide - got) <= found.length(wide - other) + found.rounding(size))


@many
@given(st.data())
def test_convex_sets_bring_no_two_arrays_further_apart(data):
    found = data.draw(drawn_sets(CONVEX))
    a, b = data.draw(weights(found)), data.draw(weights(found))
    wide = [float64(w) for w in (a, b)]
    got = [float64(found.constraint(w)) for w in (a, b)]
    size = sum(map(found.size, got)) + (sum(map(found.size, wide)) if found.family.adds else 0)
    apart, before = found.length(got[0] - got[1]), found.length(wide[0] - wide[1])
    assert np.all(apart <= before + found.rounding(size))


@many
@given(st.data())
def test_what_is_not_finite_stays_in_its_own_unit(data):
    found = data.draw(drawn_sets(list(FAMILIES)))
    bad = st.sampled_from([math.nan, math.inf, -math.inf])
    w = data.draw(weights(found, _values(found.dtype) | bad))
    wide, out = float64(w), found.constraint(w)
    assert (out.shape, out.dtype) == (w.shape, w.dtype)
    got = float64(out)
    assert np.all(np.isnan(got[np.isnan(wide)]))
    if found.constraint.elementwise:
        assert np.array_equal(np.isnan(got), np.isnan(wide))
    clean = np.all(np.isfinite(wide), axis=found.unit, keepdims=True)
    clean = np.broadcast_to(clean, found.shape)
    assert np.all(np.isfinite(got[clean]))
    whole = np.where(np.isfinite(wide), np.asarray(w), np.zeros((), w.dtype))
    mended = found.constraint(jnp.asarray(whole))
    assert np.array_equal(got[clean], float64(mended)[clean])


# Rules.


def _as_regex(pattern: str) -> str:
    """The pattern as one regular expression, for a path with a slash behind each segment."""
    start = "" if pattern.startswith("/") else "(?:[^/]*/)*"
    segments = []
    for segment in pattern.strip("/").split("/"):
        if segment == "**":
            segments.append("(?:[^/]*/)*")
            continue
        parts = re.split(r"(\*|\?|\[[^]]+\])", segment)
        special = {"*": "[^/]*", "?": "[^/]"}
        segments.append(
            "".join(special.get(p, p if p.startswith("[") else re.escape(p)) for p in parts) + "/"
        )
    return start + "".join(segments)


def matches(pattern: str, path: str) -> bool:
    return re.fullmatch(_as_regex(pattern), f"{path}/") is not None


_key = st.sampled_from(["a", "b", "ab", "aa", "a_b", "b.1", "a+", "kernel"])
_trees = st.recursive(
    st.just(np.zeros(2, np.float32)),
    lambda inner: st.one_of(
        st.dictionaries(_key, inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=2).map(tuple),
    ),
    max_leaves=8,
).filter(lambda tree: not isinstance(tree, np.ndarray))

_segment = st.one_of(
    st.just("**"),
    st.just("*"),
    _key,
    st.sampled_from(["0", "1", "[01]", "?"]),
    st.lists(
        st.sampled_from(["a", "b", "_", ".", "+", "1", "*", "?", "[ab]", "[_.]"]),
        min_size=1,
        max_size=3,
    ).map("".join),
)
_patterns = st.tuples(
    st.sampled_from(["", "", "/"]), st.lists(_segment, min_size=1, max_size=4).map("/".join)
).map("".join)


def paths_of(tree: Any, prefix: tuple[str, ...] = ()) -> list[str]:
    """The paths in the order of JAX: dicts by sorted keys."""
    if isinstance(tree, np.ndarray):
        return ["/".join(prefix)]
    items = sorted(tree.items()) if isinstance(tree, dict) else enumerate(tree)
    return [path for key, inner in items for path in paths_of(inner, (*prefix, str(key)))]


@st.composite
def _trees_and_patterns(draw: st.DrawFn, most: int) -> tuple[Any, list[str]]:
    """Patterns of any kind, and such as are made of the end of a path."""
    tree = draw(_trees)
    ends = st.sampled_from(paths_of(tree)).flatmap(
        lambda path: st.integers(0, path.count("/")).map(lambda n: "/".join(path.split("/")[n:]))
    )
    changed = st.tuples(st.sampled_from(["", "", "/", "**/", "/**/", "*/"]), ends).map("".join)
    return tree, draw(st.lists(_patterns | changed, min_size=1, max_size=most))


def _numbered(patterns: list[str]) -> list[tuple[str, oc.Constraint]]:
    """Rules that are told apart by their bounds."""
    return [(pattern, oc.max_norm(float(i))) for i, pattern in enumerate(patterns)]


@many
@given(_trees_and_patterns(4))
def test_the_first_rule_that_matches_wins(case):
    tree, patterns = case
    paths = paths_of(tree)
    bound = Binder(_numbered(patterns), strict=False)(tree)
    assert [leaf.path for leaf in bound] == paths
    for leaf in bound:
        first = [i for i, pattern in enumerate(patterns) if matches(pattern, leaf.path)][:1]
        assert (leaf.constraint.max_value if leaf.constraint else None) == (
            first[0] if first else None
        )


@many
@given(_trees_and_patterns(3))
def test_a_rule_that_matches_nothing_raises(case):
    tree, patterns = case
    paths = paths_of(tree)
    unused = [p for p in patterns if not any(matches(p, path) for path in paths)]
    bind = Binder(_numbered(patterns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # for rules behind others
        if unused:
            message = f"The rule {unused[0]!r} matches no leaf of the {len(paths)} in this tree"
            with pytest.raises(ValueError, match=re.escape(message)):
                bind(tree)
        else:
            assert len(bind(tree)) == len(paths)


# Configs.

_bound = st.one_of(st.integers(0, 5), st.floats(0, 1e30), st.sampled_from(["init", "2.5x init"]))
_number = st.one_of(st.integers(-5, 5), st.floats(-1e30, 1e30))
_axis = st.one_of(
    st.integers(-3, 3), st.none(), st.just("fan_in"), st.lists(st.integers(-3, 3), unique=True)
)
_numbers = st.lists(_number, min_size=1, max_size=4)
_init = st.just("init")
_index = st.sampled_from(["0", "-1, ...", ":, 1:", "::2", "..., :3:-1"])


def _positive(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return strategy.map(abs).map(lambda x: x + 1)


_leaves: dict[str, st.SearchStrategy[oc.Constraint]] = {
    "Box": st.builds(lambda a, b: oc.Box(min(a, b), max(a, b)), _number, _number)
    | st.builds(oc.Box, st.none(), _numbers),
    "Affine": st.builds(
        lambda row, b, axis: oc.Affine([row], b, axis), _numbers.filter(any), _number, _axis
    ),
    "BoxSection": st.builds(
        lambda a, b, normal, axis, equality: oc.BoxSection(
            min(a, b), max(a, b), normal, axis=axis, equality=equality
        ),
        _number,
        _number,
        st.none() | _numbers.filter(any),
        _axis,
        st.booleans(),
    ),
    "CenterAround": st.builds(oc.CenterAround, _number, _axis),
    "DoublyStochastic": st.builds(oc.DoublyStochastic),
    "FixedRMS": st.builds(oc.FixedRMS, _bound, _axis),
    "FixedSpectralNorm": st.builds(oc.FixedSpectralNorm, _positive(_number), _axis),
    "FixedNorm": st.builds(oc.FixedNorm, _bound, _axis),
    "Grid": st.builds(oc.Grid, _numbers),
    "HalfSpace": st.builds(oc.HalfSpace, _numbers.filter(any), _number, _axis),
    "Hyperplane": st.builds(oc.Hyperplane, _numbers.filter(any), _number, _axis),
    "L1Ball": st.builds(oc.L1Ball, _positive(_number), _axis),
    "LowRank": st.builds(oc.LowRank, st.integers(0, 9), _axis),
    "Mask": st.builds(oc.Mask, st.lists(st.booleans(), min_size=1, max_size=4) | _init),
    "MaxNorm": st.builds(oc.MaxNorm, _bound, _axis),
    "MaxOperatorNorm": st.builds(
        oc.MaxOperatorNorm,
        _positive(_number),
        st.none() | st.integers(1, 3) | st.lists(st.integers(1, 3), min_size=1, max_size=3),
        st.sampled_from([None, "SAME", "CIRCULAR", 1, [[0, 1], [1, 2]]]),
        st.none() | st.integers(1, 3),
        st.none() | st.integers(1, 3),
    ),
    "MaxRMS": st.builds(oc.MaxRMS, _bound, _axis),
    "MaxSpectralNorm": st.builds(
        oc.MaxSpectralNorm, _positive(_number), _axis, st.sampled_from(["clip", "scale"])
    ),
    "MinMaxNorm": st.builds(
        oc.MinMaxNorm, st.floats(0, 1), st.floats(1, 2) | st.just("init"), st.floats(0, 1), _axis
    ),
    "Monotone": st.builds(oc.Monotone, _axis, st.booleans()),
    "NM": st.builds(oc.NM, st.integers(1, 2), st.integers(2, 4), _axis),
    "NonNeg": st.builds(oc.NonNeg),
    "NuclearNormBall": st.builds(oc.NuclearNormBall, _positive(_number), _axis),
    "Orthogonal": st.builds(oc.Orthogonal, _positive(_number), _axis),
    "PositiveSemidefinite": st.builds(oc.PositiveSemidefinite, _number),
    "Radial": st.builds(oc.Radial),
    "Simplex": st.builds(oc.Simplex, _positive(_number), _axis),
    "Sign": st.builds(oc.Sign, st.lists(st.integers(-1, 1), min_size=1, max_size=4) | _init),
    "SkewSymmetric": st.builds(oc.SkewSymmetric),
    "SumTo": st.builds(oc.SumTo, _number, _axis),
    "Symmetric": st.builds(oc.Symmetric),
    "ConvexSequence": st.builds(oc.ConvexSequence, _axis, st.none() | st.just([0.0, 1.0, 3.0])),
    "ConcaveSequence": st.builds(oc.ConcaveSequence, _axis, st.none()),
    "Polyhedron": st.builds(
        lambda row, h, axis: oc.Polyhedron([row], h, axis), _numbers.filter(any), _number, _axis
    ),
    "Unimodal": st.builds(oc.Unimodal, _axis, st.none() | st.integers(0, 3)),
    "Tied": st.builds(oc.Tied, st.lists(st.integers(-9, 9), min_size=1, max_size=4)),
    "TopK": st.builds(oc.TopK, st.integers(0, 5) | st.floats(0.125, 1), _axis)
    | st.builds(oc.TopK, st.integers(0, 5), st.integers(-3, 3), st.just("units")),
    "Transport": st.builds(
        lambda sums: oc.Transport(sums, sums[::-1]),
        st.lists(st.floats(0, 9), min_size=1, max_size=4),
    ),
    "UnitNorm": st.builds(oc.UnitNorm, _axis),
    "ZeroDiagonal": st.builds(oc.ZeroDiagonal),
}
_constraints = st.recursive(
    st.one_of(*_leaves.values()),
    lambda inner: st.one_of(
        st.builds(oc.Stacked, inner, st.integers(0, 2)),
        st.builds(oc.Soft, inner, st.floats(0, 1)),
        st.builds(oc.Around, inner, _numbers | _init),
        st.builds(oc.Part, inner, _index),
        st.builds(lambda several: oc.Compose(*several), st.lists(inner, min_size=2, max_size=3)),
        st.builds(
            lambda several, n: oc.Intersection(*several, iterations=n),
            st.lists(inner.filter(lambda c: c.convex), min_size=2, max_size=3),
            st.integers(1, 300),
        ),
    ),
    max_leaves=4,
)
_WITH_ARRAYS = (
    *('"Affine"', '"Around"', '"Box', '"Mask"', '"Hyperplane"', '"HalfSpace"', '"Transport"'),
    *('"Polyhedron"', '"ConvexSequence"'),
)
_combinators = ("Around", "Stacked", "Soft", "Part", "Compose", "Intersection")
_drawn_rules = st.recursive(
    _constraints | st.none(),
    lambda inner: st.one_of(
        st.dictionaries(_patterns, inner, max_size=3),
        st.lists(
            st.tuples(
                _patterns | st.builds(re.compile, st.sampled_from(["a|b", ".*/K"]), st.just(re.I)),
                inner,
            ),
            max_size=3,
        ),
    ),
    max_leaves=4,
)


def fields_of(thing: Any) -> Any:
    """All that a constraint or rules are, as values that can be compared."""
    if isinstance(thing, oc.Constraint):
        own = dataclasses.fields(thing) if dataclasses.is_dataclass(thing) else ()
        return type(thing), [fields_of(getattr(thing, f.name)) for f in own]
    if isinstance(thing, dict):
        return [(key, fields_of(value)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [fields_of(value) for value in thing]
    if isinstance(thing, (np.ndarray, jax.Array)):
        return np.asarray(thing).tolist()
    return type(thing), thing


def test_all_sets_are_drawn():
    exported = {
        name
        for name, thing in vars(oc).items()
        if name[0].isupper() and isinstance(thing, type) and issubclass(thing, oc.Constraint)
    }
    assert {*_leaves, *_combinators, "Constraint", "Scale"} == exported


@many
@given(_constraints)
def test_constraints_survive_json(constraint):
    text = json.dumps(oc.serialize(constraint))
    again = oc.deserialize(json.loads(text))
    assert fields_of(again) == fields_of(constraint)
    assert json.dumps(oc.serialize(again)) == text
    if not any(word in text for word in _WITH_ARRAYS):
        # Arrays may come back in another dtype.
        assert again == constraint
        assert hash(again) == hash(constraint)


@many
@given(_drawn_rules)
def test_rules_survive_json(rules):
    text = json.dumps(oc.serialize(rules))
    again = oc.deserialize(json.loads(text))
    assert fields_of(again) == fields_of(rules)
    assert json.dumps(oc.serialize(again)) == text
