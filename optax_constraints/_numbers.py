"""What a hyperparameter may be: a number, an array of one, or a schedule."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints._text import shown

Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
Number: TypeAlias = jax.typing.ArrayLike | Schedule


def number(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field for a number: Python, JAX (also traced), or an Optax schedule.

    Args:
        default: The field's default value.

    Returns:
        A dataclass field that `Constraint.at` evaluates at a step.
    """
    return dataclasses.field(default=default, metadata={"number": True})


def value(number: Number, dtype: jnp.dtype) -> jax.Array:
    """A hyperparameter as an array."""
    if callable(number):
        raise TypeError(
            "A constraint with a schedule has no numbers yet; write constraint.at(step)(w), or "
            "use project or constrain, which know the step."
        )
    return jnp.asarray(number, dtype)


def is_readable(array: Any) -> bool:
    """Whether this process can read the numbers of an array now."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def check_number(
    owner: str, name: str, value: Number, low: float = -np.inf, high: float = np.inf
) -> float | None:
    """Checks one hyperparameter as far as it is concrete.

    Args:
        owner: Class name, for the error.
        name: Name of the hyperparameter.
        value: A Python number, an array of one number, or a schedule.
        low: Smallest allowed value.
        high: Largest allowed value.

    Returns:
        The value as a float, or None for a schedule or a traced value.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN or out of range.
    """
    what = f"{owner}: {name}={shown(value)}"
    if isinstance(value, Tracer):
        _check_scalar(what, value)
        return None
    if callable(value) and not hasattr(value, "settle"):  # a constraint is callable, too
        return None
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"{what} is not a number; write a float, a JAX scalar or an Optax schedule."
        )
    if is_array(value):
        _check_scalar(what, value)
        if not is_readable(value):
            return None
    try:
        concrete = float(cast(Any, value))
    except OverflowError:
        raise ValueError(f"{what} is too large for a float.") from None
    if not low <= concrete <= high:
        bounds = f"at least {low:g}" if high == np.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{what} is not allowed; write a number {bounds}.")
    return concrete


def is_number(given: Any, number: int) -> bool:
    """Whether a hyperparameter is known to be this number, now and in each step."""
    return isinstance(given, (int, float)) and given == number


def _check_scalar(what: str, value: Any) -> None:
    if value.ndim != 0:
        raise ValueError(f"{what} has shape {value.shape}; write one number.")
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{what} has dtype {value.dtype}; write a real number.")


ARRAYS = np.ndarray, jax.Array


def is_array(value: Any) -> TypeGuard[np.ndarray | jax.Array]:
    return isinstance(value, ARRAYS)
