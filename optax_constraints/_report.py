"""The table for people."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._axes import Layout
from optax_constraints._called import called
from optax_constraints._constraint import Constraint, parts_of
from optax_constraints._gauge import Gauge, Histogram, gauged, histogram, sample
from optax_constraints._groups import Group
from optax_constraints._html import report_html
from optax_constraints._patterns import Rules
from optax_constraints._violations import away_from, between, distance, visits
from optax_constraints._walk import Bound, Visit

_WIDTH = 100
_RIGHT = {"units", "at bound", "outside"}
_FEW = 2**16
"""So many numbers are read back from a device sooner than a program for them is compiled."""
_MOST_WORK = 2**28
"""About so many operations may go into a spectrum: a matrix of 640 x 640, a tenth of a second."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of a report. Fields that do not apply are None."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    constraint: str | None
    """The constraint with its numbers at the step of the report; None for a free leaf."""
    axis: tuple[int, ...] | None
    """The axes along which one unit runs, for a constraint that has any."""
    units: int | None
    """How many parts of the leaf are constrained each by itself."""
    at_bound: int | None
    """How many of them lie on the boundary of their set, once projected."""
    outside: float | None
    """Euclidean distance of the leaf to its set."""
    layer: str | None = None
    """Type of the layer that owns the leaf, where a layout was given."""
    group: str | None = None
    """The name of the group that the leaf is in: its rows stand together, and the first has the
    units of all."""
    inside: bool | None = None
    """Whether the leaf is in its set, up to rounding as `assert_feasible` allows it."""
    histogram: Histogram | None = None
    """Where the units of the leaf or group stand against their bound, before they are projected;
    None also for the spectra of large matrices, which would take long."""

    @property
    def _follows(self) -> bool:
        """Whether an earlier row has what holds for the whole group."""
        return self.group is not None and self.axis is None and self.units is None

    def _cells(self) -> dict[str, str]:
        def text(value: object) -> str:
            return "-" if value is None else f"{value:,}"

        axis = None if self.axis is None else ",".join(map(str, self.axis))
        return {
            "path": self.path or "(root)",
            "layer": self.layer or "",
            "shape": "x".join(map(str, self.shape)) or "scalar",
            "dtype": self.dtype,
            "constraint": "as above" if self._follows else self.constraint or "free",
            "axis": "-" if axis is None else axis or "none",
            "units": text(self.units),
            "at bound": text(self.at_bound),
            "outside": "-" if self.outside is None else f"{self.outside:.3g}",
        }


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What `report` returns: a table that prints, shows in a notebook, and has rows of data."""

    rows: tuple[Row, ...]
    """One row per array of the tree, in its order."""

    def __repr__(self) -> str:
        """The table, as `str` has it."""
        return str(self)

    def _repr_html_(self) -> str:
        """The table for notebooks, by module, with a histogram of the units of each leaf."""
        return report_html(self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as dicts of plain values, from which `pandas.DataFrame` makes a table.

        Returns:
            For each row its fields by name, but for the histogram.

        Example:
            >>> import jax.numpy as jnp
            >>> import optax_constraints as oc
            >>> (row,) = oc.report({"w": 2 * jnp.eye(3)}, oc.max_norm(1.0)).to_dicts()
            >>> row["constraint"], row["at_bound"], row["units"], row["inside"]
            ('MaxNorm(1)', 3, 3, False)
        """
        names = [f.name for f in dataclasses.fields(Row) if f.name != "histogram"]
        return [{name: getattr(row, name) for name in names} for row in self.rows]

    def __str__(self) -> str:
        """The table, at most 100 columns wide."""
        if not self.rows:
            return "no leaves"
        table = [row._cells() for row in self.rows]
        columns = [name for name in table[0] if name != "layer" or any(r[name] for r in table)]
        table.insert(0, {name: name for name in columns})
        widths = _fit({name: max(len(cells[name]) for cells in table) for name in columns})
        lines = [
            "  ".join(_cell(cells[name], widths[name], name) for name in columns).rstrip()
            for cells in table
        ]
        lines.insert(1, "-" * (sum(widths.values()) + 2 * (len(widths) - 1)))
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> list[str]:
        constrained = [row for row in self.rows if row.constraint is not None]
        text = f"{len(constrained)} of {len(self.rows)} leaves constrained"
        if any(row.units is not None for row in constrained):
            units = sum(row.units or 0 for row in constrained)
            at_bound = sum(row.at_bound or 0 for row in constrained)
            text += f"; {at_bound:,} of {units:,} units at their bound"
        if not constrained:
            return [text]
        # NaN is the worst there is, and compares as nothing.
        worst = max(constrained, key=lambda row: (row.outside != row.outside, row.outside))
        if worst.outside == 0:
            return [f"{text}; none outside"]
        path = shorten_path(worst.path or "(root)", _WIDTH - 40)
        return [text, f"furthest outside: {worst.outside:.3g} in {path}"]


def report(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
) -> Report:
    """A table of every leaf: its constraint, how hard that binds, and whether it holds.

    Reads the weights back from the device: call it outside `jax.jit`. To log from inside,
    use `violations`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step, state, extra, layout, strict: As for `violations`; with a layout the table has a
            column for the type of each layer.

    Returns:
        The report; print it, or read its `rows`.

    Raises:
        TypeError: If a rule names a leaf that is not floating-point, or weights are traced.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
        >>> print(oc.report(params, {"kernel": oc.max_norm(2.0)}))
        path    shape  dtype    constraint  axis  units  at bound  outside
        ------------------------------------------------------------------
        bias    3      float32  free        -         -         -        -
        kernel  4x3    float32  MaxNorm(2)  0         3         3        0
        1 of 2 leaves constrained; 3 of 3 units at their bound; none outside
    """
    found = visits("report", params, rules, step, state, extra, layout, strict)
    return Report(tuple(row for visit in found for row in rows_of(visit)))


def assert_feasible(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
    tolerance: float = 16.0,
) -> None:
    """Raises an error that lists what is outside its set, worst first.

    For tests of a training loop of one's own: it fails if `project` is not the last in its
    chain, if weights were loaded or averaged and not constrained, and if rules have come to
    match other leaves. Reads the weights back from the device: call it outside `jax.jit`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step, state, extra, layout, strict: As for `violations`; `step` is that of the last
            update, so the count of updates less 1.
        tolerance: How far outside rounding may lead: so many machine epsilons of a leaf's dtype
            times its norm. Elementwise sets have none.

    Raises:
        AssertionError: If a leaf is outside its set, or holds a NaN.
        TypeError: If a rule names a leaf that is not floating-point, or weights are traced.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.assert_feasible({"bias": jnp.zeros(3)}, {"bias": oc.non_neg()})
        >>> oc.assert_feasible({"bias": -jnp.ones(3)}, {"bias": oc.non_neg()})
        Traceback (most recent call last):
        AssertionError: 1 of 1 constrained leaves is outside its set:
          bias (3, float32) is 1.73 from NonNeg()
        Is project last in its chain? Weights that were loaded or averaged need constrain.
    """
    constrained, outside = 0, []
    found = visits("assert_feasible", params, rules, step, state, extra, layout, strict)
    for bound, constraint, weights, memory in found:
        if constraint is None:
            continue
        arrays = jax.tree.leaves(weights)
        constrained += len(arrays)
        distances = called(away_from, constraint, weights, memory, compiled=True)
        away = _read("assert_feasible", bound, distances)
        rounding = allowance(constraint, arrays, tolerance) if any(away) else 0.0
        for path, w, own in zip(bound.paths, arrays, away, strict=True):
            if not own <= rounding:  # also if it is NaN
                shape = "x".join(map(str, w.shape)) or "scalar"
                text = f"{path} ({shape}, {w.dtype}) is {own:.3g} from {constraint}"
                outside.append((-math.inf if math.isnan(own) else -own, text))
    if outside:
        worst = [f"  {text}" for _, text in sorted(outside)[:10]]
        verb = "is outside its set" if len(outside) == 1 else "are outside their sets"
        raise AssertionError(
            "\n".join(
                [
                    f"{len(outside)} of {constrained} constrained leaves {verb}"
                    + (":" if len(outside) <= 10 else "; the worst 10:"),
                    *worst,
                    "Is project last in its chain? Weights that were loaded or averaged need "
                    "constrain.",
                ]
            )
        )


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@jax.jit
def _norm(w: jax.Array) -> jax.Array:
    """The norm of an array, in float32 or wider."""
    return _numerics.norm(w.astype(_numerics.compute_dtype(w.dtype)), None).reshape(())


def _on_host(arrays: list[Any]) -> bool:
    """Whether norms of these are sooner taken by NumPy than by a program compiled for them."""
    # The squares of floats that are narrower neither overflow nor vanish in float64.
    return all(
        _numerics.is_readable(w) and w.size <= _FEW and w.dtype != np.float64 for w in arrays
    )


def _wide(w: Any) -> np.ndarray:
    """An array in float64, where what XLA takes for zeros are zeros."""
    wide = np.asarray(w).astype(np.float64)
    return np.where(np.abs(wide) < float(jnp.finfo(jnp.float32).tiny), 0, wide)


def _apart(w: Any, projected: Any) -> float:
    """The distance of two arrays; NaN if both have the same infinity."""
    with np.errstate(invalid="ignore"):
        return math.sqrt(np.square(_wide(w) - _wide(projected)).sum())


def _norm_of(w: Any, run: Callable[..., Any]) -> float:
    """The norm of an array that is not traced."""
    return math.sqrt(np.square(_wide(w)).sum()) if _on_host([w]) else float(run(_norm, w))


def allowance(
    constraint: Constraint,
    arrays: list[jax.Array],
    tolerance: float,
    run: Callable[..., Any] = _run,
) -> float:
    """How far outside its set a leaf, or each of a group, may be by rounding.

    Args:
        constraint: The constraint.
        arrays: The leaf, or the leaves of a group.
        tolerance: So many machine epsilons of the norm. Elementwise sets have none.
        run: Calls a function with arguments; it may compile it.

    Returns:
        A distance.
    """
    if constraint.elementwise:
        return 0.0
    eps = max(_numerics.eps(w.dtype) for w in arrays)
    norm = math.hypot(*(_norm_of(w, run) for w in arrays))
    # Beside weights whose norm overflows any distance would be rounding.
    return tolerance * eps * norm if math.isfinite(norm) else 0.0


def _at_bound(constraint: Constraint, projected: Any) -> Any:
    """Which units are at their bound; of many, how many there are and how many of them are."""
    at_bound = constraint.on_bound(projected)
    if at_bound is None or at_bound.size <= _FEW:
        return at_bound
    return at_bound.size, at_bound.sum()


def _counted(at_bound: Any) -> tuple[int | None, int | None]:
    """How many units there are, and how many of them are at their bound."""
    if at_bound is None:
        return None, None
    if isinstance(at_bound, tuple):
        units, count = at_bound
        return int(units), int(count)
    here = np.asarray(at_bound) if _numerics.is_readable(at_bound) else at_bound
    return at_bound.size, int(here.sum())


def _at_bound_of(constraint: Constraint, weights: Any, memory: Any) -> Any:
    return _at_bound(constraint, constraint.advance(weights, memory)[0])


@functools.cache
def _measure(on_host: bool, shown: bool) -> Callable[..., Any]:
    """A function for what a report measures: distances, what `_at_bound` says, and a gauge."""

    def measured(constraint: Constraint, weights: Any, memory: Any) -> tuple[Any, ...]:
        projected, _ = constraint.advance(weights, memory)
        away = projected if on_host else between(weights, projected)
        gauge = gauged(constraint, weights, memory) if shown else None
        return away, _at_bound(constraint, projected), gauge

    return measured


def rows_of(
    visit: Visit,
    run: Callable[..., Any] = _run,
    *,
    tolerance: float = 16.0,
    frugal: bool = False,
) -> list[Row]:
    """A row for each array of a leaf or group; the first says what holds for all.

    Args:
        visit: The leaf or group.
        run: Calls a function with arguments; it may compile it.
        tolerance: As for `assert_feasible`.
        frugal: Whether to hold fewer arrays at once: each leaf is projected twice, and rows do
            not say where each unit stands.

    Returns:
        The rows.
    """
    bound, constraint, weights, memory = visit
    if constraint is None and not hasattr(weights, "shape"):
        if not isinstance(weights, (int, float, complex)):
            return []
        weights = jnp.asarray(weights)
    rows = []
    for path, layout, leaf in zip(
        bound.paths, bound.layouts, jax.tree.leaves(weights), strict=True
    ):
        layer = layout.layer if layout else None
        none = (None,) * 5
        rows.append(Row(path, leaf.shape, str(leaf.dtype), *none, layer=layer))
    if constraint is None:
        return rows
    arrays, gauge = jax.tree.leaves(weights), None
    if frugal:
        distances = run(distance, weights, constraint, memory)
        at_bound = run(_at_bound_of, constraint, weights, memory)
    else:
        # Bounds may be infinite.
        infinite = not jax.config.jax_debug_infs  # pyright: ignore[reportAttributeAccessIssue]
        shown = infinite and _is_quick(constraint, weights)
        on_host = _on_host(arrays)
        measure = _measure(on_host, shown)
        distances, at_bound, gauge = called(measure, constraint, weights, memory, compiled=True)
        if on_host:
            projected = _untraced("report", bound, distances)
            distances = list(map(_apart, arrays, projected))
    away = _read("report", bound, distances)
    allowed = allowance(constraint, arrays, tolerance, run) if any(away) else 0.0
    name = bound.path if bound.is_group else None
    rows = [
        dataclasses.replace(
            row, constraint=str(constraint), outside=own, group=name, inside=own <= allowed
        )
        for row, own in zip(rows, away, strict=True)
    ]
    own = constraint.constraint if isinstance(constraint, Group) else constraint
    inside = all(row.inside for row in rows)
    units, bounded = _counted(at_bound)
    rows[0] = dataclasses.replace(
        rows[0],
        axis=getattr(own, "axis", None),
        units=units,
        at_bound=bounded,
        histogram=None if frugal else _histogram(constraint, weights, memory, inside, gauge),
    )
    return rows


def _is_quick(constraint: Constraint, weights: Any) -> bool:
    """Whether it does not take long to say where units stand."""
    arrays = jax.tree.leaves(weights)
    work = sum(w.size for w in arrays) * max(w.shape[-1] if w.ndim else 1 for w in arrays)
    return work <= _MOST_WORK or not any(part.spectral for part in parts_of(constraint))


def _histogram(
    constraint: Constraint, weights: Any, memory: Any, inside: bool, gauge: Gauge | None = None
) -> Histogram | None:
    """Where units stand, if it does not take long."""
    if not _is_quick(constraint, weights):
        return None
    found = sample(constraint, weights, memory, gauge)
    if found is None:
        return None
    # Of a set like a sphere, what has no direction and stays zero is inside, too.
    return histogram(dataclasses.replace(found, outside=found.outside & (not inside)))


def _untraced(verb: str, bound: Bound, found: Any) -> list[Any]:
    """The arrays that were found, or the reason why there are none to read."""
    arrays = jax.tree.leaves(found)
    if any(isinstance(own, Tracer) for own in arrays):
        raise TypeError(
            f"{verb} reads the weights, and those of {bound.path!r} are traced here, as under "
            f"jax.jit; call {verb} outside. Inside, write violations(params, rules): it returns "
            "arrays, which the compiled function can return in turn."
        )
    return arrays


def _read(verb: str, bound: Bound, distances: Any) -> list[float]:
    """Distances as numbers."""
    return list(map(float, _untraced(verb, bound, distances)))


def _fit(widths: dict[str, int]) -> dict[str, int]:
    """Takes from the columns of text, in this order, what does not fit in a page's width."""
    excess = sum(widths.values()) + 2 * (len(widths) - 1) - _WIDTH
    least = [("path", 28), ("constraint", 12), ("layer", 8), ("path", 10), ("constraint", 4)]
    for column, width in least:
        taken = max(0, min(excess, widths.get(column, 0) - width))
        if taken:
            widths[column] -= taken
            excess -= taken
    return widths


def _cell(text: str, width: int, column: str) -> str:
    if column == "path":
        text = shorten_path(text, width)
    text = _cut(text, width, tail=0)
    return text.rjust(width) if column in _RIGHT else text.ljust(width)


def shorten_path(path: str, width: int) -> str:
    """Cuts the middles of long segments, whose ends tell one layer from another.

    The last two, as in `query/kernel`, are cut only if it cannot be helped.
    """
    segments = path.split("/")
    for whole in (2, 0):
        cut, kept = segments[: len(segments) - whole], segments[len(segments) - whole :]
        for longest in range(max(map(len, cut), default=0), 3, -1):
            tail = max(longest // 2, min(3, longest - 2))
            short = "/".join([*(_cut(segment, longest, tail) for segment in cut), *kept])
            if len(short) <= width:
                return short
    return _cut(path, width, tail=width - 1)


def _cut(text: str, width: int, tail: int) -> str:
    """At most `width` characters of a text, `tail` of them from its end."""
    if len(text) <= width:
        return text
    return text[: width - 1 - tail] + "…" + text[len(text) - tail :]
