"""Arguments of update as numbers: `arg`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_constraints._text import shown


@dataclasses.dataclass(frozen=True)
class Arg:
    """What `arg` returns: a number or an array that `tx.update` is given."""

    source: str | Callable[[Mapping[str, Any], str], jax.typing.ArrayLike]

    def __repr__(self) -> str:
        return f"arg({getattr(self.source, '__name__', None) or repr(self.source)})"

    def read(self, what: str, extra: Mapping[str, Any], path: str) -> jax.Array:
        """The number or array, out of the extra arguments.

        Args:
            what: The hyperparameter and its leaf, for errors.
            extra: The extra arguments by name.
            path: The path of the leaf.

        Returns:
            An array.

        Raises:
            TypeError: If it is no array of numbers.
            ValueError: If there is no such argument.
        """
        given = _Given(extra)
        try:
            found = given[self.source] if isinstance(self.source, str) else self.source(given, path)
        except _MissingError as error:
            name = error.args[0]
            raise ValueError(
                f"{what} needs the argument {name!r}, and those given are "
                f"{', '.join(map(repr, extra)) or 'none'}. Write tx.update(grads, state, params, "
                f"{name}=...), or extra={{{name!r}: ...}} in the other verbs."
            ) from error
        try:
            array = jnp.asarray(found)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{what} gave {shown(found)}, which is no array.") from error
        if jnp.issubdtype(array.dtype, jnp.bool_):
            return array
        return check_real(what, array)


class _MissingError(KeyError):
    """That an argument was not given; other keys than those are the source's own affair."""


class _Given(dict[str, Any]):
    """The extra arguments, as a source sees them."""

    def __missing__(self, name: str) -> Any:
        raise _MissingError(name)


def arg(source: str | Callable[[Mapping[str, Any], str], jax.typing.ArrayLike]) -> Any:
    """A number, or an array, that is read from the extra arguments of each update.

    Write it where a constraint takes a number, or an array such as a mask or the bounds of a box.
    It is for what the forward pass measures, or what another program decides. `project` reads it
    from ``tx.update(grads, state, params, **extra)``, and the other verbs from ``extra=``. A new
    value compiles nothing. Values are not checked, since they cannot be read under `jax.jit`.

    Args:
        source: The name of an argument, or a function ``(extra, path) -> array``, called with all
            of them and the path of the leaf.

    Returns:
        What to write in the place of the number or the array.

    Raises:
        TypeError: If `source` is neither.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> tx = optax.chain(optax.sgd(1.0), oc.project(oc.max_norm(oc.arg("cap"))))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.zeros(2), tx.init(w), w, cap=2.5)
        >>> optax.apply_updates(w, updates)
        Array([1.5, 2. ], dtype=float32)
    """
    if not isinstance(source, str) and not callable(source):
        raise TypeError(
            f"arg: source={shown(source)} is neither the name of an argument of tx.update nor a "
            "function (extra, path) -> array."
        )
    return Arg(source)


def check_real(what: str, value: Any) -> Any:
    """An array, if it is one of real numbers; raises if not."""
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{what} has dtype {value.dtype}; write a real number.")
    return value
