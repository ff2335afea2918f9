"""The verb for sets in which small steps are lost: `straight_through`."""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints._axes import Layout
from optax_constraints._constrain import advance, bound_now, constrain_bound
from optax_constraints._constraint import Constraint
from optax_constraints._numbers import check_scalar
from optax_constraints._numerics import compute_dtype, is_array, is_readable
from optax_constraints._patterns import Rules
from optax_constraints._text import shown


def straight_through(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    decay: jax.typing.ArrayLike = 0.0,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> Any:
    """The result of `constrain`, to the bit, with the derivative of the identity.

    It is for sets in which small steps are lost: grids, sparsity, low rank. The optimizer trains
    free parameters, without `project`, and small steps add up in them. Compute the loss with
    ``straight_through(params, rules)``. At the end ``constrain(params, rules)`` makes the
    parameters to deploy. This is the straight-through estimator (Y. Bengio, N. Leonard, A.
    Courville, "Estimating or propagating gradients through stochastic neurons for conditional
    computation", 2013): the gradient is that at the constrained weights `P(w)`, handed to the free
    weights `w`.

    A `decay` adds ``decay * (w - P(w))`` to the gradient of `w`. This pull towards the set keeps
    weights from going back and forth between two of its points. For sparsity that is SR-STE (A.
    Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch", ICLR
    2021). It is added once for each call, so call it once in a loss, outside of loops; and if the
    loss is scaled, scale `decay` with it.

    Without `decay`, forward mode, reverse mode and derivatives of gradients all work. With a
    `decay`, or a traced one, only `jax.grad` and `jax.vjp` do. Nothing flows to the numbers of
    constraints.

    Cost:
        That of `constrain`, and with `decay` one more pass over the weights in the backward pass.

    Args:
        params: Any tree of arrays, as for `constrain`. It is not changed.
        rules: As for `project`.
        decay: How strong the pull towards the set is: a finite number of at least 0, or a JAX
            scalar. What is traced is not checked.
        step, state, extra, layout, strict: As for `constrain`.

    Returns:
        The tree with each constrained leaf inside its set, and the free ones as they came.

    Raises:
        TypeError: If `decay` is no number, or a rule names a leaf that is not floating-point.
        ValueError: If `decay` is negative or not finite, a rule matches no leaf, or a leaf does
            not have the axis asked for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> def loss(w):
        ...     return jnp.sum(oc.straight_through(w, oc.grid([-1, 0, 1])) ** 2)
        >>> jax.grad(loss)(jnp.array([-0.7, 0.2, 0.9]))
        Array([-2.,  0.,  2.], dtype=float32)
    """
    pull = _check_decay(decay)
    bind, memory = bound_now(params, rules, state, layout, strict)

    def through(constraint: Constraint, weights: Any, own: Any) -> tuple[Any, Any]:
        # So that nothing of the projection is differentiated.
        fixed = jax.lax.stop_gradient((constraint, weights, own))
        target, own = advance(*fixed)
        if pull is None:
            return jax.tree.map(_through, weights, target), own
        return jax.tree.map(lambda w, t: _pulled(w, t, pull), weights, target), own

    return constrain_bound(params, bind, memory, step=step, extra=extra, function=through)[0]


@jax.custom_jvp
def _through(w: jax.Array, target: jax.Array) -> jax.Array:
    """`target`, with the derivative of `w`."""
    del w
    return target


@_through.defjvp
def _through_jvp(primals: Any, tangents: Any) -> Any:
    return _through(*primals), tangents[0]


@jax.custom_vjp
def _pulled(w: jax.Array, target: jax.Array, decay: jax.Array) -> jax.Array:
    """`target`, with the gradient of `w` and a pull of `w` towards it."""
    del w, decay
    return target


def _pulled_forward(w: jax.Array, target: jax.Array, decay: jax.Array) -> Any:
    return target, (w, target, decay)


def _pulled_backward(saved: Any, gradient: jax.Array) -> Any:
    w, target, decay = saved
    dtype = compute_dtype(w.dtype)
    away = w.astype(dtype) - target.astype(dtype)
    pulled = gradient.astype(dtype) + decay.astype(dtype) * away
    return pulled.astype(w.dtype), None, None


_pulled.defvjp(_pulled_forward, _pulled_backward)


def _check_decay(decay: Any) -> jax.Array | None:
    """The decay as an array; None if it is known to be 0."""
    what = f"straight_through: decay={shown(decay)}"
    numbers = (int, float, np.number, np.ndarray, jax.Array)
    if isinstance(decay, bool) or not isinstance(decay, numbers):
        raise TypeError(f"{what} is not a number; write a float or a JAX scalar.")
    if is_array(decay):
        check_scalar(what, decay)
        if not is_readable(decay):
            return jax.lax.stop_gradient(jnp.asarray(decay))
    try:
        number = float(cast(Any, decay))
    except OverflowError:
        number = math.inf
    if not 0 <= number < math.inf:
        raise ValueError(f"{what} is not allowed; write a finite number of at least 0.")
    return jnp.asarray(number, compute_dtype()) if number else None
