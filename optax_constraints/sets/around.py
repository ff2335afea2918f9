"""Sets that are moved: what holds for the difference from other weights."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_constraints import _numerics
from optax_constraints._args import Arg
from optax_constraints._axes import LeafLayout
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, nudged, own_arrays, tangent_at
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import unread
from optax_constraints._numerics import stored
from optax_constraints._text import shown
from optax_constraints.sets._common import check_floating
from optax_constraints.sets.combinators import Single
from optax_constraints.sets.elementwise import as_array, beside, check_broadcasts, is_concrete


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Around(Single):
    """The difference from a center lies in the set of another constraint: ``{w : w - c in S}``.

    For fine-tuning that stays near pretrained weights: ``around(max_norm(0.1))`` for a distance,
    ``around(box(-0.01, 0.01))`` entry by entry, ``around(low_rank(8))`` for what a LoRA can add,
    ``around(top_k(1000))`` for few entries that change. Convex, smooth or elementwise where the
    constraint inside is; the projection is ``c + P(w - c)``.

    With `"init"` the center is the weights when `project` is initialised, which it keeps in its
    state: a copy of the leaf, sharded like it. Without that state, as in `constrain(params,
    rules)`, weights count as those at init. What the constraint inside remembers is that of the
    weights, too, not of the difference: ``around(max_norm("0.1x init"))`` lets each unit go a
    tenth of its norm away.

    Weights come back bit for bit where the projection leaves their difference as it is. Others
    are rounded to their dtype, by up to half an ulp of the weight, which next to a narrow set is
    much: in bfloat16 a weight of 1 moves in steps of 0.004 to 0.008. If the constraint inside is
    elementwise, rounding goes to the inside, so that no entry is ever outside, as far as there
    are numbers inside. Other sets hold up to that rounding. For narrow sets keep weights in
    float32.

    A penalty on the same distance is L2-SP of X. Li, Y. Grandvalet and F. Davoine, "Explicit
    inductive bias for transfer learning with convolutional networks", ICML 2018; H. Gouk,
    T. Hospedales and M. Pontil, "Distance-based regularisation of deep networks for
    fine-tuning", ICLR 2021, project onto balls around pretrained weights.

    Cost:
        That of the constraint inside, and a pass over the center. An elementwise set is asked seven
        times, so that entries are rounded to the inside: some ten times the arithmetic of `Box`.

    Args:
        constraint: The constraint of the difference: anything that `get` accepts. Most allow a
            difference of 0; with others the first projection leaves the center.
        center: `"init"`, an array that broadcasts to the weights, or `arg`.

    Raises:
        TypeError: If `center` is none of these.
        ValueError: If `constraint` is none, or the array is not finite; at bind, if it does not
            broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.around(oc.max_norm(1.0), center=[1.0, 1.0])(jnp.array([4.0, 5.0]))
        Array([1.6, 1.8], dtype=float32)
    """

    constraint: Any
    center: Any = "init"

    def __post_init__(self):
        super().__post_init__()
        own_arrays(self)
        if self._starts_at_init or isinstance(self.center, Arg):
            return
        if isinstance(self.center, str):
            raise TypeError(
                f"Around: center={shown(self.center)} is not an array of real numbers; write one, "
                "or 'init' for the weights at init."
            )
        array = as_array("Around", "center", self.center)
        if is_concrete(array) and not np.all(np.isfinite(np.asarray(array).astype(np.float64))):
            raise ValueError(
                f"Around: center={shown(self.center)} is not finite; write finite numbers."
            )
        object.__setattr__(self, "center", array)

    @property
    def _starts_at_init(self) -> bool:
        return isinstance(self.center, str) and self.center == "init"

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the center is the weights at init, or the constraint inside remembers."""
        return self._starts_at_init or self.constraint.remembers

    @property
    def starts_anew(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the center is known, and the constraint inside does."""
        return not self._starts_at_init and self.constraint.starts_anew

    def remember(self, w: jax.Array) -> Any:
        """The weights, if they are the center, and what the constraint inside remembers."""
        if not self.remembers:
            return ()
        return w if self._starts_at_init else (), self.constraint.remember(w)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; differences are taken in float32 or wider."""
        return self.advance(jnp.asarray(w), ())[0]

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array around what it was at init, if that is remembered."""
        center, own = self._known(w, memory)
        away = w.astype(center.dtype) - center
        near, new = self.constraint.advance(away, own)
        value = _rounded(self, new, *jax.lax.stop_gradient((w, away, near, center)))
        kept = (memory[0], new) if self.remembers and memory else memory
        return _with_derivative(value, center + near), kept

    def _known(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """The center in the dtype of differences, and what the constraint inside remembers."""
        check_floating("Around", w)
        if isinstance(self.center, Arg):
            raise unread(self.center)
        if self.remembers and not memory:  # by hand
            memory = jax.lax.stop_gradient(self.remember(w))
        first: Any
        first, own = memory if self.remembers else ((), ())
        if not self._starts_at_init:
            check_broadcasts("Around", "center", self.center, None, w.shape)
            first = beside(jnp.asarray(self.center), w)
        return first.astype(_numerics.compute_dtype(w.dtype)), own

    def _inwards(self, w: jax.Array, center: jax.Array, own: Any) -> jax.Array:
        """Of an elementwise set, the way that each weight has to go; 0 inside."""
        ways = (self.constraint.advance(d, own)[0] - d for d in _between(w, center))
        first, second = ways
        return jnp.where(first != 0, first, second)

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The tangent part of the set inside, at the difference.

        Of an elementwise set, an entry is at a bound if the next number is outside. For others,
        what is at a bound is told with a slack of 2 machine epsilons of the largest weight.
        """
        w, v = jnp.asarray(w), jnp.asarray(v)
        center, own = self._known(w, memory)
        wide = v.astype(_numerics.compute_dtype(w.dtype, v.dtype))
        away = self._at_bounds(w, center, own).astype(wide.dtype)
        if not self.elementwise:
            largest = jnp.max(jnp.abs(w), initial=0).astype(wide.dtype)
            slack = jnp.maximum(slack, 2 * _numerics.eps(w.dtype) * largest)
        return tangent_at(self.constraint, away, wide, own, slack).astype(v.dtype)

    def _at_bounds(self, w: jax.Array, center: jax.Array, own: Any) -> jax.Array:
        """The difference, at the bound of an elementwise set where weights cannot get nearer."""
        away = _between(w, center)[0]
        if not self.elementwise:
            return away
        for sign in (1, -1):
            beyond = _moved_by_one(w, jnp.full_like(w, sign))
            bound = self.constraint.advance(_between(beyond, center)[0], own)[0]
            away = jnp.where(sign * self._inwards(beyond, center, own) < 0, bound, away)
        return away

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """The constraint with the constraint inside settled, if the center broadcasts."""
        if not isinstance(self.center, (str, Arg)):
            check_broadcasts("Around", "center", self.center, path, shape)
        return self._replace(constraint=self.constraint.settle(path, shape, layout))

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units of the difference are at a bound; None if that is relative to init."""
        if self.remembers:
            return None
        center, own = self._known(w, ())
        away = self._at_bounds(w, center, own)
        return self.constraint.on_bound(away if self.elementwise else away.astype(w.dtype))

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        return f"{{ w : w - {'w₀' if self._starts_at_init else '{center}'} ∈ {{constraint}} }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Those of the difference."""
        center, own = self._known(w, memory)
        gauge = self.constraint.gauge((w - center).astype(w.dtype), own)
        return dataclasses.replace(gauge, name=f"{gauge.name} of the difference")


around = Around


# Compiled by itself, so that calls outside jit find the program they made before.
@functools.partial(jax.jit, inline=True)
def _rounded(
    this: Around, own: Any, w: jax.Array, away: jax.Array, near: jax.Array, center: jax.Array
) -> jax.Array:
    """The weights ``center + near``; of an elementwise set those that are in it."""
    there, allowed = (center + near).astype(w.dtype), near == away
    if not this.elementwise:
        return jnp.where(allowed, w, there)
    allowed &= this._inwards(w, center, own) == 0
    value = jnp.where(allowed, w, there)
    nearer = _moved_by_one(value, this._inwards(value, center, own))
    return jnp.where(this._inwards(nearer, center, own) == 0, nearer, value)


def _moved_by_one(w: jax.Array, way: jax.Array) -> jax.Array:
    """The next numbers on their way; where that is 0, the same."""
    return nudged(w, jnp.zeros_like(way), way)


def _between(w: jax.Array, center: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded difference, and its neighbour beyond the exact one; itself where it is exact."""
    w = stored(w).astype(center.dtype)
    rounded = w - center
    # What rounding took away, by D. E. Knuth's sum of two numbers.
    back = rounded - w
    rest = (w - (rounded - back)) - (center + back)
    return rounded, _moved_by_one(rounded, rest)


@jax.custom_jvp
def _with_derivative(value: jax.Array, exact: jax.Array) -> jax.Array:
    """`value`, with the derivative of what it was rounded from."""
    del exact
    return value


@_with_derivative.defjvp
def _with_derivative_jvp(primals: Any, tangents: Any) -> Any:
    return _with_derivative(*primals), tangents[1].astype(primals[0].dtype)
