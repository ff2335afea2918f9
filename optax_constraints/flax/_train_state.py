"""Flax's `TrainState` with constraints."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from optax_constraints import _stats
from optax_constraints._axes import LeafLayout
from optax_constraints._constrain import constrain_bound
from optax_constraints._divided import AnyMesh, check_mesh
from optax_constraints._lost_steps import warn_of_lost_steps
from optax_constraints._patterns import Rules
from optax_constraints._walk import parted
from optax_constraints.flax._static import HeldLayout, HeldRules, binder


class TrainState(train_state.TrainState):
    """Flax's `TrainState`, whose parameters are in their sets after each step.

    `apply_gradients` projects what `optax.apply_updates` returns, so the parameters are the
    projections to the bit; `project` in the optimizer has to go through a difference. Use one
    of the two. Schedules in the rules see `step` as it was before the step.

    Cost: one pass over each constrained leaf for an elementwise set, two for a norm. With
    `create(..., stats=True)`, and one more pass, `optax_constraints.stats(state)` has how hard
    each constraint binds.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> from optax_constraints.flax import linen as ocl
        >>> model, x = ocl.Dense(1, kernel_constraint=oc.non_neg()), jnp.ones((2, 2))
        >>> state = ocl.TrainState.create(
        ...     apply_fn=model.apply,
        ...     params=model.init(jax.random.key(0), x)["params"],
        ...     tx=optax.sgd(9.0),
        ...     rules=ocl.declared(model, x),
        ... )
        >>> grads = jax.grad(lambda p: state.apply_fn({"params": p}, x).sum())(state.params)
        >>> state.apply_gradients(grads=grads).params["kernel"]
        Array([[0.],
               [0.]], dtype=float32)
    """

    has_memory_of_constraints = True
    rules: Any = struct.field(pytree_node=False, kw_only=True)
    """As for `project`, in a box that hashes, and is equal to that of equal rules."""
    layout: Any = struct.field(pytree_node=False, kw_only=True, default=None)
    """As for `project`, in a box."""
    mesh: Any = struct.field(pytree_node=False, kw_only=True, default=None)
    """As for `project`."""
    memory: Any = struct.field(kw_only=True, default=())
    """By path, what constraints remember of their leaves, such as norms at init; with
    ``stats=True`` that beside the statistics."""

    def __post_init__(self) -> None:
        for name, box in (("rules", HeldRules), ("layout", HeldLayout)):
            value = getattr(self, name)
            if not isinstance(value, box):
                object.__setattr__(self, name, box(value))

    def apply_gradients(
        self, *, grads: Any, extra: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> "TrainState":
        """Updates the parameters, then projects them.

        Args:
            grads: Gradients, a tree like `params`.
            extra: What `arg` in the rules reads, by name.
            **kwargs: Other fields to replace.

        Returns:
            The state after the step.
        """
        new = super().apply_gradients(grads=grads, **kwargs)
        inner, rebuild = _parameters(new.params)
        bind = binder(self.rules, self.layout)
        before, _ = _parameters(self.params)
        params, memory = constrain_bound(
            inner, bind, self.memory, step=self.step, extra=extra, before=before, mesh=self.mesh
        )
        return new.replace(params=rebuild(params), memory=memory)

    @classmethod
    def create(
        cls,
        *,
        apply_fn: Callable[..., Any],
        params: Any,
        tx: optax.GradientTransformation,
        rules: Rules = None,
        layout: Mapping[str, LeafLayout] | None = None,
        mesh: AnyMesh | None = None,
        stats: bool = False,
        **kwargs: Any,
    ) -> "TrainState":
        """Makes a state at step 0. The parameters stay as they are until the first step.

        Args:
            apply_fn: Usually `model.apply`.
            params: `variables["params"]`.
            tx: The optimizer.
            rules: As for `project`; usually `declared(model, x)`.
            layout: As for `project`; usually `layout(model, x)`.
            mesh: As for `project`.
            stats: As for `project`; an update is here what the weights moved by.
            **kwargs: Fields of a subclass.

        Returns:
            The state.

        Raises:
            TypeError: If a rule names a leaf that is not floating-point.
            ValueError: If there are no rules, a rule matches no leaf, or a leaf does not have
                the axis asked for.
        """
        if rules is None:
            raise ValueError(
                "TrainState.create needs the constraints; write rules=declared(model, x), rules "
                'by path such as rules={"kernel": max_norm(2.0)}, or rules={} for none.'
            )
        held = HeldRules(rules), HeldLayout(layout)
        bind = binder(*held)
        inner, _ = _parameters(params)
        memory = _stats.start(bind, inner) if stats else bind.start(inner)
        warn_of_lost_steps(bind(inner))
        if not any(bound.needs_args for bound in bind(inner)):
            remembered, _ = parted(memory)
            jax.eval_shape(
                lambda p: constrain_bound(p, bind, remembered, step=0, extra=None), inner
            )
        return super().create(
            apply_fn=apply_fn,
            params=params,
            tx=tx,
            rules=held[0],
            layout=held[1],
            mesh=check_mesh("TrainState.create", mesh),
            memory=memory,
            **kwargs,
        )


def _parameters(params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The parameters alone, and the way back: Flax keeps scales of float8 beside them."""
    if OVERWRITE_WITH_GRADIENT in params:
        return params["params"], lambda inner: {**params, "params": inner}
    return params, lambda inner: inner
