"""Pictures, for people who have Matplotlib: `plot`, `plot_stats` and `plot_set`."""

import functools
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints._axes import Layout
from optax_constraints._config import as_constraint
from optax_constraints._constraint import Constraint, parts_of
from optax_constraints._gauge import Sample, sample
from optax_constraints._html import symbols
from optax_constraints._patterns import Rules
from optax_constraints._report import shorten_path
from optax_constraints._stats import LeafStats
from optax_constraints._text import shown
from optax_constraints._violations import visits
from optax_constraints.sets._common import MatrixSet, UnitSet
from optax_constraints.sets.combinators import Several, Single, Stacked
from optax_constraints.sets.matrix import Radial, SkewSymmetric, Symmetric
from optax_constraints.sets.operator import MaxOperatorNorm
from optax_constraints.sets.order import Monotone
from optax_constraints.sets.pattern import ZeroDiagonal
from optax_constraints.sets.sequence import ConcaveSequence, ConvexSequence
from optax_constraints.sets.sparsity import NM, TopK
from optax_constraints.sets.transport import DoublyStochastic, Transport
from optax_constraints.sets.unimodal import Unimodal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSIDE, OUTSIDE = "#3e7bfa", "#e5484d"


@functools.cache
def _figure_class() -> type["Figure"]:
    """A figure that notebooks show without pyplot, whose state is not touched."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "Pictures need Matplotlib, which is not installed here; write pip install matplotlib."
        ) from None

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            picture = io.BytesIO()
            self.savefig(picture, format="png")
            return picture.getvalue()

    return NotebookFigure


def _figure(width: float, height: float) -> "Figure":
    return _figure_class()(figsize=(width, height), layout="constrained")


def plot(  # noqa: D417  # what verbs share is said once, in `constrain`
    params: Any,
    rules: Rules,
    *,
    step: jax.typing.ArrayLike = 0,
    state: Any = None,
    extra: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
    strict: bool = True,
    panels: int = 60,
) -> "Figure":
    r"""A picture of where the units of each constrained leaf stand against their bound.

    A panel for each constrained leaf, or group of leaves: its numbers in order, such as the norm
    of each unit, the entries of an elementwise set or the singular values of a matrix; bounds as
    dashed lines; and what is outside in red. Weights are shown as they are, before they are
    projected. Of large leaves a sample of 65,536 numbers is shown.

    Reads the weights back from the device: call it outside `jax.jit`. Sets of matrices take a
    singular value decomposition of each. Needs Matplotlib, the extra `plot`.

    Args:
        params: Any tree of arrays.
        rules: As for `project`.
        step, state, extra, layout, strict: As for `violations`.
        panels: The most panels; if there are more leaves, the ones furthest outside of their
            bounds and, after these, the first ones are shown, and a note says so.

    Returns:
        A Matplotlib figure. It is shown at the end of a notebook cell; elsewhere write
        ``figure.savefig("norms.png")``. Pyplot does not know of it.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If a rule names a leaf that is not floating-point, or weights are traced.
        ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
        >>> figure = oc.plot(params, {"kernel": oc.max_norm(2.0)})
        >>> [panel.get_title() for panel in figure.axes]
        ['kernel\nMaxNorm(2)']
    """
    if panels < 1:
        raise ValueError(f"plot: panels={panels} shows nothing; write 1 or more.")
    _figure_class()  # the error without Matplotlib comes before the work
    found = []
    for bound, constraint, weights, memory in visits(
        "plot", params, rules, step, state, extra, layout, strict
    ):
        if constraint is None:
            continue
        if any(isinstance(w, Tracer) for w in jax.tree.leaves(weights)):
            raise TypeError(
                f"plot reads the weights, and those of {bound.path!r} are traced here, as under "
                "jax.jit; call plot outside."
            )
        known = sample(constraint, weights, memory)
        if known is not None:
            found.append((bound.path, constraint, known))
    count = len(found)
    if count > panels:
        worst = sorted(range(count), key=lambda i: -_share_outside(found[i][2]))[:panels]
        found = [found[i] for i in sorted(worst)]
    columns = len(found) if len(found) <= 3 else min(6, round(math.sqrt(1.5 * len(found))))
    rows = math.ceil(len(found) / columns) if found else 1
    figure = _figure(max(2.7 * columns, 4), 2.2 * rows + 0.4)
    if not found:
        figure.text(0.5, 0.5, "no constrained leaves", ha="center", va="center")
        return figure
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in grid[len(found) :]:
        panel.remove()
    for panel, (path, constraint, known) in zip(grid, found, strict=False):
        _panel(panel, path, constraint, known)
    if count > len(found):
        figure.suptitle(
            f"{len(found)} of {count} constrained leaves: what is outside, and the first", size=11
        )
    figure.supxlabel("units or entries in order; bounds dashed; outside in red", size=9)
    return figure


def _share_outside(known: Sample) -> float:
    lost = known.not_finite / max(known.not_finite + known.values.size, 1)
    return lost + (float(np.mean(known.outside)) if known.values.size else 0.0)


def _panel(panel: "Axes", path: str, constraint: Constraint, known: Sample) -> None:
    """Sorted numbers of one leaf, from the largest on if they are a spectrum."""
    spectrum = "values" in known.name
    order = np.argsort(known.values, kind="stable")
    order = order[::-1] if spectrum else order
    # Some hundred points draw any curve; all that is outside is among them at least once.
    places = np.arange(order.size)
    if order.size > 800:
        kept = np.unique(np.linspace(0, order.size - 1, 800).astype(int))
        places = np.union1d(kept, np.flatnonzero(known.outside[order])[:200])
    values, outside = known.values[order][places], known.outside[order][places]
    x = places + 1
    few = order.size <= 60
    if few:
        panel.plot(x[~outside], values[~outside], "o", ms=3.5, color=INSIDE)
    else:
        panel.plot(x, values, color=INSIDE, lw=1.8)
    panel.plot(x[outside], values[outside], "o", ms=3.5 if few else 2, color=OUTSIDE)
    for bound in known.bounds[:16]:
        panel.axhline(bound, color="0.5", linestyle="--", lw=1, zorder=0)
    panel.margins(x=0.04, y=0.12)
    panel.locator_params(axis="x", integer=True)
    if order.size == 1:
        panel.set_xlim(0.5, 1.5)
    # Rounding is not to fill the panel.
    seen = [*known.bounds, *values] or [0.0]
    low, high = min(seen), max(seen)
    if high - low < (room := 0.05 * max(abs(low), abs(high))):
        panel.set_ylim(low - room, high + room)
    about = str(constraint) if len(str(constraint)) <= 36 else f"{str(constraint)[:35]}…"
    about += f", {known.not_finite:,} not finite" if known.not_finite else ""
    title = f"{shorten_path(path or '(root)', 34)}\n{about}"
    panel.set_title(title, size=8.5, parse_math=False)  # a path may have dollar signs
    name = known.name + (" (sample)" if known.values.size + known.not_finite < known.of else "")
    panel.set_ylabel(name, size=8)
    panel.tick_params(labelsize=7)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def plot_stats(
    history: Sequence[Mapping[str, LeafStats]] | Mapping[str, LeafStats],
    *,
    steps: Sequence[float] | None = None,
    lines: int = 10,
) -> "Figure":
    """A picture of how hard each constraint binds, over the steps of a training.

    Above, the norm of what the projection takes away over that of the update: near 1, the
    optimizer pushes into the bound and does little else. Below, the share of units at their
    bound. A line for each leaf, the worst first. Needs Matplotlib, the extra `plot`.

    Args:
        history: What `stats` returned in several steps: a list of it, or, as `jax.lax.scan` and
            `jnp.stack` leave it, one of it whose numbers are arrays over steps.
        steps: The step of each entry, if not 1, 2 and so on.
        lines: The most lines; a note counts the others.

    Returns:
        A Matplotlib figure, as from `plot`.

    Raises:
        ImportError: If Matplotlib is not installed.
        TypeError: If `history` is not what `stats` returns.
        ValueError: If it is empty, `steps` has another length, or `lines` is not positive.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> params = {"bias": jnp.array([0.0, 1.0, 2.0])}
        >>> tx = optax.chain(optax.sgd(1.0), oc.project(oc.non_neg(), stats=True))
        >>> state, history = tx.init(params), []
        >>> for _ in range(3):
        ...     updates, state = tx.update(params, state, params)
        ...     history.append(oc.stats(state))
        >>> figure = oc.plot_stats(history)
        >>> figure.axes[1].get_ylabel()
        'share at the bound'
    """
    if lines < 1:
        raise ValueError(f"plot_stats: lines={lines} shows nothing; write 1 or more.")
    curves = _curves(history)
    count = len(next(iter(curves.values())).update)
    x = np.arange(1, count + 1) if steps is None else np.asarray(steps)
    if x.shape != (count,):
        raise ValueError(
            f"plot_stats: steps has shape {x.shape}, and there are {count} steps in history; write "
            "one number for each."
        )
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = {path: own.correction / own.update for path, own in curves.items()}
        share = {
            path: np.where(own.at_bound >= 0, own.at_bound / own.units, np.nan)
            for path, own in curves.items()
        }
    figure = _figure(8, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    # Of the end of the training, where what binds still binds.
    late = slice(count - max(count // 4, 1), None)

    def height(path: str) -> float:
        own = lost[path][late]
        return float(np.mean(own, where=np.isfinite(own))) if np.isfinite(own).any() else -1.0

    ordered = sorted(curves, key=height, reverse=True)
    styles = ("-", "--", ":")
    for i, path in enumerate(ordered[:lines]):
        style = {"color": f"C{i % 10}", "ls": styles[i // 10 % 3], "lw": 1.5}
        style |= {"marker": "o", "ms": 3} if count <= 20 else {}
        top.plot(x, lost[path], label=shorten_path(path or "(root)", 40), **style)
        bottom.plot(x, share[path], **style)
    top.set_ylabel("correction / update")
    bottom.set_ylabel("share at the bound")
    bottom.set_xlabel("step")
    bottom.set_ylim(-0.04, 1.04)
    if not any(np.isfinite(own).any() for own in share.values()):
        bottom.text(0.5, 0.5, "these sets do not say", transform=bottom.transAxes, ha="center")
    top.set_ylim(bottom=0)
    for panel in (top, bottom):
        panel.grid(alpha=0.25)
        panel.margins(x=0.02)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    more = len(ordered) - lines
    title = f"worst first; {more:,} more\nleaves are not shown" if more > 0 else "worst first"
    # Not what Matplotlib finds by itself, which leaves out names that start with an underscore.
    legend = figure.legend(
        top.lines,
        [str(line.get_label()) for line in top.lines],
        **{"loc": "outside right upper", "fontsize": 8, "title": title, "frameon": False},
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _curves(history: Any) -> dict[str, LeafStats]:
    """The statistics of each leaf as arrays over steps; of a step without a leaf they are NaN."""
    wanted = "write a list of what stats(state) returned, one for each step"
    many = [history] if isinstance(history, Mapping) else history
    if not isinstance(many, Sequence) or not all(isinstance(own, Mapping) for own in many):
        raise TypeError(f"plot_stats: history={shown(history)} is not a history; {wanted}.")
    paths = dict.fromkeys(path for own in many for path in own)
    if not paths:
        raise ValueError(f"plot_stats: the history is empty; {wanted}.")
    curves = {}
    for path in paths:
        known = [own.get(path) for own in many]
        if not all(own is None or isinstance(own, LeafStats) for own in known):
            raise TypeError(f"plot_stats: {path!r} is {shown(known[0])}; {wanted}.")
        absent = LeafStats(*[np.nan] * 4)  # pyright: ignore[reportArgumentType]
        fields = zip(*(absent if own is None else own for own in known), strict=True)
        curves[path] = LeafStats(
            *(np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in own]) for own in fields)  # pyright: ignore[reportArgumentType]
        )
    return curves


# A set in the plane.

_FINE = 121
"""Points along each side of the grid that finds the set."""


class _Slice(NamedTuple):
    """A plane in the space of arrays: two numbers are the coordinates of an array in it."""

    names: tuple[str, str]
    array: Callable[[jax.Array, jax.Array], jax.Array]
    first: tuple[int, ...]
    """Where the first number is in the array."""
    second: tuple[int, ...]


_VECTOR = _Slice(("w[0]", "w[1]"), lambda x, y: jnp.stack([x, y]), (0,), (1,))


def plot_set(
    constraint: Any,
    *,
    step: jax.typing.ArrayLike = 0,
    extent: float | None = None,
    points: int = 28,
    seed: int = 0,
) -> "Figure":
    """A picture of a set in the plane: the set, some points, and where they are projected.

    Sets of units are shown for a unit of two entries; sets of matrices for those of 2 x 2 with
    two free entries, such as the diagonal ones, whose singular values are the magnitudes of the
    entries; sets of sequences by a few sequences and what becomes of them. Needs Matplotlib,
    the extra `plot`.

    Args:
        constraint: Anything that `get` accepts. Arrays in it have to fit two entries.
        step: The step that schedules see.
        extent: The picture goes from minus that to that; by default somewhat beyond the set.
        points: How many random points are projected.
        seed: The seed of the points.

    Returns:
        A Matplotlib figure, as from `plot`.

    Raises:
        ImportError: If Matplotlib is not installed.
        ValueError: If the set has no picture in the plane, or is relative to init, or if `extent`
            is not positive.

    Example:
        >>> import optax_constraints as oc
        >>> oc.plot_set(oc.l1_ball(1.0)).axes[0].get_title()
        '{ w : ‖u‖₁ ≤ 1 }'
    """
    _figure_class()
    if extent is not None and not 0 < extent < math.inf:
        raise ValueError(f"plot_set: extent={extent} is no picture; write a number above 0.")
    given = as_constraint(constraint)
    if given is None:
        raise ValueError("plot_set: None allows everything; write a constraint.")
    given = given.at(step)
    if given.remembers and not given.starts_anew:
        raise ValueError(
            f"plot_set: {given} is relative to the weights at init, of which a picture has none; "
            "write numbers."
        )
    if isinstance(given, (Monotone, Unimodal, ConvexSequence, ConcaveSequence)):
        return _plot_sequences(given, seed)
    plane = _slice_for(given)
    project = _projector(given, plane)
    count = _FINE**2 + points
    if extent is None:
        # As many points as below, so that one program does for both.
        angle = np.linspace(0, 2 * np.pi, count)
        far, _ = project(1e3 * np.stack([np.cos(angle), np.sin(angle)], axis=1))
        size = float(np.max(np.abs(far), initial=0, where=np.isfinite(far)))
        extent = 1.6 * size if 0 < size < 100 else 2.0
    ends = np.linspace(-extent, extent, _FINE)
    grid = np.stack(np.meshgrid(ends, ends), axis=-1).reshape(-1, 2)
    some = np.random.default_rng(seed).uniform(-0.95 * extent, 0.95 * extent, (points, 2))
    onto, away = project(np.concatenate([grid, some]))
    (onto, ends_of_some), (away, lengths) = (np.split(x, [len(grid)]) for x in (onto, away))
    figure = _figure(4.2, 4.4)
    panel = figure.subplots()
    # Where the distance is less than a part of the grid's spacing counts as inside: the outline
    # is drawn by projected points, and so are sets without an inside.
    spacing = ends[1] - ends[0]
    levels = [-1.0, 0.2 * spacing]
    if np.min(away) < levels[1]:
        square = away.reshape(_FINE, _FINE)
        panel.contourf(ends, ends, square, levels, colors=[INSIDE], alpha=0.25)
    edge = np.unique(np.round(onto[away > levels[1]] / (spacing / 4)), axis=0) * (spacing / 4)
    panel.plot(*edge.T, ".", ms=2.2, color=INSIDE, zorder=2)
    out = lengths > 1e-4 * extent
    arrows = np.stack([some[out], ends_of_some[out]])
    panel.plot(*arrows.transpose(2, 0, 1), color="0.5", lw=0.9, zorder=1)
    panel.plot(*some.T, "o", ms=3.5, mfc="none", color="0.5", zorder=3)
    panel.plot(*ends_of_some.T, "o", ms=4, color=OUTSIDE, zorder=4)
    panel.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
    panel.set_xlabel(plane.names[0], size=9)
    panel.set_ylabel(plane.names[1], size=9)
    panel.set_title(symbols(given), size=10)
    panel.tick_params(labelsize=8)
    return figure


def _slice_for(constraint: Constraint) -> _Slice:
    """The plane in which a set is shown."""
    parts = list(parts_of(constraint))
    zero = jnp.zeros(())
    if any(isinstance(part, (Symmetric, SkewSymmetric)) for part in parts):
        names = ("W[0, 1]", "W[1, 0]")
        return _Slice(
            names, lambda x, y: jnp.stack([zero, x, y, zero]).reshape(2, 2), (0, 1), (1, 0)
        )
    if any(isinstance(part, (DoublyStochastic, Transport)) for part in parts):
        names = ("W[0, 0] = W[1, 1]", "W[0, 1] = W[1, 0]")
        return _Slice(names, lambda x, y: jnp.stack([x, y, y, x]).reshape(2, 2), (0, 0), (0, 1))
    if any(isinstance(part, MatrixSet) for part in parts):
        names = ("W[0, 0]", "W[1, 1]")
        return _Slice(names, lambda x, y: jnp.diag(jnp.stack([x, y])), (0, 0), (1, 1))
    for part in parts:
        if isinstance(part, ZeroDiagonal):
            names = ("W[0, 0]", "W[0, 1]")
            return _Slice(
                names, lambda x, y: jnp.stack([x, y, zero, zero]).reshape(2, 2), (0, 0), (0, 1)
            )
        if isinstance(part, MaxOperatorNorm):
            names = ("K[0]", "K[1]")
            return _Slice(
                names, lambda x, y: jnp.stack([x, y]).reshape(2, 1, 1), (0, 0, 0), (1, 0, 0)
            )
        if isinstance(part, Radial):
            # Two of a ring, whose others are at their mean.
            def window(x: jax.Array, y: jax.Array) -> jax.Array:
                rest = (x + y) / 2
                ring = [x, y, rest, rest, zero, rest, rest, rest, rest]
                return jnp.stack(ring).reshape(3, 3)

            return _Slice(("w[0, 0]", "w[0, 1]"), window, (0, 0), (0, 1))
        if isinstance(part, TopK) and part.of == "units":
            return _Slice(
                ("unit 0", "unit 1"), lambda x, y: jnp.stack([x, y])[None], (0, 0), (0, 1)
            )
        if isinstance(part, NM) and isinstance(part.n, int):
            # One of two has to go: others of the group are larger, or zero.
            more = [jnp.full((), 1e6)] * (part.n - 1) + [zero] * (part.m - part.n - 1)
            if part.m - part.n >= 1:
                return _Slice(
                    _VECTOR.names,
                    lambda x, y, more=tuple(more): jnp.stack([x, y, *more]),
                    (0,),
                    (1,),
                )
    return _VECTOR


def _in_plane(constraint: Constraint) -> Constraint:
    """A constraint for the arrays of its plane, whose axes are few."""
    if isinstance(constraint, Stacked):
        return _in_plane(constraint.constraint)
    if isinstance(constraint, Single):
        return constraint._replace(constraint=_in_plane(constraint.constraint))
    if isinstance(constraint, Several):
        return constraint._replace(constraints=tuple(map(_in_plane, constraint.constraints)))
    if isinstance(constraint, UnitSet):
        return constraint._replace(axis=(0,))
    if isinstance(constraint, MatrixSet):
        return constraint._replace(axis=None)
    if isinstance(constraint, MaxOperatorNorm):
        return constraint._replace(strides=1, padding="SAME", dilation=1, groups=1)
    return constraint


def _projector(
    constraint: Constraint, plane: _Slice
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Takes points (n, 2) to their projections, and to how far these are."""
    wanted = "write a set for which two numbers are enough, such as one of units of two entries"

    def project(point: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        array = plane.array(point[0], point[1])
        onto = own(array)
        coordinates = jnp.stack([onto[plane.first], onto[plane.second]])
        left = jnp.max(jnp.abs(onto - plane.array(coordinates[0], coordinates[1])))
        return coordinates, jnp.linalg.norm((onto - array).ravel()), left

    try:
        start = plane.array(jnp.zeros(()), jnp.zeros(()))
        own = _in_plane(constraint).settle("w", start.shape)
        compiled = jax.jit(jax.vmap(project))
        jax.eval_shape(compiled, jax.ShapeDtypeStruct((1, 2), start.dtype))
    except (ValueError, TypeError, IndexError) as error:
        raise ValueError(
            f"plot_set: {constraint} has no picture in the plane: {error} Or {wanted}."
        ) from error

    def points(given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        onto, away, left = map(np.asarray, compiled(jnp.asarray(given, start.dtype)))
        if np.max(left) > 1e-3 * (1 + np.max(np.abs(given))):
            raise ValueError(
                f"plot_set: {constraint} has no picture in the plane, since it projects points of "
                f"{' and '.join(plane.names)} to others; {wanted}."
            )
        return onto.astype(np.float64), away.astype(np.float64)

    return points


def _plot_sequences(constraint: Constraint, seed: int) -> "Figure":
    """Sequences, and what a set of sequences makes of them."""
    knots = getattr(constraint, "knots", None)
    n = 24 if knots is None else len(knots)
    x = np.arange(n) if knots is None else np.asarray(knots)
    t = np.linspace(-1, 1, n)
    rng = np.random.default_rng(seed)
    shapes = np.stack([t, t**2 - 0.5, -(t**2) + 0.5, np.sin(3 * t)], axis=1)
    given = shapes + 0.25 * rng.normal(size=shapes.shape)
    own = constraint._replace(axis=0).settle("w", given.shape)
    onto = np.asarray(own(jnp.asarray(given, jnp.float32)))
    figure = _figure(6.4, 4.4)
    for panel, before, after in zip(figure.subplots(2, 2).ravel(), given.T, onto.T, strict=True):
        panel.plot(x, before, "o", ms=3.5, mfc="none", color="0.5")
        panel.plot(x, after, ".-", ms=4, lw=1.5, color=OUTSIDE)
        panel.tick_params(labelsize=8)
    figure.suptitle(symbols(constraint), size=10)
    return figure
