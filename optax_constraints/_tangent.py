"""The verb for the front of a chain: `tangent`."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint, tangent_at
from optax_constraints._patterns import Rules
from optax_constraints._rules import Binder
from optax_constraints._walk import Bindings


class TangentState(NamedTuple):
    """State of `tangent`: an ordinary pytree."""

    # Not `count`, as in the state of `project`.
    updates_seen: jax.Array
    """How many updates there have been, an int32 scalar; schedules see it."""
    at_init: Any = ()
    """By path, what constraints remember of their leaves, such as norms at init."""


def tangent(
    rules: Rules, *, layout: Layout | None = None, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation that removes from each gradient what leads out of its set.

    Put it first in a chain that ends with `project`. It turns ``g`` into ``-P(-g)``, where `P`
    projects onto the tangent cone of the set at the weights: the directions that stay in the set.
    Without it, Adam and other optimizers that scale each entry by itself can stop in the wrong
    place: the optimizer pushes along one direction, and the projection pulls back along another.
    With it, weights rest only where no direction in the set leads downhill.

    For a smooth set (spheres, planes and subspaces, orthogonal matrices, matrices of fixed rank)
    the cone is the tangent space. Momentum and second moments are then Riemannian, with
    `project` as the retraction (P.-A. Absil, R. Mahony and R. Sepulchre, "Optimization
    Algorithms on Matrix Manifolds", 2008; P.-A. Absil and J. Malick, "Projection-like retractions
    on matrix manifolds", SIAM J. Optim. 22(1), 2012). For a convex set it is the closure of what
    leads from the weights into the set (J.-J. Moreau, "Decomposition orthogonale d'un espace
    hilbertien selon deux cones mutuellement polaires", 1962; R. T. Rockafellar and R. J.-B. Wets,
    "Variational Analysis", 1998, chapter 6): inside, nothing changes.

    What counts as at its bound: entries that equal it, as `project` leaves them; norms, sums and
    inner products within 2 machine epsilons of the weights' dtype and the rounding of sums;
    singular values and eigenvalues within that and the rounding of their decomposition; for
    `Monotone`, neighbours within 4; for `DoublyStochastic` and `Transport`, entries below 8 of
    the dtype they compute in, relative to the largest sum; for `BoxSection`, those within 2 of
    that, relative to the sum of magnitudes; in an `Intersection`, all within 64 of the largest
    weight.

    Cost:
        Two passes over a leaf for a norm; for simplexes and l1 balls some more, as for the
        projection; matrix products for `Orthogonal`; a decomposition or two for the other spectral
        sets. The state is one integer, and what constraints remember.

    Args:
        rules: Which leaf is under which constraint, as for `project`; None leaves a gradient
            as it is.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        The transformation. Its `update` needs `params`, which should be in their sets.

    Raises:
        TypeError: If `rules` is of the wrong kind.
        ValueError: At init, if a leaf is under a set that is neither smooth nor convex, such as
            a grid; else as for `project`.

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
        >>> mixture = jnp.array([0.5, 0.5, 0.0])
        >>> front = oc.tangent(oc.simplex())
        >>> updates, _ = front.update(jnp.array([1.0, 3.0, 8.0]), front.init(mixture), mixture)
        >>> updates  # what sums to zero, and lets the last entry be
        Array([-1.,  1.,  0.], dtype=float32)
    """
    bind = Binder(rules, layout=layout, strict=strict)

    def bound_to(params: Any) -> Bindings:
        bound = bind(params)
        for leaf in bound:
            if leaf.constraint is not None and not leaf.constraint.has_tangent:
                raise ValueError(
                    f"tangent: {leaf.constraint} on {leaf.path!r} is not known to be a smooth "
                    "set, nor a convex one whose tangent cone is known. Give this leaf None in the "
                    "rules of tangent. Where small steps are lost, as with grids and sparsity, "
                    "take the loss at straight_through(params, rules); in place of compose write "
                    "intersection; in a class of your own, write smooth = True for a smooth set, "
                    "or the method tangent for a convex one."
                )
        return bound

    def init(params: Any) -> TangentState:
        bound_to(params)  # says what has no tangent
        return TangentState(jnp.zeros((), jnp.int32), bind.start(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, TangentState]:
        if params is None:
            raise ValueError("tangent needs the parameters; write tx.update(grads, state, params).")
        if isinstance(state, Mapping):  # restored without its type
            state = TangentState(**state)
        # The weights are where the last update of `project` has put them.
        step = jnp.maximum(state.updates_seen - 1, 0)
        bound = bound_to(params)
        memory = bound.recall(state.at_init)
        new, _ = bound.map(_tangent, params, memory, step=step, extra=extra, updates=updates)
        seen = jnp.asarray(optax.safe_increment(state.updates_seen))
        return new, TangentState(seen, state.at_init)

    return optax.GradientTransformationExtraArgs(init, update)


def _tangent(constraint: Constraint, weights: Any, memory: Any, updates: Any) -> tuple[Any, Any]:
    downhill = jax.tree.map(jnp.negative, updates)
    along = tangent_at(constraint, weights, downhill, memory)
    return jax.tree.map(lambda d: 0 - d, along), memory  # without zeros that are negative
