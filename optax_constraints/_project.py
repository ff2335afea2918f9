"""The verbs that compute: `project`, `constrain`, `violations`."""

import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints import _numerics
from optax_constraints._axes import Layout
from optax_constraints._rules import Binder, Rules


class ProjectState(NamedTuple):
    """State of `project`: an ordinary pytree."""

    # Optax' own name for it, though tuples have a method of that name.
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    """How many updates there have been, an int32 scalar; schedules see it."""


def project(
    rules: Rules, *, every: int = 1, layout: Layout | None = None, strict: bool = True
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation after which the parameters are in their sets.

    It goes last in a chain, and replaces each update `u` of a parameter `p` by
    ``P(p + u) - p``, where `P` is the projection that `rules` assign to `p`. Parameters
    without a constraint get their updates as they came. Start from `constrain(params, rules)`:
    beside weights that are larger than allowed by 1 / eps, the difference loses its target.

    Cost: one pass over each constrained leaf for an elementwise set, which fuses with the
    optimizer; two for a norm. An update has to be a difference, so a norm reads `p` once
    more than `constrain` after `optax.apply_updates` does: `make bench` shows what that is
    in a training step. The state is one integer.

    Args:
        rules: Which leaf is under which constraint: a constraint for every floating-point
            leaf, or a mapping (or pairs) from pattern to constraint or None. The first
            pattern that matches a leaf wins.
        every: Project on every so many steps only; the updates between pass through.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf. With it,
            `axis="fan_in"` is exact for every layer.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.

    Returns:
        The transformation. Its `update` needs `params`.

    Raises:
        TypeError: If `rules` or `every` is of the wrong kind.
        ValueError: If a rule's value is no constraint; at init, if a rule matches no leaf or
            a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> tx = optax.chain(
        ...     optax.sgd(1.0), oc.project({"kernel": oc.max_norm(1.0), "bias": oc.non_neg()})
        ... )
        >>> grads = {"kernel": -jnp.ones((2, 3)), "bias": jnp.ones(3)}
        >>> updates, state = tx.update(grads, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["bias"]
        Array([0., 0., 0.], dtype=float32)
    """
    every = _check_every(every)
    bind = Binder(rules, layout=layout, strict=strict)

    def init(params: Any) -> ProjectState:
        bind(params)
        return ProjectState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, ProjectState]:
        del extra_args
        if params is None:
            raise ValueError("project needs the parameters; write tx.update(grads, state, params).")
        leaves, treedef = jax.tree.flatten(params)
        given = treedef.flatten_up_to(updates)
        bound = bind(params)

        def projected(given: list[Any]) -> list[Any]:
            new, before = [], None
            for leaf_bound, p, u in zip(bound, leaves, given, strict=True):
                constraint = leaf_bound.at(state.count)
                if constraint is not None and not _is_absent(u):
                    u, before = constraint.update(jnp.asarray(p), jnp.asarray(u), before)
                new.append(u)
            return new

        if every == 1:
            new = projected(given)
        else:
            # Both branches give the dtypes that a projection would.
            like = jax.eval_shape(projected, given)
            new = jax.lax.cond(
                (state.count + 1) % every == 0,
                projected,
                lambda given: jax.tree.map(lambda u, t: u.astype(t.dtype), given, like),
                given,
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return treedef.unflatten(new), ProjectState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def _is_absent(update: Any) -> bool:
    """Whether a leaf gets no update: a frozen one, or one that `optax.masked` took out."""
    return update is None or isinstance(update, optax.MaskedNode)


def _check_every(every: int) -> int:
    try:
        if isinstance(every, bool):
            raise TypeError
        every = operator.index(every)
    except TypeError:
        raise TypeError(f"every={every!r} is not an int; write a number of steps.") from None
    if every < 1:
        raise ValueError(f"every={every} is not allowed; write 1 to project on every step.")
    return every


def constrain(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    layout: Layout | None = None,
    strict: bool = True,
) -> Any:
    """Projects parameters now: at init, after loading or averaging, or after each update.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step: What schedules see; the first update is step 0.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        The tree with each constrained leaf inside its set, to the bit.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.constrain({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array([0., 2.], dtype=float32)}
    """
    return constrain_bound(params, Binder(rules, layout=layout, strict=strict), step)


def constrain_bound(params: Any, bind: Binder, step: jax.typing.ArrayLike) -> Any:
    """`constrain` with rules that may remember this tree from the last time."""
    leaves, treedef = jax.tree.flatten(params)
    bound = bind(params)
    return treedef.unflatten(
        leaf if (constraint := leaf_bound.at(step)) is None else constraint(jnp.asarray(leaf))
        for leaf_bound, leaf in zip(bound, leaves, strict=True)
    )


def violations(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    layout: Layout | None = None,
    strict: bool = True,
) -> dict[str, jax.Array]:
    """How far each constrained leaf is from its set. Runs under `jax.jit`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step: What schedules see.
        layout: As for `project`.
        strict: As for `project`.

    Returns:
        For the path of each constrained leaf the Euclidean distance to its projection, a
        scalar in float32 or float64.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.violations({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array(1., dtype=float32)}
    """
    bound = Binder(rules, layout=layout, strict=strict)(params)
    distances: dict[str, jax.Array] = {}
    for leaf_bound, leaf in zip(bound, jax.tree.leaves(params), strict=True):
        if (constraint := leaf_bound.at(step)) is not None:
            found = distance(jnp.asarray(leaf), constraint)
            # {"a": {"b": ...}, "a/b": ...} has two leaves of one path.
            other = distances.get(leaf_bound.path)
            distances[leaf_bound.path] = found if other is None else jnp.hypot(other, found)
    return distances


def distance(leaf: jax.Array, constraint: Any) -> jax.Array:
    """Euclidean distance of a leaf to its projection, a scalar in float32 or float64."""
    dtype = _numerics.compute_dtype(leaf.dtype)
    difference = leaf.astype(dtype) - constraint(leaf).astype(dtype)
    return _numerics.norm(difference, None).reshape(())
