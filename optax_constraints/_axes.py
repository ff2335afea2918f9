"""What `axis` means for one leaf."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from optax_constraints._text import as_int, describe, shown, warn

Axis: TypeAlias = int | Sequence[int] | Literal["fan_in"] | None


class _LeafLayout(NamedTuple):
    layer: str
    """Type of the layer that owns it."""
    fan_in: tuple[int, ...] | None
    """The axes of the leaf along which a unit's incoming weights run; None if not known."""
    stacked: tuple[int, ...] = ()
    """The axes of the leaf along which layers are stacked, as by `nn.scan` or `nnx.vmap`."""


class LeafLayout(_LeafLayout):
    """What a model says of one parameter."""

    convolution: Any = None
    """What the layer does with a kernel, if it is a convolution: a `Convolution`. No field."""

    def __new__(cls, layer: str, fan_in: Any, stacked: Any = (), convolution: Any = None):
        self = super().__new__(cls, layer, fan_in, stacked)
        self.convolution = convolution
        return self

    def __eq__(self, other: object) -> bool:
        # A layout written by hand, or from before, says nothing of it.
        own, others = self.convolution, getattr(other, "convolution", None)
        same = own is None or others is None or own == others
        return same and tuple.__eq__(self, other)  # pyright: ignore[reportArgumentType]

    def __ne__(self, other: object) -> bool:
        return not self == other  # a tuple has its own

    __hash__ = tuple.__hash__

    def without(self, axes: tuple[int, ...]) -> "LeafLayout":
        """The same of one slice along these axes."""
        fan_in = None if self.fan_in is None else remove_axes(self.fan_in, axes)
        return LeafLayout(self.layer, fan_in, remove_axes(self.stacked, axes), self.convolution)


Layout: TypeAlias = Mapping[str, LeafLayout]


def layout_of(layout: Layout | None, path: str) -> LeafLayout | None:
    """What a layout says of the leaf at a path."""
    if layout is None:
        return None
    # Linen's `init` returns the parameters under this key.
    return layout.get(path) or layout.get(path.removeprefix("params/"))


_ATTENTION_IN = ("query", "key", "value")

_warn_once = functools.cache(warn)


def check_axis(owner: str, axis: Axis) -> int | tuple[int, ...] | Literal["fan_in"] | None:
    """Returns `axis` in a hashable form, or says why it is none."""
    wanted = "an int, a tuple or list of ints, None for the whole tensor, or 'fan_in'"
    if axis is None:
        return None
    if isinstance(axis, str):
        if axis == "fan_in":
            return "fan_in"
        raise ValueError(f"{owner}: axis={shown(axis)} is not known; write {wanted}.")
    if not isinstance(axis, Sequence) or isinstance(axis, (bytes, bytearray)):
        return _as_int(owner, axis, wanted)
    axes = tuple(_as_int(owner, a, wanted) for a in axis)
    if len(set(axes)) < len(axes):
        raise ValueError(f"{owner}: axis={shown(axis)} names an axis twice; name each axis once.")
    return axes


def _as_int(owner: str, axis: object, wanted: str) -> int:
    try:
        return as_int(axis)
    except TypeError:
        raise TypeError(f"{owner}: axis={shown(axis)} is not an axis; write {wanted}.") from None


def settle_axis(
    owner: str,
    axis: Axis,
    shape: tuple[int, ...],
    path: str | None = None,
    layout: LeafLayout | None = None,
    *,
    of_units: bool = True,
) -> tuple[int, ...]:
    """The axes of one leaf, as a sorted tuple of non-negative ints.

    An explicit axis is taken as it is written. Where the incoming weights of a unit are known to
    run along other axes, from a layout, or by the leaf's name and rank, there is a warning.

    Args:
        owner: The constraint, as errors name it.
        axis: The axis as the constraint holds it.
        shape: Shape of the leaf.
        path: Path of the leaf, or None for an array without one.
        layout: What the model says of the leaf.
        of_units: Whether these are the axes of units. Those of a stack are not.

    Returns:
        The axes along which one unit runs.

    Raises:
        ValueError: If an axis is out of range, repeated, or cannot be told.
    """
    where = f"{owner} on {describe(path, shape)}"
    if axis is None:
        return tuple(range(len(shape)))
    if axis == "fan_in":
        if layout is None:
            return _fan_in(where, path, shape)
        if layout.fan_in is None:
            raise ValueError(
                f"{where}: axis='fan_in' cannot be told: the layout does not know the axes of "
                f"this parameter of a {layout.layer}. Write the axes of one unit's incoming "
                f"weights, such as axis={_example(len(shape))}."
            )
        return layout.fan_in
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    rank = len(shape)
    if rank == 0 and axes:
        raise ValueError(
            f"{where}: a scalar has no axis {axis!r}; write axis=None, or leave it free "
            "with a rule that maps its path to None."
        )
    for a in axes:
        if not -rank <= a < rank:
            raise ValueError(
                f"{where}: axis {a} is out of range; this leaf has the axes "
                f"{-rank} to {rank - 1}, and None means the whole tensor."
            )
    settled = tuple(sorted(a % rank for a in axes))
    if len(set(settled)) < len(settled):
        raise ValueError(f"{where}: axis={axis!r} names an axis twice; name each axis once.")
    # No axes and all axes mean entries and the whole tensor, whatever a unit is.
    if of_units and path is not None and 0 < len(settled) < rank:
        fan_in = _told_by_name(path, shape) if layout is None else layout.fan_in
        # An axis of size 1 changes no unit, as in the depthwise kernels (electrodes, 1, 1, filters)
        # of EEGNet.
        if fan_in is not None and any(shape[a] != 1 for a in {*fan_in} ^ {*settled}):
            of_layer, how = (
                ("", ", by the name and rank of this leaf")
                if layout is None
                else (f" of this {layout.layer}", "")
            )
            _warn_once(
                f"{where}: axis={axis!r} is not where the incoming weights of a unit{of_layer} "
                f"run, which is axis={fan_in}{how}. If you mean those, write axis='fan_in'. If "
                f"not, axis={axis!r} is taken as it is written, and warnings.filterwarnings("
                f"'ignore', {f'{owner} on .{path}'!r}) turns this warning off."
            )
    return settled


def drop_axes(values: Sequence[int], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one slice of an array, without the axes along which it was cut."""
    return tuple(value for i, value in enumerate(values) if i not in axes)


def insert_axes(own: tuple[int, ...], stacked: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of one slice, as axes of the array that was cut along `stacked`."""
    for axis in sorted(stacked):
        own = tuple(a + (a >= axis) for a in own)
    return own


def remove_axes(axes: tuple[int, ...], stacked: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of an array that is cut along `stacked`, as axes of one slice."""
    return tuple(a - sum(s < a for s in stacked) for a in axes if a not in stacked)


def _fan_in(where: str, path: str | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of a unit's incoming weights, by the names and ranks that layers use."""
    if path is None:
        raise ValueError(
            f"{where}: axis='fan_in' is settled from the path of a leaf, and an array by "
            "itself has none; write the axes, such as axis=0 for a Dense kernel (in, out)."
        )
    told = _told_by_name(path, shape)
    if told is not None:
        return told
    rank = len(shape)
    raise ValueError(
        f"{where}: axis='fan_in' cannot be told from this name and rank: it may be a "
        "convolution, a stack of layers, or a layer of your own. Write the axes of one "
        f"unit's incoming weights, such as axis={_example(rank)}."
    )


def _told_by_name(path: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of a unit's incoming weights where name and rank leave no doubt, else None."""
    *parents, name = path.split("/")
    parent = parents[-1].lower() if parents else ""
    rank = len(shape)
    # Not every convolution: a local or transposed one may keep its axes in another order,
    # and what Linen calls Vmap... or Scan... is a stack.
    stacked = any(segment.startswith(("Vmap", "Scan")) for segment in parents)
    ordinary = not stacked and "local" not in parent and "transpose" not in parent
    conv = rank >= 3 and "conv" in parent and ordinary

    if name in ("bias", "scale", "b", "weight") and rank == 1:
        return (0,)
    if name in ("kernel", "w"):
        if rank == 2 or (rank == 3 and parent in _ATTENTION_IN):
            return (0,)
        if rank == 3 and parent == "out":
            return (0, 1)
        if conv:
            return tuple(range(rank - 1))
    if name in ("embedding", "embeddings") and rank == 2:
        return (1,)
    if name == "weight" and (rank == 2 or conv):
        return tuple(range(1, rank))
    return None


def _example(rank: int) -> str:
    return {0: "None", 1: "0", 2: "0", 3: "(0, 1) for a Conv1D or axis=1 for a stack of Dense"}.get(
        rank, f"{tuple(range(rank - 1))} for a convolution"
    )
