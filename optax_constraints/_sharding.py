"""Meshes with Explicit axes, on which JAX wants to hear where the result of an operation goes.

Of a reshape, a product or a decomposition of sharded arrays it cannot tell. `automatic` leaves
that to the compiler, as on a mesh with Auto axes.
"""

from collections.abc import Callable
from typing import Any

import jax
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
    function: Callable[..., Any], w: jax.Array, *args: Any, spec: PartitionSpec | None = None
) -> Any:
    """`function(w, *args)`, sharded as `w`.

    Args:
        function: Takes arrays, and on a mesh with Explicit axes must not know of others there.
        w: Weights.
        *args: Other arrays, or trees of them.
        spec: What is sharded in the result, if it does not have the shape of `w`.

    Returns:
        The result. Without Explicit axes the call is all there is.
    """
    axes = explicit_axes(w)
    if not axes:
        return function(w, *args)
    sharding = jax.typeof(w).sharding
    if spec is not None:
        sharding = NamedSharding(sharding.mesh, spec)
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=sharding)(w, *args)
