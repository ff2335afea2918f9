"""Adam with one second moment a unit: `scale_by_unit_adam`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints._axes import Axis, Layout, LeafLayout, check_axis, layout_of, settle_axis
from optax_constraints._numerics import compute_dtype, sum_of_squares, widest
from optax_constraints._trees import leaves_by_path
from optax_constraints._walk import is_absent

_NAME = "scale_by_unit_adam"


class ScaleByUnitAdamState(NamedTuple):
    """State of `scale_by_unit_adam`: an ordinary pytree."""

    count: Any  # an array, but tuples have a method of that name
    """How many updates there have been, an int32 scalar."""
    mu: Any
    """First moments, like the parameters."""
    nu: Any
    """Second moments, like the parameters with the axes of a unit at length 1."""


def scale_by_unit_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    axis: Axis = 0,
    layout: Layout | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with one second moment for each unit, in the place of `optax.scale_by_adam`.

    The second moment is an average of the squared norms of a unit's gradients, as in Riemannian
    Adam (G. Bécigneul and O.-E. Ganea, "Riemannian adaptive optimization methods", ICLR 2019).
    So the step of a unit is parallel to its first moment, and does not depend on the coordinates.
    Use it in `projected`, for weights on spheres and among orthogonal matrices. A unit as a whole
    moves by about the learning rate, while in Adam each entry does. So for units of n entries,
    multiply a learning rate for Adam by about sqrt(n).

    A leaf that does not have these axes, such as a scalar, or a bias under ``axis=(0, 1)``, is
    one unit.

    Args:
        b1: Decay of the first moments.
        b2: Decay of the second moments.
        eps: What is added to the root of a second moment.
        axis: The axes along which one unit runs: an int, several, None for the whole leaf, or
            "fan_in".
        layout: As for `project`.
        mu_dtype: The dtype of the first moments; None for that of the parameters. Second moments
            are float32, or float64 if the parameters are.

    Returns:
        The transformation. Its updates have the dtypes of the gradients. It takes no step
        downhill by itself: follow it by `optax.scale_by_learning_rate`.

    Raises:
        TypeError: If `axis` is of the wrong kind.
        ValueError: If `axis` names an axis twice; at init, if "fan_in" cannot be told for a leaf.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> adam = optax.chain(oc.scale_by_unit_adam(), optax.scale_by_learning_rate(0.1))
        >>> tx = oc.projected(adam, oc.unit_norm())
        >>> w = jnp.array([[0.6], [0.8]])
        >>> updates, state = tx.update(jnp.array([[1.0], [0.0]]), tx.init(w), w)
        >>> w = optax.apply_updates(w, updates)
        >>> print(f"{jnp.linalg.norm(updates):.3f}")  # the learning rate
        0.100
    """
    axis = check_axis(_NAME, axis)

    def init(params: Any) -> ScaleByUnitAdamState:
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        zeros, treedef = jax.tree.flatten(mu)
        nu = []
        for (path, leaf), zero in zip(leaves_by_path(params), zeros, strict=True):
            axes = _unit_axes(axis, zero.shape, path, layout_of(layout, path))
            # A sum, so that it is sharded as the units are.
            nu.append(sum_of_squares(jnp.real(zero).astype(_dtype_of_squares(leaf)), axes))
        return ScaleByUnitAdamState(jnp.zeros((), jnp.int32), mu, treedef.unflatten(nu))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ScaleByUnitAdamState]:
        del params, extra
        treedef = jax.tree.structure(state.mu)
        count = jnp.asarray(optax.safe_increment(state.count))

        def step(g: Any, mu: Any, nu: Any) -> tuple[Any, Any, Any]:
            if is_absent(g):
                return g, mu, nu
            g, mu, nu = map(jnp.asarray, (g, mu, nu))
            # In float32 at least: squares of float16 leave its range.
            wide = g.astype(widest(g.dtype, nu.dtype))
            first = optax.tree.update_moment(wide, mu.astype(wide.dtype), b1, 1)
            second = optax.tree.update_moment(_squared_norms(wide, nu), nu, b2, 1)
            root = jnp.sqrt(optax.tree.bias_correction(second, b2, count))
            new = optax.tree.bias_correction(first, b1, count) / (root + eps)
            return new.astype(g.dtype), first.astype(mu.dtype), second.astype(nu.dtype)

        leaves = map(treedef.flatten_up_to, (updates, state.mu, state.nu))
        new = [step(*own) for own in zip(*leaves, strict=True)]
        updates, mu, nu = (treedef.unflatten([own[i] for own in new]) for i in range(3))
        return updates, ScaleByUnitAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)


def _unit_axes(
    axis: Any, shape: tuple[int, ...], path: str, layout: LeafLayout | None
) -> tuple[int, ...]:
    """The axes of a unit of one leaf: all, if the leaf does not have those that were named."""
    rank = len(shape)
    named = (axis,) if isinstance(axis, int) else axis
    if isinstance(named, tuple) and (
        len(named) > rank or any(not -rank <= a < rank for a in named)
    ):
        return tuple(range(rank))
    try:
        return settle_axis(_NAME, axis if rank else None, shape, path, layout)
    except ValueError as error:
        if axis == "fan_in":
            error.add_note(
                "One axis holds for all leaves here: give layout=layout(model), or optimize those "
                "that have another one by themselves, with optax.partition."
            )
        raise


def _dtype_of_squares(leaf: Any) -> jnp.dtype:
    return compute_dtype(jnp.real(jnp.zeros((), jnp.result_type(leaf))).dtype)


def _squared_norms(g: jax.Array, nu: jax.Array) -> jax.Array:
    """The squared norm of each unit; along its axes, second moments have length 1."""
    axes = tuple(axis for axis, size in enumerate(nu.shape) if size == 1)
    return sum_of_squares(jnp.abs(g) if jnp.iscomplexobj(g) else g, axes)
