"""Training under a constraint finds what is known to be the answer.

Real training, by gradients in a chain that ends in `project`, of problems whose answers are
known from elsewhere: solvers of SciPy, scikit-learn and cvxpy, a decomposition, a closed form,
or a theorem on networks.
"""

from collections.abc import Callable

import cvxpy as cp
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
import scipy.optimize
from cases import float64
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc

WIDE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
PRECISE = {"solver": "CLARABEL"} | dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-10)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def design(m: int, n: int, seed: int = 0) -> np.ndarray:
    """Correlated features, scaled so that the largest curvature of half the squares is 1."""
    a = normal(m, n, seed=seed) + 0.5 * normal(m, 1, seed=seed + 1)
    return a / np.linalg.norm(a, 2)


def train(
    loss: Callable[..., jax.Array],
    start: np.ndarray,
    constraint: oc.Constraint | None,
    *,
    steps: int,
    rate: float = 0.9,
    momentum: float = 0.5,
    tangent: bool = False,
) -> np.ndarray:
    """What gradient descent comes to."""
    front = [oc.tangent(constraint)] if tangent else []
    last = optax.identity() if constraint is None else oc.project(constraint)
    tx = optax.chain(*front, optax.sgd(rate, momentum=momentum), last)

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    @jax.jit
    def run(w):
        w = w if constraint is None else oc.constrain(w, constraint)
        return jax.lax.scan(step, (w, tx.init(w)), length=steps)[0][0]

    with jax.default_matmul_precision("highest"):
        return float64(run(jnp.asarray(start, WIDE)))


def finds(want, loss, start, constraint, **how) -> np.ndarray:
    """Asserts that training finds the answer with the constraint, and not without it."""
    got = train(loss, start, constraint, **how)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)
    free = train(loss, start, None, **how)
    assert not np.max(np.abs(free - want)) < 0.05  # also where it is not finite
    return got


def half_squares(a: np.ndarray, b: np.ndarray) -> Callable[..., jax.Array]:
    x, y = jnp.asarray(a, WIDE), jnp.asarray(b, WIDE)
    return lambda w: 0.5 * jnp.sum(jnp.square(x @ w - y))


def by_cvxpy(shape, objective, *constraints, **kind) -> np.ndarray:
    """The minimum over a convex set; objective and constraints are functions of the variable."""
    x = cp.Variable(shape, **kind)
    cp.Problem(cp.Minimize(objective(x)), [c(x) for c in constraints]).solve(**PRECISE)
    assert x.value is not None
    return np.asarray(x.value)


# Entry by entry.


def test_non_negative_least_squares():
    a, b = design(40, 8), normal(40, 5, seed=2)
    want = np.stack([scipy.optimize.nnls(a, column)[0] for column in b.T], axis=1)
    assert 5 < np.sum(want == 0) < 35
    got = finds(want, half_squares(a, b), np.zeros((8, 5)), oc.non_neg(), steps=1000)
    assert np.all(got[want == 0] == 0)


def test_bounded_least_squares():
    a, b = design(40, 8), normal(40, seed=2)
    lower, upper = np.linspace(-1, 0, 8), np.linspace(0.1, 1, 8)
    lower[3], upper[5:] = -np.inf, np.inf
    want = scipy.optimize.lsq_linear(a, b, (lower, upper), method="bvls", tol=1e-12).x
    finds(want, half_squares(a, b), np.zeros(8), oc.box(lower, upper), steps=1000)


def test_items_that_do_not_predict_themselves():
    # EASE (Steck 2019): the best B without a diagonal is I - P diag(1 / diag P), with
    # P = (X'X + lambda I)^-1.
    x = (np.random.default_rng(0).random((200, 20)) < 0.15).astype(np.float64)
    gram, ridge = x.T @ x, 5.0
    p = np.linalg.inv(gram + ridge * np.eye(20))
    want = np.eye(20) - p / np.diag(p)
    size = np.linalg.norm(gram, 2) + ridge
    data = jnp.asarray(x, WIDE)

    def loss(b):
        error = jnp.sum(jnp.square(data - data @ b))
        return (error + ridge * jnp.sum(jnp.square(b))) / (2 * size)

    got = finds(want, loss, np.zeros((20, 20)), oc.zero_diagonal(), steps=300, momentum=0.8)
    assert np.all(np.diag(got) == 0)


# Units.


@pytest.mark.parametrize("increasing", [True, False])
def test_isotonic_regression(increasing):
    # Not one projection: those are in the plain distance, the weights are in the loss.
    y = (1 if increasing else -1) * np.linspace(-1, 1, 16)[:, None] + 0.5 * normal(16, 3)
    weight = np.random.default_rng(1).uniform(0.1, 1, size=(16, 3))
    want, once = (
        np.stack(
            [
                isotonic_regression(v, sample_weight=s, increasing=increasing)
                for v, s in zip(y.T, weights.T, strict=True)
            ],
            axis=1,
        )
        for weights in (weight, np.ones_like(weight))
    )
    assert np.max(np.abs(once - want)) > 0.05
    scale, target = jnp.asarray(weight, WIDE), jnp.asarray(y, WIDE)

    def loss(w):
        return 0.5 * jnp.sum(scale * jnp.square(w - target))

    constraint = oc.monotone(increasing=increasing)
    finds(want, loss, np.zeros((16, 3)), constraint, steps=300, momentum=0.7)


def test_least_squares_in_a_polyhedron():
    a, b = design(40, 8), normal(40, seed=2)
    g, h = normal(6, 8, seed=3), np.linspace(-1, 0, 6)
    want = by_cvxpy(8, lambda w: cp.sum_squares(a @ w - b), lambda w: g @ w <= h)
    assert 1 < np.sum(g @ want > h - 1e-6) < 6
    finds(want, half_squares(a, b), np.zeros(8), oc.polyhedron(g, h), steps=1000)


@pytest.mark.parametrize("name", ["convex_sequence", "lattice"])
def test_regression_with_weights(name):
    # Not one projection: those are in the plain distance, the weights are in the loss.
    n = (5, 4) if name == "lattice" else (12, 1)
    constraint = oc.monotone(axis=None) if name == "lattice" else oc.convex_sequence()
    slope = np.add.outer(*(np.linspace(-1, 1, m) ** (2 if name != "lattice" else 1) for m in n))
    y = slope + 0.7 * normal(*n)
    weight = np.random.default_rng(1).uniform(0.3, 1, size=n)
    lines = [lambda w: cp.diff(w, axis=0) >= 0, lambda w: cp.diff(w, axis=1) >= 0]
    lines = lines if name == "lattice" else [lambda w: cp.diff(w, 2, axis=0) >= 0]
    want = by_cvxpy(n, lambda w: cp.sum(cp.multiply(weight, cp.square(w - y))), *lines)
    scale, target = jnp.asarray(weight, WIDE), jnp.asarray(y, WIDE)

    def loss(w):
        return 0.5 * jnp.sum(scale * jnp.square(w - target))

    finds(want, loss, np.zeros(n), constraint, steps=400, momentum=0.7)


@pytest.mark.parametrize("tangent", [False, True])
def test_top_eigenvector(tangent):
    # Four starts: every one comes to the vector or to its negative.
    a = normal(12, 12)
    a = (a + a.T) / np.sqrt(48)
    values, vectors = np.linalg.eigh(a)
    assert values[-1] - values[-2] > 0.1
    matrix = jnp.asarray(a, WIDE)

    def loss(w):
        return -0.5 * jnp.sum(w * (matrix @ w))

    start, want = normal(12, 4, seed=1), vectors[:, -1:]
    got = train(loss, start, oc.unit_norm(), steps=400, momentum=0.7, tangent=tangent)
    got = got * np.sign(want.T @ got)
    np.testing.assert_allclose(got, np.tile(want, 4), rtol=0, atol=1e-4)


def test_portfolio():
    factors, mean = normal(15, 4), 0.4 * normal(15, seed=1)
    risk = factors @ factors.T + np.diag(np.linspace(0.5, 2, 15))
    risk /= np.linalg.norm(risk, 2)

    def objective(w):
        return 0.5 * cp.quad_form(w, cp.psd_wrap(risk)) - mean @ w / 5

    s, mu = jnp.asarray(risk, WIDE), jnp.asarray(mean, WIDE)

    def loss(w):
        return 0.5 * w @ (s @ w) - mu @ w / 5

    want = by_cvxpy(15, objective, lambda w: cp.sum(w) == 1, nonneg=True)
    assert 2 < np.sum(want > 1e-3) < 13
    finds(want, loss, np.zeros(15), oc.simplex(), steps=500)


def test_mixture_of_experts():
    # The convex combination of predictions that fits best, for three targets at once.
    a = design(60, 6)
    b = a @ np.abs(normal(6, 3)) / 3 + 0.05 * normal(60, 3, seed=3)

    def objective(w):
        return cp.sum_squares(a @ w - b)

    want = by_cvxpy((6, 3), objective, lambda w: cp.sum(w, axis=0) == 1, nonneg=True)
    assert np.sum(want < 1e-6) > 2
    finds(want, half_squares(a, b), np.zeros((6, 3)), oc.simplex(), steps=1500, momentum=0.8)


def test_lasso():
    a, b = design(30, 12), normal(30, seed=2)
    want = by_cvxpy(12, lambda w: cp.sum_squares(a @ w - b), lambda w: cp.norm1(w) <= 4)
    assert 2 < np.sum(np.abs(want) > 1e-3) < 10
    got = finds(want, half_squares(a, b), np.zeros(12), oc.l1_ball(4.0), steps=1000)
    assert np.all(got[np.abs(want) < 1e-6] == 0)


# Matrices. The best assignment is in test_matrix.py.


def test_procrustes():
    # One start in each of the two components, rotations and reflections, as a batch.
    a = design(30, 6)
    rotation = scipy.linalg.qr(normal(6, 6, seed=2))[0]
    b = a @ rotation + 0.05 * normal(30, 6, seed=3)
    want, _ = scipy.linalg.orthogonal_procrustes(a, b)
    start = np.stack([np.eye(6), np.diag([-1.0, 1, 1, 1, 1, 1])])
    how = {"steps": 1000, "momentum": 0.8, "tangent": True}
    got = train(half_squares(a, b), start, oc.orthogonal(), **how)
    best = got[np.argmin(np.linalg.norm(a @ got - b, axis=(1, 2)))]
    np.testing.assert_allclose(best, want, rtol=0, atol=1e-4)


def test_regression_with_a_nuclear_norm():
    a, b = design(40, 6), normal(40, 5, seed=2)

    def objective(w):
        return cp.sum_squares(a @ w - b)

    want = by_cvxpy((6, 5), objective, lambda w: cp.normNuc(w) <= 4)
    assert np.linalg.matrix_rank(want, 1e-4) in (2, 3, 4)
    finds(want, half_squares(a, b), np.zeros((6, 5)), oc.nuclear_norm_ball(4.0), steps=1000)


def test_regression_of_reduced_rank():
    # Eckart and Young, in the metric of the features: the fit is the truncated SVD of the fit
    # without the constraint.
    a = design(40, 6)
    b = a @ normal(6, 2, seed=2) @ normal(2, 5, seed=3) + 0.05 * normal(40, 5, seed=4)
    fit = a @ np.linalg.lstsq(a, b)[0]
    u, s, vt = np.linalg.svd(fit, full_matrices=False)
    want = np.linalg.lstsq(a, (u[:, :2] * s[:2]) @ vt[:2])[0]
    finds(want, half_squares(a, b), np.zeros((6, 5)), oc.low_rank(2), steps=1000)


def test_completion_of_a_matrix_of_low_rank():
    # From seven entries of ten. The others are never seen.
    want = normal(20, 2) @ normal(2, 15, seed=1)
    seen = jnp.asarray(np.random.default_rng(2).random((20, 15)) < 0.7, WIDE)
    target = jnp.asarray(want, WIDE)

    def loss(w):
        return 0.5 * jnp.sum(seen * jnp.square(w - target))

    finds(want, loss, np.zeros((20, 15)), oc.low_rank(2), steps=500)


def test_semidefinite_procrustes():
    a, b = design(30, 5), normal(30, 5, seed=2)

    def objective(w):
        return cp.sum_squares(a @ w - b)

    want = by_cvxpy((5, 5), objective, PSD=True)
    assert np.linalg.matrix_rank(want, 1e-4) in (2, 3, 4)
    constraint = oc.positive_semidefinite()
    finds(want, half_squares(a, b), np.zeros((5, 5)), constraint, steps=1000, momentum=0.8)


def test_nearest_correlation_matrix():
    # With a weight for each entry, after Higham (2002).
    n = 6
    a = np.random.default_rng(0).uniform(-1, 1, size=(n, n))
    a, weight = (a + a.T) / 1.5, np.random.default_rng(1).uniform(0.3, 1, size=(n, n))
    weight = (weight + weight.T) / 2

    def objective(w):
        return cp.sum(cp.multiply(weight, cp.square(w - a)))

    want = by_cvxpy((n, n), objective, lambda w: cp.diag(w) == 1, PSD=True)
    assert np.min(np.linalg.eigvalsh(want)) < 1e-6
    scale, target = jnp.asarray(weight, WIDE), jnp.asarray(a, WIDE)

    def loss(w):
        return 0.5 * jnp.sum(scale * jnp.square(w - target))

    diagonal = np.eye(n) == 1
    unit_diagonal = oc.box(np.where(diagonal, 1, -np.inf), np.where(diagonal, 1, np.inf))
    constraint = oc.intersection(oc.positive_semidefinite(), unit_diagonal)
    finds(want, loss, np.eye(n), constraint, steps=200)


# Networks. What is promised holds for all inputs, whatever they were trained for.

PAIRS = 100_000


def points(*shape: int, seed: int, high: float) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(-high, high, size=(*shape, 2)), jnp.float32)


def fitted(net: nn.Module, rules, height: float = 1.0) -> Callable[[jax.Array], np.ndarray]:
    """A network trained for a target that is steep, not convex and not monotonic."""
    x, rng = points(256, seed=0, high=1.0), np.random.default_rng(1)
    y = height * (jnp.sin(4 * x[:, 0]) * jnp.cos(2 * x[:, 1]) + 0.5 * x[:, 1])
    # With numbers of NumPy, whose program need not be compiled.
    start = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / leaf.shape[0] ** 0.5, leaf.dtype),
        jax.eval_shape(net.init, jax.random.key(0), x),
    )
    tx = optax.chain(optax.adam(1e-2), oc.project(rules) if rules else optax.identity())

    def loss(params):
        return jnp.mean(jnp.square(jnp.asarray(net.apply(params, x)) - y))

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=300)

    (params, _), losses = run(start)
    assert losses[-1] < 0.95 * losses[1]  # it was trained, as far as the set allows
    apply = jax.jit(net.apply)

    def predict(x):
        with jax.default_matmul_precision("highest"):
            return float64(apply(params, x))

    return predict


class MLP(nn.Module):
    """Two hidden layers of tanh, which is increasing and 1-Lipschitz."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(nn.Dense(16)(x))
        return nn.Dense(1)(x)[:, 0]


class InputConvex(nn.Module):
    """After Amos, Xu and Kolter (2017): free kernels from the input, `z` from layer to layer."""

    @nn.compact
    def __call__(self, x):
        z = nn.softplus(nn.Dense(16)(x))
        z = nn.softplus(nn.Dense(16, use_bias=False, name="z1")(z) + nn.Dense(16)(x))
        return (nn.Dense(1, use_bias=False, name="z2")(z) + nn.Dense(1)(x))[:, 0]


@pytest.mark.slow
def test_a_network_of_spectral_norms_is_1_lipschitz():
    x, y = points(2, PAIRS, seed=7, high=1.5)
    y = jnp.where(jnp.arange(PAIRS)[:, None] % 2 == 0, y, x + 0.1 * y)  # half of them are near
    apart = np.linalg.norm(float64(x) - float64(y), axis=1)

    def slopes(rules):
        f = fitted(MLP(), rules, height=5.0)
        return np.abs(f(x) - f(y)) / apart

    slope = slopes({"kernel": oc.max_spectral_norm(1.0)})
    assert 0.9 < np.max(slope) <= 1 + 1e-4
    assert np.sum(slopes(None) > 1 + 1e-4) > 1000


def test_an_input_convex_network_is_convex():
    x, y = points(2, PAIRS, seed=8, high=1.5)

    def violations(rules):
        f = fitted(InputConvex(), rules)
        return np.sum(f((x + y) / 2) > (f(x) + f(y)) / 2 + 1e-5)

    assert violations({"z*/kernel": oc.non_neg()}) == 0
    assert violations(None) > 1000


def test_a_monotonic_network_is_monotonic():
    x, y = points(2, PAIRS, seed=9, high=1.5)

    def violations(rules):
        f = fitted(MLP(), rules)
        return np.sum(f(x + jnp.abs(y - x)) < f(x) - 1e-5)

    assert violations({"kernel": oc.non_neg()}) == 0
    assert violations(None) > 1000
