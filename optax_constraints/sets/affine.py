"""Systems of linear equations for each unit: a step along the rows of a matrix."""

import dataclasses
import functools
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout, settle_axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._sharding import automatic
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import UnitSet, check_floating, sum_rounding, widen
from optax_constraints.sets.linear import check_array, readable

# Accelerators would multiply float32 matrices in fewer bits.
_matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def _residual(x: jax.Array, rows: jax.Array, point: jax.Array) -> jax.Array:
    """By what each equation is missed, for units (size, number) and orthonormal rows."""
    return _matmul(rows, x) - point[:, None]


@functools.partial(jax.custom_jvp)
@jax.jit
def _onto_rows(x: jax.Array, rows: jax.Array, point: jax.Array) -> jax.Array:
    """The nearest solutions of ``rows @ x = point``, for units (size, number)."""
    missed, size = _residual(x, rows, point), _numerics.norm(x, (0,))
    # What a step takes from the rows, and leaves of them, and so what is left of the unit.
    taken, left = (
        _numerics.norm(missed + point[:, None], (0,)),
        _numerics.norm(point[:, None], (0,)),
    )
    unit = jnp.where(size > 0, size, 1)
    finite = jnp.isfinite(jnp.sum(missed, axis=0, keepdims=True))
    stays = jnp.max(jnp.abs(missed), axis=0, keepdims=True) <= sum_rounding(x) * size
    stays = stays & finite
    far = ~stays & (jnp.square(taken / unit) - jnp.square(left / unit) > 0.9)

    def step(x: jax.Array, missed: jax.Array, where: jax.Array) -> jax.Array:
        moved = x - _matmul(rows.T, jnp.where(where, missed, 0))
        return jnp.where(where, jnp.where(finite, moved, jnp.nan), x)

    moved = step(x, missed, ~stays)
    # What a long step rounds away may be much beside a short result.
    return lax.cond(
        jnp.any(far), lambda y: step(y, _residual(y, rows, point), far), lambda y: y, moved
    )


@_onto_rows.defjvp
def _onto_rows_jvp(primals, tangents):
    def formula(x, rows, point):
        return x - _matmul(rows.T, _residual(x, rows, point))

    # Also at a solution, where the projection changes nothing.
    return _onto_rows(*primals), jax.jvp(formula, primals, tangents)[1]


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Affine(UnitSet):
    """Each unit solves linear equations: ``{w : A unit = b}``.

    A plane of any dimension, so convex and smooth; the projection
    ``unit - A^T (A A^T)^-1 (A unit - b)`` is the nearest point, exact up to rounding. Equations
    that follow from others are fine. A unit is allowed, and comes back bit for bit, if it
    misses none of them, combined to orthonormal ones, by more than 8 machine epsilons of the
    dtype of the sums, times the norm of the unit.

    For conservation laws, interpolation conditions, zero sums over groups, or to keep what a layer
    does to some inputs. Orthonormal rows are found once, when the set is made, in float64.

    Cost:
        Two products with the rows of `a`. Two more where a result is much shorter than the weights.
        A traced `a` is decomposed in each step, and its rows have to be independent.

    Args:
        a: An array of shape (equations, ...), each of its rows of the shape of one unit: the
            lengths of the leaf's axes in `axis`, in the leaf's order.
        b: The right-hand sides: a number, or one for each equation.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is infinite or NaN, `a` is zero or has another shape, no unit
            solves the equations, or an axis is repeated; when bound or called, if the rows do
            not have the shape of a unit.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.affine([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], [1.0, 4.0])(jnp.ones((3, 1)))
        Array([[0.5],
               [0.5],
               [2. ]], dtype=float32)
    """

    formula = "{ w : A u = {b} }"

    convex: ClassVar[bool] = True
    smooth: ClassVar[bool] = True

    a: Any
    b: Any = 0.0
    axis: Axis = 0

    # What `_orthonormal` returned. As an attribute it goes where the arrays of the fields go.
    _found: ClassVar[tuple[Any, ...] | None] = None

    def __post_init__(self):
        a = check_array(f"Affine: a={shown(self.a)}", self.a)
        b = check_array(f"Affine: b={shown(self.b)}", self.b)
        if a.ndim < 2 or not a.size:
            raise ValueError(
                f"Affine: a={shown(self.a)} has shape {a.shape}; write an array of shape "
                "(equations, ...), each of its rows of the shape of one unit."
            )
        if b.shape not in ((), a.shape[:1]):
            raise ValueError(
                f"Affine: b has shape {b.shape}, and a has {a.shape[0]} rows; write one number, "
                "or one for each row."
            )
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "b", b)
        super().__post_init__()
        object.__setattr__(self, "_found", _orthonormal(readable(a), readable(b), shown(self.b)))

    def settle(self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None) -> Self:
        """This constraint for one leaf, whose units the rows must fit."""
        self._unit_axes(path, shape, layout)
        return cast(Self, super().settle(path, shape, layout))

    def _unit_axes(
        self, path: str | None, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> tuple[int, ...]:
        axis = settle_axis("Affine", self.axis, shape, path, layout)
        unit = tuple(shape[a] for a in axis)
        if self.a.shape[1:] != unit:
            raise ValueError(
                f"Affine on {describe(path, shape)}: a unit along axis={self.axis!r} has shape "
                f"{unit}, and each row of a has shape {self.a.shape[1:]}; write an array of shape "
                f"{(self.a.shape[0], *unit)}, or another axis."
            )
        return axis

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; sums are taken in float32 or wider."""
        w = jnp.asarray(w)
        check_floating("Affine", w)
        axis = self._unit_axes(None, w.shape)
        if not w.size:
            return w
        return automatic(lambda w, this: this._whole(w, axis), w, self)

    def _whole(self, w: jax.Array, axis: tuple[int, ...]) -> jax.Array:
        wide = widen("Affine", w)
        rows, point = self._equations(wide.dtype)
        order = (*axis, *(i for i in range(w.ndim) if i not in axis))
        units = jnp.transpose(wide, order)
        new = _onto_rows(units.reshape(rows.shape[1], -1), rows, point)
        back = tuple(order.index(i) for i in range(w.ndim))
        return jnp.transpose(new.reshape(units.shape), back).astype(w.dtype)

    def _equations(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
        """Orthonormal rows, and what units make of them."""
        b = jnp.broadcast_to(jnp.asarray(self.b, dtype), self.a.shape[:1])
        if self._found is None:
            # With R from A^T = Q R the equations are Q^T x = R^-T b.
            q, r = jnp.linalg.qr(jnp.asarray(self.a, dtype).reshape(self.a.shape[0], -1).T)
            point = jax.scipy.linalg.solve_triangular(r, b, trans=1)
            return q.T, point
        rows, mix, *point = (jnp.asarray(x, dtype) for x in self._found)
        return rows, point[0] if point else _matmul(mix, b)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """By how much each unit misses each equation."""
        del memory
        wide, axis = self._widen(w)
        order = (*axis, *(a for a in range(w.ndim) if a not in axis))
        a, b = (jnp.asarray(x, wide.dtype) for x in (self.a, self.b))
        units = jnp.transpose(wide, order).reshape(a[0].size, -1)
        missed = a.reshape(len(a), -1) @ units - jnp.broadcast_to(b, a.shape[:1])[:, None]
        return Gauge("residuals", missed, 0.0, 0.0)


affine = Affine


def _orthonormal(a: np.ndarray | None, b: np.ndarray | None, given: str) -> tuple | None:
    """Orthonormal rows that span those of a matrix, if it is known.

    Then the mix of rows that they are and, if `b` is known, too, what solutions make of them.
    """
    if a is None:
        return None
    a = a.reshape(len(a), -1)
    length = np.max(np.abs(a), axis=1, keepdims=True)
    length = length * np.linalg.norm(a / np.where(length > 0, length, 1), axis=1, keepdims=True)
    scale = 1 / np.where(length > 0, length, 1)
    u, s, vt = np.linalg.svd(a * scale, full_matrices=False)
    if not s[0]:
        raise ValueError("Affine: a is zero, and allows everything or nothing.")
    rank = int(np.sum(s > _DEPENDENT * s[0]))
    rows = vt[:rank]
    mix = (u[:, :rank] / s[:rank]).T * scale[:, 0]
    if b is None:
        return rows, mix
    b = np.broadcast_to(b, len(a))
    point = mix @ b
    missed = np.abs(a @ (rows.T @ point) - b) * scale[:, 0]
    if np.any(missed > 10 * _DEPENDENT * np.max(np.abs(b * scale[:, 0]), initial=0)):
        worst = int(np.argmax(missed))
        raise ValueError(
            f"Affine: no unit solves the equations with b={given}: row {worst} of a follows from "
            f"the others, and they make {b[worst] + (a @ (rows.T @ point) - b)[worst]:g} of it, "
            f"not {b[worst]:g}; leave that equation out, or write another b."
        )
    return rows, mix, point


# Relative to their length, rows that are nearer to others follow from them.
_DEPENDENT = 1e-6
