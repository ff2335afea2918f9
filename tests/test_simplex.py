"""Sets given by a sum over each unit: against CVXPY, and what the shared promises leave open."""

import cvxpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import bits, float64
from cases.simplex import NORMAL, onto_simplex

import optax_constraints as oc
from optax_constraints._axes import LeafLayout
from optax_constraints.sets.linear import CenterAround, HalfSpace, Hyperplane, SumTo
from optax_constraints.sets.simplex import L1Ball, Simplex

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)


def columns() -> np.ndarray:
    """One unit a column: random, wide, inside, on the boundary, tied, zero, one far entry."""
    rng = np.random.default_rng(0)
    on_boundary = np.array([0.5, 0, 0.25, 0, 0, 0.25, 0])
    far = np.array([1e3, 0, 1e-3, -1e3, 5, 0, 0])
    random = rng.normal(size=(7, 8)) * np.logspace(-2, 3, 8)
    named = [on_boundary, on_boundary / 3, -on_boundary, np.ones(7), np.zeros(7), far]
    return np.concatenate([random, np.stack(named, axis=1)], axis=1)


def by_cvxpy(w: np.ndarray, constraints) -> np.ndarray:
    """The nearest point to each column, by an interior-point solver."""
    x, target = cvxpy.Variable(len(w)), cvxpy.Parameter(len(w))
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - target)), constraints(x))
    out = []
    for column in w.T:
        target.value = column
        problem.solve(solver=cvxpy.CLARABEL)
        out.append(x.value)
    return np.stack(out, axis=1)


def by_root(w: np.ndarray, total: float) -> np.ndarray:
    """The nearest point of the simplex to each column, its threshold by SciPy's root finder."""
    out = []
    for column in w.T:
        column = column - np.max(column)

        def excess(threshold, column=column):
            return np.sum(np.maximum(column - threshold, 0)) - total

        threshold = scipy.optimize.brentq(excess, -total, 0, xtol=1e-300, rtol=1e-15)
        out.append(np.maximum(column - threshold, 0))
    return np.stack(out, axis=1)


def by_kkt(w: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    """The nearest point of the plane to each column, from the optimality conditions."""
    matrix = np.block([[np.eye(len(w)), normal[:, None]], [normal[None, :], np.zeros((1, 1))]])
    return np.linalg.solve(matrix, np.vstack([w, np.full((1, w.shape[1]), offset)]))[:-1]


def l1_ball_by_root(w: np.ndarray, radius: float) -> np.ndarray:
    inside = np.sum(np.abs(w), axis=0) <= radius
    return np.where(inside, w, np.sign(w) * by_root(np.abs(w), radius))


def half_space_by_kkt(w: np.ndarray, normal: np.ndarray, offset: float) -> np.ndarray:
    return np.where(normal @ w <= offset, w, by_kkt(w, normal, offset))


@pytest.mark.parametrize(
    ("constraint", "exact", "oracle"),
    [
        (Simplex(), lambda w: by_root(w, 1), lambda x: [x >= 0, cvxpy.sum(x) == 1]),
        (L1Ball(2.0), lambda w: l1_ball_by_root(w, 2), lambda x: [cvxpy.norm1(x) <= 2]),
        (SumTo(-3.0), lambda w: by_kkt(w, np.ones(7), -3), lambda x: [cvxpy.sum(x) == -3]),
        (
            CenterAround(0.5, axis=0),
            lambda w: by_kkt(w, np.ones(7), 3.5),
            lambda x: [cvxpy.sum(x) / 7 == 0.5],
        ),
        (Hyperplane(NORMAL, 0.5), lambda w: by_kkt(w, NORMAL, 0.5), lambda x: [NORMAL @ x == 0.5]),
        (
            HalfSpace(NORMAL, -1.0),
            lambda w: half_space_by_kkt(w, NORMAL, -1),
            lambda x: [NORMAL @ x <= -1],
        ),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, oc.Constraint) else "",
)
def test_nearest_point(constraint, exact, oracle):
    w = columns()
    got = float64(constraint(jnp.asarray(w, DTYPE)))
    scale = np.maximum(np.max(np.abs(w), axis=0), 1)
    assert np.max(np.abs(got - exact(w)) / scale) <= 8 * EPS
    # The solver is the less exact of the two, and less so on the boundary.
    few = slice(2, 6)
    assert np.max(np.abs(got[:, few] - by_cvxpy(w[:, few], oracle)) / scale[few]) <= 1e-5


# Hard for a threshold: many entries at it, far below it, or nothing but it.

HARD = {
    "sorted": lambda n, rng: np.sort(rng.normal(size=n)),
    "parabola": lambda n, rng: -4 * (np.arange(n) / n) ** 2,
    "wide": lambda n, rng: rng.normal(size=n) * np.exp(5 * rng.normal(size=n)),
    "far away": lambda n, rng: rng.normal(size=n) * 1e-3 + 1000,
    "one above the others": lambda n, rng: np.append(0, rng.random(n - 1) * 1e-3 - 0.9),
    # The threshold lies between two neighbours of the dtype.
    "at the threshold": lambda n, rng: np.append(0, rng.integers(0, 4, n - 1) * EPS / 2 - 1),
    "ties": lambda n, rng: rng.integers(-3, 3, n) / 4,
    "constant": lambda n, rng: np.full(n, 7.0),
    "nothing but one": lambda n, rng: np.append(1e30, np.full(n - 1, -1e30)),
    "small": lambda n, rng: rng.normal(size=n) / n,
}


@pytest.mark.parametrize("total", [1.0, 50.0])
def test_sums_of_long_and_hard_units(total):
    n, rng = 2500, np.random.default_rng(0)
    w = jnp.asarray(np.stack([make(n, rng) for make in HARD.values()]), DTYPE)
    wide = np.asarray(w, np.longdouble)
    for constraint, values in (
        (Simplex(total, axis=1), wide),
        (L1Ball(total, axis=1), np.abs(wide)),
    ):
        project = jax.jit(constraint)
        got = project(w)
        moved = np.any(float64(got) != float64(w), axis=1)
        assert np.sum(moved) >= len(HARD) - 3
        entries = np.abs(np.asarray(got, np.longdouble))[moved]
        assert np.max(np.abs(np.sum(entries, axis=1) - total)) <= 4 * EPS * total
        want = onto_simplex(total)(values[moved])
        assert np.max(np.abs(entries - want)) <= 8 * EPS * total
        assert bits(project(got)) == bits(got)


def test_a_plane_is_met_where_the_step_is_much_longer_than_the_result():
    # Such a step is rounded by more than the sum of the result may miss.
    w = jnp.asarray(np.random.default_rng(0).normal(size=(7, 50)) * 1e-3 + 1000, DTYPE)
    for constraint, normal in (
        (SumTo(1.0), np.ones(7)),
        (Hyperplane(NORMAL, 1.0), NORMAL),
        (HalfSpace(NORMAL, 1.0), NORMAL),
    ):
        project = jax.jit(constraint)
        got = project(w)
        terms = normal[:, None] * np.asarray(got, np.longdouble)
        missed = np.abs(np.sum(terms, axis=0) - 1)
        assert np.max(missed / np.sum(np.abs(terms), axis=0)) <= 2 * EPS
        assert bits(project(got)) == bits(got)


# Units.


def test_a_unit_does_not_depend_on_the_others():
    # Newton's method takes one step for some units, many for others, and stays put for NaN.
    rng = np.random.default_rng(0)
    hard = np.stack([make(200, rng) for make in HARD.values()], axis=1)
    w = jnp.asarray(np.concatenate([hard, rng.normal(size=(200, 20))], axis=1), DTYPE)
    w = w.at[3, 2].set(jnp.nan)
    for constraint in (Simplex(), L1Ball()):
        together = constraint(w)
        for i in range(0, w.shape[1], 3):
            assert bits(constraint(w[:, [i] * w.shape[1]])[:, 0]) == bits(together[:, i])
        assert np.array_equal(np.isnan(float64(together)).all(axis=0), np.arange(w.shape[1]) == 2)


def test_infinite_entries_end_and_spoil_their_unit_only():
    w = jnp.array([[jnp.inf, -jnp.inf, 0.5], [1.0, 2.0, 3.0]], DTYPE)
    for constraint in (Simplex(), L1Ball(), SumTo(1.0), HalfSpace([1.0, 1.0])):
        out = float64(constraint(w))
        clean = jnp.broadcast_to(w[:, 2:], (2, 3))
        assert np.array_equal(out[:, 2], float64(constraint(clean))[:, 2])
        assert np.all(np.isnan(out[:, :2]))


@pytest.mark.parametrize(
    "constraint",
    [
        Simplex(2.0, axis=(0, -1)),
        L1Ball(2.0, axis=(0, -1)),
        SumTo(2.0, axis=(0, -1)),
        CenterAround(2.0, axis=(0, -1)),
        HalfSpace(np.arange(12.0).reshape(4, 3), 2.0, axis=(0, -1)),
        Hyperplane(np.arange(12).reshape(4, 3), 2.0, axis=(0, -1)),
    ],
    ids=str,
)
def test_units_along_several_axes(constraint):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2, 3)), DTYPE)
    whole = type(constraint)(**{**vars(constraint), "axis": None})
    got = constraint(w)
    for i in range(2):
        np.testing.assert_allclose(got[:, i], whole(w[:, i]), rtol=0, atol=8 * EPS)
    assert constraint(jnp.zeros((4, 0, 3))).shape == (4, 0, 3)


def test_units_without_entries():
    for constraint in (Simplex(), L1Ball(), SumTo(1.0), CenterAround(1.0)):
        assert constraint(jnp.zeros((0, 3))).shape == (0, 3)


# Feasible weights, to the bit.


def test_zeros_keep_their_signs_and_inf_is_no_bound():
    w = jnp.asarray([[0.5, -3.0], [-0.0, 0.25], [0.5, 1.0]], DTYPE)
    assert bits(Simplex()(w[:, :1])) == bits(w[:, :1])
    assert bits(L1Ball(np.inf)(w)) == bits(w)
    assert bits(Hyperplane([1.0, -2.0, -1.0])(w[:, :1])) == bits(w[:, :1])
    assert bits(HalfSpace([1.0, -2.0, -1.0])(w[:, :1])) == bits(w[:, :1])


def test_totals_of_zero():
    w = jnp.asarray([[0.5, -3.0], [-0.0, 0.25]], DTYPE)
    for constraint in (Simplex(0.0), L1Ball(0.0)):
        np.testing.assert_array_equal(constraint(w), np.zeros((2, 2)))
        np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(constraint(w)))(w), 0)  # noqa: B023


def test_weights_that_sum_up_to_rounding_are_allowed():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(500, 40)) * 3, DTYPE)
    w = jax.nn.softmax(logits, axis=0)
    for constraint in (Simplex(), L1Ball(), SumTo(1.0), HalfSpace(np.ones(500), 1.0)):
        assert bits(constraint(w)) == bits(w)


# Derivatives.


def test_derivatives_on_the_set():
    w = Simplex()(jnp.asarray([0.9, 0.4, -1.0], DTYPE))
    dw = jnp.asarray([1.0, 2.0, 3.0], DTYPE)
    # Outside it is that of the face of the nearest point, and zero along entries that are zero.
    outside = jax.jvp(Simplex(), (w - 0.1,), (dw,))[1]
    np.testing.assert_allclose(outside, [-0.5, 0.5, 0], atol=1e-6)
    # On the boundary of a ball and of a half space it is that from inside.
    for constraint in (L1Ball(), HalfSpace(np.ones(3), 1.0)):
        np.testing.assert_array_equal(jax.jvp(constraint, (w,), (dw,))[1], dw)
    for constraint in (Simplex(), SumTo(1.0), CenterAround(1 / 3), Hyperplane(np.ones(3), 1.0)):
        assert bits(constraint(w)) == bits(w)
        np.testing.assert_allclose(jax.jvp(constraint, (w,), (dw,))[1], [-1, 0, 1], atol=1e-6)


def test_derivatives_in_the_hyperparameters():
    w = jnp.asarray([3.0, -1.0, 2.5, 0.0], DTYPE)
    weight = jnp.asarray([1.0, 10.0, 100.0, 1000.0], DTYPE)
    for make, want in (
        (Simplex, (1 + 100) / 2),
        (L1Ball, (1 + 100) / 2),
        (SumTo, 1111 / 4),
        (CenterAround, 1111),
        (lambda b: HalfSpace([2.0, 0.0, 0.0, 0.0], b), 1 / 2),
    ):
        got = jax.grad(lambda b: jnp.sum(weight * make(b)(w)))(jnp.asarray(1.0, DTYPE))  # noqa: B023
        np.testing.assert_allclose(got, want, rtol=1e-6)
    normal = jnp.asarray([1.0, 2.0, -1.0, 0.5], DTYPE)
    got, h = jax.grad(lambda a: jnp.sum(weight * Hyperplane(a, 1.0)(w)))(normal), 1e-4

    def reference(a):
        return float64(weight) @ by_kkt(float64(w)[:, None], a, 1.0)[:, 0]

    steps = h * np.eye(4)
    want = [
        (reference(float64(normal) + s) - reference(float64(normal) - s)) / 2 / h for s in steps
    ]
    np.testing.assert_allclose(got, want, rtol=1e-4)


# Hyperparameters.


def test_schedules_and_traced_numbers():
    w = jnp.asarray([[3.0], [1.0]], DTYPE)
    for make in (Simplex, L1Ball, SumTo, CenterAround, lambda b: HalfSpace([1.0, 1.0], b)):
        traced = jax.jit(lambda b: make(b)(w))(1.0)  # noqa: B023
        np.testing.assert_allclose(traced, make(lambda step: 1.0 + step).at(0)(w), atol=EPS)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: Simplex(-1.0), ValueError, "Simplex: total=-1.0 is not allowed"),
        (lambda: Simplex(np.inf), ValueError, "Simplex: total=inf is not allowed"),
        (lambda: L1Ball(np.nan), ValueError, "L1Ball: radius=nan is not allowed"),
        (lambda: L1Ball("one"), ValueError, "L1Ball: radius='one' is not a number"),
        (lambda: SumTo(np.inf), ValueError, "SumTo: value=inf is not allowed"),
        (lambda: CenterAround(np.nan), ValueError, "CenterAround: ref_value=nan"),
        (lambda: Simplex(axis=(0, 0)), ValueError, "names an axis twice"),
        (lambda: HalfSpace([1.0], np.inf), ValueError, "HalfSpace: offset=inf"),
        (lambda: HalfSpace([0.0, 0.0]), ValueError, "HalfSpace: normal=.* is zero"),
        (lambda: Hyperplane([1.0, np.nan]), ValueError, "Hyperplane: normal=.* a NaN"),
        (lambda: Hyperplane([[1.0], [1.0, 2.0]]), ValueError, "Hyperplane: normal=.* ragged"),
        (lambda: Hyperplane("up"), TypeError, "Hyperplane: normal='up' is not an array"),
        (lambda: HalfSpace(np.ones(2, bool)), TypeError, "HalfSpace: normal=.* is not an array"),
    ],
)
def test_bad_hyperparameters(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_a_normal_has_the_shape_of_a_unit():
    constraint = HalfSpace(np.ones(3), 1.0, axis=1)
    text = r"HalfSpace on 'a/gate' of shape \(3, 4\): a unit along axis=1 has shape \(4,\)"
    with pytest.raises(ValueError, match=text):
        oc.project({"gate": constraint}).init({"a": {"gate": jnp.zeros((3, 4))}})
    with pytest.raises(ValueError, match=r"write a normal of shape \(4,\), or another axis"):
        constraint(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"normal has shape \(1,\)"):
        Hyperplane([1.0])(jnp.zeros((3, 4)))


def test_a_normal_along_fan_in():
    constraint = HalfSpace(np.ones((3, 4)), axis="fan_in")
    assert constraint.settle("attention/out/kernel", (3, 4, 5)).axis == (0, 1)
    layout = LeafLayout("Einsum", (1, 2))
    assert constraint.settle("w", (2, 3, 4), layout).axis == (1, 2)


def test_configs_hold_the_normal():
    constraint = HalfSpace(np.array([1, 2]), 0.5, axis=(1,))
    config = constraint.get_config()
    assert config == {"normal": [1, 2], "offset": 0.5, "axis": [1]}
    w = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)), DTYPE)
    assert bits(HalfSpace.from_config(config)(w)) == bits(constraint(w))


def test_on_bound():
    w = jnp.asarray([[0.5, 0.25, 0.0], [0.5, 0.25, 1.0]], DTYPE)
    np.testing.assert_array_equal(Simplex().on_bound(w), [[False, False, True]])
    np.testing.assert_array_equal(L1Ball().on_bound(w), [[True, False, True]])
    np.testing.assert_array_equal(HalfSpace([1, 1], 1.0).on_bound(w), [[True, False, True]])
    for constraint in (SumTo(1.0), CenterAround(0.5), Hyperplane([1, 1], 1.0)):
        assert constraint.on_bound(w) is None
