"""Constraints made of other constraints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import (
    Axis,
    LeafLayout,
    check_axis,
    drop_axes,
    insert_axes,
    settle_axis,
)
from optax_constraints._config import as_constraint, builtin
from optax_constraints._constraint import Constraint, own_arrays, tangent_at
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import Number, check_numbers, is_number, number, value
from optax_constraints._sharding import automatic
from optax_constraints._text import shown


def _part(owner: str, given: Any) -> Constraint:
    constraint = as_constraint(given)
    if constraint is None:
        raise ValueError(f"{owner}: constraint=None constrains nothing; leave the leaf free.")
    return constraint


class Single(Constraint):
    """Base of what is made of one constraint, and is of its kind."""

    constraint: Any

    def __post_init__(self):
        object.__setattr__(self, "constraint", _part(type(self).__name__, self.constraint))

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside is."""
        return self.constraint.elementwise

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside is."""
        return self.constraint.convex

    @property
    def smooth(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside is."""
        return self.constraint.smooth

    @property
    def has_tangent(self) -> bool:
        """Whether the constraint inside has."""
        return self.constraint.has_tangent

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside does."""
        return self.constraint.spreads

    @property
    def loses_steps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside does."""
        return self.constraint.loses_steps

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside does."""
        return self.constraint.remembers

    @property
    def starts_anew(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside does."""
        return self.constraint.starts_anew


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Stacked(Single):
    """Each slice along `axis` lies in the set of another constraint: ``{w : slice in S}``.

    For layers that are stacked in one array: scanned blocks, ensembles, experts, heads. The axes of
    the constraint inside are those of one slice, so `Stacked(max_norm(2.0))` bounds the columns of
    each layer in a stack of Dense kernels (layers, in, out). Convex where the constraint inside is.

    Cost:
        That of the constraint inside, under one `jax.vmap`. Norms do not even need that.

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

    formula = "{ w : each slice along {axis} ∈ {constraint} }"

    constraint: Any
    axis: Axis = 0

    def __post_init__(self):
        super().__post_init__()
        axis = check_axis("Stacked", self.axis)
        if axis is None or axis == "fan_in":
            raise ValueError(
                f"Stacked: axis={axis!r} does not number slices; write the axes along which the "
                "layers are stacked, such as 0."
            )
        object.__setattr__(self, "axis", axis)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array, of at least one more axis than a slice has."""
        return automatic(
            lambda w, this: this._over_slices(this.constraint, w)(w), jnp.asarray(w), self
        )

    def remember(self, w: jax.Array) -> Any:
        """What is remembered of each slice, stacked along first axes."""
        return automatic(
            lambda w, this: this._over_slices(this.constraint.remember, w, out_axis=0)(w),
            *(w, self),
            spec=PartitionSpec(),
        )

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the help of what is remembered of each slice."""
        if not self.remembers:
            return self(w), memory

        def advance(w: jax.Array, this: Stacked, memory: Any) -> tuple[jax.Array, Any]:
            function = this.constraint.advance
            for axis in settle_axis("Stacked", this.axis, w.shape):
                function = jax.vmap(function, (axis, 0), (axis, 0))
            return function(w, memory)

        return automatic(advance, w, self, memory, like=(w, memory))

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The tangent part of each slice."""
        w, v = jnp.asarray(w), jnp.asarray(v)

        def tangent(w: jax.Array, v: jax.Array, this: Stacked, memory: Any) -> jax.Array:
            def function(w: jax.Array, v: jax.Array, memory: Any) -> jax.Array:
                return tangent_at(this.constraint, w, v, memory, slack)

            for axis in settle_axis("Stacked", this.axis, w.shape):
                function = jax.vmap(function, (axis, axis, 0), axis)
            return function(w, v, memory if this.remembers else ())

        return automatic(tangent, w, v, self, memory)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """The constraint with its axes, and those of the constraint inside, settled."""
        axes = settle_axis("Stacked", self.axis, shape, path, of_units=False)
        inner = self.constraint.settle(
            path, drop_axes(shape, axes), layout and layout.without(axes)
        )
        if inner.unitwise:
            return inner._replace(axis=insert_axes(inner.axis, axes))
        return self._replace(constraint=inner, axis=axes)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units lie on the boundary, over all slices."""
        return automatic(
            lambda w, this: this._over_slices(this.constraint.on_bound, w, 0)(w),
            *(w, self),
            spec=PartitionSpec(),
        )

    def _over_slices(self, function: Any, w: jax.Array, out_axis: int | None = None) -> Any:
        # The last axis is mapped first, and leaves the numbers of those before it as they are.
        for axis in settle_axis("Stacked", self.axis, w.shape):
            function = jax.vmap(function, axis, axis if out_axis is None else out_axis)
        return function

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Those of all slices."""

        def of_slice(w: jax.Array, memory: Any) -> Gauge:
            gauge = self.constraint.gauge(w, memory)
            low, high = (
                None if bound is None else jnp.broadcast_to(bound, gauge.values.shape)
                for bound in (gauge.low, gauge.high)
            )
            return dataclasses.replace(gauge, low=low, high=high)

        known = 0 if jax.tree.leaves(memory) else None
        for axis in settle_axis("Stacked", self.axis, w.shape):
            of_slice = jax.vmap(of_slice, (axis, known))
        return of_slice(w, memory)


stacked = Stacked


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Soft(Single):
    """Moves a part of the way to the set of another constraint: ``w + rate (P(w) - w)``.

    What a hard projection does in one step, this does over about ``1 / rate`` of them: weights that
    are pulled out of the set by each update stay a little outside. Weights inside come back bit for
    bit. With a schedule from 0 to 1 a constraint fades in.

    Cost:
        That of the constraint inside, and one more pass.

    Args:
        constraint: Anything that `get` accepts.
        rate: How far to go in one step, from 0 (not at all) to 1 (into the set): a number, a
            JAX scalar or a schedule.

    Raises:
        TypeError: If `rate` is not a number.
        ValueError: If `constraint` is none, or `rate` is outside [0, 1].

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.soft(oc.non_neg(), rate=0.25)(jnp.array([-1.0, 1.0]))
        Array([-0.75,  1.  ], dtype=float32)
    """

    formula = "w ↦ w + {rate} · (P(w) - w), with P onto {constraint}"

    constraint: Any
    rate: Number = number(low=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        own_arrays(self)
        check_numbers(self)

    @property
    def convex(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside is, and each step goes all the way."""
        return self.constraint.convex and is_number(self.rate, 1)

    @property
    def loses_steps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the constraint inside does, and each step goes all the way back."""
        return self.constraint.loses_steps and is_number(self.rate, 1)

    elementwise = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    smooth = False  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @property
    def has_tangent(self) -> bool:
        """Whether the constraint inside has, and each step goes all the way into its set."""
        return self.constraint.has_tangent and is_number(self.rate, 1)

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The tangent part of the set inside."""
        return tangent_at(self.constraint, w, v, memory, slack)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Moves one array."""
        w = jnp.asarray(w)
        return self._towards(self.constraint(w), w)

    def remember(self, w: jax.Array) -> Any:
        """What the constraint inside remembers."""
        return self.constraint.remember(w)

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Moves one array with the help of what is remembered of it."""
        projected, memory = self.constraint.advance(w, memory)
        return self._towards(projected, w), memory

    def _towards(self, projected: jax.Array, w: jax.Array) -> jax.Array:
        dtype = _numerics.compute_dtype(w.dtype)
        wide = projected.astype(dtype)
        # From the projection back, so that a rate of 1 and weights inside give exactly that.
        away = (1 - value(self.rate, dtype)) * (w.astype(dtype) - wide)
        # A zero keeps its sign.
        return jnp.where(projected == w, projected, (wide + away).astype(w.dtype))

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """The constraint with the constraint inside settled."""
        settled = super().settle(path, shape, layout)
        return settled._replace(constraint=self.constraint.settle(path, shape, layout))

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units lie on the boundary of the set inside."""
        return self.constraint.on_bound(w)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Those of the set inside."""
        return self.constraint.gauge(w, memory)


soft = Soft


class Several(Constraint):
    """Base of what is made of several constraints."""

    constraints: tuple[Constraint, ...]

    def _take(self, given: tuple[Any, ...]) -> None:
        name = type(self).__name__
        if len(given) < 2:
            raise ValueError(
                f"{name}: {len(given)} constraints are given; write two or more, as in "
                f"{name}(max_norm(2.0), non_neg())."
            )
        object.__setattr__(self, "constraints", tuple(_part(name, c) for c in given))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes it from what `get_config` returned."""
        rest = dict(config)
        constraints = rest.pop("constraints", None)
        known = {f.name for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        if not isinstance(constraints, (list, tuple)) or not set(rest) <= known:
            raise ValueError(
                f"{cls.__name__}: the config {shown(dict(config))} does not fit: it has a list of "
                f"'constraints', and besides only {sorted(known - {'constraints'})}."
            )
        return cls(*constraints, **rest)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the constraints does."""
        return any(c.remembers for c in self.constraints)

    @property
    def starts_anew(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all of the constraints that remember do."""
        return all(c.starts_anew or not c.remembers for c in self.constraints)

    @property
    def spreads(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the constraints does."""
        return any(c.spreads for c in self.constraints)

    @property
    def loses_steps(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether one of the constraints does."""
        return any(c.loses_steps for c in self.constraints)

    def at(self, step: jax.typing.ArrayLike) -> Constraint:
        """This constraint with each schedule inside replaced by its value."""
        return self._replace(constraints=tuple(c.at(step) for c in self.constraints))

    def read(self, extra: Mapping[str, Any], path: str) -> Constraint:
        """This constraint with a value in the place of each `arg` inside."""
        return self._replace(constraints=tuple(c.read(extra, path) for c in self.constraints))

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint with the axes of the constraints inside settled."""
        settled = tuple(c.settle(path, shape, layout) for c in self.constraints)
        return self._replace(constraints=settled)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array; what is remembered of init is that of this array."""
        w = jnp.asarray(w)
        return self.advance(w, jax.lax.stop_gradient(self.remember(w)))[0]

    def remember(self, w: jax.Array) -> Any:
        """What each constraint remembers."""
        return tuple(c.remember(w) for c in self.constraints)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Those of the last constraint."""
        return self.constraints[-1].gauge(w, self._each(memory)[-1])

    def _each(self, memory: Any) -> Any:
        """What is remembered, for each constraint; by hand there may be nothing."""
        return memory if self.remembers and memory else ((),) * len(self.constraints)


@builtin
@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Compose(Several):
    """One projection after the other: ``... P_b(P_a(w))``.

    Only the last constraint is sure to hold: its projection may lead out of the sets before it, and
    where it does not, the result need not be the nearest point they share. `Intersection` finds
    that for convex sets. Some pairs do compose into the projection onto the intersection: `NonNeg`
    and then a bound on norms, or `Mask` and then anything that keeps zeros.

    Cost:
        That of the constraints.

    Args:
        *constraints: Two or more, of anything that `get` accepts, in the order in which they
            are applied.

    Raises:
        ValueError: If there are fewer than two, or one is none.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.compose(oc.non_neg(), oc.max_norm(1.0))(jnp.array([3.0, 4.0, -5.0]))
        Array([0.6, 0.8, 0. ], dtype=float32)
    """

    formula = "w ↦ … P₂(P₁(w)), onto {constraints:, then }"

    constraints: tuple[Constraint, ...]

    def __init__(self, *constraints: Any):
        """Takes the constraints as they are named in a rule."""
        self._take(constraints)

    @property
    def elementwise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether all of them are."""
        return all(c.elementwise for c in self.constraints)

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the help of what each constraint remembers."""
        new = []
        for constraint, own in zip(self.constraints, self._each(memory), strict=True):
            w, own = constraint.advance(w, own)
            new.append(own)
        return w, tuple(new) if self.remembers else memory

    @property
    def has_tangent(self) -> bool:
        """Whether the set is the intersection, and its cone known.

        That holds where all are elementwise, and where signs and zeros are followed by a bound
        on norms.
        """
        *first, last = self.constraints
        cones = all(c.elementwise and c.sign_preserving for c in first)
        allowed = self.elementwise or (cones and last.sign_preserving)
        return allowed and all(c.has_tangent for c in self.constraints)

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The tangent part of one set after the other."""
        for constraint, own in zip(self.constraints, self._each(memory), strict=True):
            v = tangent_at(constraint, w, v, own, slack)
        return jnp.asarray(v)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units lie on the boundary of the last set."""
        return self.constraints[-1].on_bound(w)


compose = Compose
