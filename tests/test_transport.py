"""Transport plans: against cvxpy and linprog, and what the shared promises leave open."""

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
from cases import bits, float64

import optax_constraints as oc
from optax_constraints._axes import LeafLayout

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)


def normal(shape, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, DTYPE)


def margins(m: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    rows, columns = rng.random(m), rng.random(n)
    rows[0] = 0
    return rows, columns * np.sum(rows) / np.sum(columns)


@pytest.mark.parametrize(("m", "n"), [(4, 7), (7, 4)])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_nearest_plan(m, n, size):
    rows, columns = (size * sums for sums in margins(m, n))
    project = jax.jit(lambda w: oc.transport(rows, columns)(w))
    for seed, scale in enumerate((0.1, 1.0, 10.0)):
        w = normal((m, n), seed, scale * size)
        got = project(w)
        assert bits(project(got)) == bits(got)
        x = cp.Variable((m, n), nonneg=True)
        sums = [cp.sum(x, axis=1) == rows / size, cp.sum(x, axis=0) == columns / size]
        cp.Problem(cp.Minimize(cp.sum_squares(x - float64(w) / size)), sums).solve("CLARABEL")
        np.testing.assert_allclose(got / size, x.value, atol=2e-5 * max(1, scale))
        x = float64(got)
        assert np.all(x[0] == 0)
        assert np.min(x) >= 0
        missed = np.concatenate([np.sum(x, 1) - rows, np.sum(x, 0) - columns])
        assert np.max(np.abs(missed)) <= 8 * EPS * max(np.max(rows), np.max(columns))


def test_ones_are_the_doubly_stochastic_matrices():
    w = normal((5, 6, 6))
    np.testing.assert_allclose(oc.transport(1.0, 1.0)(w), oc.doubly_stochastic()(w), atol=8 * EPS)


def test_derivatives_also_in_the_sums():
    rows, columns = (jnp.asarray(x, DTYPE) for x in margins(4, 5, 1))
    rows = rows.at[0].set(0.5)
    columns = columns * (jnp.sum(rows) / jnp.sum(columns))
    w, v, u = normal((4, 5), 1), normal((4, 5), 2), normal((4, 5), 3)
    dr = jnp.asarray([0.1, -0.2, 0.3, 0.1], DTYPE)

    @jax.jit
    def project(w, rows):
        return oc.transport(rows, columns)(w)

    _, got = jax.jit(lambda w, r: jax.jvp(project, (w, r), (v, dr)))(w, rows)
    h = 1e-3 if jnp.float32 == DTYPE else 1e-6
    ends = [project(w + s * h * v, rows + s * h * dr) for s in (1, -1)]
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * h), atol=2e-3)
    back = jax.jit(lambda w, r: jax.vjp(project, w, r)[1](u))(w, rows)
    np.testing.assert_allclose(
        jnp.vdot(u, got), jnp.vdot(back[0], v) + jnp.vdot(back[1], dr), rtol=1e-4
    )


def test_a_kernel_is_flattened_and_a_stack_goes_layer_by_layer():
    w = normal((2, 3, 2, 4))
    constraint = oc.transport(4.0, 6.0, axis=(1, 2))
    layout = LeafLayout("Conv", (1, 2), stacked=(0,))
    settled = oc.transport(4.0, 6.0, axis="fan_in").settle("a/kernel", w.shape, layout)
    got = settled(w)
    want = [oc.transport(4.0, 6.0)(layer.reshape(6, 4)).reshape(3, 2, 4) for layer in w]
    np.testing.assert_allclose(got, jnp.stack(want), atol=8 * EPS)
    with pytest.raises(ValueError, match="the matrices are 6x8"):
        oc.transport(np.ones(4), 1.0, axis=(1, 2)).settle("a/kernel", w.shape)
    assert constraint.settle("a", (4, 2, 3)).axis == (1, 2)


def test_a_transport_plan_by_training():
    rows, columns = margins(6, 8)
    cost = np.random.default_rng(3).random((6, 8))
    constraint = oc.transport(rows, columns)
    tx = oc.projected(optax.adam(optax.cosine_decay_schedule(0.05, 300)), constraint)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jnp.asarray(cost, DTYPE), state, w)
        return (jnp.asarray(optax.apply_updates(w, updates)), state), None

    w = constraint(jnp.zeros((6, 8), DTYPE))
    w = float64(jax.lax.scan(step, (w, tx.init(w)), length=300)[0][0])
    sums = np.vstack([np.kron(np.eye(6), np.ones(8)), np.kron(np.ones(6), np.eye(8))])
    best = scipy.optimize.linprog(cost.ravel(), A_eq=sums, b_eq=np.concatenate([rows, columns]))
    assert abs(np.sum(cost * w) - best.fun) <= 1e-3 * best.fun
    np.testing.assert_allclose(w, best.x.reshape(6, 8), atol=1e-2)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: oc.transport([1.0, -1.0], 0.0), ValueError, "rows=.* has a negative sum"),
        (lambda: oc.transport([[1.0]], [1.0]), ValueError, r"rows=.* has shape \(1, 1\); write"),
        (lambda: oc.transport([1.0, 2.0], [1.0, 1.0]), ValueError, "rows sum to 3 and the columns"),
        (lambda: oc.transport(np.nan, 1.0), ValueError, "rows=nan has an infinite entry or a NaN"),
        (lambda: oc.transport("one", 1.0), TypeError, "rows='one' is not an array of real"),
        (
            lambda: oc.transport(1.0, 1.0).settle("a/w", (2, 3)),
            ValueError,
            r"Transport on 'a/w' of shape \(2, 3\): the rows sum to 2 and the columns to 3",
        ),
        (
            lambda: oc.transport([1.0, 1.0, 1.0], 1.0)(jnp.ones((2, 3))),
            ValueError,
            r"the matrices are 2x3, and rows has shape \(3,\); write one number for each of the 2",
        ),
    ],
)
def test_bad_hyperparameters(make, error, text):
    with pytest.raises(error, match=text):
        make()
