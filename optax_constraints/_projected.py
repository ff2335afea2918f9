"""An optimizer whose steps stay in their sets: `projected`."""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_constraints._axes import Layout
from optax_constraints._constraint import Constraint, moved
from optax_constraints._divided import AnyMesh
from optax_constraints._kept_params import with_kept_params
from optax_constraints._moments import Moment, field_names, map_first_moments
from optax_constraints._patterns import Rules
from optax_constraints._project import project
from optax_constraints._rules import Binder
from optax_constraints._tangent import tangent
from optax_constraints._text import shown
from optax_constraints._walk import Bindings, is_absent


def projected(
    optimizer: optax.GradientTransformation,
    rules: Rules,
    *,
    transport: bool | Collection[str] = True,
    every: int = 1,
    stats: bool = False,
    keep_params: bool = False,
    layout: Layout | None = None,
    mesh: AnyMesh | None = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer whose steps stay in their sets, and whose momentum comes along.

    It is ``chain(tangent(rules), optimizer, project(rules))``. With it Adam arrives at the optimum
    under every convex set; without `tangent` it may stop elsewhere. For leaves under smooth sets,
    each step then projects the first moments of the optimizer onto the tangent space of the new
    weights. That is Riemannian gradient descent with momentum, with projections as retraction and
    as vector transport (P.-A. Absil, R. Mahony and R. Sepulchre, "Optimization Algorithms on Matrix
    Manifolds", 2008, sections 4.1 and 8.1.3). Second moments stay as they are, and so do the
    moments of all other leaves.

    First moments are found inside any wrappers of Optax: the fields `mu` and `trace` of states, and
    what Optax' other optimizers call them, if their paths and shapes are those of the parameters.
    They are not found behind `optax.flatten`, `optax.lookahead` and GaLore, which have parameters
    of their own. LBFGS, Rprop and the optimizers that sum gradients from the start have none to
    move.

    Cost:
        That of `tangent`, the optimizer and `project`, and the tangent part of each first moment
        under a smooth set: two passes over a leaf for a norm.

    Args:
        optimizer: Any optimizer of Optax, wrappers included, or one of your own.
        rules: As for `project`.
        transport: Whether first moments come along; or, for an optimizer of your own, the names
            of the fields in which its states hold them, instead of those above.
        every: As for `project`. On the steps between, moments stay as they are.
        stats: As for `project`: for `stats(state)`.
        keep_params: As for `project`, but of all leaves, since an optimizer may need them.
        layout: As for `project`.
        mesh: As for `project`, for its projections. Tangents are taken where the weights are.
        strict: As for `project`.

    Returns:
        The transformation. Its `update` needs `params`, except with ``keep_params=True``, and hands
        extra arguments on. Its state is that of the chain: a tuple of the states of `tangent`, the
        optimizer and `project`; with ``keep_params=True`` it also has the parameters.

    Raises:
        TypeError: If `optimizer` is none, or `transport` or `rules` is of the wrong kind.
        ValueError: At init, if the state has no field of a name in `transport`; else as for
            `tangent` and `project`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> tx = oc.projected(optax.sgd(0.1, momentum=0.9), oc.unit_norm())
        >>> w = jnp.array([0.6, 0.8])
        >>> updates, state = tx.update(jnp.array([1.0, 0.0]), tx.init(w), w)
        >>> w = optax.apply_updates(w, updates)
        >>> momentum = optax.tree.get(state, "trace")
        >>> bool(jnp.abs(jnp.vdot(momentum, w)) < 1e-6)  # tangent to the sphere where w is now
        True
    """
    fields = _check_transport(transport)
    chain: Any = optax.chain(
        tangent(rules, layout=layout, strict=strict),
        _check_optimizer(optimizer),
        project(rules, every=every, stats=stats, layout=layout, mesh=mesh, strict=strict),
    )
    if fields is not None and not fields:
        return with_kept_params(chain) if keep_params else chain
    bind = Binder(rules, layout=layout, strict=False)  # the chain has said what is wrong

    def init(params: Any) -> Any:
        state = chain.init(params)
        names = set(field_names(state[1]))
        for name in sorted(fields or ()):
            if name not in names:
                raise ValueError(
                    f"projected: transport names the field {name!r}, and the state of this "
                    f"optimizer has only {', '.join(map(repr, sorted(names))) or 'none'}; name "
                    "those that hold first moments, or write transport=True."
                )
        return state

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, tuple[Any, ...]]:
        updates, (front, inner, last) = chain.update(updates, state, params, **extra)
        bound, moments = bind(params), []
        map_first_moments(lambda own: moments.append(own) or own, inner, params, fields)
        if not moments or not any(b.constraint is not None and b.constraint.smooth for b in bound):
            return updates, (front, inner, last)
        seen = last.updates_seen

        def carried(moments: list[Moment], params: Any, updates: Any) -> list[Moment]:
            weights = _after(bound, params, updates)
            step = jnp.maximum(seen - 1, 0)
            return [_carried(bound, weights, own, step, extra) for own in moments]

        # Between projections, weights are not in their sets.
        due = True if every == 1 else seen % every == 0
        if isinstance(due, Tracer):
            moments = jax.lax.cond(due, carried, lambda own, *_: own, moments, params, updates)
        elif due:  # a condition would be compiled in each step
            moments = carried(moments, params, updates)
        new = iter(moments)
        inner = map_first_moments(lambda _: next(new), inner, params, fields)
        return updates, (front, inner, last)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return with_kept_params(tx) if keep_params else tx


def _check_optimizer(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    parts = (getattr(optimizer, name, None) for name in ("init", "update"))
    if isinstance(optimizer, type) or not all(map(callable, parts)):
        raise TypeError(
            f"projected: {shown(optimizer)} is no optimizer; the optimizer comes first, as in "
            "projected(optax.adam(1e-3), rules)."
        )
    if isinstance(optimizer, optax.MultiSteps):  # takes extra arguments, and does not say so
        update: Any = optimizer.update
        return optax.GradientTransformationExtraArgs(optimizer.init, update)
    return optax.with_extra_args_support(optimizer)


def _check_transport(transport: Any) -> tuple[str, ...] | None:
    """The fields that hold first moments; None for those of Optax' optimizers."""
    if isinstance(transport, bool):
        return None if transport else ()
    names = isinstance(transport, Collection) and not isinstance(transport, (str, bytes))
    if not names or not all(isinstance(name, str) for name in transport):
        raise TypeError(
            f"projected: transport={shown(transport)} is neither a bool nor a collection of the "
            'names of fields; write transport=True, or names such as transport=("mu", "trace").'
        )
    return tuple(transport)


def _after(bound: Bindings, params: Any, updates: Any) -> Any:
    """The parameters after an update, where a smooth set holds."""
    leaves, treedef = jax.tree.flatten(params)
    changes = treedef.flatten_up_to(updates)
    for own in bound:
        if own.constraint is not None and own.constraint.smooth:
            for place in own.places:
                if not is_absent(changes[place]):
                    p, u = jnp.asarray(leaves[place]), jnp.asarray(changes[place])
                    leaves[place] = moved(p, u)
    return treedef.unflatten(leaves)


def _carried(
    bound: Bindings, weights: Any, moment: Moment, step: jax.Array, extra: dict[str, Any]
) -> Moment:
    """A first moment, with its tangent part where a smooth set holds."""
    treedef = jax.tree.structure(weights)
    whole = list(moment)
    for own in bound:  # of a group all leaves, or none
        if any(moment[place] is None for place in own.places):
            for place in own.places:
                whole[place] = None
    vectors = treedef.unflatten(whole)
    new, _ = bound.map(_smooth, weights, {}, step=step, extra=extra, updates=vectors)
    pairs = zip(treedef.flatten_up_to(new), moment, strict=True)
    return [old if own is None else own for own, old in pairs]


def _smooth(constraint: Constraint, weights: Any, _: Any, vector: Any) -> tuple[Any, Any]:
    return constraint.tangent(weights, vector) if constraint.smooth else vector, ()
