"""Sets in which each entry is bounded by itself."""

import dataclasses

import jax
import jax.numpy as jnp

from optax_constraints._constraint import Constraint


@dataclasses.dataclass(frozen=True, eq=False)
class NonNeg(Constraint):
    """No weight is negative: ``{w : w >= 0}``.

    Convex. The projection ``max(w, 0)`` is exact in every dtype, and NaN stays NaN. One
    pass over the weights, which fuses with the optimizer's own. Integers are fine.

    The set is that of `keras.constraints.NonNeg`.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.non_neg()(jnp.array([-1.0, 0.5]))
        Array([0. , 0.5], dtype=float32)
    """

    elementwise = True

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array of any shape."""
        w = jnp.asarray(w)
        return jnp.maximum(w, jnp.zeros((), w.dtype))

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The entries that are zero."""
        return w <= 0
