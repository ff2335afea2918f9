"""Adam and projection in one step, which gives parameters in the place of updates."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from optax_constraints._axes import Layout
from optax_constraints._constrain import advance
from optax_constraints._divided import AnyMesh, check_mesh
from optax_constraints._patterns import Rules
from optax_constraints._project import project
from optax_constraints._rules import Binder
from optax_constraints._sharding import explicit_axes
from optax_constraints._walk import Bindings, Visit, is_absent, like_before
from optax_constraints.sets.norm import (
    FixedNorm,
    FixedRMS,
    MaxNorm,
    MaxRMS,
    MinMaxNorm,
    UnitNorm,
)


class FusedOptimizer(NamedTuple):
    """What `fused_adam` returns."""

    init: Callable[..., Any]
    """``init(params)``: the state."""
    step: Callable[..., tuple[Any, Any]]
    """``step(params, state, grads, **extra)``: the new parameters and state."""


def fused_adam(
    learning_rate: optax.ScalarOrSchedule,
    rules: Rules,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
    layout: Layout | None = None,
    mesh: AnyMesh | None = None,
    interpret: bool = False,
) -> FusedOptimizer:
    """Adam, or AdamW, and projection in one step that gives parameters in the place of updates.

    Updates, and a chain that has to make them, are what a step on a GPU could do without. Here the
    parameters are the projections, to the bit, as after `optax.apply_updates` and `constrain`.
    On CUDA GPUs a kernel takes a step over a leaf in one pass if a norm bounds its rows: the
    units run along the last axis, or axes, and have at most 16,384 entries. It moves 28 bytes a
    parameter in float32, as Adam alone does, where `constrain` after the step moves 36 and a chain
    40. All other leaves, and all leaves on other platforms, take Adam of Optax and `constrain`.

    Donate the state and the parameters: then they are written in place, and otherwise copied
    first. On a mesh with Auto axes each device takes its rows. On one with Explicit axes there is
    no kernel outside of `jax.shard_map`. There are no derivatives through a step.

    Args:
        learning_rate: A number or a schedule.
        rules: As for `project`.
        b1: Decay of the first moments.
        b2: Decay of the second moments.
        eps: What is added to the root of a second moment.
        weight_decay: As for `optax.adamw`; it is multiplied by the learning rate.
        layout: As for `project`.
        mesh: As for `project`.
        interpret: Whether to run the kernel on any platform, slowly, in Pallas' interpreter: for
            tests.

    Returns:
        Two functions, ``init(params)`` and ``step(params, state, grads, **extra)``. The state is
        that of ``optax.chain(optax.adam(...), project(rules))``, with `optax.adamw` if there is
        weight decay, so that either can go on from a checkpoint of the other.

    Raises:
        TypeError: If `rules` or `mesh` is of the wrong kind.
        ValueError: If a rule's value is no constraint; at init, if a rule matches no leaf or a
            leaf does not have the axis asked for.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> from optax_constraints import recipes
        >>> adam = recipes.fused_adam(0.1, oc.unit_norm(axis=-1))
        >>> w = jnp.array([[0.6, 0.8]])
        >>> step = jax.jit(adam.step, donate_argnums=(0, 1))
        >>> w, state = step(w, adam.init(w), jnp.array([[1.0, 0.0]]))
        >>> print(f"{jnp.linalg.norm(w):.4f}")
        1.0000
    """
    check_mesh("fused_adam", mesh)
    adam: Any = optax.adam(learning_rate, b1, b2, eps)
    if weight_decay:
        adam = optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay)
    bind = Binder(rules, layout=layout)

    def step(params: Any, state: Any, grads: Any, **extra: Any) -> tuple[Any, Any]:
        bound, treedef = bind(params), jax.tree.structure(params)

        def at_places(tree: Any, values: Mapping[int, Any]) -> Any:
            leaves = treedef.flatten_up_to(tree)
            return treedef.unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)])

        def in_rows(params: Any, state: Any, grads: Any) -> dict[int, tuple[Visit, Any]]:
            (moments, *_), last = state
            trees = map(treedef.flatten_up_to, (params, grads, moments.mu, moments.nu))
            arrays = list(zip(*trees, strict=True))
            now: Any = {"step": last.updates_seen, "extra": extra}
            visits = {
                v.bound.places[0]: v for v in bound.visits(params, bound.recall(last.memory), **now)
            }
            return {i: (v, arrays[i]) for i, v in visits.items() if _fits(v, *arrays[i])}

        def apart(params: Any, state: Any, grads: Any, done: Mapping[int, Any] = _NOTHING) -> Any:
            """Adam, then `constrain`, for all leaves but those that are done."""
            (moments, *rest), last = state
            absent = dict.fromkeys(done, optax.MaskedNode())
            weights = at_places(params, absent)
            mu, nu = (at_places(x, absent) for x in (moments.mu, moments.nu))
            own = moments._replace(mu=mu, nu=nu), *rest
            updates, own = adam.update(at_places(grads, absent), own, weights)
            moments, *rest = own
            weights = optax.apply_updates(weights, updates)
            params, mu, nu = (
                at_places(tree, {place: own[i] for place, own in done.items()})
                for i, tree in enumerate((weights, moments.mu, moments.nu))
            )
            free = [
                b if {*done}.isdisjoint(b.places) else dataclasses.replace(b, constraint=None)
                for b in bound
            ]
            memory, seen = bound.recall(last.memory), last.updates_seen
            now: Any = {"step": seen, "extra": extra, "mesh": mesh, "divides": True}
            params, kept = Bindings(free).map(advance, params, memory, **now)
            memory = like_before(last.memory, memory | kept)
            last = last._replace(updates_seen=optax.safe_increment(seen), memory=memory)
            return params, ((moments._replace(mu=mu, nu=nu), *rest), last)

        def together(params: Any, state: Any, grads: Any) -> Any:
            """The kernel for what it can take, then the rest."""
            moments, *rest = state[0]
            rate = learning_rate(rest[-1].count) if callable(learning_rate) else learning_rate
            count = optax.safe_increment(moments.count)
            corrections = 1 - b1**count, 1 - b2**count
            numbers = rate, (b1, b2), (1 - b1, 1 - b2), corrections, eps, weight_decay
            found = in_rows(params, state, grads).items()
            done = {place: _stepped(*own, numbers, interpret) for place, own in found}
            return apart(params, state, grads, done)

        if not in_rows(params, state, grads):
            return apart(params, state, grads)
        if interpret:
            return together(params, state, grads)
        return lax.platform_dependent(params, state, grads, cuda=together, default=apart)

    return FusedOptimizer(optax.chain(adam, project(rules, layout=layout)).init, step)


_NOTHING: Mapping[int, Any] = MappingProxyType({})
_NORMS = (MaxNorm, MinMaxNorm, UnitNorm, FixedNorm, MaxRMS, FixedRMS)
_LONGEST_ROW = 16384  # 32 entries of an array for each of 512 threads


def _fits(visit: Visit, p: Any, g: Any, m: Any, v: Any) -> bool:
    """Whether the kernel can take a step over a leaf."""
    constraint: Any = visit.constraint
    if type(constraint) not in _NORMS or constraint.axis_name is not None or is_absent(g):
        return False
    rank, axes = jnp.ndim(p), constraint.axis
    length = math.prod(p.shape[a] for a in axes)
    dtypes = {jnp.result_type(x) for x in (p, m, v)}
    return (
        axes == tuple(range(rank - len(axes), rank))
        and 1 < length <= _LONGEST_ROW
        and 0 < p.size < 2**31
        and len(dtypes) == 1
        and dtypes < {jnp.dtype("float32"), jnp.dtype("bfloat16")}
        and jnp.promote_types(jnp.result_type(g), *dtypes) in dtypes
        and not explicit_axes(p)
    )


def _stepped(visit: Visit, arrays: Any, numbers: Any, interpret: bool) -> list[jax.Array]:
    """The new weights and moments of a leaf, from the kernel."""
    from optax_constraints._adam_rows import Numbers, adam_rows

    constraint: Any = visit.constraint
    shape = arrays[0].shape
    length = math.prod(shape[a] for a in constraint.axis)
    rows = [jnp.reshape(x, (-1, length)) for x in arrays]
    at_init = jnp.reshape(visit.memory, (-1, 1)) if constraint.remembers else None
    new = adam_rows(constraint, Numbers(*numbers), *rows, at_init, interpret=interpret)
    return [x.reshape(shape) for x in new]
