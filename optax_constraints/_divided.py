"""Matrix sets on a mesh: matrices of one shape are divided over its devices.

Left to the compiler, each device decomposes every matrix that is whole there, and of those that
are split it gathers the parts. Here the matrices of one shape under equal constraints are stacked,
each device projects some of them, and the results go back to where the weights are. Only
constraints on how arrays are sharded and one `jax.shard_map` are needed for that: they name one
axis of the mesh at a time, since the compiler knows an all-to-all for each of these steps, and
none for all of them at once. So nothing has to be known of how the weights are sharded, which
inside of `jax.jit` cannot be known.
"""

import functools
import itertools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.experimental.shard_alike import shard_alike
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_constraints._constraint import Constraint
from optax_constraints._sharding import automatic, explicit_axes
from optax_constraints._text import shown
from optax_constraints.sets._common import MatrixSet
from optax_constraints.sets.combinators import Stacked

AnyMesh = Mesh | AbstractMesh


class Work(NamedTuple):
    """A leaf whose projection can be done elsewhere."""

    key: Hashable
    """The same for leaves whose constraints at this step are equal."""
    constraint: Constraint
    weights: jax.Array
    """What is to be projected."""
    memory: Any


class Done(NamedTuple):
    """What `advance` returned for it."""

    weights: jax.Array
    memory: Any


def check_mesh(verb: str, mesh: Any) -> AnyMesh | None:
    """A mesh as it is, or the reason why it is none."""
    if mesh is None or isinstance(mesh, (Mesh, AbstractMesh)):
        return mesh
    raise TypeError(
        f"{verb}: mesh={shown(mesh)} is no jax.sharding.Mesh; write the mesh on which the "
        "parameters are, such as jax.make_mesh((8,), ('data',)), or leave mesh out: then it is "
        "that of jax.set_mesh."
    )


def divided(work: Sequence[Work], mesh: AnyMesh | None) -> list[Done | None]:
    """Projects matrices of one shape on all devices of a mesh, each device some of them.

    Args:
        work: Leaves under sets that spread.
        mesh: A mesh; None for that of `jax.set_mesh`.

    Returns:
        For each leaf its projection; or None where it has to be projected in its place, because
        there is no mesh, or no other matrix of this shape.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    items = [_items(own) for own in work]
    for i, (own, (constraint, *arrays)) in enumerate(zip(work, items, strict=True)):
        # Of what numbers matrices, the length may differ.
        kinds = tuple((x.shape[1:], x.dtype) for x in jax.tree.leaves(arrays))
        key = own.key, type(constraint), kinds, jax.tree.structure(arrays), _mesh_of(own, mesh)
        groups.setdefault(key, []).append(i)
    done: list[Done | None] = [None] * len(work)
    for (*_, here), places in groups.items():
        lengths = tuple(items[i][1].shape[0] for i in places)
        if here is None or sum(lengths) < 2:
            continue
        constraint = items[places[0]][0]
        arrays = tuple(items[i][1:] for i in places)
        weights = arrays[0][0]
        run = functools.partial(_run, mesh=here, ends=bool(explicit_axes(weights)))
        new = automatic(run, weights, arrays, constraint, like=arrays)
        for i, own in zip(places, new, strict=True):
            done[i] = _whole(work[i], *own)
    return done


def _items(own: Work) -> tuple[Constraint, jax.Array, Any]:
    """The constraint of one matrix, and the matrices and memories, numbered by their first axis."""
    constraint, weights, memory = own.constraint, own.weights, own.memory
    if _is_numbered(constraint, weights):
        inner = constraint.constraint if isinstance(constraint, Stacked) else constraint
        return inner, weights, memory
    return constraint, *jax.tree.map(lambda x: x[None], (weights, memory))


def _whole(own: Work, weights: jax.Array, memory: Any) -> Done:
    if _is_numbered(own.constraint, own.weights):
        return Done(weights, memory)
    return Done(*jax.tree.map(lambda x: x[0], (weights, memory)))


def _is_numbered(constraint: Constraint, weights: jax.Array) -> bool:
    """Whether the first axis of an array numbers matrices."""
    if isinstance(constraint, Stacked):
        return constraint.axis in (0, (0,))
    plain = isinstance(constraint, MatrixSet) and constraint.axis is None and weights.ndim > 2
    # Arrays among the fields may differ from matrix to matrix.
    return plain and not any(jnp.ndim(x) for x in jax.tree.leaves(constraint))


def _mesh_of(own: Work, mesh: AnyMesh | None) -> AnyMesh | None:
    """The mesh over which a leaf can be divided; None for none."""
    current = jax.sharding.get_abstract_mesh()
    if AxisType.Manual in getattr(current, "axis_types", ()):
        return None  # inside of `shard_map` each device has a part of its own
    if jax.config.values["jax_disable_jit"]:
        return None
    if mesh is None:
        mesh = current
    if not isinstance(own.weights, Tracer):
        # Outside of `jit` it is known where weights are, and they stay there.
        sharding: Any = own.weights.sharding
        known = isinstance(sharding, NamedSharding) and sharding.mesh.axis_names == mesh.axis_names
        mesh = sharding.mesh if known else None
    return None if mesh is None or mesh.empty or mesh.size < 2 else mesh


def _run(_: Any, arrays: Any, constraint: Constraint, *, mesh: AnyMesh, ends: bool) -> Any:
    if not isinstance(jax.tree.leaves(arrays)[0], Tracer):
        return _compiled(arrays, constraint, mesh, ends)
    here = jax.sharding.get_abstract_mesh()
    return _divided(arrays, constraint, mesh if here.empty else here, ends)


def _divided(arrays: Any, constraint: Constraint, mesh: AnyMesh, ends: bool) -> Any:
    """Matrices and memories as `constraint.aim` leaves them.

    Args:
        arrays: A pair of matrices and memories for each leaf, numbered by first axes.
        constraint: That of one matrix.
        mesh: The mesh, with Auto axes.
        ends: Whether it is said elsewhere how the results are sharded.

    Returns:
        A pair for each leaf, sharded like it.
    """
    lengths = [weights.shape[0] for weights, _ in arrays]
    # Layers that are numbered already may stay where they are, if it is said where they end.
    stays = len(lengths) == 1 and ends
    # An axis of an array that is split over several axes of the mesh usually names them in their
    # order, and can be joined again from the last on. What numbers layers is split over the first.
    names = mesh.axis_names if stays else mesh.axis_names[::-1]
    missing = -sum(lengths) % mesh.size

    def place(x: jax.Array, over: int) -> jax.Array:
        """An array whose first axis is split over the first axes of the mesh."""
        rest = [PartitionSpec.UNCONSTRAINED if over < len(names) else None] * (x.ndim - 1)
        spec = PartitionSpec(names[:over] or None, *rest)
        return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def out(*parts: jax.Array) -> jax.Array:
        stack = parts[0]
        if not stays:
            stack = place(jnp.concatenate([place(part, 0) for part in parts]), 0)
        stack = jnp.pad(stack, [(0, missing), *[(0, 0)] * (stack.ndim - 1)])
        for over in range(1, len(names) + 1):
            stack = place(stack, over)
        return stack

    def back(stack: jax.Array) -> list[jax.Array]:
        for over in reversed(range(stays, len(names))):
            stack = place(stack, over)
        stops = itertools.accumulate(lengths)
        return [stack[stop - n : stop] for n, stop in zip(lengths, stops, strict=True)]

    weights, memory = jax.tree.map(out, *arrays)
    weights, memory = jax.shard_map(
        lambda constraint, w, memory: jax.vmap(constraint.aim)(w, memory),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(names), PartitionSpec(names)),
        out_specs=PartitionSpec(names),
        check_vma=False,
    )(constraint, weights, memory)
    leaves, treedef = jax.tree.flatten((weights, memory))
    new = [treedef.unflatten(own) for own in zip(*map(back, leaves), strict=True)]
    return jax.tree.map(lambda old, new: shard_alike(old, new)[1], arrays, tuple(new))


_compiled = jax.jit(_divided, static_argnums=(2, 3))
