"""What the families share: units along axes, and matrices."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

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
from optax_constraints._constraint import Constraint, own_arrays
from optax_constraints._sharding import automatic
from optax_constraints._text import describe
from optax_constraints.sets.combinators import Stacked


def widen(owner: str, w: jax.Array) -> jax.Array:
    """Floating-point weights in the dtype in which sums over them are taken."""
    if not jnp.issubdtype(w.dtype, jnp.floating):
        raise TypeError(
            f"{owner} takes floating-point weights, and these are {w.dtype}: the nearest point "
            "to integers has none. Convert them to float first."
        )
    return w.astype(_numerics.compute_dtype(w.dtype))


class UnitSet(Constraint):
    """Base of the sets that hold for each unit: one slice of the weights along `axis`."""

    unitwise = True
    axis: Axis

    def __post_init__(self):
        own_arrays(self)
        object.__setattr__(self, "axis", check_axis(type(self).__name__, self.axis))

    def _widen(self, w: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """The weights in the dtype of their sums, and the axes of a unit."""
        name = type(self).__name__
        return widen(name, w), settle_axis(name, self.axis, w.shape)


class MatrixSet(Constraint):
    """Base of the sets of matrices.

    With ``axis=None`` the last two axes are the matrix, and those before them number matrices.
    Otherwise `axis` are the axes that are flattened into its rows, such as `"fan_in"`, and all
    others into its columns: a Conv2D kernel (height, width, in, out) with `"fan_in"` is one
    matrix of (height * width * in, out).
    """

    square: ClassVar[bool] = False
    """Whether the set has only square matrices."""

    axis: Axis

    def __post_init__(self):
        own_arrays(self)
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

    def _touches(self, w: jax.Array) -> jax.Array | None:
        """What `on_bound` says."""
        del w
        return None

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
        """This constraint with `"fan_in"` as axes of one leaf, layer by layer of a stack."""
        if self.axis is None:
            self._check(path, shape)
            return self
        axis = settle_axis(type(self).__name__, self.axis, shape, path, layout)
        stacked = layout.stacked if layout is not None else ()
        if not stacked or self.axis != "fan_in":
            settled = self._replace(axis=axis)
            settled._check(path, shape)
            return settled
        inner = self._replace(axis=remove_axes(axis, stacked))
        inner._check(path, drop_axes(shape, stacked))
        return Stacked(inner, stacked)
