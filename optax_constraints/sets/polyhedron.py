"""Sets given by several inequalities for each unit."""

import dataclasses
import math
from typing import Any, ClassVar, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from optax_constraints import _numerics
from optax_constraints._axes import Axis, LeafLayout, settle_axis
from optax_constraints._config import builtin
from optax_constraints._gauge import Gauge
from optax_constraints._numerics import is_readable
from optax_constraints._sharding import automatic, vary_like
from optax_constraints._text import describe, shown
from optax_constraints.sets._active_set import Minimum, free_numbers
from optax_constraints.sets._common import UnitSet
from optax_constraints.sets.isotonic import are_finite

_EXACT = lax.Precision.HIGHEST


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Polyhedron(UnitSet):
    """Each unit satisfies some linear inequalities: ``{w : g @ unit <= h}``.

    Convex; the projection is the nearest point, up to rounding: within 1e-6 of the largest entry
    in float32 where no rows of `g` are nearly dependent. What inequalities overlap does not
    matter: rows may repeat, and there may be more of them than entries. Also known as projection
    onto a polytope, least distance programming, or a quadratic program with the identity.

    The multipliers of the inequalities are non-negative, and minimise a quadratic function of ``g @
    g.T``, the same matrix for all units. An active-set method finds which of them are not zero. If
    ``16 + 4 m`` steps for `m` inequalities are not enough for a unit, it stays outside, and
    `violations` shows it. If no point satisfies all inequalities, which is an error where the
    numbers are known, the result means nothing.

    An inequality that holds but for the rounding of its sum (8 machine epsilons of the dtype it
    was taken in, times the sum of the magnitudes, or the largest entry) holds. A unit with an
    entry that is not finite becomes NaN. The derivative is that of the plane of the inequalities
    whose multiplier is not zero; at an allowed unit, the identity.

    Cost:
        Some 4 to 10 Cholesky factorisations of ``m`` by ``m`` matrices for `m` inequalities, for
        all units at once. The limit is ``16 + 4 m``.

    Args:
        g: A matrix with one row for each inequality and one column for each entry of a unit, in
            the leaf's order.
        h: The bounds, one for each inequality, or one number for all.
        axis: The axes along which one unit runs, as for `MaxNorm`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `g` is no matrix, or has a row of zeros; if `h` has another length; if a
            number is infinite or NaN, or an axis is repeated; if no point satisfies all
            inequalities; when bound or called, if `g` does not have a column for each entry of a
            unit. Numbers are checked as far as they are concrete.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> corner = oc.polyhedron([[1.0, 1.0], [-1.0, 0.0]], [1, -0.25])  # x + y <= 1, x >= 1/4
        >>> corner(jnp.array([[1.0, -0.5, 0.5], [1.0, 0.5, 0.25]])).round(3)
        Array([[0.5 , 0.25, 0.5 ],
               [0.5 , 0.5 , 0.25]], dtype=float32)
    """

    formula = "{ w : G u ≤ {h} }"

    convex: ClassVar[bool] = True

    g: Any
    h: Any
    axis: Axis = 0

    def __post_init__(self):
        g = _array("g", self.g)
        if g.ndim != 2 or not g.shape[0]:
            raise ValueError(
                f"Polyhedron: g has shape {g.shape}; write a matrix with a row for each inequality."
            )
        h = _array("h", self.h)
        if h.shape not in ((), g.shape[:1]):
            raise ValueError(
                f"Polyhedron: h has shape {h.shape} and g has {g.shape[0]} rows; write one bound "
                "for each row, or one number."
            )
        object.__setattr__(self, "g", g)
        object.__setattr__(self, "h", h)
        if is_readable(g):
            empty = np.flatnonzero(~np.any(np.asarray(g), axis=1))
            if empty.size:
                raise ValueError(
                    f"Polyhedron: row {empty[0]} of g is zero and bounds nothing; leave it out."
                )
            if is_readable(h):
                _check_feasible(np.asarray(g), np.asarray(h))
        super().__post_init__()

    def settle(self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None) -> Self:
        """This constraint with `axis` as axes of one leaf, whose units `g` must fit."""
        self._unit_axes(path, shape, layout)
        return cast(Self, super().settle(path, shape, layout))

    def _unit_axes(
        self, path: str | None, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> tuple[int, ...]:
        """The axes of a unit; raises if `g` does not fit it."""
        axis = settle_axis("Polyhedron", self.axis, shape, path, layout)
        size = math.prod(shape[a] for a in axis)
        if self.g.shape[1] != size:
            raise ValueError(
                f"Polyhedron on {describe(path, shape)}: a unit along axis={self.axis!r} has "
                f"{size} entries, and g has {self.g.shape[1]} columns; write a column for each "
                "entry, or another axis."
            )
        return axis

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; computes in float32 or wider."""
        w = jnp.asarray(w)
        wide, _ = self._widen(w)
        axis = self._unit_axes(None, w.shape)
        if not w.size:
            return w

        def onto(w: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
            units, back = _as_columns(w, axis)
            return back(_onto_polyhedron(units, *_normalized(g, h, w.dtype)))

        return automatic(onto, wide, self.g, self.h).astype(w.dtype)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        """The vector without what leads above the inequalities that hold with equality."""
        del memory
        axis = self._unit_axes(None, w.shape)
        if not w.size:
            return v
        rounding = 2 * _numerics.eps(w.dtype)

        def along(w: jax.Array, v: jax.Array, g: jax.Array, h: jax.Array, slack: Any) -> jax.Array:
            (units, _), (columns, back) = (_as_columns(x, axis) for x in (w, v))
            rows, bounds = _normalized(g, h, v.dtype)
            tight = _tight(units, rows, bounds, rounding, slack)
            zero = jnp.zeros_like(bounds)
            return back(_on_faces(columns, rows, zero, tight))

        return automatic(along, w.astype(v.dtype), v, self.g, self.h, slack)

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The units with an inequality that is an equality, up to rounding."""
        wide, _ = self._widen(w)
        axis = self._unit_axes(None, w.shape)
        beside = tuple(1 if a in axis else n for a, n in enumerate(w.shape))

        def tight(w: jax.Array, g: jax.Array, h: jax.Array) -> jax.Array:
            units, _ = _as_columns(w, axis)
            near = _tight(units, *_normalized(g, h, w.dtype), 2 * _numerics.eps(w.dtype), 0.0)
            return jnp.any(near, axis=0).reshape(beside)

        return automatic(tight, wide, self.g, self.h, spec=PartitionSpec())

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """Of each unit and inequality, the product less the bound."""
        del memory
        wide, _ = self._widen(w)
        units, _ = _as_columns(wide, self._unit_axes(None, w.shape))
        g, h = (jnp.asarray(x, wide.dtype) for x in (self.g, self.h))
        above = g @ units - jnp.broadcast_to(h, g.shape[:1])[:, None]
        return Gauge("products less bounds", above, None, 0.0)


polyhedron = Polyhedron


def _array(name: str, given: Any) -> Any:
    """An argument as an array of real numbers, checked as far as it is concrete."""
    what = f"Polyhedron: {name}={shown(given)}"
    if not isinstance(given, jax.Array):
        try:
            given = np.asarray(given)
        except ValueError:
            raise ValueError(f"{what} is ragged; write rows of one length.") from None
    if not (jnp.issubdtype(given.dtype, jnp.floating) or jnp.issubdtype(given.dtype, jnp.integer)):
        raise TypeError(f"{what} is not an array of real numbers.")
    if is_readable(given) and not np.all(np.isfinite(np.asarray(given).astype(np.float64))):
        raise ValueError(
            f"{what} has an infinite entry or a NaN; write finite numbers, and leave out the rows "
            "without a bound."
        )
    return given


def _check_feasible(g: np.ndarray, h: np.ndarray) -> None:
    """Raises if no point satisfies all inequalities by a margin of rounding."""
    # Takes a moment to import, and comes with JAX.
    from scipy.optimize import linprog

    g, h = g.astype(np.float64), np.broadcast_to(h.astype(np.float64), len(g))
    size = np.linalg.norm(g, axis=1)
    # How far above its bound a point has to be, at least.
    rows = np.concatenate([g / size[:, None], -np.ones((len(g), 1))], axis=1)
    cost = np.eye(g.shape[1] + 1)[-1]
    bounds = [(None, None)] * g.shape[1] + [(0, None)]
    found = linprog(cost, rows, h / size, bounds=bounds)
    if found.status == 0 and found.fun > 1e-6 * max(np.max(np.abs(h / size)), 1e-300):
        worst = np.argsort(found.ineqlin.marginals)[:2]
        raise ValueError(
            f"Polyhedron: no point satisfies all inequalities; rows {min(worst)} and {max(worst)} "
            "of g are among those that contradict each other."
        )


def _as_columns(w: jax.Array, axis: tuple[int, ...]) -> tuple[jax.Array, Any]:
    """The units as columns of a matrix, and the way back."""
    order = (*axis, *(a for a in range(w.ndim) if a not in axis))
    moved = jnp.transpose(w, order)
    size = math.prod(w.shape[a] for a in axis)

    def back(columns: jax.Array) -> jax.Array:
        return jnp.transpose(columns.reshape(moved.shape), tuple(map(order.index, range(w.ndim))))

    return moved.reshape(size, -1), back


def _normalized(g: jax.Array, h: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Rows of norm 1, and their bounds as a column."""
    g, h = jnp.asarray(g, dtype), jnp.asarray(h, dtype)
    largest = jnp.max(jnp.abs(g), axis=1, keepdims=True)
    size = largest * jnp.sqrt(jnp.sum(jnp.square(g / largest), axis=1, keepdims=True))
    return g / size, jnp.broadcast_to(h, g.shape[:1])[:, None] / size


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _size(w: jax.Array, rows: jax.Array, bounds: jax.Array) -> jax.Array:
    """What the rounding of the inequalities goes by."""
    largest = jnp.max(jnp.abs(w), axis=0, keepdims=True)
    return jnp.maximum(_times(jnp.abs(rows), jnp.abs(w)), largest) + jnp.abs(bounds)


def _tight(
    w: jax.Array, rows: jax.Array, bounds: jax.Array, rounding: float, slack: Any
) -> jax.Array:
    """Which inequalities are equalities, for each unit."""
    near = (rounding + 8 * _numerics.eps(w.dtype)) * _size(w, rows, bounds)
    return _times(rows, w) >= bounds - near - slack


# Compiled by itself, so that calls outside jit find the program they made before.
@jax.jit
def _onto_polyhedron(w: jax.Array, rows: jax.Array, bounds: jax.Array) -> jax.Array:
    finite = are_finite(w)
    w = jnp.where(finite, w, 0)
    excess = _times(rows, w) - bounds
    near = 8 * _numerics.eps(w.dtype) * _size(w, rows, bounds)
    # As numbers: XLA's CPU backend compiles `any` slowly.
    above = jnp.max((excess > near).astype(w.dtype), axis=0, keepdims=True)
    outside = above > 0
    every = jnp.ones_like(excess, bool)
    new = lax.cond(jnp.max(above) > 0, lambda w: _on_faces(w, rows, bounds, every), lambda w: w, w)
    return jnp.where(finite, jnp.where(outside, new, w), jnp.nan)


def _on_faces(w: jax.Array, rows: jax.Array, bounds: jax.Array, among: jax.Array) -> jax.Array:
    """The nearest points that satisfy the inequalities `among` which each unit is."""
    fixed = lax.stop_gradient((w, rows, bounds, _times(rows, rows.T)))
    active = _active(*fixed, among)
    solve = _solver(_times(rows, rows.T), active)

    def step(_: Any, w: jax.Array) -> jax.Array:
        return w - _times(rows.T, solve((_times(rows, w) - bounds).T).T)

    # The second and third correct rounding, and what made the matrix definite.
    return lax.fori_loop(0, 3, step, w)


def _regularity(gram: jax.Array) -> float:
    """What is added to the diagonal, so that rounding cannot make a matrix indefinite."""
    return 4 * len(gram) * _numerics.eps(gram.dtype)


# Here and below a row for each unit, as the solvers of many systems have them: whatever is
# transposed in between takes long to compile.
def _solver(gram: jax.Array, active: jax.Array) -> Any:
    """Solves the system of the active inequalities for each unit."""
    inside = active[:, :, None] & active[:, None, :]
    diagonal = jnp.where(active, _regularity(gram), 1)[:, None]
    eye = np.eye(len(gram), dtype=gram.dtype)[None]
    matrices = jnp.where(inside, gram[None], 0) + eye * diagonal
    # Transposed, as LAPACK has it, lest a loop makes a copy in another order.
    upper = jnp.swapaxes(lax.linalg.cholesky(matrices, symmetrize_input=False), -1, -2)

    def solve(b: jax.Array) -> jax.Array:
        factor = jnp.swapaxes(upper, -1, -2)
        y = jnp.where(active, b, 0)[..., None]
        y = lax.linalg.triangular_solve(factor, y, left_side=True, lower=True)
        y = lax.linalg.triangular_solve(factor, y, left_side=True, lower=True, transpose_a=True)
        return y[..., 0]

    return solve


def _active(
    w: jax.Array, rows: jax.Array, bounds: jax.Array, gram: jax.Array, among: jax.Array
) -> jax.Array:
    """Which inequalities have a multiplier that is not zero, in a row for each unit.

    What makes the matrix definite makes the inequalities soft by so much times the multipliers.
    Each round starts from the multipliers of the last, which takes that back again.
    """
    excess, among = (_times(rows, w) - bounds).T, among.T
    added = _regularity(gram)
    rounding = 8 * _numerics.eps(w.dtype) * jnp.max(_size(w, rows, bounds), axis=0)[:, None]
    limit = 16 + 4 * len(rows)

    def round_(state: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, None]:
        multipliers, active = state
        target = excess + added * multipliers

        def best(active: jax.Array) -> Minimum:
            found = _solver(gram, active)(target)
            slopes = jnp.where(among, _times(found, gram) - target, 0)
            return Minimum(found, rounding, slopes, rounding)

        start = vary_like(jnp.zeros_like(excess), w), active
        return free_numbers(best, start, 1, limit), None

    start = vary_like((jnp.zeros_like(excess), jnp.zeros_like(among)), w)
    return lax.scan(round_, start, None, length=3)[0][1]
