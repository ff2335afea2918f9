"""Several leaves under one constraint: `joint` and `across`.

A group is a constraint, too, but one whose arrays stand in a tuple.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_constraints._axes import LeafLayout, drop_axes, settle_axis
from optax_constraints._constraint import Constraint, tangent_at
from optax_constraints._gauge import Gauge
from optax_constraints._numerics import widest
from optax_constraints._sharding import automatic
from optax_constraints._text import describe
from optax_constraints.sets._common import InParts, Parts
from optax_constraints.sets.combinators import Single, Stacked


class Group(Single):
    """Base of both: several arrays under the constraint of one."""

    def whole(self, parts: tuple[jax.ShapeDtypeStruct, ...]) -> jax.ShapeDtypeStruct:
        """The one array that the constraint sees."""
        return jax.ShapeDtypeStruct((sum(math.prod(part.shape) for part in parts),), _dtype(parts))

    def __str__(self) -> str:
        """As the constraint of one array."""
        return str(self.constraint)


def _dtype(parts: Any) -> jnp.dtype:
    return widest(*(part.dtype for part in parts))


class Block(NamedTuple):
    """How one leaf becomes rows of a joint array."""

    order: tuple[int, ...]
    """The axes of the leaf: those of stacks, of the fan-in, of the units."""
    shape: tuple[int, ...]
    """The shape of the leaf with its axes in that order."""
    rows: int


@dataclasses.dataclass(frozen=True, eq=False)
class JointGroup(Group):
    """Leaves as one array (*stacks, rows, units)."""

    constraint: Constraint
    blocks: tuple[Block, ...]
    stack: tuple[int, ...]
    units: int

    def whole(self, parts: tuple[jax.ShapeDtypeStruct, ...]) -> jax.ShapeDtypeStruct:
        """The joint array."""
        rows = sum(block.rows for block in self.blocks)
        return jax.ShapeDtypeStruct((*self.stack, rows, self.units), _dtype(parts))

    def remember(self, w: Any) -> Any:
        """What the constraint remembers of the joint array."""
        return self.constraint.remember(self._together(w))

    def advance(self, w: Any, memory: Any) -> tuple[Any, Any]:
        """Projects the joint array."""

        def advance(_: Any, w: Parts, this: JointGroup, memory: Any) -> tuple[Parts, Any]:
            joint, memory = this.constraint.advance(this._joined(w), memory)
            return this._parted(joint, w), memory

        return automatic(advance, w[0], w, self, memory, like=(w, memory))

    def tangent(self, w: Any, v: Any, memory: Any = (), *, slack: Any = 0.0) -> Any:
        """The tangent part of the joint vector."""

        def tangent(_: Any, w: Parts, v: Parts, this: JointGroup, memory: Any) -> Parts:
            parts = this._joined(w), this._joined(v)
            return this._parted(tangent_at(this.constraint, *parts, memory, slack), v)

        return automatic(tangent, w[0], w, v, self, memory, like=v)

    def on_bound(self, w: Any) -> jax.Array | None:
        """Which units of the joint array lie on the boundary."""
        return self.constraint.on_bound(self._together(w))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The numbers of the joint array."""
        return self.constraint.gauge(self._joined(w), memory)

    def _together(self, parts: Parts) -> jax.Array:
        """The joint array, also on a mesh with Explicit axes."""
        spec = jax.sharding.PartitionSpec()
        return automatic(lambda _, parts: self._joined(parts), parts[0], parts, spec=spec)

    def _joined(self, parts: Parts) -> jax.Array:
        rows = [
            jnp.transpose(part, block.order).reshape(*self.stack, block.rows, self.units)
            for part, block in zip(parts, self.blocks, strict=True)
        ]
        return jnp.concatenate([row.astype(_dtype(parts)) for row in rows], axis=-2)

    def _parted(self, joint: jax.Array, like: Parts) -> Parts:
        parts, start = [], 0
        for part, block in zip(like, self.blocks, strict=True):
            rows = jax.lax.slice_in_dim(joint, start, start + block.rows, axis=-2)
            back = tuple(block.order.index(a) for a in range(part.ndim))
            parts.append(jnp.transpose(rows.reshape(block.shape), back).astype(part.dtype))
            start += block.rows
        return tuple(parts)


def joined(
    name: str,
    constraint: Constraint,
    paths: tuple[str, ...],
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    layouts: tuple[LeafLayout | None, ...],
) -> JointGroup:
    """Leaves of one layer as a joint array, under a constraint that is settled for it.

    Args:
        name: The name of the group, for errors.
        constraint: The constraint of the joint array; `Stacked` if stacks are not in the layout.
        paths: The paths of the leaves.
        leaves: Their shapes and dtypes.
        layouts: What the model says of them.

    Returns:
        The group.

    Raises:
        ValueError: If the units cannot be told, or their numbers differ.
    """
    found = [_block(constraint, *leaf) for leaf in zip(paths, leaves, layouts, strict=True)]
    blocks, stacks, units = zip(*found, strict=True)
    if len({*zip(stacks, units, strict=True)}) > 1:
        each = ", ".join(
            f"{describe(path, leaf.shape)} has {math.prod(stack)} x {unit}"
            if stack
            else f"{describe(path, leaf.shape)} has {unit}"
            for path, leaf, stack, unit in zip(paths, leaves, stacks, units, strict=True)
        )
        raise ValueError(
            f"joint on {name!r}: the leaves of a group have one number of units, and here {each}. "
            "If the layers are stacked, write stacked(...) in the rule, or give layout="
            "layout(model)."
        )
    stack, rows = stacks[0], sum(block.rows for block in blocks)
    axes = tuple(range(len(stack)))
    if stack:
        inner = constraint.constraint if isinstance(constraint, Stacked) else constraint
        constraint = Stacked(inner, axes)
    kind = next((layout.layer for layout in layouts if layout), "group")
    layout = LeafLayout(kind, (len(stack),), axes)
    settled = constraint.settle(name, (*stack, rows, units[0]), layout)
    return JointGroup(settled, blocks, stack, units[0])


def _block(
    constraint: Constraint, path: str, leaf: jax.ShapeDtypeStruct, layout: LeafLayout | None
) -> tuple[Block, tuple[int, ...], int]:
    """How a leaf is part of a joint array, and its stacks and units."""
    shape = leaf.shape
    stacked = layout.stacked if layout else ()
    if isinstance(constraint, Stacked):
        stacked = settle_axis("Stacked", constraint.axis, shape, path)
    own = drop_axes(range(len(shape)), stacked)
    fan_in = _rows(path, drop_axes(shape, stacked), layout and layout.without(stacked))
    rows = tuple(own[a] for a in fan_in)
    order = (*stacked, *rows, *(a for a in own if a not in rows))
    block = Block(order, tuple(shape[a] for a in order), math.prod(shape[a] for a in rows))
    units = math.prod(shape[a] for a in own if a not in rows)
    return block, tuple(shape[a] for a in stacked), units


def _rows(path: str, shape: tuple[int, ...], layout: LeafLayout | None) -> tuple[int, ...]:
    """The axes of a leaf that run along the rows: its fan-in, and of biases and scales none."""
    if layout is None and path.rpartition("/")[2] in ("bias", "scale", "b"):
        return ()
    axes = settle_axis("joint", "fan_in", shape, path, layout)
    return () if len(axes) == len(shape) else axes


@dataclasses.dataclass(frozen=True, eq=False)
class AcrossGroup(Group):
    """Leaves as one vector, which sets that can leave in its parts."""

    constraint: Constraint

    def remember(self, w: Any) -> Any:
        """What the constraint remembers of the vector."""
        if isinstance(self.constraint, InParts):
            return self.constraint.remember_parts(w)
        return self.constraint.remember(_one_vector(w))

    def advance(self, w: Any, memory: Any) -> tuple[Any, Any]:
        """Projects the vector."""
        if isinstance(self.constraint, InParts):
            return self.constraint.advance_parts(w, memory)

        def advance(_: Any, w: Parts, constraint: Constraint, memory: Any) -> tuple[Parts, Any]:
            vector, memory = constraint.advance(_vector(w), memory)
            return _in_parts(vector, w), memory

        return automatic(advance, w[0], w, self.constraint, memory, like=(w, memory))

    def tangent(self, w: Any, v: Any, memory: Any = (), *, slack: Any = 0.0) -> Any:
        """The tangent part of a vector."""
        if isinstance(self.constraint, InParts):
            return self.constraint.tangent_parts(w, v, memory, slack)

        def tangent(_: Any, w: Parts, v: Parts, constraint: Constraint, memory: Any) -> Parts:
            return _in_parts(tangent_at(constraint, _vector(w), _vector(v), memory, slack), v)

        return automatic(tangent, w[0], w, v, self.constraint, memory, like=v)

    def on_bound(self, w: Any) -> jax.Array | None:
        """Which units lie on the boundary: one for most sets, all entries for some."""
        return self.constraint.on_bound(_one_vector(w))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The numbers of the vector."""
        return self.constraint.gauge(_vector(w), memory)

    def prepare(self, params: Any, updates: Any, memory: Any = ()) -> Any:
        """What the update has to know of the vector."""
        if isinstance(self.constraint, InParts):
            return self.constraint.prepare_parts(params, updates, memory)
        return None

    def update(
        self, params: Any, updates: Any, memory: Any = (), prepared: Any = None
    ) -> tuple[Any, Any]:
        """The update that takes the vector to its projection."""
        if isinstance(self.constraint, InParts):
            return self.constraint.update_parts(params, updates, memory, prepared)
        return super().update(params, updates, memory, prepared)


def spread(
    name: str,
    constraint: Constraint,
    paths: tuple[str, ...],
    leaves: tuple[jax.ShapeDtypeStruct, ...],
    layouts: tuple[LeafLayout | None, ...],
) -> AcrossGroup:
    """Leaves as one vector, under a constraint that is settled for it; arguments as `joined`."""
    del paths, layouts
    return AcrossGroup(constraint.settle(name, (sum(math.prod(leaf.shape) for leaf in leaves),)))


def _vector(parts: Parts) -> jax.Array:
    return jnp.concatenate([part.ravel().astype(_dtype(parts)) for part in parts])


def _in_parts(vector: jax.Array, like: Parts) -> Parts:
    parts, start = [], 0
    for part in like:
        own = jax.lax.slice_in_dim(vector, start, start + part.size)
        parts.append(own.reshape(part.shape).astype(part.dtype))
        start += part.size
    return tuple(parts)


def _one_vector(parts: Parts) -> jax.Array:
    """The vector, also on a mesh with Explicit axes."""
    spec = jax.sharding.PartitionSpec()
    return automatic(lambda _, parts: _vector(parts), parts[0], parts, spec=spec)
