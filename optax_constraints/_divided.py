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
    for i, own in enumerate(work):
        groups.setdefault(_kind(own, mesh), []).append(i)
    done: list[Done | None] = [None] * len(work)
    for (_, _, here, numbered, *_), places in groups.items():
        arrays = tuple((work[i].weights, work[i].memory) for i in places)
        if here is None or sum(w.shape[0] if numbered else 1 for w, _ in arrays) < 2:
            continue
        first = arrays[0][0]
        constraint = work[places[0]].constraint
        if numbered and isinstance(constraint, Stacked):
            constraint = constraint.constraint
        run = functools.partial(_run, mesh=here, numbered=numbered, ends=bool(explicit_axes(first)))
        results = automatic(run, first, arrays, constraint, like=arrays)
        for i, result in zip(places, results, strict=True):
            done[i] = Done(*result)
    return done


def _kind(own: Work, mesh: AnyMesh | None) -> tuple[Any, ...]:
    """What is the same for leaves that are divided together."""
    numbered = _is_numbered(own.constraint, own.weights)
    leaves, structure = jax.tree.flatten((own.weights, own.memory))
    # Of what numbers matrices, the length may differ.
    kinds = tuple((x.shape[numbered:], x.dtype) for x in leaves)
    here = _mesh_of(own, mesh)
    where = None
    if not isinstance(own.weights, Tracer):
        where = own.weights.sharding
    elif explicit_axes(own.weights):
        where = jax.typeof(own.weights).sharding
    return own.key, type(own.constraint), here, numbered, kinds, structure, where


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


def _run(_: Any, arrays: Any, constraint: Constraint, **how: Any) -> Any:
    eager = not isinstance(jax.tree.leaves(arrays)[0], Tracer)
    return (_compiled if eager else _divided)(arrays, constraint, **how)


def _divided(
    arrays: Any, constraint: Constraint, *, mesh: AnyMesh, numbered: bool, ends: bool
) -> Any:
    """Matrices and memories as `constraint.aim` leaves them.

    Args:
        arrays: The weights and the memory of each leaf.
        constraint: That of one matrix.
        mesh: The mesh. If it has Explicit axes, that around this call has Auto ones.
        numbered: Whether first axes number matrices.
        ends: Whether it is said elsewhere how the results are sharded.

    Returns:
        A pair for each leaf, sharded like it.
    """
    around = jax.sharding.get_abstract_mesh()
    mesh = mesh if around.empty else around
    lengths = [weights.shape[0] if numbered else 1 for weights, _ in arrays]
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
        if not numbered:
            parts = tuple(part[None] for part in parts)
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
        if not numbered:
            return [stack[i] for i in range(len(lengths))]
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
    new = tuple(treedef.unflatten(own) for own in zip(*map(back, leaves), strict=True))
    # What is sharded alike, the partitioner tells by what stands in one operation: here one that
    # does nothing, and is gone afterwards.
    always = lax.optimization_barrier(jnp.array(True))
    return jax.tree.map(lambda old, new: jnp.where(always, new, old), arrays, new)


_compiled = jax.jit(_divided, static_argnames=("mesh", "numbered", "ends"))
