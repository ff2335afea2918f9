"""What Flax keeps in static attributes: it has to hash, to compare by value, to outlive a trace."""

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
from jax.core import Tracer

from optax_constraints._axes import Layout
from optax_constraints._config import as_constraint
from optax_constraints._constraint import Constraint
from optax_constraints._patterns import Rules, parse
from optax_constraints._rules import Binder


def layer_constraint(where: str, value: Any) -> Constraint | None:
    """The constraint that a keyword of a layer was given.

    Args:
        where: The layer with its keyword, for errors.
        value: What was given.

    Returns:
        The constraint, or None for None.

    Raises:
        TypeError: If JAX is tracing a number or an array in it.
        ValueError: If it is no constraint.
    """
    try:
        constraint = as_constraint(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error
    if _is_traced(constraint):
        raise TypeError(
            f"{where}: this constraint holds a number or an array that JAX is tracing, and a "
            "layer keeps its constraints after the trace has ended. Make it with NumPy, as in "
            "np.ones(3), or outside of the function that jax.jit, nnx.jit or jax.vmap transforms."
        )
    return constraint


def _is_traced(x: Any) -> bool:
    """Whether a constraint, or what it is made of, holds a tracer."""
    if isinstance(x, Tracer):
        return True
    if isinstance(x, Mapping):
        return any(map(_is_traced, x.values()))
    if isinstance(x, (tuple, list)):
        return any(map(_is_traced, x))
    if isinstance(x, functools.partial):
        return _is_traced((x.func, x.args, x.keywords))
    if inspect.isfunction(x):
        return any(map(_holds_tracer, x.__closure__ or ()))
    return isinstance(x, Constraint) and _is_traced(vars(x))


def _holds_tracer(cell: types.CellType) -> bool:
    try:
        # Not what is in there: a function may refer to itself.
        return isinstance(cell.cell_contents, Tracer)
    except ValueError:  # There is nothing in it yet.
        return False


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays of a tree, and the way back: only they are traced, `train=True` stays."""
    leaves, treedef = jax.tree.flatten(tree)
    is_array = [hasattr(leaf, "shape") and hasattr(leaf, "dtype") for leaf in leaves]

    def rebuild(arrays: list[Any]) -> Any:
        rest = iter(arrays)
        return treedef.unflatten(
            next(rest) if array else leaf for leaf, array in zip(leaves, is_array, strict=True)
        )

    return [leaf for leaf, array in zip(leaves, is_array, strict=True) if array], rebuild


class _Held:
    """A value that is equal to another of the same key.

    JAX and Flax compile anew for each static value that they have not seen, and refuse to
    combine trees in which they differ.
    """

    def __init__(self, value: Any, key: Hashable):
        self.value = value
        try:
            self._hash = hash(key)
        except TypeError:  # A constraint or a pattern that does not hash: equal to itself alone.
            key = object()
            self._hash = hash(key)
        self._key = key

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._key == vars(other)["_key"])

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.value)

    def __deepcopy__(self, memo: Any) -> "_Held":
        return self

    def __reduce__(self) -> Any:
        # Hashes of strings are others in another process.
        return type(self), (self.value,)


class HeldRules(_Held):
    """Rules; their order counts."""

    def __init__(self, rules: Rules):
        super().__init__(rules, tuple(parse(rules)))


class HeldLayout(_Held):
    """What a model says of its parameters, or None."""

    def __init__(self, layout: Layout | None):
        key = None if layout is None else tuple(sorted(layout.items(), key=lambda item: item[0]))
        super().__init__(layout, key)


@functools.lru_cache(maxsize=64)
def binder(rules: HeldRules, layout: HeldLayout) -> Binder:
    """Rules with a layout, as one binder for all that are equal: it remembers the trees it saw."""
    return Binder(rules.value, layout=layout.value)
