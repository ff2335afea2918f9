"""What a hyperparameter may be: a number, a schedule, text in what is known of a leaf, `arg`."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias, TypeGuard, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints import _expressions
from optax_constraints._axes import LeafLayout, drop_axes, settle_axis
from optax_constraints._text import describe, shown

Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]


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

    It stands where a constraint takes a number, or an array such as a mask or the bounds of a
    box: for what the forward pass measures, or another program decides. `project` reads it from
    ``tx.update(grads, state, params, **extra)``, and the other verbs from ``extra=``. Other
    values compile nothing; they are not checked, since under `jax.jit` they could not be.

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


def number(
    default: Any = dataclasses.MISSING,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    init: bool = False,
    whole: bool = False,
    array: bool = False,
) -> Any:
    """A dataclass field for a number: Python, JAX (also traced), a schedule, text or `arg`.

    Args:
        default: The field's default value.
        low: Smallest allowed value.
        high: Largest allowed value.
        init: Whether text may be relative to `init`, the norm of each unit at init.
        whole: Whether text is a count, and rounded to a whole number.
        array: Whether `arg` may be an array that broadcasts.

    Returns:
        A dataclass field that `check_numbers`, `Constraint.settle` and `Constraint.at` look after.
    """
    limits = Limits(low, high, init, whole, array)
    return dataclasses.field(default=default, metadata={"number": limits})


def fields_of(constraint: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of a constraint, if it is a dataclass."""
    return dataclasses.fields(constraint) if dataclasses.is_dataclass(constraint) else ()


def limits_of(field: dataclasses.Field) -> Limits | None:
    """What the numbers in a field are; None for a field that is for something else."""
    return field.metadata.get("number")


def check_numbers(constraint: Any) -> None:
    """Checks the numbers of a constraint as far as they are concrete.

    Raises:
        TypeError: If one is no number.
        ValueError: If one is NaN or out of range, or is text that is no expression.
    """
    for field in fields_of(constraint):
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


def check_real(what: str, value: Any) -> Any:
    """An array, if it is one of real numbers; raises if not."""
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"{what} has dtype {value.dtype}; write a real number.")
    return value


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


class Settled(float):
    """A number that was text, for one leaf; the report shows both."""

    text: str

    def __new__(cls, value: float, text: str) -> "Settled":
        """Keeps the text beside the number."""
        self = super().__new__(cls, value)
        self.text = text
        return self

    def __getnewargs__(self) -> Any:  # for copies and pickles
        """The arguments that make it again."""
        return float(self), self.text


class SettledCount(int):
    """A whole number that was text, for one leaf."""

    text: str

    def __new__(cls, value: int, text: str) -> "SettledCount":
        """Keeps the text beside the number."""
        self = super().__new__(cls, value)
        self.text = text
        return self

    def __getnewargs__(self) -> Any:
        """The arguments that make it again."""
        return int(self), self.text


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


ARRAYS = np.ndarray, jax.Array


def is_array(value: Any) -> TypeGuard[np.ndarray | jax.Array]:
    """Whether a value is an array, of NumPy or of JAX."""
    return isinstance(value, ARRAYS)


def is_readable(array: Any) -> bool:
    """Whether this process can read the numbers of an array now."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable
