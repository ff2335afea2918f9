"""Copies of the parameters in the state, for loops that update without passing them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_constraints._constraint import moved
from optax_constraints._rules import Binder
from optax_constraints._walk import is_absent, states_in


class KeptParamsState(NamedTuple):
    """State of `project(rules, keep_params=True)`: an ordinary pytree."""

    params: Any
    """The parameters as the updates left them; `optax.MaskedNode()` in the place of free ones."""
    inner: Any
    """The state without `keep_params`."""


def with_kept_params(
    tx: optax.GradientTransformationExtraArgs, bind: Binder | None = None
) -> optax.GradientTransformationExtraArgs:
    """A transformation that knows the parameters by itself.

    Args:
        tx: Needs the parameters, and leads to the updates that are applied.
        bind: Says which leaves are constrained; None to keep all of them.

    Returns:
        The transformation, whose `update` needs no `params`, but takes them if there are any.
    """

    def init(params: Any) -> KeptParamsState:
        leaves, treedef = jax.tree.flatten(params)
        wanted = range(len(leaves))
        if bind is not None:
            bound = bind(params)
            wanted = {p for own in bound if own.constraint is not None for p in own.places}
        # Copies, lest the state and the parameters be one buffer, and both donated.
        kept = [jnp.array(w) if i in wanted else optax.MaskedNode() for i, w in enumerate(leaves)]
        return KeptParamsState(treedef.unflatten(kept), tx.init(params))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, KeptParamsState]:
        if isinstance(state, Mapping):  # restored without its type
            state = KeptParamsState(**state)
        kept, treedef = jax.tree.flatten(state.params, is_leaf=is_absent)
        if params is not None:
            own = treedef.flatten_up_to(params)
        else:  # of free leaves the shape will do
            came = treedef.flatten_up_to(updates)
            own = [u if is_absent(w) else w for w, u in zip(kept, came, strict=True)]
        new, inner = tx.update(updates, state.inner, treedef.unflatten(own), **extra)
        seen = jnp.asarray(states_in(inner)[0].updates_seen)
        changes, after = treedef.flatten_up_to(new), list(kept)
        for i, (w, p, u) in enumerate(zip(kept, own, changes, strict=True)):
            if not is_absent(w) and not is_absent(u):
                p = jnp.asarray(p)
                changes[i] = _rounded(jnp.asarray(u), seen)
                after[i] = moved(p, changes[i])
        new = treedef.unflatten(changes)
        return new, KeptParamsState(treedef.unflatten(after), inner)

    return optax.GradientTransformationExtraArgs(init, update)


@jax.custom_jvp
def _rounded(update: jax.Array, seen: jax.Array) -> jax.Array:
    """The update to the bit, but no product that a compiler could join with a sum.

    Such as that with a learning rate: here, where the parameters are followed, and in the
    caller's program it would be rounded before it is added, or not, as it happens.
    """
    # A number of updates is never negative, which compilers do not know.
    zero = jnp.minimum(seen, 0)
    bits = jax.lax.bitcast_convert_type(update, f"uint{8 * update.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(bits + zero.astype(bits.dtype), update.dtype)


@_rounded.defjvp
def _rounded_jvp(primals: Any, tangents: Any) -> Any:
    return _rounded(*primals), tangents[0]
