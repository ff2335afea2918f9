"""What the families share: units along axes, and matrices."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import (
    Axis,
    LeafLayout,
    check_axis,
    drop_axes,
    remove_axes,
    settle_axis,
)
from optax_constraints._constraint import Constraint, difference, moved, own_arrays
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import check_numbers
from optax_constraints._numerics import in_turn
from optax_constraints._sharding import automatic
from optax_constraints._text import describe
from optax_constraints.sets.combinators import Stacked

Parts: TypeAlias = tuple[jax.Array, ...]
"""One array, or several that belong together."""


def widen(owner: str, w: jax.Array) -> jax.Array:
    """Floating-point weights in the dtype in which sums over them are taken."""
    check_floating(owner, w)
    return w.astype(_numerics.compute_dtype(w.dtype))


def check_floating(owner: str, w: jax.Array) -> None:
    """Raises if weights are not floating-point."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{owner} takes floating-point weights, and these are {w.dtype}: the nearest point "
            "to integers has none. Convert them to float first."
        )


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of an array, or the one unit that several arrays make up together.

    What is reduced over the units of one array keeps their axes with length 1; over several
    arrays it is a scalar. So in both cases it broadcasts to each array.
    """

    axes: tuple[tuple[int, ...], ...]
    """For each array the axes along which its units run."""

    @classmethod
    def one(cls, parts: Parts) -> "Units":
        """Arrays that are one unit."""
        return cls(tuple(tuple(range(part.ndim)) for part in parts))

    def reduce(self, function: Any, combine: Any, parts: Parts) -> jax.Array:
        """A reduction of `jnp` such as `jnp.sum`, and what combines two of its results."""
        keep = len(self.axes) == 1
        pairs = list(zip(parts, self.axes, strict=True))
        # Of several arrays some may be empty, and have no largest entry.
        full = [(part, axis) for part, axis in pairs if part.size] or pairs
        return functools.reduce(
            combine, [function(part, axis=axis, keepdims=keep) for part, axis in full]
        )

    def sum(self, parts: Parts) -> jax.Array:
        """The sum of each unit."""
        return self.reduce(jnp.sum, operator.add, parts)

    def count(self, parts: Parts) -> jax.Array:
        """How many bools of each unit are true."""
        return self.reduce(functools.partial(jnp.sum, dtype=jnp.int32), operator.add, parts)

    def max(self, parts: Parts) -> jax.Array:
        """The largest entry of each unit."""
        return self.reduce(jnp.max, jnp.maximum, parts)

    def min(self, parts: Parts) -> jax.Array:
        """The least entry of each unit."""
        return self.reduce(jnp.min, jnp.minimum, parts)

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """The shape of what is reduced over the units."""
        if len(self.axes) > 1:
            return ()
        ((part, axes),) = zip(parts, self.axes, strict=True)
        return tuple(1 if a in axes else n for a, n in enumerate(part.shape))

    def size(self, parts: Parts) -> int:
        """How many entries a unit has."""
        pairs = zip(parts, self.axes, strict=True)
        return sum(math.prod(part.shape[a] for a in axes) for part, axes in pairs)


Terms: TypeAlias = tuple[Parts, ...]
"""Arrays as sums: of each its weights, and their update if there is one."""


def totals(terms: Terms, after: jax.Array | None = None) -> Parts:
    """The arrays that are the sums of others.

    In a loop over several arrays `after` is its state: what depends on that is computed anew in
    each turn, and not once before the loop, which would need a copy of them all.
    """

    def total(*own: jax.Array) -> jax.Array:
        *rest, last = own
        return functools.reduce(moved, (*rest, in_turn(last, after if len(terms) > 1 else None)))

    return tuple(total(*own) for own in terms)


def each(function: Callable[..., jax.Array], *parts: Parts) -> Parts:
    """A function of each of the arrays that belong together."""
    return tuple(map(function, *parts))


def in_compute_dtype(terms: Terms, after: jax.Array | None = None) -> Parts:
    """What the terms sum to, in the dtype of their sums; `after` as for `totals`."""
    parts = totals(terms, after)
    dtype = _numerics.compute_dtype(*(part.dtype for part in parts))
    return each(lambda x: x.astype(dtype), parts)


class InParts(Constraint):
    """Base of the sets that can project a vector whose parts are arrays in several places."""

    def remember_parts(self, parts: Parts) -> Any:
        """`remember` of the vector."""
        del parts
        return ()

    def advance_parts(self, parts: Parts, memory: Any) -> tuple[Parts, Any]:
        """`advance` of the vector, without a copy of it."""
        return self._onto(tuple((part,) for part in parts), Units.one(parts)), memory

    def prepare_parts(self, params: Parts, updates: Parts, memory: Any) -> Any:
        """`prepare` of the vector."""
        del params, updates, memory
        return None

    def update_parts(
        self, params: Parts, updates: Parts, memory: Any, prepared: Any
    ) -> tuple[Parts, Any]:
        """`update` of the vector."""
        del prepared
        target = self._onto(tuple(zip(params, updates, strict=True)), Units.one(params))
        return jax.tree.map(difference, target, params, updates), memory

    def _onto(self, terms: Terms, units: Units) -> Parts:
        """Projects the units of what the terms sum to."""
        raise NotImplementedError

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        units = cast(UnitSet, self)._units(w)
        return self._along_in((w,), (v,), units, memory, slack)[0]

    def tangent_parts(self, w: Parts, v: Parts, memory: Any, slack: Any) -> Parts:
        """`tangent` of the vector."""
        dtype = _numerics.compute_dtype(*(part.dtype for part in (*w, *v)))
        wide = tuple(part.astype(dtype) for part in v)
        along = self._along_in(w, wide, Units.one(w), memory, slack)
        return tuple(new.astype(part.dtype) for new, part in zip(along, v, strict=True))

    def _along_in(self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any) -> Parts:
        if not units.size(w):
            return v
        wide = tuple(part.astype(like.dtype) for part, like in zip(w, v, strict=True))
        rounding = max(_numerics.eps(part.dtype) for part in w)
        return self._along_parts(wide, v, units, memory, slack, rounding)

    def _along_parts(
        self, w: Parts, v: Parts, units: Units, memory: Any, slack: Any, rounding: float
    ) -> Parts:
        """`_along` of units, in wide weights that were rounded to an epsilon."""
        raise NotImplementedError


def sum_rounding(x: jax.Array) -> float:
    """The rounding of a sum, relative to the sum of the magnitudes."""
    return 8 * _numerics.eps(x.dtype)


def positive_part(a: jax.Array) -> jax.Array:
    """The nearest positive semidefinite matrices to symmetric ones; NaN where not finite."""
    finite = jnp.all(jnp.isfinite(a), axis=(-2, -1), keepdims=True)
    # LAPACK may not return from an infinity.
    vectors, values = jax.lax.linalg.eigh(jnp.where(finite, a, 0), symmetrize_input=False)
    scaled = vectors * jnp.maximum(values, 0)[..., None, :]
    product = jnp.matmul(scaled, jnp.swapaxes(vectors, -1, -2), precision=jax.lax.Precision.HIGHEST)
    return jnp.where(finite, product, jnp.nan)


def spectral_tolerance(a: jax.Array) -> float:
    """The relative rounding of singular values and of entries of a Gram matrix."""
    return (4 + max(a.shape[-2:]) ** 0.5 / 4) * _numerics.eps(a.dtype)


class UnitSet(Constraint):
    """Base of the sets that hold for each unit: one slice of the weights along `axis`."""

    unitwise = True
    axis: Axis

    def __post_init__(self):
        own_arrays(self)
        check_numbers(self)
        object.__setattr__(self, "axis", check_axis(type(self).__name__, self.axis))

    def _widen(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The weights in the dtype of their sums, and the axes of a unit."""
        return widen(type(self).__name__, w), self._axes(w)

    def _axes(self, w: jax.Array) -> tuple[int, ...]:
        """The axes of a unit."""
        return settle_axis(type(self).__name__, self.axis, w.shape)

    def _units(self, w: jax.Array) -> Units:
        """The units of one array."""
        check_floating(type(self).__name__, w)
        return Units((self._axes(w),))


class LineSet(UnitSet):
    """Base of the sets in which the entries of a unit have an order: `axis` is one axis."""

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint with its `axis` as the axis of one leaf."""
        settled = super().settle(path, shape, layout)
        self._check(path, shape, cast(tuple[int, ...], cast(UnitSet, settled).axis))
        return settled

    def _check(self, path: str | None, shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
        """The one axis, or the reason why there is none that fits."""
        if len(axes) == 1:
            return axes[0]
        raise ValueError(
            f"{type(self).__name__} on {describe(path, shape)}: axis={self.axis!r} is "
            f"{len(axes)} axes here, and entries have an order along one axis only; "
            "write that axis, such as axis=0."
        )


class MatrixSet(Constraint):
    """Base of the sets of matrices.

    With ``axis=None`` the last two axes are the matrix, and those before them number matrices.
    Otherwise `axis` are the axes that are flattened into its rows, such as `"fan_in"`, and all
    others into its columns: a Conv2D kernel (height, width, in, out) with `"fan_in"` is one
    matrix of (height * width * in, out).
    """

    spectral = True
    spreads = True

    square: ClassVar[bool] = False
    """Whether the set has only square matrices."""

    axis: Axis

    def __post_init__(self):
        own_arrays(self)
        check_numbers(self)
        object.__setattr__(self, "axis", check_axis(type(self).__name__, self.axis))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one matrix, or each matrix of an array; computes in float32 or wider."""
        return self._anywhere(type(self)._whole, jnp.asarray(w))

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which matrices of an allowed array lie on the boundary of the set, one bool each."""
        return self._anywhere(type(self)._touches, w, PartitionSpec())

    def _anywhere(self, method: Any, w: jax.Array, spec: PartitionSpec | None = None) -> Any:
        """`method(self, w)`, also on a mesh with Explicit axes, where arrays have to go along."""
        return automatic(lambda w, this: method(this, w), w, self, spec=spec)

    def _whole(self, w: jax.Array) -> jax.Array:
        matrices, restore = self._matrices(w)
        return restore(self._project(matrices)).astype(w.dtype)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        del memory
        rounding = _numerics.eps(w.dtype)

        def along(w: jax.Array, v: jax.Array, this: MatrixSet, slack: Any) -> jax.Array:
            a, _ = this._matrices(w.astype(v.dtype))
            b, restore = this._matrices(v)
            return restore(this._along_matrices(a, b, slack, rounding) if a.size else b)

        return automatic(along, w, v, self, slack)

    def _along_matrices(
        self, a: jax.Array, b: jax.Array, slack: jax.Array, rounding: float
    ) -> jax.Array:
        """`_along` of matrices (..., rows, columns) whose weights were rounded to an epsilon."""
        raise NotImplementedError

    def _touches(self, w: jax.Array) -> jax.Array | None:
        """What `on_bound` says."""
        del w
        return None

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The singular values, from the largest on."""
        del memory
        a, _ = self._matrices(w)
        a = jnp.where(jnp.isfinite(a), a, 0)  # LAPACK may not return from an infinity
        return Gauge("singular values", jnp.linalg.svd(a, compute_uv=False))

    def _project(self, a: jax.Array) -> jax.Array:
        """Projects matrices (..., rows, columns) in float32 or float64."""
        raise NotImplementedError

    def _matrices(self, w: jax.Array) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
        """The matrices (..., rows, columns) in float32 or wider, and the way back."""
        name = type(self).__name__
        wide = widen(name, w)
        self._check(None, w.shape)
        if self.axis is None:
            return wide, lambda a: a
        rows = settle_axis(name, self.axis, w.shape)
        order = (*rows, *(a for a in range(w.ndim) if a not in rows))
        moved = jnp.transpose(wide, order)
        height = math.prod(moved.shape[: len(rows)])
        back = tuple(order.index(a) for a in range(w.ndim))
        return (
            moved.reshape(height, -1 if height else math.prod(moved.shape[len(rows) :])),
            lambda a: jnp.transpose(a.reshape(moved.shape), back),
        )

    def _check(self, path: str | None, shape: tuple[int, ...]) -> None:
        """Raises if an array of this shape holds no matrices of this set."""
        name = type(self).__name__
        where = f"{name} on {describe(path, shape)}"
        if len(shape) < 2:
            raise ValueError(
                f"{where}: a matrix has two axes; leave this leaf free with a rule that maps "
                "its path to None."
            )
        rows = (len(shape) - 2,)
        if self.axis is not None:
            rows = settle_axis(name, self.axis, shape, path, of_units=False)
        columns = (len(shape) - 1,) if self.axis is None else drop_axes(range(len(shape)), rows)
        if not rows or not columns:
            raise ValueError(
                f"{where}: axis={self.axis!r} leaves no axis for the columns; write the axes of "
                "the rows, such as axis=0."
            )
        m, n = (math.prod(shape[a] for a in axes) for axes in (rows, columns))
        if self.square and m != n:
            raise ValueError(
                f"{where}: the set has only square matrices, and this is {m}x{n}; write another "
                "axis, or another set."
            )

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint for one leaf, `"fan_in"` layer by layer of a stack."""
        settled = cast(MatrixSet, super().settle(path, shape, layout))
        if self.axis is None:
            self._check(path, shape)
            return settled._replace(axis=None)
        axis = cast(tuple[int, ...], settled.axis)
        stacked = layout.stacked if layout is not None else ()
        if not stacked or self.axis != "fan_in":
            settled._check(path, shape)
            return settled
        inner = settled._replace(axis=remove_axes(axis, stacked))
        inner._check(path, drop_axes(shape, stacked))
        return Stacked(inner, stacked)
