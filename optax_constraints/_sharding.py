"""Meshes on which JAX wants to hear more of an array than its shape and dtype.

With Explicit axes it asks where the result of an operation goes, and of a reshape, a product or
a decomposition of sharded arrays it cannot tell. `automatic` leaves that to the compiler, as on
a mesh with Auto axes. Inside `jax.shard_map` it asks over which axes a value varies, and a loop
must not start from a value that varies less than what comes back: see `vary_like`.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def explicit_axes(w: jax.Array) -> tuple[str, ...]:
    """The names of the Explicit axes of the mesh on which an array is."""
    # Older versions of JAX have such meshes, but not what it takes to leave them.
    if not hasattr(jax.sharding, "auto_axes"):
        return ()
    mesh = jax.typeof(w).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def automatic(
    function: Callable[..., Any],
    w: jax.Array,
    *args: Any,
    spec: PartitionSpec | None = None,
    like: Any = None,
) -> Any:
    """`function(w, *args)`, sharded as `w`.

    Args:
        function: Takes arrays, and on a mesh with Explicit axes must not know of others there.
        w: Weights.
        *args: Other arrays, or trees of them.
        spec: What is sharded in the result, if it does not have the shape of `w`.
        like: A tree of arrays, if the result is a tree that is sharded as those are.

    Returns:
        The result. Without Explicit axes the call is all there is.
    """
    axes = explicit_axes(w)
    if not axes:
        return function(w, *args)
    sharding = jax.tree.map(lambda x: jax.typeof(x).sharding, w if like is None else like)
    if spec is not None:
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)(w, *args)


def vary_like(x: Any, like: jax.Array) -> Any:
    """A tree of arrays, marked inside `jax.shard_map` as varying wherever `like` does.

    Args:
        x: A tree of arrays, such as the zeros from which a loop starts.
        like: An array, such as the weights.

    Returns:
        The same values. Outside `jax.shard_map` nothing happens.
    """

    def mark(x: jax.Array) -> jax.Array:
        axes = tuple(sorted(_varying(like) - _varying(x), key=str))
        if not axes:
            return x
        # Both calls have other names in older versions of JAX.
        if hasattr(lax, "pcast"):
            return lax.pcast(x, axes, to="varying")
        return getattr(lax, "pvary")(x, axes)  # noqa: B009  # pyright knows the newest only

    return jax.tree.map(mark, x)


def _varying(x: jax.Array) -> frozenset:
    aval = jax.typeof(x)
    if hasattr(aval, "manual_axis_type"):
        return getattr(aval, "manual_axis_type").varying  # noqa: B009
    return getattr(aval, "vma", frozenset())
