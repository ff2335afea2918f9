"""What a hyperparameter may be: a number, a schedule, text in what is known of a leaf, `arg`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints import _expressions
from optax_constraints._args import Arg, check_real
from optax_constraints._axes import LeafLayout, drop_axes, settle_axis
from optax_constraints._numerics import is_array, is_readable
from optax_constraints._text import describe, shown

Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


Number: TypeAlias = jax.typing.ArrayLike | Schedule | str | Arg
"""A number, a JAX scalar, a schedule, text such as `"sqrt(fan_in)"`, or `arg`."""


class Limits(NamedTuple):
    """What the numbers in one field are."""

    low: float = -math.inf
    high: float = math.inf
    init: bool = False
    """Whether text may be relative to `init`, the norm of each unit at init."""
    whole: bool = False
    """Whether text is a count, and rounded to a whole number."""
    array: bool = False
    """Whether `arg` may be an array that broadcasts, and None stands for no number."""


def number(default: Any = dataclasses.MISSING, **limits: Any) -> Any:
    """A dataclass field for a number: Python, JAX (also traced), a schedule, text or `arg`.

    Args:
        default: The field's default value.
        **limits: As for `Limits`.

    Returns:
        A dataclass field that `check_numbers`, `Constraint.settle` and `Constraint.at` look after.
    """
    return dataclasses.field(default=default, metadata={"number": Limits(**limits)})


@functools.cache
def fields_of(kind: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a class of constraints, if it is a dataclass."""
    return dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()


def limits_of(field: dataclasses.Field) -> Limits | None:
    """What the numbers in a field are; None for a field that is for something else."""
    return field.metadata.get("number")


def check_numbers(constraint: Any) -> None:
    """Checks the numbers of a constraint as far as they are concrete.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is NaN or out of range, or is text that is no expression.
    """
    for field in fields_of(type(constraint)):
        limits = limits_of(field)
        if limits is not None and not limits.array:
            given = getattr(constraint, field.name)
            check_number(type(constraint).__name__, field.name, given, limits)


def check_number(
    owner: str,
    name: str,
    value: Any,
    limits: Limits = Limits(),  # noqa: B008  # a tuple
) -> float | None:
    """Checks one hyperparameter as far as it is concrete.

    Args:
        owner: Class name, for the error.
        name: Name of the hyperparameter.
        value: What was given.
        limits: What it may be.

    Returns:
        The value as a float, or None for one that is not known yet.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN or out of range, or is text that is no expression.
    """
    what = f"{owner}: {name}={shown(value)}"
    if isinstance(value, Tracer):
        check_scalar(what, value)
        return None
    if isinstance(value, Arg) or is_schedule(value):
        return None
    if isinstance(value, str):
        return _check_text(what, value, limits)
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"{what} is not a number; write a float, a JAX scalar or an Optax schedule."
        )
    if is_array(value):
        check_scalar(what, value)
        if not is_readable(value):
            return None
    try:
        concrete = float(cast(Any, value))
    except OverflowError:
        raise ValueError(f"{what} is too large for a float.") from None
    return _in_range(what, concrete, limits)


def _check_text(what: str, text: str, limits: Limits) -> float | None:
    try:
        _expressions.check(text)
    except ValueError as error:
        raise ValueError(
            f"{what} is not a number: {error}. Write a number, 'init' or '2x init' for a multiple "
            "of each unit's norm at init, or an expression of numbers, fan_in, fan_out, size and "
            "init with + - * /, sqrt and parentheses, such as 'sqrt(fan_out / fan_in)'."
        ) from None
    names = _expressions.names_in(text)
    if "init" in names and not limits.init:
        raise ValueError(
            f"{what} is relative to init, the norm of a unit at init, which only sets of norms "
            "know; write it in fan_in, fan_out and size."
        )
    found = _expressions.evaluate(what, text, {})  # also of the parts without names
    return None if names else _in_range(what, found, limits)


def relative_to(given: Any) -> frozenset[str]:
    """What of a leaf a hyperparameter needs, by name; nothing, if it is no text."""
    return _expressions.names_in(given) if isinstance(given, str) else frozenset()


def _in_range(what: str, value: float, limits: Limits) -> float:
    low, high = limits.low, limits.high
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{what} is not allowed; write a number {bounds}.")
    return value


def check_scalar(what: str, value: Any) -> None:
    """Raises if an array is not one real number."""
    if value.ndim != 0:
        raise ValueError(f"{what} has shape {value.shape}; write one number.")
    check_real(what, value)


def is_schedule(value: Any) -> bool:
    """Whether a hyperparameter is a function of the step; a constraint is callable, too."""
    return callable(value) and not hasattr(value, "settle")


def is_number(given: Any, number: int) -> bool:
    """Whether a hyperparameter is known to be this number, now and in each step."""
    return isinstance(given, (int, float)) and given == number


def concrete(number: Any, init: float) -> float | None:
    """A hyperparameter as a float for one norm at init; None if it is not known yet."""
    if isinstance(number, str):
        try:
            return _expressions.evaluate(repr(number), number, {"init": init})
        except ValueError:  # another norm at init may be fine
            return None
    readable = is_array(number) and is_readable(number)
    return float(number) if readable or isinstance(number, (int, float)) else None


def value(number: Number, dtype: jnp.dtype, init: jax.Array | None = None) -> jax.Array:
    """A hyperparameter as an array.

    Args:
        number: The hyperparameter, its schedule evaluated.
        dtype: The dtype of the array.
        init: The norms at init, for text that is relative to them.

    Returns:
        The array: a scalar, unless it is relative to init or `arg` gave an array.

    Raises:
        TypeError: If it is a schedule or `arg`, which only a verb can evaluate.
        ValueError: If it is text that only a verb can evaluate.
    """
    if isinstance(number, Arg) or callable(number):
        if isinstance(number, Arg):
            raise unread(number)
        raise TypeError(
            "A constraint with a schedule has no numbers yet; write constraint.at(step)(w), or "
            "use project or constrain, which know the step."
        )
    if isinstance(number, str):
        known = {} if init is None else {"init": init}
        if unknown := relative_to(number) - set(known):
            raise ValueError(
                f"A constraint with {number!r} has no number yet, since an array by itself does "
                f"not tell its {', '.join(sorted(unknown))}; use project or constrain, which know "
                "the leaf."
            )
        number = _expressions.evaluate(repr(number), number, known)
    return jnp.asarray(number, dtype)


def unread(number: Arg) -> TypeError:
    """What is wrong with a call of a constraint that has an `arg`."""
    return TypeError(
        f"A constraint with {number!r} has no numbers yet; write constraint.read(extra, path)(w), "
        "or use project, which reads the arguments of tx.update, or constrain(..., extra=...)."
    )


# Text, as one leaf makes numbers of it.


class _Told:
    """What numbers that were text have in common; the report shows both."""

    text: str

    def __new__(cls, value: float, text: str) -> Any:
        """Keeps the text beside the number."""
        self = super().__new__(cls, value)  # pyright: ignore[reportCallIssue]  # of a number
        self.text = text
        return self

    def __getnewargs__(self) -> Any:  # for copies and pickles
        """The arguments that make it again."""
        return +cast(Any, self), self.text


class Settled(_Told, float):
    """A number that was text, for one leaf."""


class SettledCount(_Told, int):
    """A whole number that was text, for one leaf."""


def settle_number(
    owner: str,
    name: str,
    given: Any,
    limits: Limits,
    path: str,
    shape: tuple[int, ...],
    layout: LeafLayout | None,
) -> Any:
    """A hyperparameter for one leaf: of text its value, or text that is relative to init alone.

    Args:
        owner: Class name, for errors.
        name: Name of the hyperparameter.
        given: The hyperparameter.
        limits: What it may be.
        path: Path of the leaf.
        shape: Shape of the leaf.
        layout: What the model says of the leaf.

    Returns:
        What was given, if it is no text.

    Raises:
        ValueError: If `fan_in` or `fan_out` is not certain, or the value is out of range.
    """
    if not isinstance(given, str):
        return given
    names = relative_to(given)
    stacked = layout.stacked if layout else ()
    own = tuple(a for a in range(len(shape)) if a not in stacked)
    known: dict[str, Any] = {"size": math.prod(shape[a] for a in own)}
    what = f"{owner} on {describe(path, shape)}: {name}={given!r}"
    if names & {"fan_in", "fan_out"}:
        try:
            axes = settle_axis(owner, "fan_in", shape, path, layout)
        except ValueError as error:
            raise ValueError(
                f"{what} needs fan_in, which this leaf's name and shape do not tell. Give "
                "layout=layout(model), or write a number."
            ) from error
        known["fan_in"] = math.prod(shape[a] for a in axes if a in own)
        known["fan_out"] = math.prod(drop_axes(shape, (*axes, *stacked)))
    found = _expressions.evaluate(what, given, known)
    if "init" in names:
        return given if names == {"init"} else _expressions.substitute(given, known)
    _in_range(f"{what} is {found:g}, which", found, limits)
    if not limits.whole:
        return Settled(found, given)
    if 0 < found < 1 and not names:
        raise ValueError(f"{what} is {found:g}, and text is a count here; write '{given} * size'.")
    if found > 0 and not round(found):
        raise ValueError(
            f"{what} is {found:g}, which as a count is none at all; write more, or leave this "
            "leaf free."
        )
    return SettledCount(round(found), given)
