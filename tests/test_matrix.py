"""Sets of square matrices against convex solvers and combinatorial answers; rings by hand."""

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64
from scipy.optimize import linear_sum_assignment

import optax_constraints as oc
from optax_constraints._axes import LeafLayout
from optax_constraints.sets.matrix import (
    PositiveSemidefinite,
    Radial,
    SkewSymmetric,
    Symmetric,
)
from optax_constraints.sets.transport import DoublyStochastic

X64 = bool(jax.config.jax_enable_x64)
WIDE = np.float64 if X64 else np.float32
EPS = float(np.finfo(WIDE).eps)
NEAR = 1e-8 if X64 else 1e-5
PRECISE = {"solver": "CLARABEL"} | dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(WIDE)


# Symmetric matrices and their like.


@pytest.mark.parametrize("constraint", [Symmetric(), SkewSymmetric()], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_mirrored_to_the_bit_in_every_dtype(constraint, dtype):
    w = jnp.asarray(normal(2, 9, 9), dtype) * jnp.asarray(float(jnp.finfo(dtype).max) / 8, dtype)
    out = float64(constraint(w))
    assert np.all(np.isfinite(out))
    assert np.array_equal(out, constraint.sign * np.swapaxes(out, 1, 2))
    want = (float64(w) + constraint.sign * np.swapaxes(float64(w), 1, 2)) / 2
    np.testing.assert_allclose(out, want, rtol=float(jnp.finfo(dtype).eps))


def test_a_sum_of_two_entries_does_not_overflow():
    w = jnp.asarray([[1.0, 3e38], [3.2e38, 1.0]], jnp.float32)
    assert float(Symmetric()(w)[0, 1]) == pytest.approx(3.1e38)
    assert float(SkewSymmetric()(w * jnp.array([[1, -1], [1, 1]]))[1, 0]) == pytest.approx(3.1e38)


@pytest.mark.parametrize("constraint", [Symmetric(), SkewSymmetric()], ids=str)
def test_a_zero_keeps_its_sign(constraint):
    w = jnp.asarray([[0.0, -0.0], [0.0, -0.0]])
    assert bits(constraint(w)) == bits(w)


@pytest.mark.parametrize("constraint", [Symmetric(), SkewSymmetric()], ids=str)
def test_from_outside_a_chain_ends_within_rounding(constraint):
    # Beside entries of different size an update cannot always express the same target.
    p, u = jnp.asarray(normal(30, 30)), jnp.asarray(normal(30, 30, seed=1))
    tx = oc.project(constraint)
    new = float64(optax.apply_updates(p, tx.update(u, tx.init(p), p)[0]))
    assert np.max(np.abs(new - constraint.sign * new.T)) <= 4 * EPS
    p = constraint(p)
    new = float64(optax.apply_updates(p, tx.update(u, tx.init(p), p)[0]))
    assert np.array_equal(new, constraint.sign * new.T)


@pytest.mark.parametrize("constraint", [Symmetric(), SkewSymmetric()], ids=str)
def test_derivative_at_a_point_of_the_set_is_the_tangent_part(constraint):
    w, v = constraint(normal(5, 5)), normal(5, 5, seed=1)
    _, got = jax.jvp(constraint, (w,), (jnp.asarray(v),))
    np.testing.assert_allclose(got, (v + constraint.sign * v.T) / 2, rtol=4 * EPS)


def test_axes_of_a_kernel_are_flattened():
    w = normal(2, 6, 3)
    out = np.asarray(Symmetric(axis=(0, 2))(w))
    matrix = np.transpose(w, (0, 2, 1)).reshape(6, 6)
    want = np.transpose(((matrix + matrix.T) / 2).reshape(2, 3, 6), (0, 2, 1))
    np.testing.assert_allclose(out, want, rtol=4 * EPS)


# Positive semidefinite matrices.


@pytest.mark.parametrize("bound", [0.0, 0.3, -0.5])
def test_nearest_positive_semidefinite_matrix(bound):
    w = normal(3, 6, 6)
    w[1] = w[1, :, :2] @ w[1, :, :2].T  # on the boundary, of rank 2
    w[2] = -w[2] @ w[2].T
    got = float64(PositiveSemidefinite(bound)(w))
    for a, x in zip(w.astype(np.float64), got, strict=True):
        variable = cp.Variable((6, 6), symmetric=True)
        objective = cp.Minimize(cp.sum_squares(variable - a))
        cp.Problem(objective, [variable >> bound * np.eye(6)]).solve(solver="CLARABEL")
        scale = np.max(np.abs(a))
        np.testing.assert_allclose(x, variable.value, atol=(3e-6 if X64 else 1e-5) * scale)
        values, vectors = np.linalg.eigh((a + a.T) / 2)
        want = (vectors * np.maximum(values, bound)) @ vectors.T
        np.testing.assert_allclose(x, want, atol=16 * EPS * scale)
        assert np.array_equal(x, x.T)


@pytest.mark.parametrize("rank", [1, 10, 40])
def test_gram_matrices_come_back_bit_for_bit(rank):
    factor = jnp.asarray(normal(40, rank))
    gram = jnp.matmul(factor, factor.T, precision="highest")
    gram = (gram + gram.T) / 2
    assert bits(PositiveSemidefinite()(gram)) == bits(gram)
    # Beside one that is outside, and takes the other branch.
    both = jnp.stack([gram, jnp.asarray(normal(40, 40))])
    assert bits(PositiveSemidefinite()(both)[0]) == bits(gram)


def test_without_a_tolerance_there_is_something_to_do():
    a = jnp.eye(4).at[0, 0].set(-1e-3 if not X64 else -1e-8)
    assert float(PositiveSemidefinite()(a)[0, 0]) == pytest.approx(0, abs=EPS)
    almost = jnp.eye(4).at[0, 1].set(4 * EPS)
    out = PositiveSemidefinite()(almost)
    assert bits(out) == bits(out.T)


def test_the_bound_may_be_traced_and_has_a_derivative():
    w = jnp.asarray(normal(5, 5))
    values = np.linalg.eigvalsh((float64(w) + float64(w).T) / 2)
    traced = jax.jit(lambda bound: jnp.trace(PositiveSemidefinite(bound)(w)))
    for bound in (0.1, 1.0):
        np.testing.assert_allclose(traced(bound), np.sum(np.maximum(values, bound)), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(traced)(bound), np.sum(values < bound), rtol=1e-5)


def test_on_bound_tells_which_matrices_are_singular():
    w = jnp.stack([jnp.eye(3), jnp.diag(jnp.array([2.0, 1.0, 0.0]))])
    assert np.asarray(PositiveSemidefinite().on_bound(w)).tolist() == [False, True]


# Doubly stochastic matrices.


def gap(a: np.ndarray, x: np.ndarray) -> float:
    """How far x is from the optimality of the nearest point, relative to the data.

    It is nearest if no doubly stochastic y has <a - x, y - x> > 0, and the best y is an
    assignment.
    """
    slope = a - x
    rows, columns = linear_sum_assignment(slope, maximize=True)
    scale = max(1.0, np.max(np.abs(a))) * len(a)
    return (np.sum(slope[rows, columns]) - np.sum(slope * x)) / scale


def sums(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.sum(x, axis=0), np.sum(x, axis=1)])


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_nearest_doubly_stochastic_matrix(scale):
    w = normal(3, 6, 6) * WIDE(scale)
    w[1] = w[1, :, :1]  # every column the same
    got = float64(DoublyStochastic()(w))
    for a, x in zip(w.astype(np.float64), got, strict=True):
        variable = cp.Variable((6, 6), nonneg=True)
        sums_are_one = [cp.sum(variable, axis=0) == 1, cp.sum(variable, axis=1) == 1]
        objective = cp.Minimize(cp.sum_squares(variable - a))
        cp.Problem(objective, sums_are_one).solve(**PRECISE)
        np.testing.assert_allclose(x, variable.value, atol=NEAR * max(1, scale))


HARD = {
    "small": lambda n: normal(n, n) * WIDE(0.01),
    "ordinary": lambda n: normal(n, n),
    "large": lambda n: normal(n, n) * WIDE(10),
    "larger": lambda n: normal(n, n) * WIDE(100),
    "ties": lambda n: np.random.default_rng(0).integers(0, 3, (n, n)).astype(WIDE),
    "rank one": lambda n: normal(n, 1) * normal(1, n, seed=1),
    "distances": lambda n: (-100 * (normal(n, 1) - normal(1, n, seed=1)) ** 2).astype(WIDE),
    "heavy tails": lambda n: np.exp(2 * normal(n, n)),
    "zeros": lambda n: np.zeros((n, n), WIDE),
    "constant": lambda n: np.full((n, n), 5, WIDE),
    "one entry": lambda n: np.eye(n, dtype=WIDE) * (np.arange(n) == 3),
    "one column": lambda n: np.eye(n, dtype=WIDE)[:, :1] * np.ones((1, n), WIDE),
    "diagonal": lambda n: 3 * np.eye(n, dtype=WIDE),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_matrices(name):
    n = 60
    a = HARD[name](n)
    x = DoublyStochastic()(a)
    assert bits(DoublyStochastic()(x)) == bits(x)
    x = float64(x)
    assert np.min(x) >= 0
    np.testing.assert_allclose(sums(x), 1, rtol=0, atol=16 * EPS)
    assert gap(a.astype(np.float64), x) <= 4 * EPS


@pytest.mark.parametrize("scale", [1e5, 1e30])
def test_far_outside_the_nearest_is_the_best_assignment(scale):
    a = normal(6, 6) * WIDE(scale)
    rows, columns = linear_sum_assignment(a, maximize=True)
    want = np.zeros((6, 6))
    want[rows, columns] = 1
    np.testing.assert_allclose(DoublyStochastic()(a), want, atol=4 * EPS)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0, -1e30])
def test_constant_matrices_become_the_mean_of_all_permutations(value):
    out = DoublyStochastic()(jnp.full((6, 6), value))
    np.testing.assert_allclose(out, 1 / 6, rtol=4 * EPS)


def test_projected_gradients_find_the_best_assignment():
    cost = np.random.default_rng(3).random((10, 10))
    tx = optax.chain(optax.sgd(0.5), oc.project(DoublyStochastic()))
    loss = jax.grad(lambda x: jnp.sum(jnp.asarray(cost) * x))

    @jax.jit
    def train(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(loss(x), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=200)[0][0]

    x = float64(train(jnp.full((10, 10), 0.1)))
    want = np.zeros((10, 10))
    want[linear_sum_assignment(cost)] = 1
    np.testing.assert_allclose(x, want, atol=1e-4)


def test_derivative_of_doubly_stochastic_inside_and_on_the_boundary():
    constraint = DoublyStochastic()
    v = jnp.asarray(normal(6, 6, seed=1))
    inside = constraint(normal(6, 6) * WIDE(0.02))
    assert np.min(inside) > 0
    _, got = jax.jvp(constraint, (inside,), (v,))
    np.testing.assert_allclose(got, constraint.tangent(inside, v), atol=8 * EPS)
    np.testing.assert_allclose(np.sum(got, axis=0), 0, atol=8 * EPS)
    np.testing.assert_allclose(np.sum(got, axis=1), 0, atol=8 * EPS)
    # At a point of the set the zeros move, too; at one outside they do not.
    corner = jnp.eye(6, dtype=v.dtype)
    _, got = jax.jvp(constraint, (corner,), (v,))
    centred = v - jnp.mean(v, axis=0) - jnp.mean(v, axis=1, keepdims=True) + jnp.mean(v)
    np.testing.assert_allclose(got, centred, atol=8 * EPS)
    a = jnp.asarray(normal(6, 6))
    x, got = jax.jvp(constraint, (a,), (v,))
    assert np.all(np.asarray(got)[np.asarray(x) == 0] == 0)
    np.testing.assert_allclose(np.sum(got, axis=0), 0, atol=8 * EPS)
    step = 1e-3 if not X64 else 1e-6
    want = (float64(constraint(a + step * v)) - float64(constraint(a - step * v))) / (2 * step)
    np.testing.assert_allclose(got, want, atol=1e-3 if not X64 else 1e-8)


def test_one_matrix_of_many_does_not_wait_for_the_others():
    # The others take more steps, and it is the same to the bit beside them and beside itself.
    easy, hard = normal(6, 6) * WIDE(0.1), normal(6, 6, seed=1) * WIDE(100)
    beside = DoublyStochastic()(np.stack([easy, hard, hard]))
    alone = DoublyStochastic()(np.stack([easy, easy, easy]))
    assert bits(beside[0]) == bits(alone[0])


def test_on_bound_are_the_zeros():
    assert np.asarray(DoublyStochastic().on_bound(jnp.eye(2))).tolist() == [
        [False, True],
        [True, False],
    ]


# Rings.


def test_rings_of_even_and_odd_windows():
    w = jnp.arange(16.0).reshape(4, 4)
    w = w.at[1:3, 1:3].set(100 + jnp.arange(4.0).reshape(2, 2))
    want = np.full((4, 4), 7.5)
    want[1:3, 1:3] = 101.5
    np.testing.assert_allclose(Radial()(w), want)
    out = np.asarray(Radial()(jnp.arange(25.0).reshape(5, 5, 1, 1).at[2, 2].set(-3)))[..., 0, 0]
    np.testing.assert_allclose(out, np.where(np.arange(25).reshape(5, 5) == 12, -3, 12))


def test_rings_of_one_value_come_back_bit_for_bit():
    w = np.full((7, 7, 2, 3), 0.1, WIDE)
    w[1:6, 1:6] = -0.0
    w[2:5, 2:5] = 3e38
    w[3, 3] = 1e-42 if not X64 else 1e-310
    assert bits(Radial()(w)) == bits(w)


def test_means_of_rings_do_not_overflow_and_are_wide():
    w = jnp.asarray(np.where(np.arange(9).reshape(3, 3) % 2, 3e38, -3e38), jnp.float32)
    assert float(jnp.max(jnp.abs(Radial()(w)))) == pytest.approx(3e38)
    w = jnp.ones((9, 9), jnp.bfloat16).at[0, 0].set(257)
    assert float(Radial()(w)[0, 1]) == 9  # 1 + 256 / 32; sums in bfloat16 stay at 256


def test_a_nan_stays_in_its_ring():
    w = normal(5, 5, 2)
    w[1, 2, 0] = np.nan
    assert np.sum(np.isnan(Radial()(w))) == 8


def test_a_stack_of_kernels_has_its_windows_behind_the_layers():
    layout = LeafLayout("Conv", (1, 2, 3), stacked=(0,))
    w = normal(2, 3, 3, 4, 5)
    got = Radial().settle("conv/kernel", w.shape, layout)(w)
    np.testing.assert_array_equal(got, np.stack([Radial()(layer) for layer in w]))


# Errors.


@pytest.mark.parametrize(
    "constraint",
    [Symmetric(), SkewSymmetric(), PositiveSemidefinite(), DoublyStochastic()],
    ids=str,
)
def test_only_square_matrices(constraint):
    with pytest.raises(ValueError, match=r"'a/kernel' of shape \(2, 3, 4\).*square.*3x4"):
        constraint.settle("a/kernel", (2, 3, 4))
    with pytest.raises(ValueError, match=r"shape \(4,\): a matrix has two axes"):
        constraint(jnp.ones(4))
    with pytest.raises(TypeError, match="these are int32"):
        constraint(jnp.ones((2, 2), jnp.int32))


@pytest.mark.parametrize("shape", [(3,), (3, 4, 1, 1)])
def test_only_square_windows(shape):
    with pytest.raises(ValueError, match=r"Radial on 'conv/kernel' of shape .*no square window"):
        Radial().settle("conv/kernel", shape)
    with pytest.raises(ValueError, match="no square window"):
        Radial()(jnp.ones(shape))


def test_a_bound_that_is_no_number():
    with pytest.raises(ValueError, match="min_eigenvalue=nan is not allowed"):
        PositiveSemidefinite(float("nan"))
    with pytest.raises(ValueError, match="min_eigenvalue='a' is not a number"):
        PositiveSemidefinite("a")


@pytest.mark.parametrize(
    "constraint",
    [Symmetric(), SkewSymmetric(), PositiveSemidefinite(), DoublyStochastic(), Radial()],
    ids=str,
)
@pytest.mark.parametrize("shape", [(0, 0), (3, 3, 0), (0, 3, 3)])
def test_empty_arrays(constraint, shape):
    if shape[0] == shape[1] if isinstance(constraint, Radial) else shape[-1] == shape[-2]:
        assert constraint(jnp.zeros(shape)).shape == shape
    else:
        with pytest.raises(ValueError, match="square"):
            constraint(jnp.zeros(shape))
