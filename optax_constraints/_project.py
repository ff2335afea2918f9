"""The verb for the end of a chain: `project`."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_constraints import _stats
from optax_constraints._axes import Layout
from optax_constraints._called import called
from optax_constraints._constraint import Constraint, difference, moved
from optax_constraints._divided import AnyMesh, check_mesh
from optax_constraints._kept_params import with_kept_params
from optax_constraints._lost_steps import warn_of_lost_steps
from optax_constraints._numerics import InTurn, in_turn
from optax_constraints._patterns import Rules
from optax_constraints._private import called_from_optax
from optax_constraints._rules import Binder
from optax_constraints._text import as_int
from optax_constraints._walk import Bindings, like_before, parted


class ProjectState(NamedTuple):
    """State of `project`: an ordinary pytree."""

    # Not `count`, so that `optax.tree.get(state, "count")` finds one in the chain: Adam's.
    updates_seen: jax.Array
    """How many updates there have been, an int32 scalar; schedules see it."""
    memory: Any = ()
    """By path, what constraints remember of their leaves, such as norms at init; with
    ``stats=True`` that beside the statistics, which `stats` reads."""
    has_memory_of_constraints = True  # no field


def project(
    rules: Rules,
    *,
    every: int = 1,
    stagger: bool = False,
    stats: bool = False,
    keep_params: bool = False,
    layout: Layout | None = None,
    mesh: AnyMesh | None = None,
    strict: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """An Optax transformation after which the parameters are in their sets.

    Put it last in a chain. It replaces each update `u` of a parameter `p` by ``P(p + u) - p``,
    where `P` is the projection that `rules` assign to `p`. Updates of parameters without a
    constraint pass through.

    Start from `constrain(params, rules)`. If weights start very far outside, by a factor of 1e7 in
    float32, the update is lost in rounding.

    Cost:
        That of the sets: one pass over a leaf for an elementwise set, which fuses with the
        optimizer, and two for a norm. A norm reads `p` once more than `constrain` after
        `optax.apply_updates` does, since an update has to be a difference. The state is one
        integer, and what constraints remember.

    Args:
        rules: Which leaf is under which constraint: a constraint for every floating-point
            parameter, or a mapping (or pairs) from pattern to constraint or None. The first
            pattern that matches a leaf wins.
        every: Project only on every so many steps. Updates between them pass through.
        stagger: Whether not all leaves are projected on the same of these steps, but each step
            projects some, of about equal work, so that steps take equal time. Each leaf is still
            projected once in `every` steps.
        stats: Whether to measure how hard each constraint binds, for `stats(state)`. That is one
            more pass over each constrained leaf. Under sets that are neither norms nor elementwise,
            the weights from before the projection are kept until after it.
        keep_params: Whether the state has a copy of the constrained leaves, for loops that call
            ``tx.update(grads, state)`` without `params`. It is exact as long as nothing else
            changes them.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf. With it,
            `axis="fan_in"` is exact for every layer.
        mesh: Over whose devices matrices are divided: of those of one shape under equal
            constraints, each device projects some. Without it that is the mesh of `jax.set_mesh`,
            if there is one. Norms and entries need no mesh: they follow their leaf.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.

    Returns:
        The transformation. Its `update` needs `params`, except with ``keep_params=True``.

    Raises:
        TypeError: If `rules`, `every` or `mesh` is of the wrong kind.
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
    check_mesh("project", mesh)
    bind = Binder(rules, layout=layout, strict=strict)

    def init(params: Any) -> ProjectState:
        memory = _stats.start(bind, params) if stats else bind.start(params)
        warn_of_lost_steps(bind(params), every)
        return ProjectState(jnp.zeros((), jnp.int32), memory)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, ProjectState]:
        if params is None:
            raise ValueError(
                "project needs the parameters; write tx.update(grads, state, params), or where a "
                "loop of others does not pass them, project(rules, keep_params=True)."
            )
        if isinstance(state, Mapping):  # restored without its type
            state = ProjectState(**state)
        bound = bind(params)
        turns = bound.turns(every) if stagger else [bound]
        # Their other branch has updates as they came in, and both must have one dtype.
        keep_dtype = called_from_optax(*_CONDITIONS)

        def projected(
            bound: Bindings, updates: Any, memory: dict[str, Any], shown: dict[str, Any]
        ) -> Any:
            order, measured = InTurn(bound.largest if not stats else 0), []

            def move(
                constraint: Constraint, p: Any, own: Any, u: Any, done: Any = None
            ) -> tuple[Any, Any]:
                if stats or constraint.unitwise:
                    u = order.wait(u)
                prepared, known = None, None
                if done is not None:
                    new, kept = difference(done[0], p, u), done[1]
                elif not stats:
                    new, kept, prepared = called(_updated, constraint, p, u, own)
                elif constraint.elementwise:
                    total = jax.tree.map(moved, p, u)
                    known = _stats.of_entries(constraint, p, u, total, own)
                    before = jnp.stack([known.update, known.correction])
                    order.end(before)
                    total = jax.tree.map(lambda x: in_turn(x, before), total)
                    new, kept = constraint.lead(p, u, total, own)
                else:
                    prepared = called("prepare", constraint, p, u, own)
                    if known := _stats.of_update(constraint, p, u, own, prepared):
                        before = jnp.stack([known.update, known.correction])
                        prepared = jax.tree.map(lambda x: in_turn(x, before), prepared)
                    new, kept = called("update", constraint, p, u, own, prepared)
                order.end(prepared)
                if keep_dtype:
                    new = _narrowed(constraint, p, new, u, own)
                if stats:
                    if known is None:
                        without, with_it = (jax.tree.map(moved, p, x) for x in (u, new))
                        known = _stats.of_step(constraint, u, without, with_it)
                    measured.append(known)
                return new, kept

            now: Any = {"step": state.updates_seen, "extra": extra}
            new, memory = bound.map(
                move, params, memory, updates=updates, mesh=mesh, divides=True, **now
            )
            if stats:
                shown = _stats.renewed(shown, bound, params, updates, measured)
            return new, memory, shown

        def passed(
            bound: Bindings, updates: Any, memory: dict[str, Any], shown: dict[str, Any]
        ) -> Any:
            # In the dtypes that a projection would give.
            like, *_ = jax.eval_shape(functools.partial(projected, bound), updates, memory, shown)
            return jax.tree.map(lambda u, t: u.astype(t.dtype), updates, like), memory, shown

        old, _ = parted(state.memory)
        kept, shown = bound.recall(old), _stats.recall(bound, state.memory) if stats else {}
        treedef = jax.tree.structure(params)
        new = treedef.flatten_up_to(updates)
        for turn, part in enumerate(turns):
            due = True if every == 1 else state.updates_seen % every == (turn - 1) % every
            # Only what may change: a condition copies what passes through it.
            own = part.constrained
            places = {place for leaf in own.values() for place in leaf.places}
            came = [u if i in places else optax.MaskedNode() for i, u in enumerate(new)]
            known = ({k: x for k, x in tree.items() if k in own} for tree in (kept, shown))
            given = treedef.unflatten(came), *known
            if isinstance(due, Tracer):
                branches = (functools.partial(branch, part) for branch in (projected, passed))
                after, *known = jax.lax.cond(due, *branches, *given)
            else:  # a condition would be compiled in each step
                after, *known = (projected if due else passed)(part, *given)
            after = treedef.flatten_up_to(after)
            new = [after[i] if i in places else u for i, u in enumerate(new)]
            kept, shown = kept | known[0], shown | known[1]
        memory = _stats.kept(state.memory, kept, shown) if stats else like_before(old, kept)
        seen = jnp.asarray(optax.safe_increment(state.updates_seen))
        return treedef.unflatten(new), state._replace(updates_seen=seen, memory=memory)

    tx = optax.GradientTransformationExtraArgs(init, update)
    return with_kept_params(tx, bind) if keep_params else tx


def _updated(constraint: Constraint, params: Any, updates: Any, memory: Any) -> tuple[Any, ...]:
    """The update of a leaf, what to remember, and what it had to know of whole units."""
    prepared = constraint.prepare(params, updates, memory)
    return *constraint.update(params, updates, memory, prepared), prepared


def _narrowed(constraint: Constraint, params: Any, moved: Any, updates: Any, memory: Any) -> Any:
    """Updates in the dtypes that they came in, after which entries of entrywise sets hold."""
    narrow = jax.tree.map(lambda m, u: m.astype(u.dtype), moved, updates)
    same = jax.tree.map(lambda m, u: m.dtype == u.dtype, moved, updates)
    if all(jax.tree.leaves(same)):
        return moved
    return constraint.keep_inside(params, narrow, memory)


# Of Optax, what chooses between the updates of a transformation and others.
_CONDITIONS = ("apply_if_finite", "conditionally_mask", "conditionally_transform")


def _check_every(every: int) -> int:
    try:
        every = as_int(every)
    except TypeError:
        raise TypeError(f"every={every!r} is not an int; write a number of steps.") from None
    if every < 1:
        raise ValueError(f"every={every} is not allowed; write 1 to project on every step.")
    return every
