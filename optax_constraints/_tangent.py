"""The verb for the front of a chain: `tangent`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint
from optax_constraints._patterns import Rules
from optax_constraints._rules import Binder
from optax_constraints._walk import Bindings


class TangentState(NamedTuple):
    """State of `tangent`: an ordinary pytree."""

    # Not `count`, as in the state of `project`.
    updates_seen: jax.Array
    """How many updates there have been, an int32 scalar; schedules see it."""


def tangent(
    rules: Rules, *, layout: Layout | None = None, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that leaves of each gradient what is tangent to its set.

    It goes first in a chain that ends with `project`, so that momentum and second moments
    collect only what moves weights within their sets: Riemannian gradients, with `project` as
    the retraction (P.-A. Absil, R. Mahony and R. Sepulchre, "Optimization Algorithms on Matrix
    Manifolds", 2008). It is for smooth sets: spheres, planes and subspaces, orthogonal
    matrices, matrices of fixed rank. For them the derivative of the projection at a point of
    the set is the orthogonal projection onto its tangent space (P.-A. Absil and J. Malick,
    "Projection-like retractions on matrix manifolds", SIAM J. Optim. 22(1), 2012), and so one
    `jax.jvp` of a constraint is the tangent part, also for sets of your own that say
    ``smooth = True``.

    Cost: one derivative of each projection, which for a norm is two passes over a leaf, for
    spectral sets an eigendecomposition or singular value decomposition. The state is one
    integer.

    Args:
        rules: Which leaf is under which constraint, as for `project`; None leaves a gradient
            as it is.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        The transformation. Its `update` needs `params`, which should be in their sets.

    Raises:
        TypeError: If `rules` is of the wrong kind.
        ValueError: At init, if a leaf is under a set that is not smooth, such as a ball or a
            box; else as for `project`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> tx = optax.chain(
        ...     oc.tangent(oc.unit_norm()), optax.sgd(0.1), oc.project(oc.unit_norm())
        ... )
        >>> w = jnp.array([0.6, 0.8])
        >>> updates, state = tx.update(jnp.array([0.6, 0.8]), tx.init(w), w)
        >>> bool(jnp.all(jnp.abs(updates) < 1e-7))  # the gradient was normal to the sphere
        True
    """
    bind = Binder(rules, layout=layout, strict=strict)

    def bound_to(params: Any) -> Bindings:
        bound = bind(params)
        for leaf in bound:
            if leaf.constraint is not None and not leaf.constraint.smooth:
                raise ValueError(
                    f"tangent: {leaf.constraint} on {leaf.path!r} is not known to be a smooth "
                    "set. At a corner or on a boundary the directions that stay in a set are no "
                    "linear space, so that a gradient there has no tangent part. Give this leaf "
                    "None in the rules of tangent; in a class of your own for a smooth set, "
                    "write smooth = True."
                )
        return bound

    def init(params: Any) -> TangentState:
        bound_to(params)
        return TangentState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, TangentState]:
        if params is None:
            raise ValueError("tangent needs the parameters; write tx.update(grads, state, params).")
        # The weights are where the last update of `project` has put them.
        step = jnp.maximum(state.updates_seen - 1, 0)
        bound = bound_to(params)
        new, _ = bound.map(_tangent, params, {}, step=step, extra=extra, updates=updates)
        seen = jnp.asarray(optax.safe_increment(state.updates_seen))
        return new, TangentState(seen)

    return optax.GradientTransformationExtraArgs(init, update)


def _tangent(constraint: Constraint, weights: Any, _: Any, updates: Any) -> tuple[Any, Any]:
    return constraint.tangent(weights, updates), ()
