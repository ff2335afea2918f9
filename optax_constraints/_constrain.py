"""The verb that projects now: `constrain`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from optax_constraints import _stats
from optax_constraints._axes import Layout
from optax_constraints._called import called
from optax_constraints._constraint import Constraint
from optax_constraints._divided import AnyMesh, check_mesh
from optax_constraints._lost_steps import warn_of_one_value
from optax_constraints._patterns import Rules
from optax_constraints._rules import Binder
from optax_constraints._trees import check_arrays
from optax_constraints._walk import like_before, memory_in, parted


def constrain(
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    mesh: AnyMesh | None = None,
    strict: bool = True,
) -> Any:
    """Projects parameters now: at init, after loading or averaging, or after each update.

    Args:
        params: Any tree of arrays. It is not changed. For a module of Equinox or Flax NNX you get
            a new module; NNX variables that it shares come back as copies. To change an NNX module
            in place, and leave shared variables shared, write
            ``nnx.update(model, constrain(nnx.state(model, nnx.Param), rules))``.
        rules: As for `project`.
        step: What schedules see; the first update is step 0.
        state: The optimizer's state, for constraints that remember weights at init. Without
            it the weights given here are those at init.
        extra: What `arg` reads, by name: the extra arguments of `tx.update`.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf.
        mesh: As for `project`.
        strict: Whether a rule that matches no leaf is an error. `False` is for trees seen
            in part.

    Returns:
        The tree with each constrained leaf inside its set. The rounding of an update, which
        `project` cannot avoid, does not come in here.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point, or there are no arrays, as
            in a Linen module.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.constrain({"bias": jnp.array([-1.0, 2.0])}, {"bias": oc.non_neg()})
        {'bias': Array([0., 2.], dtype=float32)}
    """
    bind, memory = bound_now(params, rules, state, layout, strict)
    check_mesh("constrain", mesh)
    new, _ = constrain_bound(params, bind, memory, step=step, extra=extra, mesh=mesh)
    warn_of_one_value(bind(params), params, new)
    return new


def bound_now(
    params: Any, rules: Rules, state: Any, layout: Layout | None, strict: bool
) -> tuple[Binder, Any]:
    """Rules for a verb that projects now, and what constraints remember."""
    check_arrays(params)
    bind = Binder(rules, layout=layout, strict=strict)
    return bind, bind.start(params) if state is None else memory_in(state)


def advance(constraint: Constraint, weights: Any, memory: Any, done: Any = None) -> tuple[Any, Any]:
    """What `constrain` puts in the place of weights, and what to remember."""
    return called("advance", constraint, weights, memory) if done is None else done


def constrain_bound(
    params: Any,
    bind: Binder,
    memory: Any,
    *,
    step: jax.typing.ArrayLike,
    extra: Mapping[str, Any] | None,
    before: Any = None,
    mesh: AnyMesh | None = None,
    function: Callable[..., tuple[Any, Any]] = advance,
) -> tuple[Any, Any]:
    """`constrain` with rules that may remember this tree, and with what constraints remember.

    Beside a memory that has statistics, `before` is the parameters before they moved.
    """
    bound, now = bind(params), {"step": step, "extra": extra}
    old, shown = parted(memory)
    divides = function is advance
    new, kept = bound.map(function, params, bound.recall(old), mesh=mesh, divides=divides, **now)
    if shown is None:
        return new, like_before(memory, kept)
    shown = _stats.of_weights(bound, before, params, new, memory, **now)
    return new, _stats.kept(memory, kept, shown)
