"""A constraint for one part of an array."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from optax_constraints._axes import (
    LeafLayout,
    drop_axes,
)
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, tangent_at
from optax_constraints._gauge import Gauge
from optax_constraints._sharding import automatic, explicit_axes
from optax_constraints._text import as_int, describe, shown
from optax_constraints.sets.combinators import Single


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Part(Single):
    """One part of an array lies in the set of another constraint: ``{w : w[index] in S}``.

    For parameters that hold several things in one array: the gates of a recurrent kernel, a fused
    query-key-value projection, the first columns that see certain inputs. The part is what
    ``w[index]`` is in NumPy, and axes of the constraint inside are those of the part.

    Cost:
        That of the constraint inside on the part, and a copy of the leaf.

    Args:
        constraint: Anything that `get` accepts.
        index: The part: integers, slices and `...`, as NumPy's `np.s_[:, :3]` makes them, or
            as text, `":, :3"`.

    Raises:
        TypeError: If `index` is something else, such as an array.
        ValueError: If `constraint` is none or the text is no index; at bind, if the leaf has no
            such part, or an empty one.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.part(oc.non_neg(), ":, 0")(-jnp.ones((2, 2)))
        Array([[ 0., -1.],
               [ 0., -1.]], dtype=float32)
    """

    formula = "{ w : w[{index}] ∈ {constraint} }"

    constraint: Any
    index: Any

    def __post_init__(self):
        super().__post_init__()
        # As text it hashes, and is its own JSON form.
        object.__setattr__(self, "index", _index_text(self.index))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects the part of one array."""
        w = jnp.asarray(w)
        return self._with(w, self.constraint(self._of(w)))

    def _of(self, w: jax.Array) -> jax.Array:
        """The part of one array."""
        index = self._index("", w.shape)
        if not explicit_axes(w):
            return w[index]
        # Axes that the part has whole stay as they are sharded.
        gone = _dropped_axes(index, w.ndim)
        sizes = drop_axes(w.shape, gone)
        spec = drop_axes(jax.typeof(w).sharding.spec, gone)
        part = _part_shape(w.shape, index)
        kept = (s if n == m else None for s, n, m in zip(spec, sizes, part, strict=True))
        return automatic(lambda w: w[index], w, spec=PartitionSpec(*kept))

    def _with(self, w: jax.Array, part: jax.Array) -> jax.Array:
        """One array with another part."""
        index = self._index("", w.shape)
        return automatic(lambda w, part: w.at[index].set(part), w, part)

    def remember(self, w: jax.Array) -> Any:
        """What the constraint inside remembers of the part."""
        return self.constraint.remember(self._of(w))

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects the part with the help of what is remembered of it."""
        part, memory = self.constraint.advance(self._of(w), memory)
        return self._with(w, part), memory

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The tangent part of the part; the rest is free."""
        w, v = jnp.asarray(w), jnp.asarray(v)
        part = tangent_at(self.constraint, self._of(w), self._of(v), memory, slack)
        return self._with(v, part)

    def _index(self, path: str, shape: tuple[int, ...]) -> tuple[Any, ...]:
        index = _parse_index(self.index)
        try:
            part = _part_shape(shape, index)
        except IndexError as error:
            raise ValueError(
                f"Part on {describe(path, shape)}: there is no [{self.index}]: {error}. Write an "
                "index of this shape."
            ) from None
        if 0 in part and 0 not in shape:
            raise ValueError(
                f"Part on {describe(path, shape)}: [{self.index}] is empty, so that nothing is "
                "constrained; write an index of this shape."
            )
        return index

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """The constraint with the axes of the constraint inside settled for the part."""
        index = self._index(path, shape)
        gone = _dropped_axes(index, len(shape))
        part = _part_shape(shape, index)
        inner = self.constraint.settle(path, part, layout and layout.without(gone))
        return self._replace(constraint=inner)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units of the part lie on the boundary."""
        return self.constraint.on_bound(self._of(w))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Those of the part."""
        return self.constraint.gauge(self._of(w), memory)


part = Part


def _index_text(index: Any) -> str:
    """An index of integers, slices and `...` as text."""
    wanted = "write integers, slices and '...', such as np.s_[:, :3] or ':, :3'"
    if isinstance(index, str):
        try:
            index = _parse_index(index)
        except ValueError:
            raise ValueError(f"Part: index={shown(index)} is not an index; {wanted}.") from None
    texts = []
    for item in index if isinstance(index, (tuple, list)) else (index,):
        if item is Ellipsis:
            texts.append("...")
            continue
        try:
            if isinstance(item, slice):
                bounds = (item.start, item.stop, item.step)
                start, stop, step = (
                    "" if bound is None else str(as_int(bound)) for bound in bounds
                )
                texts.append(f"{start}:{stop}" + (f":{step}" if step else ""))
            else:
                texts.append(str(as_int(item)))
        except TypeError:
            raise TypeError(f"Part: index={shown(index)} is not an index; {wanted}.") from None
    if texts.count("...") > 1:
        raise ValueError(f"Part: index={shown(index)} has more than one '...'; {wanted}.")
    text = ", ".join(texts)
    try:
        _parse_index(text)
    except ValueError:  # an empty tuple, or numbers beyond any axis
        raise ValueError(f"Part: index={shown(index)} is not an index; {wanted}.") from None
    return text


def _parse_index(text: str) -> tuple[Any, ...]:
    items: list[Any] = []
    for item in text.strip("[]").split(","):
        item = item.strip()
        if item == "...":
            items.append(Ellipsis)
        elif re.fullmatch(r"-?\d{1,18}", item):
            items.append(int(item))
        elif re.fullmatch(r"(-?\d{1,18})?:(-?\d{1,18})?(:(-?\d{1,18})?)?", item):
            items.append(slice(*(int(bound) if bound else None for bound in item.split(":"))))
        else:
            raise ValueError
    return tuple(items)


def _part_shape(shape: tuple[int, ...], index: tuple[Any, ...]) -> tuple[int, ...]:
    return np.broadcast_to(np.zeros(()), shape)[index].shape


def _dropped_axes(index: tuple[Any, ...], rank: int) -> tuple[int, ...]:
    """The axes that integers in an index take away."""
    if Ellipsis in index:
        at = index.index(Ellipsis)
        index = (*index[:at], *[slice(None)] * (rank - len(index) + 1), *index[at + 1 :])
    return tuple(axis for axis, item in enumerate(index) if isinstance(item, int))
