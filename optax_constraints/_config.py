"""Identifiers and configs: the names and the JSON forms of constraints."""

import dataclasses
import difflib
import inspect
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints._args import Arg, arg
from optax_constraints._constraint import Constraint, own_classes
from optax_constraints._text import shown

Projection: TypeAlias = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class FunctionConstraint(Constraint):
    """A plain function array -> array, where the library needs a `Constraint`."""

    function: Projection

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Calls the function."""
        return self.function(jnp.asarray(w))

    def __str__(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", type(self.function).__name__)


Identifier: TypeAlias = Constraint | type | str | Mapping[str, Any] | Projection


def as_constraint(identifier: Any) -> Constraint | None:
    """What `get` returns, with plain functions as constraints, too."""
    thing = get(identifier)
    return thing if thing is None or isinstance(thing, Constraint) else FunctionConstraint(thing)


_Registrable = TypeVar("_Registrable", bound="type[Constraint] | Projection")
_Set = TypeVar("_Set", bound=type[Constraint])
_Class = TypeVar("_Class")

# Every name that `get` and `deserialize` know: the library's own sets, which are entered beside
# their classes, and what users register.
_registry: dict[str, type[Constraint] | Projection] = {}

_KERAS_MODULE = "keras.constraints"
_OWN_MODULE = "optax_constraints"


@overload
def builtin(cls: _Set, /, *, in_keras: bool = ...) -> _Set: ...
@overload
def builtin(*, in_keras: bool) -> Callable[[_Set], _Set]: ...
def builtin(cls: Any = None, /, *, in_keras: bool = False) -> Any:
    """Enters one of the library's own sets under its name and its snake_case alias."""
    if cls is None:
        return lambda cls: builtin(cls, in_keras=in_keras)
    _registry[cls.__name__] = _registry[snake_case(cls.__name__)] = cls
    own_classes[cls] = _KERAS_MODULE if in_keras else _OWN_MODULE
    return cls


def snake_case(name: str) -> str:
    """`MaxNorm` -> `max_norm`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


@overload
def register(constraint: _Registrable, *, name: str | None = None) -> _Registrable: ...
@overload
def register(*, name: str | None = None) -> Callable[[_Registrable], _Registrable]: ...
def register(constraint: Any = None, *, name: str | None = None) -> Any:
    """Gives a constraint class or function of your own a name that configs can use.

    Args:
        constraint: A subclass of `Constraint`, or a function array -> array. Without it,
            `register(name=...)` is a decorator.
        name: The name; by default that of the class or function.

    Returns:
        What was given, so that `register` decorates.

    Raises:
        TypeError: If it is neither a class nor a named function.
        ValueError: If the name is taken by something else.

    Example:
        >>> import optax_constraints as oc
        >>> @oc.register
        ... class NonPositive(oc.Constraint):
        ...     def __call__(self, w):
        ...         return w * (w <= 0)
        >>> oc.get("NonPositive")(-1.0)
        -1.0
    """
    if constraint is None:
        return lambda given: register(given, name=name)
    is_class = inspect.isclass(constraint)
    if not (issubclass(constraint, Constraint) if is_class else inspect.isfunction(constraint)):
        raise TypeError(
            f"register takes a subclass of Constraint or a function, not {constraint!r}; "
            "register the class of an object, not the object."
        )
    key: str = name or constraint.__name__
    if key == "<lambda>":
        raise TypeError("A lambda has no name; write register(the_function, name='...').")
    known = _registry.get(key)
    if known is not None and _identity(known) != _identity(constraint):
        raise ValueError(f"The name {key!r} is taken by {known!r}; write register(..., name=...).")
    _registry[key] = constraint
    return constraint


def _identity(thing: Any) -> Hashable:
    """Where a definition stands: run again in a notebook, it is still the same one."""
    return getattr(thing, "__module__", None), getattr(thing, "__qualname__", id(thing))


def get(identifier: Any) -> Any:
    """Turns an identifier into a constraint.

    Args:
        identifier: None; a constraint or any callable array -> array; a class, which is
            called without arguments; a registered name such as `"max_norm"`; or a config,
            a mapping with the key `class_name`.

    Returns:
        The constraint or callable, or None for None.

    Raises:
        ValueError: If it is none of these, or the name is not registered.

    Example:
        >>> import optax_constraints as oc
        >>> oc.get("max_norm")
        MaxNorm(max_value=2, axis=0)
    """
    if identifier is None:
        return None
    if isinstance(identifier, Mapping):
        return _deserialize_constraint(identifier)
    thing = _look_up(identifier) if isinstance(identifier, str) else identifier
    if inspect.isclass(thing):
        try:
            thing = thing()
        except TypeError as error:
            raise ValueError(
                f"Could not interpret constraint identifier: {identifier!r}: {error}. Write "
                f"an instance, such as {thing.__name__}(...)."
            ) from error
    if not callable(thing):
        text = (
            f"Could not interpret constraint identifier: {identifier!r}. Write a constraint "
            "such as max_norm(2.0), a name such as 'max_norm', a config, or a function "
            "array -> array."
        )
        raise ValueError(f"{text} {several(identifier)}".rstrip())
    return thing


def several(given: Any) -> str:
    """What to write instead, if somebody gives constraints in a list or tuple; else nothing."""
    if not isinstance(given, (list, tuple)) or not given or not all(map(_is_one, given)):
        return ""
    parts = ", ".join(
        thing.__name__ if inspect.isfunction(thing) or inspect.isclass(thing) else shown(thing)
        for thing in given
    )
    if len(given) == 1:
        return f"Write {parts} without the brackets around it."
    return (
        f"A leaf has one constraint: write compose({parts}), for one after the other, or "
        f"intersection({parts}), for the nearest point that is in each of them, if they are convex."
    )


def _is_one(thing: Any) -> bool:
    return thing in _registry if isinstance(thing, str) else callable(thing)


def _look_up(name: str) -> Any:
    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, n=3, cutoff=0.5)
        # Of a set of the library, one of its two names is enough.
        names = {
            snake_case(known) if _registry[known] in own_classes else known for known in _registry
        }
        hint = (
            f"Did you mean {' or '.join(map(repr, close))}?"
            if close
            else f"Known names are {', '.join(sorted(names))}."
        )
        raise ValueError(
            f"Could not interpret constraint identifier: {name!r}. {hint} A class or "
            "function of your own needs optax_constraints.register first."
        )
    return _registry[name]


def serialize(thing: Any) -> Any:
    """The JSON form of a constraint or of whole rules.

    For the classes that Keras has, it is the form that Keras gives, and loads there. What Keras
    does not know, such as ``axis="fan_in"`` or a bound relative to init, it refuses to load. The
    form is strict JSON: infinities are the text `"Infinity"` and `"-Infinity"`.

    Args:
        thing: Anything `get` accepts, or rules: a mapping of patterns, or a sequence of
            (pattern, constraint) pairs. In rules the order counts: do not sort the keys.

    Returns:
        None, dicts, lists, strings and numbers.

    Raises:
        TypeError: If something has no JSON form: a schedule, a traced number, a predicate,
            a function or class that is not registered.

    Example:
        >>> import optax_constraints as oc
        >>> oc.serialize({"kernel": oc.max_norm(2.0), "bias": None})["kernel"]["config"]
        {'max_value': 2.0, 'axis': 0}
    """
    if isinstance(thing, Mapping) and "class_name" not in thing:
        if all(isinstance(key, str) for key in thing):
            return {key: serialize(value) for key, value in thing.items()}
        return serialize(list(thing.items()))
    if isinstance(thing, Sequence) and not isinstance(thing, str):
        pairs = map(_check_pair, thing)
        return [[_serialize_pattern(pattern), serialize(value)] for pattern, value in pairs]
    constraint = get(thing)
    return None if constraint is None else _serialize_constraint(constraint)


def _check_pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2:
        raise TypeError(f"{shown(pair)} is not a pair (pattern, constraint).")
    return pair[0], pair[1]


# Patterns that are neither text nor regular expressions, by the name that they have in configs.
_pattern_types: dict[str, type] = {}


def pattern_type(name: str) -> Callable[[type[_Class]], type[_Class]]:
    """Gives a dataclass that is a pattern, made of patterns and text, a name in configs."""

    def enter(cls: type[_Class]) -> type[_Class]:
        _pattern_types[name] = cls
        return cls

    return enter


def _serialize_pattern(pattern: object) -> Any:
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return {"regex": pattern.pattern, "flags": pattern.flags}
    for name, cls in _pattern_types.items():
        if type(pattern) is cls:
            parts = [getattr(pattern, f.name) for f in dataclasses.fields(cls)]
            parts = parts[0] if isinstance(parts[0], tuple) else parts
            return {name: [_serialize_pattern(part) for part in parts]}
    raise TypeError(
        f"The pattern {pattern!r} has no JSON form; write a string or a compiled regular "
        "expression."
    )


def _serialize_constraint(constraint: Any) -> dict[str, Any]:
    if isinstance(constraint, FunctionConstraint):
        constraint = constraint.function
    is_function = not isinstance(constraint, Constraint)
    definition = constraint if is_function else type(constraint)
    module = None if is_function else own_classes.get(definition)
    if module is not None:
        config = strict_json(constraint.get_config())
        if module == _KERAS_MODULE and not all(map(_is_known_to_keras, config.values())):
            # Keras goes by the name of the class alone, and would take the config and fail in
            # training. With an argument that it does not know, it says so when it loads.
            module, config = _OWN_MODULE, {"axis_name": None, **config}
        return _config(module, definition.__name__, config, None)
    names = [name for name, known in _registry.items() if known is definition] or [
        # An object made before a notebook cell defined its class again.
        name
        for name, known in _registry.items()
        if _identity(known) == _identity(definition)
    ]
    if not names:
        raise TypeError(
            f"{constraint!r} has no JSON form, since nothing is registered that could be "
            "found again under its name; decorate its class or function with "
            "optax_constraints.register."
        )
    if is_function:
        return _config(_OWN_MODULE, "function", names[0], names[0])
    return _config(_OWN_MODULE, definition.__name__, strict_json(constraint.get_config()), names[0])


def _config(module: str, class_name: str, config: Any, registered: str | None) -> dict[str, Any]:
    return {
        "module": module,
        "class_name": class_name,
        "config": config,
        "registered_name": registered,
    }


def _is_known_to_keras(argument: Any) -> bool:
    """Whether Keras takes this as a bound or an axis: finite numbers, several axes or None."""
    if isinstance(argument, list):
        return all(isinstance(axis, int) for axis in argument)
    return argument is None or isinstance(argument, (int, float))


# JSON has no such numbers. This is how the JSON form of protocol buffers writes them.
_NOT_FINITE = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def strict_json(value: Any) -> Any:
    """A config in which numbers that JSON does not have are text."""
    if isinstance(value, Mapping):
        return {key: strict_json(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(part) for part in value]
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def to_json(what: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Constraint):
        return _serialize_constraint(value)
    if isinstance(value, (tuple, list)):
        return [to_json(what, v) for v in value]
    if isinstance(value, Arg) and isinstance(value.source, str):
        return {"arg": value.source}
    if isinstance(value, Arg):
        raise TypeError(
            f"{what} is {value!r}, a function, which has no JSON form; write arg('a name')."
        )
    if isinstance(value, Tracer) or callable(value):
        kind = "a traced value" if isinstance(value, Tracer) else "a schedule"
        raise TypeError(f"{what} is {kind}, which has no JSON form; write a number.")
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return (
            np.asarray(value).astype(float).tolist()
            if value.dtype.kind not in "iub"
            else (np.asarray(value).tolist())
        )
    raise TypeError(f"{what}={value!r} has no JSON form; write a number or override get_config.")


def deserialize(config: Any) -> Any:
    """Makes constraints, or whole rules, from their JSON form.

    Names are looked up among the registered ones and nowhere else: nothing that a config
    names is imported, and no code in it runs, so a config may come from anywhere.

    Args:
        config: What `serialize` or Keras returned, with `None` for `null`; names in place
            of configs are fine.

    Returns:
        A constraint, a function, None, a dict of rules or a list of pairs.

    Raises:
        ValueError: If a name is unknown or a value is bad.
        TypeError: If something has the wrong type.

    Example:
        >>> import optax_constraints as oc
        >>> oc.deserialize({"class_name": "MaxNorm", "config": {"max_value": 3.0}})
        MaxNorm(max_value=3.0, axis=0)
    """
    try:
        return _deserialize(config)
    except RecursionError:
        raise ValueError(f"The config {shown(config)} is nested too deep.") from None


def _deserialize(config: Any) -> Any:
    if config is None or isinstance(config, str):
        return get(config)
    if isinstance(config, Mapping):
        if "class_name" in config:
            return _deserialize_constraint(config)
        for key in config:
            if not isinstance(key, str):
                raise TypeError(f"A config of rules has strings as keys, not {key!r}.")
            _check_length(key)
        return {key: _deserialize(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_deserialize_pair(pair) for pair in config]
    raise TypeError(
        f"{shown(config)} is not the config of a constraint or of rules; write what "
        "serialize returned."
    )


def _deserialize_pair(pair: Any) -> tuple[Any, Any]:
    pattern, value = _check_pair(pair)
    return _deserialize_pattern(pattern), _deserialize(value)


def _deserialize_pattern(pattern: Any) -> Any:
    if isinstance(pattern, str):
        _check_length(pattern)
        return pattern
    if not isinstance(pattern, Mapping):
        raise TypeError(f"{shown(pattern)} is not a pattern; write a string.")
    for name, cls in _pattern_types.items():
        if set(pattern) == {name} and isinstance(pattern[name], list):
            try:
                return cls(*map(_deserialize_pattern, pattern[name]))
            except TypeError as error:
                raise TypeError(f"{shown(pattern)} is not a pattern: {error}") from error
    if isinstance(pattern.get("regex"), str):
        _check_length(pattern["regex"])
    try:
        # Under DEBUG, compiling would print.
        return re.compile(pattern["regex"], pattern.get("flags", 0) & ~int(re.DEBUG))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise ValueError(
            f"{shown(pattern)} is not a pattern; write a string, or {{'regex': '...', 'flags': 0}}."
        ) from error


# Python's own compiler of patterns takes seconds for very long ones.
_LONGEST_PATTERN = 500


def _check_length(pattern: str) -> None:
    if len(pattern) > _LONGEST_PATTERN:
        raise ValueError(
            f"{shown(pattern)} is not a pattern; write a string, or {{'regex': '...', 'flags': "
            f"0}}, of at most {_LONGEST_PATTERN} characters."
        )


def _deserialize_constraint(config: Mapping[str, Any]) -> Any:
    class_name = config.get("class_name")
    registered = config.get("registered_name")
    arguments = config.get("config")
    for name in (class_name, registered):
        if name is not None and not isinstance(name, str):
            raise TypeError(f"The config {shown(config)} has a class_name that is not a string.")
    if class_name is None:
        raise ValueError(
            f"{shown(config)} is not a config: it has no key 'class_name'. Rules by pattern go "
            "to the verbs, such as project, not to get."
        )
    if class_name == "function":
        if not isinstance(arguments, str):
            raise TypeError(f"The config {shown(config)} names no registered function.")
        function = _look_up(arguments)
        if inspect.isclass(function):
            raise ValueError(f"The config {shown(config)} names a class, not a function.")
        return function
    if registered in _registry:
        class_name = registered
    elif registered is not None and _registry.get(class_name) in own_classes:
        raise ValueError(
            f"The config {shown(config)} is that of a class of its own, {registered!r}, and not "
            f"of {class_name}; give that class to optax_constraints.register under this name."
        )
    thing = _look_up(class_name)
    if not inspect.isclass(thing):
        return thing
    cls = cast(type[Constraint], thing)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise TypeError(f"{class_name}: config={shown(arguments)} is not a mapping of arguments.")
    plain = {key: _plain(value) for key, value in arguments.items()}
    try:
        inspect.signature(cls).bind(**plain)
    except TypeError as error:
        # A class with a from_config of its own may take other keys than its constructor.
        if cls.from_config.__func__ is Constraint.from_config.__func__:
            wanted = ", ".join(inspect.signature(cls).parameters) or "none"
            raise ValueError(
                f"{class_name}: the config {shown(dict(arguments))} does not fit: {error}. "
                f"Its arguments are: {wanted}."
            ) from error
    return cls.from_config(plain)


def _plain(value: Any) -> Any:
    """Reads `arg`, numbers that JSON does not have, and Keras' forms of tuples and arrays."""
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"arg"}:
        return arg(value["arg"])
    kind, content = value.get("class_name"), value.get("config")
    if kind == "__tuple__" and isinstance(value.get("items"), list):
        return tuple(map(_plain, value["items"]))
    if kind in ("__numpy__", "__tensor__") and isinstance(content, Mapping):
        return _plain(content.get("value"))
    if "class_name" not in value:
        return {key: _plain(part) for key, part in value.items()}
    return value


builtin(Constraint, in_keras=True)
