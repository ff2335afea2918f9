"""`Constraint`, the base class: a projection, a pytree, and a value."""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints._args import Arg
from optax_constraints._axes import LeafLayout, settle_axis
from optax_constraints._equality import Compared, Held
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import (
    Limits,
    Settled,
    SettledCount,
    check_scalar,
    fields_of,
    is_schedule,
    limits_of,
    settle_number,
)
from optax_constraints._numerics import ARRAYS, compute_dtype, is_array, widest

_Made = TypeVar("_Made", bound="Constraint")

own_classes: dict[type, str] = {}
"""The library's own sets, and the module by which their configs name them."""


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

    sign_preserving: ClassVar[bool] = False
    """Whether the projection takes no entry across zero, nor away from it."""

    loses_steps: ClassVar[bool] = False
    """Whether allowed weights lie apart, so that after a small update of all of them the
    projection leads back to where they were. `project` warns of such a set at init, and
    `straight_through` trains with it."""

    remembers: ClassVar[bool] = False
    """Whether `advance` needs what `remember` returned, which `project` keeps in its state."""

    starts_anew: ClassVar[bool] = False
    """Whether what it remembers only saves work, so that `advance` can do without: with `()`."""

    formula: ClassVar[str] = "{ w : P(w) = w }"
    """The set in symbols, as notebooks show it. ``{name}`` stands for the field of that name. By
    convention `w` are the weights, `u` is one unit of them, and `W` one matrix."""

    spectral: ClassVar[bool] = False
    """Whether `gauge` decomposes matrices, which takes long for large ones."""

    spreads: ClassVar[bool] = False
    """Whether the work on a matrix is worth a way to another device: on a mesh, matrices of one
    shape are then divided over the devices."""

    _not_shown: ClassVar[tuple[str, ...]] = ("axis", "axis_name")
    """Fields that the report leaves out."""

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
        # A constraint inside has the form that `serialize` gives it, and that file needs this one.
        from optax_constraints._config import to_json

        name = type(self).__name__
        return {
            f.name: to_json(f"{name}.{f.name}", getattr(self, f.name))
            for f in fields_of(type(self))
        }

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

    @property
    def has_tangent(self) -> bool:
        """Whether `tangent` knows the directions that stay in the set."""
        own = type(self)
        cone = self.convex and own._along is not Constraint._along
        return self.smooth or cone or own.tangent is not Constraint.tangent

    def tangent(
        self,
        w: jax.typing.ArrayLike,
        v: jax.typing.ArrayLike,
        memory: Any = (),
        *,
        slack: jax.typing.ArrayLike = 0.0,
    ) -> jax.Array:
        """The nearest direction to a vector along which the set goes on, to first order.

        That is the projection of the vector onto the tangent cone of the set at the weights; of
        a smooth set, onto its tangent space. As it stands, it is for smooth sets; a convex set
        writes its own.

        Args:
            w: Weights in the set.
            v: A vector, such as a step, of the same shape.
            memory: What is remembered of the leaf.
            slack: How near to a bound, beside rounding, an entry counts as at it.

        Returns:
            The tangent part, in the dtype of `v`.
        """
        w, v = jnp.asarray(w), jnp.asarray(v)
        dtype = compute_dtype(w.dtype, v.dtype)
        along = self._along(w, v.astype(dtype), memory, jnp.asarray(slack, dtype))
        return along.astype(v.dtype)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """`tangent` of a vector in a dtype in which sums are taken, float32 or wider."""
        del slack

        def project(w: jax.Array) -> jax.Array:
            known = self.remembers and jax.tree.leaves(memory)
            return self.advance(w, memory)[0] if known else self(w)

        return jax.jvp(project, (w.astype(v.dtype),), (v,))[1]

    def at(self, step: jax.typing.ArrayLike) -> "Constraint":
        """This constraint with each schedule replaced by its value.

        Args:
            step: The step, counted from 0.

        Returns:
            A constraint without schedules. What they return is not checked, since under
            `jax.jit` it could not be: a bound below 0 counts as 0, as if it were traced.
        """
        values = {}
        for field in fields_of(type(self)):
            given = getattr(self, field.name)
            if isinstance(given, Constraint):
                values[field.name] = given.at(step)
            elif limits_of(field) and is_schedule(given):
                values[field.name] = given(step)
        return self._replace(**values) if values else self

    def read(self, extra: Mapping[str, Any], path: str) -> "Constraint":
        """This constraint with a number, or an array, in the place of each `arg`.

        Args:
            extra: The extra arguments of `tx.update`.
            path: The path of the leaf.

        Returns:
            A constraint without `arg`. As for schedules, numbers are not checked.

        Raises:
            ValueError: If an argument is missing, or is an array where one number is needed.
        """
        values = {}
        for field in fields_of(type(self)):
            given, limits = getattr(self, field.name), limits_of(field)
            if isinstance(given, Constraint):
                values[field.name] = given.read(extra, path)
            elif isinstance(given, Arg):
                what = f"{type(self).__name__}: {field.name}={given!r} on {path!r}"
                values[field.name] = found = given.read(what, extra, path)
                if limits and not limits.array:
                    check_scalar(what, found)
        return self._replace(**values) if values else self

    def _replace(self, **values: Any) -> Self:
        """This constraint with other values in some fields.

        Those of the library's own sets are not checked again: they may be traced.
        """
        if type(self) not in own_classes:
            return dataclasses.replace(cast(Any, self), **values)
        return _remake(type(self), {**_values(self), **values})

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> "Constraint":
        """This constraint for one leaf: with its `axis`, if it has one, and numbers for text.

        Args:
            path: Path of the leaf.
            shape: Shape of the leaf.
            layout: What the model says of the leaf, where there is one.

        Returns:
            A constraint whose `axis` is a tuple of non-negative ints.

        Raises:
            ValueError: If the leaf does not have that axis, or `"fan_in"` is not certain.
        """
        owner, values = type(self).__name__, {}
        for field in fields_of(type(self)):
            given, limits = getattr(self, field.name), self._limits(field)
            if field.name == "axis":
                values["axis"] = settle_axis(owner, given, shape, path, layout)
            elif limits and isinstance(given, str):
                values[field.name] = settle_number(
                    owner, field.name, given, limits, path, shape, layout
                )
        return self._replace(**values) if values else self

    def _limits(self, field: dataclasses.Field) -> Limits | None:
        """What the numbers in one field are, for text; None for a field of something else."""
        return limits_of(field)

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """Which units of an allowed array lie on the boundary of the set.

        Args:
            w: The weights.

        Returns:
            One bool a unit, in any shape, or None for a set that does not say.
        """
        del w
        return None

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The numbers that the set bounds, for people to look at; as it stands, the entries.

        Args:
            w: The weights, in the set or not.
            memory: What is remembered of the leaf.

        Returns:
            A number for each unit, each entry or each singular value, and where its bounds are.
        """
        del memory
        return Gauge("entries", w)

    def _repr_html_(self) -> str:
        """The set in symbols, for notebooks."""
        from optax_constraints._html import set_html  # that file needs this one

        return set_html(self)

    def prepare(self, params: Any, updates: Any, memory: Any = ()) -> Any:
        """What `update` has to know of whole units, such as their norms, or None for nothing.

        `project` orders leaves by it, so that they share the memory that this takes.

        Args:
            params: The weights as they are.
            updates: The update, of the same shape.
            memory: What is remembered of the leaf.

        Returns:
            A tree of arrays with a number for each unit, for the last of which other leaves
            wait; or None.
        """
        del params, updates, memory
        return None

    def taken(
        self, params: Any, updates: Any, prepared: Any, memory: Any = ()
    ) -> tuple[Any, jax.Array, jax.Array | None] | None:
        """What is known after `prepare`, so that statistics need no pass over the weights for it.

        Args:
            params: The weights, in the dtype in which their sums are taken.
            updates: The update, of the same shape.
            prepared: What `prepare` returned.
            memory: What is remembered of the leaf.

        Returns:
            The weights after the update, as `prepare` summed them; the norm of what the
            projection takes away from them; and what `on_bound` says after it. None if that
            is not known.
        """
        del params, updates, prepared, memory
        return None

    def update(
        self, params: Any, updates: Any, memory: Any = (), prepared: Any = None
    ) -> tuple[Any, Any]:
        """The update that takes one leaf to the projection of ``params + updates``.

        Args:
            params: The weights as they are.
            updates: The update, of the same shape.
            memory: What is remembered of the leaf, for `advance`.
            prepared: What `prepare` returned, if it was called.

        Returns:
            ``P(params + updates) - params``, in the wider dtype of the two; and what to remember.
        """
        del prepared
        return self.lead(params, updates, jax.tree.map(moved, params, updates), memory)

    def lead(self, params: Any, updates: Any, total: Any, memory: Any = ()) -> tuple[Any, Any]:
        """`update`, from the weights that the update leads to."""
        target, memory = self.aim(total, memory)
        delta = jax.tree.map(difference, target, params, updates)
        return self.keep_inside(params, delta, memory), memory

    def keep_inside(self, params: Any, delta: Any, memory: Any = ()) -> Any:
        """An update after which no entry is outside of an elementwise set.

        ``p + (t - p)`` can round to a neighbour of `t` that is outside the set. One step of the
        update towards the set is enough to bring the sum back in.

        Args:
            params: The weights as they are.
            delta: The update, of the same shape.
            memory: What is remembered after the update.

        Returns:
            The update, of the dtype of `delta`; of other sets just that.
        """
        if not self.elementwise:
            return delta
        reached = jax.lax.stop_gradient(jax.tree.map(moved, params, delta))
        return jax.tree.map(nudged, delta, reached, self.aim(reached, memory)[0])

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
        names = (f.name for f in dataclasses.fields(self) if f.name not in self._not_shown)
        values = (getattr(self, name) for name in names)
        return f"{type(self).__name__}({', '.join(map(_short, values))})"


# Of a class without a constructor of its own: it takes no arguments.
_CLS = inspect.Parameter("cls", inspect.Parameter.POSITIONAL_ONLY)
Constraint.__new__.__signature__ = inspect.Signature([_CLS])  # pyright: ignore[reportFunctionMemberAccess]


def moved(params: jax.Array, updates: jax.Array) -> jax.Array:
    """The weights after an update, in their dtype."""
    dtype = widest(params.dtype, updates.dtype)
    return (params.astype(dtype) + updates.astype(dtype)).astype(params.dtype)


def difference(target: jax.Array, params: jax.Array, updates: jax.Array) -> jax.Array:
    """The update that leads from the weights to a target, in the dtype of a sum of the two."""
    dtype = widest(params.dtype, updates.dtype)
    return target.astype(dtype) - params.astype(dtype)


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
nudged = jax.jit(_nudge, inline=True)


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
    rest: tuple[tuple[str, "Held"], ...]


_DATA = "_names_of_data"


def _values(constraint: Constraint) -> dict[str, Any]:
    """The attributes of a constraint: its fields, and what a user's class may have besides."""
    names = _names_of_class(type(constraint))
    own = vars(constraint)
    more = own.keys() - {*names, _DATA}
    return {
        name: own[name] if name in own else getattr(constraint, name)
        for name in (*names, *sorted(more))
        if name in own or hasattr(constraint, name)
    }


@functools.cache
def _names_of_class(kind: type) -> tuple[str, ...]:
    """The names of fields, and then of slots."""
    fields = [f.name for f in fields_of(kind)]
    slots = {name for cls in kind.__mro__ for name in getattr(cls, "__slots__", ())}
    return (*fields, *sorted(slots - {*fields}))


def _split(constraint: Constraint) -> tuple[dict[str, Any], _Structure]:
    """The subtrees of a constraint by name, and its structure."""
    values = _values(constraint)
    names = vars(constraint).get(_DATA)
    if names is None:
        own = type(constraint) in own_classes
        numbers = {f.name for f in fields_of(type(constraint)) if own and f.metadata.get("number")}
        names = tuple(
            name
            for name, value in values.items()
            if (_holds_numbers(value) if name in numbers else _is_data(value, own))
        )
    rest = tuple((k, Held(value)) for k, value in values.items() if k not in names)
    return {name: values[name] for name in names}, _Structure(names, rest)


def _holds_numbers(value: Any) -> bool:
    """Whether a field for numbers holds some, and no text, schedule or `arg`."""
    if isinstance(value, Constraint) or is_array(value):
        return True
    return not isinstance(value, (str, Arg)) and not callable(value)


def _is_data(value: Any, own: bool) -> bool:
    """Whether another field holds arrays or constraints.

    A class of a user's own may count on NumPy arrays to be concrete.
    """
    if isinstance(value, (tuple, list)):
        return bool(value) and all(_is_data(part, own) for part in value)
    return isinstance(value, (Constraint, jax.Array) if not own else (Constraint, *ARRAYS))


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
    return tuple((name, Compared(value)) for name, value in _values(constraint).items())


def tangent_at(constraint: Constraint, w: Any, v: Any, memory: Any = (), slack: Any = None) -> Any:
    """`constraint.tangent`, with no more arguments than it needs.

    A class of a user's own may have written it for two.
    """
    more = (memory,) if constraint.remembers else ()
    if slack is None or not is_own(constraint):
        return constraint.tangent(w, v, *more)
    return constraint.tangent(w, v, *more, slack=slack)


def parts_of(constraint: Any) -> Iterator[Constraint]:
    """A constraint, and all that it is made of."""
    if isinstance(constraint, (tuple, list)):
        for part in constraint:
            yield from parts_of(part)
    elif isinstance(constraint, Constraint):
        yield constraint
        yield from parts_of(tuple(_values(constraint).values()))


def is_own(constraint: Constraint) -> bool:
    """Whether a constraint is one of the library's own, whose shapes need no check."""
    return all(type(part) in own_classes for part in parts_of(constraint))


def axis_names(constraint: Constraint) -> tuple[str, ...]:
    """The axes of meshes that a constraint, or what it is made of, names."""
    named = [_values(part).get("axis_name") or () for part in parts_of(constraint)]
    return tuple(n for own in named for n in ((own,) if isinstance(own, str) else own))


def has_args(constraint: Constraint) -> bool:
    """Whether a constraint, or what it is made of, needs extra arguments of `tx.update`."""
    values = (_values(part).values() for part in parts_of(constraint))
    return any(isinstance(value, Arg) for own in values for value in own)


def own_arrays(constraint: Constraint) -> None:
    """Copies the NumPy arrays among the fields of a constraint, which their owner may change."""
    for name, value in _values(constraint).items():
        if isinstance(value, np.ndarray):
            value = np.array(value)
            value.flags.writeable = False
            object.__setattr__(constraint, name, value)


def _short(value: object) -> str:
    if isinstance(value, Constraint):
        return str(value)
    if isinstance(value, tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, Tracer):
        return "traced"
    if isinstance(value, Arg):
        return repr(value)
    if isinstance(value, (Settled, SettledCount)):
        return f"{value:.4g} = {value.text}"
    if callable(value):
        return "schedule"
    if isinstance(value, (int, float, np.number)) or (
        is_array(value) and cast(Any, value).ndim == 0
    ):
        return f"{float(cast(Any, value)):.4g}"
    if is_array(value):
        return f"array {'x'.join(map(str, cast(Any, value).shape))}"
    return repr(value)
