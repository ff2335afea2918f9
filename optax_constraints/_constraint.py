"""`Constraint`, and the identifiers and configs by which constraints are named."""

import contextlib
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias, TypeGuard, TypeVar, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints._axes import LeafLayout, settle_axis
from optax_constraints._numerics import compute_dtype
from optax_constraints._text import shown

Projection: TypeAlias = Callable[[jax.Array], jax.Array]
Schedule: TypeAlias = Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]
Number: TypeAlias = jax.typing.ArrayLike | Schedule
_Made = TypeVar("_Made", bound="Constraint")


class Constraint:
    """A set of allowed arrays, given by the projection onto it.

    A subclass needs only `__call__`. As it stands, `Constraint()` allows everything.

    The library's own sets are frozen dataclasses with a field for each hyperparameter. A
    subclass that is one, too, gets `get_config` from its fields, and a field called `axis` is
    settled leaf by leaf. Make it with `@dataclasses.dataclass(frozen=True, eq=False)`, so that
    it keeps the equality of this class, by the values of its fields.

    Constraints are pytrees: numbers and arrays are their leaves, and axes, text, schedules and
    functions belong to their structure. So a constraint can be an argument of `jax.jit`,
    `jax.vmap` or `jax.lax.scan`, and other numbers compile nothing. In a subclass of your own
    the leaves are the JAX arrays and the constraints among its attributes; NumPy arrays are not,
    so that it may count on them to be concrete.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> class NonPositive(oc.Constraint):
        ...     def __call__(self, w):
        ...         return jnp.minimum(w, 0)
        >>> NonPositive()(jnp.array([-1.0, 1.0]))
        Array([-1.,  0.], dtype=float32)
    """

    elementwise: ClassVar[bool] = False
    """Whether each entry is projected by itself. If so, `project` corrects the rounding of
    ``p + update`` entry by entry, and the sum is never outside the set."""

    unitwise: ClassVar[bool] = False
    """Whether each slice along the field `axis` is projected by itself. If so, more axes need
    no more than another `axis`."""

    convex: ClassVar[bool] = False
    """Whether this is the projection onto a set that is known to be convex, so that nearest
    points are unique. A map that goes only a part of the way is none."""

    smooth: ClassVar[bool] = False
    """Whether the set is a smooth one, such as a sphere or a plane: the derivative of the
    projection at a point of the set is then the orthogonal projection onto its tangent space."""

    remembers: ClassVar[bool] = False
    """Whether `advance` needs what `remember` returned, which `project` keeps in its state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Makes an object, and the first of its class known to JAX."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise TypeError(f"{cls.__name__}() takes no arguments")
        # Not when the class is made: a class may be a pytree by itself, such as an eqx.Module.
        _register_pytree(cls)
        return super().__new__(cls)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array.

        Args:
            w: The weights, of any shape.

        Returns:
            The projection, of the shape and dtype of `w`.
        """
        return jnp.asarray(w)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, as values that JSON can hold."""
        name = type(self).__name__
        return {f.name: _to_json(f"{name}.{f.name}", getattr(self, f.name)) for f in _fields(self)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Makes a constraint from what `get_config` returned.

        Args:
            config: The constructor's arguments by name.

        Returns:
            The constraint.
        """
        return cls(**config)

    def remember(self, w: jax.Array) -> Any:
        """What a set that `remembers` keeps of one leaf, from its weights at init.

        Args:
            w: The weights at init.

        Returns:
            Any pytree of arrays.
        """
        del w
        return ()

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the help of what is remembered of it.

        Args:
            w: The weights.
            memory: What `remember` or the last `advance` returned.

        Returns:
            The projection, and what to remember, of the same structure, shapes and dtypes.
        """
        return self(w), memory

    def aim(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """`advance` for `update`: in a difference the sign of a zero does not matter."""
        return self.advance(w, memory)

    def tangent(self, w: jax.typing.ArrayLike, v: jax.typing.ArrayLike) -> jax.Array:
        """The part of a vector that is tangent to a smooth set.

        Args:
            w: Weights in the set.
            v: A vector, such as a gradient, of the same shape.

        Returns:
            The tangent part, in the dtype of `v`.
        """
        w, v = jnp.asarray(w), jnp.asarray(v)
        dtype = compute_dtype(w.dtype, v.dtype)
        return jax.jvp(self, (w.astype(dtype),), (v.astype(dtype),))[1].astype(v.dtype)

    def at(self, step: jax.typing.ArrayLike) -> "Constraint":
        """This constraint with each schedule replaced by its value.

        Args:
            step: The step, counted from 0.

        Returns:
            A constraint without schedules. What they return is not checked, since under
            `jax.jit` it could not be: a bound below 0 counts as 0, as if it were traced.
        """
        values = {
            f.name: value.at(step) if isinstance(value, Constraint) else value(step)
            for f in _fields(self)
            if isinstance(value := getattr(self, f.name), Constraint)
            or (f.metadata.get("number") and callable(value))
        }
        return self._replace(**values) if values else self

    def _replace(self, **values: Any) -> Self:
        """This constraint with other values in some fields.

        Those of the library's own sets are not checked again: they may be traced.
        """
        if type(self) not in _builtin:
            return dataclasses.replace(cast(Any, self), **values)
        return _remake(type(self), {**_values(self), **values})

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> "Constraint":
        """This constraint with its `axis`, if it has one, as axes of one leaf.

        Args:
            path: Path of the leaf.
            shape: Shape of the leaf.
            layout: What the model says of the leaf, where there is one.

        Returns:
            A constraint whose `axis` is a tuple of non-negative ints.

        Raises:
            ValueError: If the leaf does not have that axis, or `"fan_in"` is not certain.
        """
        if not any(f.name == "axis" for f in _fields(self)):
            return self
        this = cast(Any, self)
        axis = settle_axis(type(self).__name__, this.axis, shape, path, layout)
        return self._replace(axis=axis)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units of an allowed array lie on the boundary of the set.

        Args:
            w: The weights.

        Returns:
            One bool a unit, in any shape, or None for a set that does not say.
        """
        del w
        return None

    def update(
        self,
        params: jax.Array,
        updates: jax.Array,
        memory: Any = (),
        after: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, jax.Array | None]:
        """The update that takes one leaf to the projection of ``params + updates``.

        Args:
            params: The weights as they are.
            updates: The update, of the same shape.
            memory: What is remembered of the leaf, for `advance`.
            after: A scalar of the leaf before this one. A set may make its result depend on it,
                so that leaves are projected one after the other and share their memory.

        Returns:
            ``P(params + updates) - params``, in the wider dtype of the two; what to remember;
            and a scalar for the leaf that comes next.
        """
        weights = params.dtype
        dtype = jnp.promote_types(params.dtype, updates.dtype)
        params, updates = params.astype(dtype), updates.astype(dtype)
        target, memory = self.aim((params + updates).astype(weights), memory)
        delta = target.astype(dtype) - params
        return self.keep_inside(params.astype(weights), delta), memory, after

    def keep_inside(self, params: jax.Array, delta: jax.Array) -> jax.Array:
        """An update after which no entry is outside of an elementwise set.

        ``p + (t - p)`` can round to a neighbour of `t` that is outside the set. One step of the
        update towards the set is enough to bring the sum back in.

        Args:
            params: The weights as they are.
            delta: The update, of the same shape.

        Returns:
            The update, of the dtype of `delta`; of other sets just that.
        """
        if not self.elementwise:
            return delta
        dtype = jnp.promote_types(params.dtype, delta.dtype)
        reached = (params.astype(dtype) + delta.astype(dtype)).astype(params.dtype)
        reached = jax.lax.stop_gradient(reached)
        return _nudged(delta, reached, self.aim(reached, ())[0])

    def __eq__(self, other: object) -> bool:
        """Whether `other` is the same set with the same hyperparameters."""
        return (
            isinstance(other, Constraint)
            and type(self) is type(other)
            and _key(self) == _key(other)
        )

    def __hash__(self) -> int:
        """A hash that agrees with equality."""
        return hash((type(self), _key(self)))

    def __str__(self) -> str:
        """The name with its hyperparameters, without the axis, as the report shows it."""
        if not dataclasses.is_dataclass(self):
            return type(self).__name__
        left_out = ("axis", "axis_name")
        values = (getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out)
        return f"{type(self).__name__}({', '.join(map(_short, values))})"


# Of a class without a constructor of its own: it takes no arguments.
_CLS = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)
Constraint.__new__.__signature__ = inspect.Signature([_CLS])  # pyright: ignore[reportFunctionMemberAccess]


@jax.custom_jvp
def _nudge(delta: jax.Array, reached: jax.Array, allowed: jax.Array) -> jax.Array:
    """`delta`, one step further where what it reached is not what is allowed there."""
    most = jnp.finfo(delta.dtype).max
    towards = jnp.where(allowed > reached, most, -most).astype(delta.dtype)
    outside = (allowed > reached) | (allowed < reached)
    return jnp.where(outside, jnp.nextafter(delta, towards), delta)


@_nudge.defjvp
def _nudge_jvp(primals: Any, tangents: Any) -> Any:
    return _nudge(*primals), tangents[0]


# Compiled by itself, for calls outside jit.
_nudged = jax.jit(_nudge, inline=True)


# Constraints as pytrees, and as values that are equal or not.


@functools.cache
def _register_pytree(cls: type["Constraint"]) -> None:
    """Makes the objects of a class pytrees, unless they are already.

    Not with `register_dataclass`: it makes objects by their constructor, which checks numbers,
    and JAX fills trees with placeholders; and what a field holds, a number or text, decides
    here whether it is a leaf.
    """

    def flatten_with_keys(constraint: Constraint) -> Any:
        data, structure = _split(constraint)
        return [(jax.tree_util.GetAttrKey(k), v) for k, v in data.items()], structure

    def flatten(constraint: Constraint) -> Any:
        data, structure = _split(constraint)
        return list(data.values()), structure

    def unflatten(structure: _Structure, leaves: Iterable[Any]) -> Constraint:
        values = {name: held.value for name, held in structure.rest}
        new = _remake(cls, values | dict(zip(structure.data, leaves, strict=True)))
        # So that an object with placeholders in it has the same structure.
        object.__setattr__(new, _DATA, structure.data)
        return new

    with contextlib.suppress(ValueError):
        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)


class _Structure(NamedTuple):
    """What of a constraint is no leaf."""

    data: tuple[str, ...]
    """The names of what is."""
    rest: tuple[tuple[str, "_Held"], ...]


_DATA = "_names_of_data"


def _values(constraint: Constraint) -> dict[str, Any]:
    """The attributes of a constraint: its fields, and what a user's class may have besides."""
    names = [f.name for f in _fields(constraint)]
    slots = (name for cls in type(constraint).__mro__ for name in getattr(cls, "__slots__", ()))
    names += sorted({*slots, *vars(constraint)} - {*names, _DATA})
    return {name: getattr(constraint, name) for name in names if hasattr(constraint, name)}


def _split(constraint: Constraint) -> tuple[dict[str, Any], _Structure]:
    """The subtrees of a constraint by name, and its structure."""
    values = _values(constraint)
    names = vars(constraint).get(_DATA)
    if names is None:
        own = type(constraint) in _builtin
        numbers = {f.name for f in _fields(constraint) if own and f.metadata.get("number")}
        names = tuple(
            name
            for name, value in values.items()
            if (_is_number(value) if name in numbers else _is_data(value, own))
        )
    rest = tuple((k, _Held(value)) for k, value in values.items() if k not in names)
    return {name: values[name] for name in names}, _Structure(names, rest)


def _is_number(value: Any) -> bool:
    """Whether a field for numbers holds some, and no text or schedule."""
    if isinstance(value, Constraint) or _is_array(value):
        return True
    return not isinstance(value, str) and not callable(value)


def _is_data(value: Any, own: bool) -> bool:
    """Whether another field holds arrays or constraints.

    A class of a user's own may count on NumPy arrays to be concrete.
    """
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_data(part, own) for part in value)
    return isinstance(value, (Constraint, jax.Array) if not own else (Constraint, *_ARRAYS))


def _remake(cls: type[_Made], values: Mapping[str, Any]) -> _Made:
    """An object of a class with these attributes, without its constructor."""
    new = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(new, name, value)
    return new


def _key(constraint: Constraint) -> Hashable:
    """What equality and hashing compare: the fields, or the object itself."""
    if not dataclasses.is_dataclass(constraint):
        return id(constraint)
    return tuple((name, _Compared(value)) for name, value in _values(constraint).items())


class _Compared:
    """A value of a field, which is equal to others and hashes also if there are arrays in it."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Compared) and _equal(self.value, other.value)

    def __hash__(self) -> int:
        # Of an array not what it holds: that may be large, and on a device.
        if _is_array(self.value):
            return hash((np.shape(self.value), str(jnp.result_type(self.value))))
        if isinstance(self.value, (tuple, list)):
            return hash(tuple(map(_Compared, self.value)))
        return hash(self.value)

    def __repr__(self) -> str:
        return repr(self.value)


class _Held(_Compared):
    """One that always hashes: what does not by itself is equal to itself alone."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Held):
            return False
        return self.value is other.value or (hash(self) == hash(other) and super().__eq__(other))

    def __hash__(self) -> int:
        try:
            return super().__hash__()
        except TypeError:
            return id(self.value)


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_equal, a, b))
    if _is_array(a) and _is_array(b):
        if a.shape != b.shape or a.dtype != b.dtype or not (_is_readable(a) and _is_readable(b)):
            return False
        try:
            return np.asarray(a).tobytes() == np.asarray(b).tobytes()
        except (RuntimeError, TypeError):  # deleted, or a random key
            return False
    if _is_array(a) or _is_array(b):
        return False
    return a == b


def _is_readable(array: Any) -> bool:
    """Whether this process can read the numbers of an array now."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def axis_names(constraint: Any) -> tuple[str, ...]:
    """The axes of meshes that a constraint, or what it is made of, names."""
    if isinstance(constraint, (tuple, list)):
        return tuple(name for part in constraint for name in axis_names(part))
    if not isinstance(constraint, Constraint):
        return ()
    values = _values(constraint)
    named = values.get("axis_name")
    own = () if named is None else (named,) if isinstance(named, str) else tuple(named)
    return own + axis_names(tuple(values.values()))


def own_arrays(constraint: Constraint) -> None:
    """Copies the NumPy arrays among the fields of a constraint, which their owner may change."""
    for name, value in _values(constraint).items():
        if isinstance(value, np.ndarray):
            value = np.array(value)
            value.flags.writeable = False
            object.__setattr__(constraint, name, value)


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


def _fields(constraint: Constraint) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(constraint) if dataclasses.is_dataclass(constraint) else ()


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
    if callable(value) and not isinstance(value, Constraint):
        return None
    if isinstance(value, bool) or not isinstance(
        value, (int, float, np.number, np.ndarray, jax.Array)
    ):
        raise TypeError(
            f"{what} is not a number; write a float, a JAX scalar or an Optax schedule."
        )
    if _is_array(value):
        _check_scalar(what, value)
        if not _is_readable(value):
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


_ARRAYS = np.ndarray, jax.Array


def _is_array(value: Any) -> TypeGuard[np.ndarray | jax.Array]:
    return isinstance(value, _ARRAYS)


def _short(value: object) -> str:
    if isinstance(value, Constraint):
        return str(value)
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, Tracer):
        return "traced"
    if callable(value):
        return "schedule"
    if isinstance(value, (int, float, np.number)) or (
        _is_array(value) and cast(Any, value).ndim == 0
    ):
        return f"{float(cast(Any, value)):.4g}"
    if _is_array(value):
        return f"array {'x'.join(map(str, cast(Any, value).shape))}"
    return repr(value)


# Identifiers and configs.

_Registrable = TypeVar("_Registrable", bound="type[Constraint] | Projection")

# Every name that `get` and `deserialize` know: the library's own, written once in
# optax_constraints/__init__.py, and what users register.
_registry: dict[str, type[Constraint] | Projection] = {}
_builtin: dict[type, str] = {}

_KERAS_MODULE = "keras.constraints"
_OWN_MODULE = "optax_constraints"


def register_builtin(cls: type[Constraint], *, in_keras: bool = False) -> None:
    """Enters one of the library's own sets under its name and its snake_case alias."""
    _registry[cls.__name__] = _registry[snake_case(cls.__name__)] = cls
    _builtin[cls] = _KERAS_MODULE if in_keras else _OWN_MODULE


def is_builtin(constraint: Constraint) -> bool:
    """Whether a constraint is one of the library's own, whose shapes need no check."""
    fields = (getattr(constraint, f.name) for f in _fields(constraint))
    parts = (part for value in fields for part in (value if isinstance(value, tuple) else [value]))
    return type(constraint) in _builtin and all(
        is_builtin(part) for part in parts if isinstance(part, Constraint)
    )


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
        raise ValueError(
            f"Could not interpret constraint identifier: {identifier!r}. Write a constraint "
            "such as max_norm(2.0), a name such as 'max_norm', a config, or a function "
            "array -> array."
        )
    return thing


def _look_up(name: str) -> Any:
    if name not in _registry:
        close = difflib.get_close_matches(name, _registry, n=3, cutoff=0.5)
        # Of a set of the library, one of its two names is enough.
        names = {
            snake_case(known) if _registry[known] in _builtin else known for known in _registry
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

    For the classes that Keras has, it is the form that Keras gives, and loads there.

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


def _serialize_pattern(pattern: object) -> Any:
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return {"regex": pattern.pattern, "flags": pattern.flags}
    raise TypeError(
        f"The pattern {pattern!r} has no JSON form; write a string or a compiled regular "
        "expression."
    )


def _serialize_constraint(constraint: Any) -> dict[str, Any]:
    if isinstance(constraint, FunctionConstraint):
        constraint = constraint.function
    is_function = not isinstance(constraint, Constraint)
    definition = constraint if is_function else type(constraint)
    module = None if is_function else _builtin.get(definition)
    if module is not None:
        return _config(module, definition.__name__, constraint.get_config(), None)
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
    return _config(_OWN_MODULE, definition.__name__, constraint.get_config(), names[0])


def _config(module: str, class_name: str, config: Any, registered: str | None) -> dict[str, Any]:
    return {
        "module": module,
        "class_name": class_name,
        "config": config,
        "registered_name": registered,
    }


def _to_json(what: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Constraint):
        return _serialize_constraint(value)
    if isinstance(value, (tuple, list)):
        return [_to_json(what, v) for v in value]
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
    if isinstance(pattern, Mapping):
        if isinstance(pattern.get("regex"), str):
            _check_length(pattern["regex"])
        try:
            # Under DEBUG, compiling would print.
            pattern = re.compile(pattern["regex"], pattern.get("flags", 0) & ~int(re.DEBUG))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
            raise ValueError(
                f"{shown(pattern)} is not a pattern; write a string, or "
                "{'regex': '...', 'flags': 0}."
            ) from error
    elif not isinstance(pattern, str):
        raise TypeError(f"{shown(pattern)} is not a pattern; write a string.")
    else:
        _check_length(pattern)
    return pattern, _deserialize(value)


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
    elif registered is not None and _registry.get(class_name) in _builtin:
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
    """Reads the forms in which Keras writes tuples, NumPy arrays and tensors."""
    if not isinstance(value, Mapping):
        return value
    kind, content = value.get("class_name"), value.get("config")
    if kind == "__tuple__" and isinstance(value.get("items"), list):
        return tuple(value["items"])
    if kind in ("__numpy__", "__tensor__") and isinstance(content, Mapping):
        return content.get("value")
    return value
