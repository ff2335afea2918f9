"""Sets of singular values against SciPy, cvxpy and known answers."""

import re

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from cases import bits, derivatives, float64

import optax_constraints as oc
from optax_constraints.sets import singular_values as of_values
from optax_constraints.sets.polar import polar
from optax_constraints.sets.spectral import (
    LowRank,
    MaxSpectralNorm,
    NuclearNormBall,
    Orthogonal,
)

X64 = bool(jax.config.jax_enable_x64)
DTYPE = jnp.float64 if X64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)
NEAR = 1e-8 if X64 else 1e-5
SETS = [Orthogonal(), MaxSpectralNorm(), NuclearNormBall(2.0), LowRank(2)]
each_set = pytest.mark.parametrize("constraint", SETS, ids=str)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, DTYPE)


def with_singular_values(m: int, n: int, s: np.ndarray, seed: int = 0) -> jax.Array:
    u, _, vt = np.linalg.svd(float64(normal(m, n, seed=seed)), full_matrices=False)
    return jnp.asarray((u * s) @ vt, DTYPE)


def singular_values(w: jax.Array) -> np.ndarray:
    return np.linalg.svd(float64(w), compute_uv=False)


def gram_error(q: jax.Array) -> float:
    tall = float64(q) if q.shape[0] >= q.shape[1] else float64(q).T
    return float(np.max(np.abs(tall.T @ tall - np.eye(tall.shape[1]))))


# Orthogonal matrices.


@pytest.mark.parametrize("shape", [(32, 32), (64, 20), (20, 64)])
def test_orthogonal_is_the_polar_factor(shape):
    project = jax.jit(Orthogonal())
    for condition in (1.0, 10.0, 1e2, 1e3, 1e4, 1e6):
        w = with_singular_values(*shape, np.geomspace(1, 1 / condition, min(shape)))
        got = project(w)
        want, _ = scipy.linalg.polar(float64(w))
        # The polar factor moves by 1 / s_min of what moves the matrix.
        assert np.max(np.abs(float64(got) - want)) <= max(NEAR, EPS * condition)
        assert gram_error(got) <= (1e-14 if X64 else 1e-6)
        assert bits(project(got)) == bits(got)


def test_orthogonal_near_the_set():
    q = scipy.linalg.qr(float64(normal(64, 32)), mode="economic")[0]
    project = jax.jit(Orthogonal())
    for noise in (1e-1, 1e-2, 1e-3, 1e-5, 3e-7):
        w = jnp.asarray(q, DTYPE) + normal(64, 32, seed=1, scale=noise)
        got = project(w)
        np.testing.assert_allclose(got, scipy.linalg.polar(float64(w))[0], atol=1e-6, rtol=0)
        assert gram_error(got) <= 2e-6
        assert bits(project(got)) == bits(got)


def test_small_and_large_weights_lose_nothing():
    # Every multiple of a matrix has the same polar factor.
    w = normal(7, 5, 3)
    want = np.stack([scipy.linalg.polar(a)[0] for a in float64(w)])
    for scale in (1e-3, 0.1, 0.12, 0.15, 3.0, 300.0):
        np.testing.assert_allclose(Orthogonal()(w * scale), want, atol=1e-6, rtol=0)


def test_zero_stays_zero():
    zeros = jnp.zeros((2, 5, 3), DTYPE)
    for constraint in SETS:
        assert bits(constraint(zeros)) == bits(zeros)


def test_scale_of_orthogonal():
    w = normal(6, 4)
    got = Orthogonal(scale=0.3)(w)
    np.testing.assert_allclose(got, 0.3 * scipy.linalg.polar(float64(w))[0], atol=1e-6)
    assert bits(Orthogonal(0.3)(got)) == bits(got)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e30])
def test_orthogonal_of_deficient_rank(scale):
    # What is determined is right, the rest finite, at most orthonormal, and the same each time.
    zero_column = normal(6, 4).at[:, 1].set(0) * scale
    got = Orthogonal()(zero_column)
    assert np.all(float64(got)[:, 1] == 0)
    assert gram_error(got[:, jnp.array([0, 2, 3])]) <= 1e-6
    low = normal(6, 2) @ normal(2, 4, seed=1) * scale
    got = Orthogonal()(low)
    s = singular_values(got)
    np.testing.assert_allclose(s[:2], 1, atol=1e-5)
    assert np.all(s <= 1 + 1e-5)
    assert bits(Orthogonal()(low)) == bits(got)


def test_procrustes():
    # The orthogonal Q nearest to A Q = B is the polar factor of A^T B.
    a, b = normal(40, 8), normal(40, 8, seed=1)
    tx = optax.chain(optax.sgd(5e-3), oc.project(Orthogonal()))

    def loss(q):
        return jnp.sum(jnp.square(a @ q - b))

    def step(carry, _):
        q, state = carry
        updates, state = tx.update(jax.grad(loss)(q), state, q)
        return (optax.apply_updates(q, updates), state), None

    want, _ = scipy.linalg.polar(float64(a).T @ float64(b))
    losses = []
    for seed in range(8):
        q = Orthogonal()(normal(8, 8, seed=seed + 2))
        (q, _), _ = jax.lax.scan(step, (q, tx.init(q)), length=1000)
        losses.append((float(loss(q)), float(np.max(np.abs(float64(q) - want)))))
    assert min(losses)[1] <= 1e-4


@pytest.mark.slow
def test_orthogonal_over_a_thousand_steps_of_adam():
    target, x = normal(64, 32, seed=1), normal(128, 64, seed=2)
    tx = optax.chain(optax.adam(1e-2), oc.project(Orthogonal()))

    def step(carry, _):
        q, state = carry
        grads = jax.grad(lambda q: jnp.mean(jnp.square(jnp.tanh(x @ q) - x @ target)))(q)
        updates, state = tx.update(grads, state, q)
        q = jnp.asarray(optax.apply_updates(q, updates))
        gram = jnp.matmul(q.T, q, precision="highest")
        return (q, state), (q, jnp.max(jnp.abs(gram - jnp.eye(32))))

    q = Orthogonal()(normal(64, 32))
    (_, _), (history, errors) = jax.lax.scan(step, (q, tx.init(q)), length=1000)
    assert np.max(np.abs(history[-1] - history[0])) > 0.1
    assert np.max(errors) <= 1e-5
    assert max(gram_error(q) for q in history[::50]) <= 2e-6


def test_sylvester():
    # The derivative of the polar factor by the equation that defines it: W = Q H, H symmetric.
    w, dw = normal(6, 4), normal(6, 4, seed=1)
    q, h = scipy.linalg.polar(float64(w))
    omega = scipy.linalg.solve_sylvester(h, h, q.T @ float64(dw) - float64(dw).T @ q)
    want = q @ omega + (np.eye(6) - q @ q.T) @ float64(dw) @ np.linalg.inv(h)
    got = jax.jvp(Orthogonal(), (w,), (dw,))[1]
    np.testing.assert_allclose(got, want, atol=1e-4)
    got = jax.jvp(lambda s: Orthogonal(s)(w), (0.5,), (2.0,))[1]
    np.testing.assert_allclose(got, 2 * q, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (4, 4)])
def test_derivative_at_orthogonal_matrices_is_the_tangent_part(shape):
    q, dq = Orthogonal(2.0)(normal(*shape)), normal(*shape, seed=1)
    got = float64(jax.jvp(Orthogonal(2.0), (q,), (dq,))[1])
    q, dq = float64(q) / 2, float64(dq)
    if shape[0] < shape[1]:
        q, dq, got = q.T, dq.T, got.T
    np.testing.assert_allclose(got, dq - q @ (q.T @ dq + dq.T @ q) / 2, atol=1e-5)


def test_derivative_at_matrices_of_a_rank_is_the_tangent_part():
    w = with_singular_values(6, 4, np.array([2.0, 1.0, 0, 0]))
    dw = normal(6, 4, seed=1)
    u, _, vt = np.linalg.svd(float64(w))
    left, right = u[:, 2:] @ u[:, 2:].T, vt[2:].T @ vt[2:]
    assert bits(LowRank(2)(w)) == bits(w)
    got = jax.jvp(LowRank(2), (w,), (dw,))[1]
    np.testing.assert_allclose(got, float64(dw) - left @ float64(dw) @ right, atol=1e-5)


# Convex sets.


def nearest_by_cvxpy(a: np.ndarray, norm, bound: float) -> np.ndarray:
    x = cp.Variable(a.shape)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - a)), [norm(x) <= bound])
    problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-11, tol_gap_rel=1e-11, tol_feas=1e-11)
    assert x.value is not None
    return x.value


@pytest.mark.parametrize(
    ("constraint", "norm", "bound"),
    [
        (MaxSpectralNorm(1.2), cp.sigma_max, 1.2),
        (NuclearNormBall(2.5), cp.normNuc, 2.5),
    ],
    ids=str,
)
def test_nearest_point_by_cvxpy(constraint, norm, bound):
    deficient = normal(5, 1) @ normal(1, 4, seed=1)
    for w in (normal(5, 4), normal(4, 5, seed=1), deficient, normal(5, 4, scale=0.1)):
        want = nearest_by_cvxpy(float64(w), norm, bound)
        np.testing.assert_allclose(constraint(w), want, atol=2e-6)


@pytest.mark.parametrize("shape", [(32, 32), (10, 48)])
@pytest.mark.parametrize("scale", [0.3, 3.0, 1e3])
def test_nearest_point_by_numpy(shape, scale):
    w = normal(*shape, scale=scale)
    u, s, vt = np.linalg.svd(float64(w), full_matrices=False)
    lowered = np.maximum(s - max((np.cumsum(s) - 5) / np.arange(1, len(s) + 1)), 0)
    spectral_want = (u * np.minimum(s, 2)) @ vt
    nuclear_want = (u * (lowered if np.sum(s) > 5 else s)) @ vt
    largest = np.max(np.abs(float64(w)))
    for constraint, want in (
        (MaxSpectralNorm(2.0), spectral_want),
        (NuclearNormBall(5.0), nuclear_want),
    ):
        got = constraint(w)
        np.testing.assert_allclose(got, want, atol=NEAR * largest, rtol=0)
        assert bits(constraint(got)) == bits(got)
    assert singular_values(MaxSpectralNorm(2.0)(w))[0] <= 2 * (1 + 8 * EPS)
    assert np.sum(singular_values(NuclearNormBall(5.0)(w))) <= 5 * (1 + 16 * EPS)


def test_smaller_singular_values_are_left_alone():
    s = np.array([3.0, 1.5, 0.9, 0.3, 1e-3])
    got = singular_values(MaxSpectralNorm()(with_singular_values(8, 5, s)))
    np.testing.assert_allclose(got, np.minimum(s, 1), atol=1e-6)


@pytest.mark.parametrize("over", [0.0, 1e-4, 1e-2])
def test_no_violation_is_missed(over):
    # One singular value above the bound among many below or at it, wherever it points.
    for seed in range(10):
        s = np.concatenate([[1 + over], np.full(10, 1.0), np.linspace(1, 0, 21)])
        # Ones at the bound would be above it by the rounding of the product.
        w = with_singular_values(40, 32, s * (1 if over else 1 - 16 * EPS), seed)
        got = MaxSpectralNorm()(w)
        assert singular_values(got)[0] <= 1 + 8 * EPS
        assert (bits(got) == bits(w)) == (over == 0)


def test_decompositions_are_taken_only_where_needed(monkeypatch):
    calls = []

    def counted(name, plain):
        def called(*args):
            jax.debug.callback(lambda: calls.append(name))
            return plain(*args)

        return called

    for name in ("_clip_nearby", "svd"):
        monkeypatch.setattr(of_values, name, counted(name, getattr(of_values, name)))
    # No other test has this shape, for which it is traced anew.
    w = with_singular_values(13, 9, np.linspace(0.999, 0.1, 9))
    nearby, both = ["_clip_nearby"], ["_clip_nearby", "svd"]
    for scale, expected in ((1, []), (1.2, nearby), (1.3, both), (8, ["svd"])):
        jax.block_until_ready(MaxSpectralNorm()(w * scale))
        jax.effects_barrier()
        assert calls == expected
        calls.clear()


@pytest.mark.parametrize(
    ("constraint", "conditional"),
    [(MaxSpectralNorm(), ["gesdd", "syevd"]), (oc.positive_semidefinite(), ["syevd"])],
    ids=str,
)
def test_the_compiler_leaves_decompositions_where_they_are_needed(constraint, conditional):
    # What a loop does not change it moves in front of it.
    text = jax.jit(constraint).lower(normal(8, 8)).compile().as_text() or ""
    assert all(name in text for name in ["potrf", *conditional])
    always = re.findall('custom_call_target="([^"]*)"', text[text.index("ENTRY") :])
    assert len(always) == 1
    assert "potrf" in always[0]


def test_what_is_surely_beyond_a_bound_is():
    for shape in ((90, 60), (60, 90), (60, 60)):
        w = normal(*shape)
        largest = singular_values(w)[0]
        told = [of_values._surely_beyond(w, jnp.full((1, 1), largest * f)) for f in (0.5, 1.001)]
        assert told == [True, False]
    # Of a diagonal matrix it tells as much as there is.
    w = jnp.diag(jnp.asarray([0.5, 3.0, 2.0], DTYPE))
    told = [of_values._surely_beyond(w, jnp.full((1, 1), b, DTYPE)) for b in (2.99, 3.01)]
    assert told == [True, False]


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (60, 60)], ids=str)
def test_near_the_bound_and_far_from_it(shape):
    s = np.linspace(1, 0, 60) ** 2
    scales = (0.9, 1.0001, 1.01, 1.24, 1.26, 8.0)
    w = jnp.stack([with_singular_values(*shape, s * scale, seed=3) for scale in scales])
    got = MaxSpectralNorm()(w)
    for one, out in zip(float64(w), float64(got), strict=True):
        u, values, vt = np.linalg.svd(one, full_matrices=False)
        want = (u * np.minimum(values, 1)) @ vt
        np.testing.assert_allclose(out, want, rtol=0, atol=4 * EPS * max(1, values[0]))
    assert bits(got[0]) == bits(w[0])
    assert bits(MaxSpectralNorm()(got)) == bits(got)


def test_a_decomposition_that_fails_is_taken_again(monkeypatch):
    plain = jax.lax.linalg.svd

    def failing(a, *, algorithm=None, **kwargs):
        factors = plain(a, algorithm=algorithm, **kwargs)
        return [x * jnp.nan for x in factors] if algorithm is None else factors

    monkeypatch.setattr(jax.lax.linalg, "svd", failing)
    # No other test has a matrix of this shape, so that none finds this program in a cache.
    w = normal(23, 19)
    got = MaxSpectralNorm()(w)
    u, s, vt = np.linalg.svd(float64(w), full_matrices=False)
    np.testing.assert_allclose(got, (u * np.minimum(s, 1)) @ vt, atol=1e-6)


def test_bound_of_zero():
    for constraint in (MaxSpectralNorm(0.0), NuclearNormBall(0.0), LowRank(0), Orthogonal(0.0)):
        np.testing.assert_array_equal(constraint(normal(4, 3)), np.zeros((4, 3)))


def test_a_rank_that_is_no_bound():
    w = normal(4, 3)
    assert bits(LowRank(3)(w)) == bits(w)
    assert bits(LowRank(7)(w)) == bits(w)


def test_truncation():
    w = normal(12, 9)
    u, s, vt = np.linalg.svd(float64(w))
    for rank in (1, 2, 5):
        want = (u[:, :rank] * s[:rank]) @ vt[:rank]
        got = LowRank(rank)(w)
        np.testing.assert_allclose(got, want, atol=1e-5)
        assert bits(LowRank(rank)(got)) == bits(got)


# All of them.


@each_set
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny(constraint, scale):
    unit = float64(normal(5, 4))
    got = float64(constraint(jnp.asarray(unit * scale, DTYPE)))
    assert np.all(np.isfinite(got))
    if isinstance(constraint, (Orthogonal, LowRank)):
        like = float64(constraint(jnp.asarray(unit, DTYPE)))
        like = like if isinstance(constraint, Orthogonal) else like * scale
        np.testing.assert_allclose(got, like, rtol=1e-4, atol=1e-5 * np.max(np.abs(like)))
    elif scale < 1:
        assert bits(constraint(jnp.asarray(unit * scale, DTYPE))) == bits(
            jnp.asarray(unit * scale, DTYPE)
        )
    else:
        s = singular_values(jnp.asarray(got))
        measure = s[0] if isinstance(constraint, MaxSpectralNorm) else np.sum(s) / 2
        np.testing.assert_allclose(measure, 1, atol=1e-5)


@each_set
def test_a_matrix_of_a_batch_does_not_depend_on_the_others(constraint):
    w = jnp.stack([normal(6, 4, seed=i, scale=10.0 ** (i - 2)) for i in range(4)])
    out = constraint(w)
    for spoilt in (jnp.nan, jnp.inf, 1e30, 0.0):
        other = constraint(w.at[1].set(spoilt))
        assert bits(other[jnp.array([0, 2, 3])]) == bits(out[jnp.array([0, 2, 3])])
        if np.isnan(spoilt):
            assert np.all(np.isnan(float64(other[1])))
    for i in range(4):
        np.testing.assert_allclose(out[i], constraint(w[i]), rtol=1e-5, atol=1e-6)


@each_set
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_derivatives(constraint, shape):
    w, dw, dual = (normal(*shape, seed=i, scale=s) for i, s in ((0, 2.0), (1, 1.0), (2, 1.0)))
    forward, backward = map(float64, derivatives(constraint, w, dw, dual))
    np.testing.assert_allclose(
        np.sum(forward * float64(dual)), np.sum(backward * float64(dw)), rtol=1e-3
    )

    def reference(a):
        u, s, vt = np.linalg.svd(a, full_matrices=False)
        if isinstance(constraint, LowRank):
            s = s * (np.arange(len(s)) < 2)
        elif isinstance(constraint, MaxSpectralNorm):
            s = np.minimum(s, 1)
        elif isinstance(constraint, Orthogonal):
            s = np.ones_like(s)
        else:
            s = np.maximum(s - max((np.cumsum(s) - 2) / np.arange(1, len(s) + 1)), 0)
        return (u * s) @ vt

    a, da, h = float64(w), float64(dw), 1e-6
    want = (reference(a + h * da) - reference(a - h * da)) / (2 * h)
    np.testing.assert_allclose(forward, want, rtol=1e-3, atol=1e-4)


@each_set
@pytest.mark.parametrize(
    "w", [np.zeros((4, 3)), np.ones((4, 3)), np.eye(4, 3), 3 * np.eye(4, 3)], ids=str
)
def test_gradients_are_finite_where_singular_values_are_tied(constraint, w):
    dual = normal(4, 3, seed=1)
    grad = jax.grad(lambda w: jnp.sum(dual * constraint(w)))(jnp.asarray(w, DTYPE))
    assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("constraint", [MaxSpectralNorm(1.0), NuclearNormBall(9.0)], ids=str)
def test_derivative_inside_is_the_identity(constraint):
    w, dw = normal(5, 4, scale=0.1), normal(5, 4, seed=1)
    np.testing.assert_array_equal(jax.jvp(constraint, (w,), (dw,))[1], dw)


def test_derivative_with_respect_to_the_bound():
    w = normal(5, 4, scale=3)
    for make in (MaxSpectralNorm, NuclearNormBall):
        got = jax.jvp(lambda b, make=make: make(b)(w), (2.0,), (1.0,))[1]
        want = (float64(make(2.01)(w)) - float64(make(1.99)(w))) / 0.02
        np.testing.assert_allclose(got, want, atol=1e-3)


@each_set
def test_axes(constraint):
    # axis=(0, 1) flattens a kernel (height, width, in) to its rows.
    w = normal(2, 3, 4, scale=2.0)
    make = type(constraint)
    first = {LowRank: (2,), NuclearNormBall: (2.0,)}.get(make, ())
    got = make(*first, axis=(0, 1))(w)
    np.testing.assert_allclose(got.reshape(6, 4), constraint(w.reshape(6, 4)), atol=1e-6)
    got = make(*first, axis=2)(w)
    np.testing.assert_allclose(
        np.moveaxis(got, 2, 0).reshape(4, 6),
        constraint(jnp.moveaxis(w, 2, 0).reshape(4, 6)),
        atol=1e-6,
    )


def test_on_bound():
    s = np.array([1.0, 0.5])
    w = jnp.stack([with_singular_values(3, 2, s * scale) for scale in (0.9, 1.0)])
    np.testing.assert_array_equal(MaxSpectralNorm().on_bound(w), [False, True])
    np.testing.assert_array_equal(NuclearNormBall(1.5).on_bound(w), [False, True])
    w = w.at[0].set(0)
    np.testing.assert_array_equal(Orthogonal().on_bound(w), [False, True])


@each_set
def test_empty_arrays(constraint):
    for shape in ((0, 3), (3, 0), (0, 4, 3)):
        assert constraint(jnp.zeros(shape)).shape == shape


@each_set
def test_eager_calls_find_their_program_again(constraint):
    w = normal(5, 4)
    constraint(w)
    before = of_values.with_spectrum._cache_size() + polar._cache_size()
    constraint(w + 2)
    assert of_values.with_spectrum._cache_size() + polar._cache_size() == before


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Orthogonal(-1.0), ValueError, "Orthogonal: scale=-1.0"),
        (lambda: MaxSpectralNorm(-1.0), ValueError, "MaxSpectralNorm: max_value=-1.0"),
        (lambda: MaxSpectralNorm("a"), ValueError, "MaxSpectralNorm: max_value='a'"),
        (lambda: NuclearNormBall(float("nan")), ValueError, "NuclearNormBall: radius=nan"),
        (lambda: LowRank(-1), ValueError, "LowRank: rank=-1"),
        (lambda: LowRank(1.5), TypeError, "LowRank: rank=1.5 is not an int"),
        (lambda: LowRank(True), TypeError, "LowRank: rank=True is not an int"),
        (lambda: Orthogonal()(jnp.zeros(3)), ValueError, "a matrix has two axes"),
        (lambda: Orthogonal()(jnp.zeros((3, 3), int)), TypeError, "floating-point"),
    ],
)
def test_errors(make, error, words):
    with pytest.raises(error, match=words):
        make()
