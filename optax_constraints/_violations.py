"""How far weights are from their sets: `violations`, and what else only looks at them."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_constraints import _numerics
from optax_constraints._axes import Layout
from optax_constraints._called import called
from optax_constraints._constraint import Constraint
from optax_constraints._patterns import Rules
from optax_constraints._rules import Binder
from optax_constraints._trees import check_arrays
from optax_constraints._walk import Visit, memory_in


def visits(
    verb: str,
    params: Any,
    rules: Rules,
    step: jax.typing.ArrayLike,
    state: Any,
    extra: Mapping[str, Any] | None,
    layout: Layout | None,
    strict: bool,
) -> Iterator[Visit]:
    """Each leaf with its constraint at one step, for a verb that changes nothing.

    Raises:
        ValueError: If there is no state, and a constraint remembers weights at init.
    """
    check_arrays(params)
    bound = Binder(rules, layout=layout, strict=strict)(params)
    for leaf in bound:
        own = leaf.constraint
        if state is None and own is not None and own.remembers and not own.starts_anew:
            raise ValueError(
                f"{verb}: {leaf.constraint} on {leaf.path!r} is relative to what the "
                f"weights were at init, which only the state of project knows; write {verb}"
                "(params, rules, state=state) with the state of an optimizer that has project "
                "in it."
            )
    memory = {} if state is None else bound.recall(memory_in(state))
    return bound.visits(params, memory, step=step, extra=extra)


def violations(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> dict[str, jax.Array]:
    """How far each constrained leaf is from its set. Runs under `jax.jit`.

    After a projection it is zero, up to rounding. Use it to check a training loop, or as a penalty
    for weights that nothing projects. To see how hard constraints bind while they hold, use
    `stats`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step, state, extra, layout, strict: As for `constrain`; a bound that is relative to init
            needs the state.

    Returns:
        For the path of each constrained leaf the Euclidean distance to its projection, a
        scalar in float32 or float64.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, a leaf does not have the axis asked for, or a
            bound is relative to init and there is no state.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.violations({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array(1., dtype=float32)}
    """
    distances: dict[str, jax.Array] = {}
    found = visits("violations", params, rules, step, state, extra, layout, strict)
    for bound, constraint, weights, memory in found:
        if constraint is None:
            continue
        away = jax.tree.leaves(called(away_from, constraint, weights, memory, compiled=True))
        for path, own in zip(bound.paths, away, strict=True):
            # {"a": {"b": ...}, "a/b": ...} has two leaves of one path.
            other = distances.get(path)
            distances[path] = own if other is None else jnp.hypot(other, own)
    return distances


def distance(weights: Any, constraint: Constraint, memory: Any = ()) -> Any:
    """Euclidean distance of each array to its projection, scalars in float32 or float64."""
    return between(weights, constraint.advance(weights, memory)[0])


def away_from(constraint: Constraint, weights: Any, memory: Any) -> Any:
    """`distance`, of a constraint first."""
    return distance(weights, constraint, memory)


def between(weights: Any, projected: Any) -> Any:
    """Euclidean distance of each array to another, scalars in float32 or float64."""

    def away(w: jax.Array, target: jax.Array) -> jax.Array:
        dtype = _numerics.compute_dtype(w.dtype)
        difference = w.astype(dtype) - target.astype(dtype)
        return _numerics.norm(difference, None).reshape(())

    return jax.tree.map(away, weights, projected)
