"""Boxes cut by a plane, and several linear equations: what the shared promises leave open."""

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64
from cases.section import section

import optax_constraints as oc

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)
NORMAL = np.array([1.0, -2.0, 0.0, 3.0, 1.0, 0.5, -1.0])


def normal(shape, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, DTYPE)


BOXES = {
    "capped simplex": (0.0, 0.5, None, 1.0),
    "signs": (-0.25, 0.5, NORMAL, 0.5),
    "from below": (None, 0.3, NORMAL, 0.2),
    "from above": (-0.1, None, NORMAL, 0.2),
    "a plane": (None, None, NORMAL, 1.0),
    "arrays": (np.linspace(-1, 0, 7), np.linspace(0.1, 2, 7), NORMAL, -0.5),
}


@pytest.mark.parametrize("equality", [True, False])
@pytest.mark.parametrize("name", BOXES)
def test_nearest_point(name, equality):
    lower, upper, a, value = BOXES[name]
    constraint = jax.jit(lambda w: oc.box_section(lower, upper, a, value, equality=equality)(w))
    a = np.ones(7) if a is None else a
    for scale in (0.1, 1.0, 100.0):
        w = normal((7, 2), seed=1, scale=scale)
        got = constraint(w)
        assert bits(constraint(got)) == bits(got)
        for target, found in zip(float64(w).T, float64(got).T, strict=True):
            x = cp.Variable(7)
            conditions = [a @ x == value if equality else a @ x <= value]
            conditions += [] if lower is None else [x >= lower]
            conditions += [] if upper is None else [x <= upper]
            problem = cp.Problem(cp.Minimize(cp.sum_squares(x - target)), conditions)
            problem.solve(solver=cp.CLARABEL)
            np.testing.assert_allclose(found, x.value, atol=1e-5 * max(1, scale))


HARD = {
    "wide": lambda n, rng: rng.normal(size=n) * np.exp(5 * rng.normal(size=n)),
    "far away": lambda n, rng: rng.normal(size=n) * 1e-3 + 1000,
    "one above the others": lambda n, rng: np.append(1e6, rng.random(n - 1) * 1e-3),
    "ties": lambda n, rng: rng.integers(-3, 3, n) / 4,
    "constant": lambda n, rng: np.full(n, 7.0),
    "huge": lambda n, rng: rng.normal(size=n) * 1e30,
    "huge and ordinary": lambda n, rng: np.where(rng.random(n) < 0.5, 1e30, rng.normal(size=n)),
    "at the bounds": lambda n, rng: rng.integers(0, 2, n) * 0.02,
}


@pytest.mark.parametrize("signs", [False, True])
def test_sums_of_long_and_hard_units(signs):
    n, rng = 400, np.random.default_rng(0)
    w = jnp.asarray(np.stack([make(n, rng) for make in HARD.values()]), DTYPE)
    a = rng.normal(size=n) if signs else None
    lower, upper, value = (-0.02 if signs else 0.0), 0.02, 1.0
    project = jax.jit(lambda w: oc.box_section(lower, upper, a, value, axis=1)(w))
    got = project(w)
    assert bits(project(got)) == bits(got)
    a = np.ones(n) if a is None else a
    assert np.all((got >= np.asarray(lower, DTYPE)) & (got <= np.asarray(upper, DTYPE)))
    terms = a * np.asarray(got, np.longdouble)
    missed = np.abs(np.sum(terms, axis=1) - value) / np.sum(np.abs(terms), axis=1)
    assert np.max(missed) <= 8 * EPS
    want = section(1, lower, upper, a, value)[0](float64(w)[:-2])
    np.testing.assert_allclose(got[:5], want[:5], atol=64 * EPS * 1000)


def test_derivatives_are_those_of_the_projection():
    w, v, u = normal((7, 4), 1), normal((7, 4), 2), normal((7, 4), 3)
    numbers = (jnp.asarray(-0.25), jnp.asarray(0.5), jnp.asarray(NORMAL), jnp.asarray(0.45))
    numbers = tuple(x.astype(DTYPE) for x in numbers)

    def project(w, *numbers):
        return oc.box_section(*numbers)(w)

    _, got = jax.jvp(lambda w: project(w, *numbers), (w,), (v,))
    (back,) = jax.vjp(lambda w: project(w, *numbers), w)[1](u)
    np.testing.assert_allclose(jnp.vdot(u, got), jnp.vdot(back, v), rtol=1e-4)
    h = 1e-3 if jnp.float32 == DTYPE else 1e-6
    for i in range(5):
        ends = [
            project(
                *(
                    x + s * h * (v if i == 0 else 1) if i == k else x
                    for k, x in enumerate((w, *numbers))
                )
            )
            for s in (1, -1)
        ]
        want = (float64(ends[0]) - float64(ends[1])) / (2 * h)
        along = tuple(
            (v if i == 0 else jnp.ones_like(x)) if i == k else jnp.zeros_like(x)
            for k, x in enumerate((w, *numbers))
        )
        _, got = jax.jvp(project, (w, *numbers), along)
        np.testing.assert_allclose(got, want, atol=2e-3)
        assert np.max(np.abs(want)) > 0.1


def test_a_vector_in_parts_is_the_vector_at_once():
    parts = {"a": normal((3, 2), 0), "b": normal((5,), 1), "c": normal((0,), 2)}
    a = np.linspace(-1, 2, 11)
    rules = [(oc.across("*"), oc.box_section(-0.25, a + 1.5, a, 0.5, axis=None))]
    got = oc.constrain(parts, rules)
    vector = jnp.concatenate([x.ravel() for x in parts.values()])
    want = oc.box_section(-0.25, a + 1.5, a, 0.5)(vector)
    np.testing.assert_allclose(
        jnp.concatenate([x.ravel() for x in got.values()]), want, atol=8 * EPS
    )


def test_on_bound():
    w = jnp.asarray([[0.5, 0.25, 0.75], [0.5, 0.75, 0.25]], DTYPE)
    found = oc.box_section(0.0, 0.75).on_bound(w)
    np.testing.assert_array_equal(found, [[False, True, True]])
    below = oc.box_section(None, 0.875, equality=False)
    np.testing.assert_array_equal(
        below.on_bound(w * jnp.asarray([1, 0.5, 0])), [[True, False, False]]
    )


def test_what_is_not_known_before_is_the_nearest_of_the_box():
    got = jax.jit(lambda upper: oc.box_section(0.0, upper)(normal((4,))))(0.125)
    np.testing.assert_array_equal(got, 0.125)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: oc.box_section(1.0, 0.0), ValueError, r"BoxSection: lower=1.0 is above upper=0.0"),
        (lambda: oc.box_section(np.nan, 0.0), ValueError, "BoxSection: lower=nan"),
        (lambda: oc.box_section(0.0, [1.0, np.nan]), ValueError, "upper=.* has a NaN; write"),
        (lambda: oc.box_section(0.0, 1.0, [0.0, 0.0]), ValueError, "normal=.* is zero and has no"),
        (lambda: oc.box_section(0.0, 1.0, value=np.inf), ValueError, "value=inf is not allowed"),
        (lambda: oc.box_section(0.0, "a"), ValueError, "upper='a' is not a number"),
        (lambda: oc.box_section(0.0, 1.0, equality=1), TypeError, "equality=1 is not True or"),
        (
            lambda: oc.box_section(0.0, 0.1).settle("a/w", (7, 3)),
            ValueError,
            r"BoxSection on 'a/w' of shape \(7, 3\): nothing between lower=0.0 and upper=0.1 has "
            r"the inner product value=1.0: with the 7 entries of a unit it is from 0 to 0.7",
        ),
        (
            lambda: oc.box_section(0.0, 1.0, [1.0, 1.0]).settle("a/w", (7, 3)),
            ValueError,
            r"a unit along axis=0 has shape \(7,\), and the normal has shape \(2,\); write a",
        ),
        (
            lambda: oc.box_section(0.0, [1.0, 1.0])(jnp.ones(7)),
            ValueError,
            r"has shape \(7,\), and the upper has shape \(2,\)",
        ),
        (lambda: oc.affine([1.0, 2.0]), ValueError, r"Affine: a=.* has shape \(2,\); write an"),
        (lambda: oc.affine(np.zeros((2, 3))), ValueError, "Affine: a is zero"),
        (lambda: oc.affine(np.ones((2, 3)), [1.0]), ValueError, r"b has shape \(1,\), and a has 2"),
        (lambda: oc.affine([[np.inf]]), ValueError, "Affine: a=.* has an infinite entry or a NaN"),
        (
            lambda: oc.affine([[1.0, 0], [0, 1.0], [2.0, 1.0]], [1.0, 2.0, 5.0]),
            ValueError,
            r"no unit solves the equations with b=.*: row \d of a follows from the others",
        ),
        (
            lambda: oc.affine(np.ones((2, 3))).settle("a/w", (7, 3)),
            ValueError,
            r"Affine on 'a/w' .*has shape \(7,\), and each row of a has shape \(3,\); write an "
            r"array of shape \(2, 7\)",
        ),
    ],
)
def test_bad_hyperparameters(make, error, text):
    with pytest.raises(error, match=text):
        make()


# Linear equations.


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_nearest_solution(scale):
    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 9)) * np.array([[1e-6], [1.0], [1e6]])
    a = np.vstack([a, a[0] - 3 * a[1]])
    b = a @ rng.normal(size=9)
    w = normal((9, 5), 1, scale)
    exact = float64(w)
    scales = np.linalg.norm(a[:3], axis=1, keepdims=True)
    rows, sides = a[:3] / scales, b[:3, None] / scales
    exact = exact - np.linalg.pinv(rows) @ (rows @ exact - sides)
    for constraint in (oc.affine(a, b), jax.jit(lambda b: oc.affine(a, b))(jnp.asarray(b, DTYPE))):
        got = jax.jit(constraint)(w)
        np.testing.assert_allclose(got, exact, atol=32 * EPS * scale)
        assert bits(constraint(got)) == bits(got)


def test_a_traced_matrix_has_derivatives():
    w, a = normal((6, 2), 0), normal((2, 6), 1)
    b = jnp.asarray([0.5, -1.0], DTYPE)

    def loss(a, b):
        return jnp.sum(jnp.sin(oc.affine(a, b)(w)))

    np.testing.assert_allclose(
        jax.jit(lambda a: oc.affine(a, b)(w))(a), oc.affine(a, b)(w), atol=1e-5
    )
    h = 1e-2 if jnp.float32 == DTYPE else 1e-5
    for i, x in enumerate((a, b)):
        gradient = jax.grad(loss, i)(a, b)
        v = normal(x.shape, 2)
        ends = [
            jax.jit(loss)(*(y + s * h * v if i == k else y for k, y in enumerate((a, b))))
            for s in (1, -1)
        ]
        np.testing.assert_allclose(jnp.vdot(gradient, v), (ends[0] - ends[1]) / (2 * h), rtol=2e-2)


def test_a_result_that_is_much_shorter_than_the_step():
    a = np.array([[1.0, 1, 1, 1], [1.0, -1, 1, -1]])
    w = jnp.asarray(1000 + np.arange(8.0).reshape(4, 2) / 8, DTYPE)
    project = jax.jit(oc.affine(a, [1.0, 0.0]))
    got = project(w)
    np.testing.assert_allclose(a @ float64(got), [[1, 1], [0, 0]], atol=8 * EPS)
    assert bits(project(got)) == bits(got)


# A known answer.


def test_a_portfolio_by_training():
    # Little variance and much return, with at most a quarter in each, and a target for their sum.
    rng = np.random.default_rng(0)
    returns = rng.normal(size=(40, 10)) * 0.1 + rng.random(10) * 0.05
    mean, risk = np.mean(returns, axis=0), np.cov(returns.T) * 10
    constraint = oc.box_section(0.0, 0.25)
    tx = oc.projected(optax.adam(optax.cosine_decay_schedule(0.01, 1000)), constraint)

    def step(carry, _):
        w, state = carry
        gradient = jnp.asarray(risk, DTYPE) @ w - jnp.asarray(mean, DTYPE)
        updates, state = tx.update(gradient, state, w)
        return (jnp.asarray(optax.apply_updates(w, updates)), state), None

    w = jnp.full(10, 0.1, DTYPE)
    w = float64(jax.lax.scan(step, (w, tx.init(w)), length=1000)[0][0])
    x = cp.Variable(10)
    objective = cp.Minimize(cp.quad_form(x, cp.psd_wrap(risk)) / 2 - mean @ x)
    cp.Problem(objective, [x >= 0, x <= 0.25, cp.sum(x) == 1]).solve("CLARABEL")
    np.testing.assert_allclose(w, x.value, atol=1e-3)
    assert 0 < np.sum(w > 1e-4) < 10
