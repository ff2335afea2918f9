"""Constraints made of other constraints."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from optax_constraints._axes import (
    Axis,
    LeafLayout,
    check_axis,
    drop_axes,
    insert_axes,
    remove_axes,
    settle_axis,
)
from optax_constraints._constraint import Constraint, as_constraint


@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Constraint):
    """Each slice along `axis` lies in the set of another constraint, by itself.

    For layers that are stacked in one array: scanned blocks, ensembles, experts, heads. The
    axes of the constraint inside are those of one slice, so `Stacked(max_norm(2.0))` bounds
    the columns of each layer in a stack of Dense kernels (layers, in, out). Convex where the
    constraint inside is. Costs what that costs: one `jax.vmap`, and not even that for the
    norms.

    Args:
        constraint: The constraint of one slice: anything that `get` accepts.
        axis: The axis, or axes, that number the slices.

    Raises:
        TypeError: If `axis` is no axis.
        ValueError: If `constraint` is none, or `axis` is None or `"fan_in"`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.Stacked(oc.max_norm(1.0))(jnp.array([[[3.0], [4.0]], [[0.3], [0.4]]])).ravel()
        Array([0.6, 0.8, 0.3, 0.4], dtype=float32)
    """

    constraint: Any
    axis: Axis = 0

    def __post_init__(self):
        inner = as_constraint(self.constraint)
        if inner is None:
            raise ValueError("Stacked: constraint=None constrains nothing; leave the leaf free.")
        axis = check_axis("Stacked", self.axis)
        if axis is None or axis == "fan_in":
            raise ValueError(
                f"Stacked: axis={axis!r} does not number slices; write the axes along which the "
                "layers are stacked, such as 0."
            )
        object.__setattr__(self, "constraint", inner)
        object.__setattr__(self, "axis", axis)

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether the constraint inside is."""
        return self.constraint.elementwise

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array, of at least one more axis than a slice has."""
        w = jnp.asarray(w)
        return self._over_slices(self.constraint, w)(w)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """The constraint with its axes, and those of the constraint inside, settled."""
        axes = settle_axis("Stacked", self.axis, shape, path)
        own_layout = layout and LeafLayout(
            layout.layer,
            None if layout.fan_in is None else remove_axes(layout.fan_in, axes),
            remove_axes(layout.stacked, axes),
        )
        inner = self.constraint.settle(path, drop_axes(shape, axes), own_layout)
        if inner.unitwise:
            return dataclasses.replace(inner, axis=insert_axes(inner.axis, axes))
        return Stacked(inner, axes)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units lie on the boundary, over all slices."""
        return self._over_slices(self.constraint.on_bound, w, 0)(w)

    def _over_slices(self, function: Any, w: jax.Array, out_axis: int | None = None) -> Any:
        # The last axis is mapped first, and leaves the numbers of those before it as they are.
        for axis in settle_axis("Stacked", self.axis, w.shape):
            function = jax.vmap(function, axis, axis if out_axis is None else out_axis)
        return function
