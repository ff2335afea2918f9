"""Sorted units and sparse units, against references that nobody here wrote."""

import itertools

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc
from optax_constraints._axes import LeafLayout
from optax_constraints.sets.order import Monotone
from optax_constraints.sets.sparsity import NM, TopK

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)
RNG = np.random.default_rng
PRECISE = {"solver": "CLARABEL"} | dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-9)


def float64(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x)).astype(np.float64)


def bits(x) -> bytes:
    return np.asarray(x).tobytes()


# Monotone.


def columns(n: int) -> np.ndarray:
    """Units of many kinds side by side."""
    rng = RNG(n)
    noise = rng.normal(size=(n, 8))
    line = np.arange(n, dtype=float)
    kinds = [
        *noise.T,
        np.sort(noise[:, 0]),
        -np.sort(noise[:, 0]),
        np.ones(n),
        np.zeros(n),
        rng.integers(-2, 3, n),
        (-1.0) ** line * 1.5**-line,
        (-1.5) ** np.minimum(line, 40),
        np.where(line == n // 2, -1e6, line),
        np.where(line == n // 2, 1e6, -line),
        np.sin(line / 3) + line / 20,
        10000 + noise[:, 1],  # whose cumulative sums round to steps of 0.25 in float32
        np.where(noise[:, 2] > 1, 1e6, 1e-6) * noise[:, 3],
        -(line**3),
    ]
    return np.stack(kinds, axis=1)


@pytest.mark.parametrize("n", [1, 3, 8, 37, 70])
def test_monotone_is_isotonic_regression(n):
    w = jnp.asarray(columns(n), DTYPE)
    got = Monotone()(w)
    want = np.apply_along_axis(isotonic_regression, 0, float64(w))
    scale = np.max(np.abs(float64(w)), axis=0)
    assert np.all(np.abs(float64(got) - want) <= 8 * EPS * scale)
    assert np.all(np.diff(float64(got), axis=0) >= 0)
    assert bits(Monotone()(got)) == bits(got)
    # A unit does not depend on those beside it: neither on how long they take, nor on NaN.
    beside = Monotone()(w.at[:, 1:].set(0))
    spoilt = Monotone()(w.at[n // 2, 1:].set(jnp.nan))
    assert bits(beside[:, 0]) == bits(got[:, 0]) == bits(spoilt[:, 0])
    assert np.all(np.isnan(spoilt[n // 2, 1:]))


@pytest.mark.parametrize("n", [8, 37])
def test_monotone_never_pools_what_is_in_order(n):
    w = np.sort(columns(n), axis=0)
    w[:, 0] = np.where(np.arange(n) % 2, 0.0, -0.0)
    # Sums of equal numbers, divided by how many they are, need not be that number.
    w[:, 9:] = RNG(0).normal(size=w.shape[1] - 9)
    for dtype in (DTYPE, jnp.bfloat16, jnp.float16):
        allowed = jnp.asarray(np.clip(w, -6e4, 6e4), DTYPE).astype(dtype)
        assert bits(Monotone()(allowed)) == bits(allowed)
        assert bits(Monotone(increasing=False)(-allowed)) == bits(-allowed)


def test_monotone_decreasing():
    got = Monotone(increasing=False)(jnp.array([4.0, 2.0, 3.0, 1.0, 1.0, 4.0]))
    np.testing.assert_allclose(got, [4.0, 2.5, 2.5, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, (1,), [-2]])
def test_monotone_along_any_axis(axis):
    w = jnp.asarray(RNG(0).normal(size=(4, 5, 3)), DTYPE)
    got = float64(Monotone(axis)(w))
    along = np.atleast_1d(axis)[0]
    want = np.apply_along_axis(isotonic_regression, along, float64(w))
    np.testing.assert_allclose(got, want, atol=8 * EPS)


def test_monotone_in_float16_does_not_overflow():
    w = jnp.asarray(np.linspace(6e4, 5e4, 8), jnp.float16)
    out = Monotone()(w)
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(float64(out), np.mean(float64(w)), rtol=1e-3)


def test_monotone_ends_with_infinite_and_huge_entries():
    w = jnp.asarray(RNG(0).normal(size=(37, 21)), DTYPE)
    spoilt = w.at[3, 1].set(jnp.inf).at[30, 2].set(-jnp.inf).at[:2, 3].set(-jnp.inf)
    spoilt = spoilt.at[36, 4].set(jnp.inf).at[20, 5].set(jnp.nan)
    got = Monotone()(spoilt)
    assert bits(got[:, 0]) == bits(Monotone()(w)[:, 0])
    assert bits(got[:, 6:]) == bits(Monotone()(w)[:, 6:])
    # No unit hides that it has diverged, not even one whose infinities are in order.
    assert np.all(np.isnan(got[:, 1:6]))
    huge = float64(Monotone()(w * 1e34)) / 1e34
    np.testing.assert_allclose(huge, float64(Monotone()(w)), atol=16 * EPS)


@pytest.mark.parametrize("n", [5, 17])
def test_the_derivative_of_monotone_averages_over_pools(n):
    w, dw, cotangent = (jnp.asarray(RNG(s).normal(size=(n, 3)), DTYPE) for s in range(3))
    value, transpose = jax.vjp(Monotone(), w)
    _, got = jax.jvp(Monotone(), (w,), (dw,))
    for column in range(3):
        same = float64(value)[:, column, None] == float64(value)[None, :, column]
        average = same / np.sum(same, axis=1, keepdims=True)
        assert np.any(same != np.eye(n))
        np.testing.assert_allclose(got[:, column], average @ dw[:, column], atol=8 * EPS)
        np.testing.assert_allclose(
            transpose(cotangent)[0][:, column], average.T @ cotangent[:, column], atol=8 * EPS
        )


def test_the_derivative_of_monotone_leaves_alone_what_is_in_order():
    w = jnp.array([0.0, 1.0, 1.0, 1.0, 2.0, 2.0])
    dw = jnp.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    assert bits(jax.jvp(Monotone(), (w,), (dw,))[1]) == bits(dw)


def test_monotone_on_bound():
    w = jnp.array([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0]])
    assert Monotone().on_bound(w).tolist() == [[False, True]]


def test_groups_need_one_axis():
    with pytest.raises(ValueError, match=r"NM on an array of shape \(4, 4\): axis=None is 2"):
        NM(axis=None)(jnp.ones((4, 4)))
    with pytest.raises(ValueError, match=r"NM on 'a/kernel' of shape \(4, 4, 4\).*one axis"):
        NM(axis=(0, 2)).settle("a/kernel", (4, 4, 4))
    with pytest.raises(ValueError, match=r"NM on 'Conv_0/kernel'.*'fan_in' is 2 axes"):
        oc.project({"kernel": NM(axis="fan_in")}).init({"Conv_0": {"kernel": jnp.ones((4, 4, 4))}})
    for cls in (Monotone, NM):
        assert cls(axis="fan_in").settle("Dense_0/kernel", (4, 3)) == cls(axis=(0,))
        assert cls(axis=None)(jnp.ones(4)).shape == (4,)


# Lattices.


@pytest.mark.parametrize(("shape", "axis"), [((9, 7), None), ((2, 6, 3, 5), (3, 1))])
def test_monotone_along_several_axes(shape, axis):
    axes = (0, 1) if axis is None else axis
    noise, places = RNG(0).normal(size=shape), np.indices(shape)
    slope = sum(places[a] for a in axes)
    index = np.arange(noise.size).reshape(shape)
    for w in (noise, slope / 5 + noise, slope + noise / 10, -1e3 * slope + noise):
        want = cp.Variable(w.size)
        rises = [want[index[places[a] > 0]] >= want[index[places[a] < shape[a] - 1]] for a in axes]
        distance = cp.sum_squares(want - w.ravel())
        cp.Problem(cp.Minimize(distance), rises).solve(**PRECISE)
        got = float64(Monotone(axis)(jnp.asarray(w, DTYPE)))
        scale = np.max(np.abs(w))
        np.testing.assert_allclose(got.ravel(), want.value, atol=2e-6 * scale)
        assert all(np.all(np.diff(got, axis=a) >= 0) for a in axes)
        falling = float64(Monotone(axis, increasing=False)(-jnp.asarray(w, DTYPE)))
        np.testing.assert_array_equal(falling, -got)


def test_a_lattice_does_not_depend_on_those_beside_it():
    w = jnp.asarray(RNG(0).normal(size=(8, 9, 4)), DTYPE)
    got = Monotone((0, 1))(w)
    for other in (0, jnp.nan, jnp.inf, 1e3 * w[..., 1:]):
        beside = Monotone((0, 1))(w.at[..., 1:].set(other))
        assert bits(beside[..., 0]) == bits(got[..., 0])
    assert Monotone((0, 1)).on_bound(got).shape == (1, 1, 4)
    ramp = jnp.add.outer(jnp.arange(3.0), jnp.arange(4.0))
    both = jnp.stack([ramp, ramp.at[1, 1].set(3.0)], axis=-1)
    assert Monotone((0, 1)).on_bound(both).tolist() == [[[False, True]]]


def test_axes_of_one_size_are_compiled_once():
    def sorts(*shape: int) -> int:
        program = str(jax.make_jaxpr(Monotone(None))(jnp.ones(shape, DTYPE)))
        return program.count("reduce_min") + program.count("min ")

    assert 0 < sorts(3, 3) == sorts(3, 3, 3, 3) < sorts(3, 4, 3, 4) == sorts(4, 3)


def test_monotone_takes_a_bool():
    with pytest.raises(TypeError, match=r"increasing='down' is not a bool"):
        Monotone(increasing="down")


@pytest.mark.parametrize("constraint", [Monotone(1), TopK(2, 1), TopK(0.5), NM(axis=1)], ids=repr)
def test_empty_arrays_and_integers(constraint):
    for shape in [(0, 4), (4, 0), (0, 0)]:
        assert constraint(jnp.ones(shape)).shape == shape
    with pytest.raises(TypeError, match="floating-point"):
        constraint(jnp.ones((2, 4), int))


# TopK.


def top_k(w: np.ndarray, k: int, axis) -> np.ndarray:
    """The k largest magnitudes of each unit, by a stable sort."""
    axes = tuple(range(w.ndim)) if axis is None else tuple(np.atleast_1d(axis) % w.ndim)
    order = [*(a for a in range(w.ndim) if a not in axes), *sorted(axes)]
    moved = np.transpose(w, order)
    flat = moved.reshape(*moved.shape[: w.ndim - len(axes)], -1)
    rank = np.argsort(np.argsort(-np.abs(flat), axis=-1, kind="stable"), axis=-1)
    kept = np.where(rank < k, flat, 0).reshape(moved.shape)
    return np.transpose(kept, np.argsort(order))


@pytest.mark.parametrize("dtype", [DTYPE, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("axis", [None, 0, (0, 2), -1])
def test_top_k_is_that_of_a_stable_sort(axis, dtype):
    traces = []

    @jax.jit
    def project(w, k):
        traces.append(k)
        return TopK(k, axis)(w)

    rng = RNG(0)
    normal = rng.normal(size=(6, 5, 4))
    ties = rng.integers(-3, 4, (6, 5, 4))
    for w, k in itertools.product(
        [normal, ties, ties * 1e-6, np.ones((6, 5, 4)), normal * (ties == 0)], [0, 1, 3, 7, 200]
    ):
        w = jnp.asarray(w, DTYPE).astype(dtype)
        got = project(w, k)
        np.testing.assert_array_equal(float64(got), top_k(float64(w), k, axis))
        assert bits(project(got, k)) == bits(got)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("k", "kept"),
    [(0, 0), (4, 4), (99, 10), (1.0, 10), (0.5, 5), (0.29, 3), (0.01, 1), (0.96, 10)],
)
def test_top_k_counts_and_fractions(k, kept):
    w = jnp.arange(1.0, 11.0)
    want = np.where(np.arange(10) >= 10 - kept, np.arange(1.0, 11.0), 0)
    dtype = jnp.int32 if isinstance(k, int) else jnp.float32
    for number in (k, np.asarray(k, dtype)[()], jnp.asarray(k, dtype)):
        np.testing.assert_array_equal(TopK(number)(w), want)
    np.testing.assert_array_equal(jax.jit(lambda k: TopK(k)(w))(jnp.asarray(k, dtype)), want)


def test_top_k_of_a_fraction_goes_by_the_size_of_a_unit():
    w = jnp.asarray(RNG(0).normal(size=(6, 5, 4)), DTYPE)
    for axis, kept in ((None, 30), ((0, 2), 6)):
        got = np.count_nonzero(TopK(0.25, axis)(w), axis=axis)
        assert np.all(got == kept)


def test_gradual_pruning_follows_a_schedule():
    traces = []

    def remaining(step):
        traces.append(step)
        return 60 - 10 * jnp.minimum(step, 5)

    params = jnp.asarray(RNG(0).normal(size=(6, 10)), jnp.bfloat16)
    tx = optax.chain(optax.sgd(0.1), oc.project(TopK(remaining)))
    state, update = tx.init(params), jax.jit(tx.update)
    traces.clear()
    for left in (60, 50, 40, 30, 20, 10, 10):
        gradient = jnp.asarray(RNG(left).normal(size=(6, 10)), jnp.bfloat16)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        assert np.count_nonzero(params) == left
    assert len(traces) == 1


def test_what_top_k_and_nm_keep_is_kept_to_the_bit():
    w = jnp.array([-0.0, 3.0, 1e-40, 0.0, -2.0, -0.0, jnp.nan, 1.0], jnp.float32)
    zero = np.array([-0.0, 0.0, 0.0, 0.0, 0.0, -0.0, np.nan, 0.0], np.float32)
    assert bits(TopK(5)(w)) == bits(w)
    assert bits(TopK(0)(w)) == bits(zero)
    assert bits(NM(4, 8)(w)) == bits(w.at[2].set(0))
    assert bits(NM(5, 8)(w)) == bits(w)
    # Zeros keep their sign also where the k-th magnitude is tied.
    tied = w.at[4].set(-3.0).at[7].set(3.0)
    assert bits(TopK(3)(tied)) == bits(tied.at[2].set(0).at[7].set(0))


@pytest.mark.parametrize("constraint", [TopK(0.34, axis=0), NM(1, 2, axis=1)], ids=repr)
def test_the_derivative_of_sparsity_is_its_mask(constraint):
    w, dw = (jnp.asarray(RNG(s).normal(size=(8, 6)), DTYPE) for s in range(2))
    kept = constraint(w) != 0
    assert 0 < np.sum(kept) < kept.size
    want = jnp.where(kept, dw, 0)
    assert bits(jax.jvp(constraint, (w,), (dw,))[1]) == bits(want)
    assert bits(jax.vjp(constraint, w)[1](dw)[0]) == bits(want)
    # At a point of the set it is the same, and where there is room for more nonzeros, all stay.
    assert bits(jax.jvp(constraint, (constraint(w),), (dw,))[1]) == bits(want)
    assert bits(jax.jvp(constraint, (jnp.zeros_like(w),), (dw,))[1]) == bits(dw)


@pytest.mark.parametrize("constraint", [TopK(9), NM()], ids=repr)
def test_what_sparsity_drops_is_zero_after_apply_updates(constraint):
    for dtype in (DTYPE, jnp.bfloat16):
        p, u = (jnp.asarray(RNG(s).normal(size=(8, 6)), DTYPE).astype(dtype) for s in range(2))
        updates, _ = oc.project(constraint).update(u, oc.project(constraint).init(p), p)
        target, got = constraint(p + u), optax.apply_updates(p, updates)
        np.testing.assert_array_equal(got == 0, target == 0)


def test_units_of_top_k_and_groups_of_nm_that_are_full():
    w = jnp.array([[1.0, 1.0], [0.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
    assert TopK(2, axis=0).on_bound(w).tolist() == [[False, True]]
    assert NM(1, 2).on_bound(w).tolist() == [[True, True], [False, False]]


def test_zeros_do_not_count_where_magnitudes_are_tied():
    w = jnp.array([0.0, 2.0, 0.0, -2.0, 1.0, 2.0, -0.0])
    for k, kept in ((1, [1]), (2, [1, 3]), (3, [1, 3, 5]), (4, [1, 3, 4, 5])):
        assert np.flatnonzero(oc.top_k(k)(w)).tolist() == kept


@pytest.mark.parametrize(
    ("k", "error", "message"),
    [
        (-1, ValueError, r"k=-1 is not allowed"),
        (1.5, ValueError, r"k=1\.5 is not allowed; write a number from 0 to 1"),
        (0.0, ValueError, r"k=0\.0 as a fraction keeps nothing"),
        (jnp.float32(0), ValueError, r"as a fraction keeps nothing"),
        (float("nan"), ValueError, r"k=nan is not allowed"),
        (2**40, ValueError, r"is not allowed"),
        (True, TypeError, r"k=True is not a number"),
        ("half", ValueError, r"k='half' is not a number"),
        (np.arange(2), ValueError, r"has shape \(2,\); write one number"),
    ],
)
def test_top_k_checks_its_number(k, error, message):
    with pytest.raises(error, match=message):
        TopK(k)


# Units that are kept or dropped as a whole.


@pytest.mark.parametrize("dtype", [DTYPE, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("axis", [0, (0, 2), (1, 2)])
def test_top_k_of_units_is_that_of_a_stable_sort(axis, dtype):
    rng = RNG(0)
    normal = rng.normal(size=(6, 5, 4))
    for w in (normal, rng.integers(0, 2, (6, 5, 4)), np.ones((6, 5, 4)), normal * 1e-4):
        w = jnp.asarray(w, DTYPE).astype(dtype)
        size = np.sqrt(np.sum(np.square(float64(w)), axis=axis, keepdims=True))
        rank = np.argsort(np.argsort(-size, axis=None, kind="stable")).reshape(size.shape)
        for k in (0, 1, 3, 0.5, 99):
            count = k if isinstance(k, int) else round(k * size.size)
            got = TopK(k, axis, "units")(w)
            np.testing.assert_array_equal(got, np.where(rank < count, w, 0))
            assert bits(TopK(k, axis, "units")(got)) == bits(got)


def test_units_that_are_kept_are_kept_to_the_bit():
    w = jnp.array([[1e-40, -0.0, 3e38, 1e-30, jnp.nan], [0.0, 0.0, 3e38, -0.0, 1.0]], jnp.float32)
    got = TopK(2, 0, "units")(w)
    assert bits(got[:, [2, 4]]) == bits(w[:, [2, 4]])
    # What is dropped is zero, and a zero keeps its sign; the smallest number is none.
    assert np.all(np.asarray(got[:, [0, 1, 3]]).view(np.uint32) << 1 == 0)
    assert bits(TopK(5, 0, "units")(w)) == bits(w)
    assert bits(TopK(4, 0, "units")(w)) == bits(w)


def test_neurons_filters_and_heads():
    params = {
        "dense": {"kernel": jnp.asarray(RNG(0).normal(size=(4, 6)), DTYPE)},
        "conv": {"kernel": jnp.asarray(RNG(1).normal(size=(3, 3, 2, 5)), DTYPE)},
        "heads": jnp.asarray(RNG(2).normal(size=(4, 3, 2)), DTYPE),
    }
    rules = {
        "kernel": TopK(2, "fan_in", "units"),
        "heads": TopK("0.125 * size", axis=(0, 2), of="units"),
    }
    got = oc.constrain(params, rules)
    assert np.count_nonzero(np.any(got["dense"]["kernel"] != 0, axis=0)) == 2
    assert np.count_nonzero(np.any(got["conv"]["kernel"] != 0, axis=(0, 1, 2))) == 2
    assert np.count_nonzero(np.any(got["heads"] != 0, axis=(0, 2))) == 3
    assert str(oc.report(got, rules).rows[0].constraint) == "TopK(2 units)"
    assert [row.at_bound for row in oc.report(got, rules).rows] == [1, 1, 1]
    # A neuron and its bias.
    layer = {"kernel": params["dense"]["kernel"], "bias": jnp.full(6, 0.1)}
    together = oc.constrain(layer, {oc.joint("kernel", "bias"): TopK(2, 0, "units")})
    kept = np.any(together["kernel"] != 0, axis=0)
    assert np.array_equal(kept, together["bias"] != 0)
    assert np.count_nonzero(kept) == 2


def test_units_of_each_layer_of_a_stack():
    w = jnp.asarray(RNG(0).normal(size=(3, 4, 6)) * [[[1.0]], [[9.0]], [[99.0]]], DTYPE)
    layout = {"w": LeafLayout("Dense", (1,), (0,))}
    want = jnp.stack([TopK(2, 0, "units")(layer) for layer in w])
    by_layout = oc.constrain({"w": w}, {"w": TopK(2, "fan_in", "units")}, layout=layout)["w"]
    for got in (oc.stacked(TopK(2, 0, "units"))(w), by_layout):
        assert bits(got) == bits(want)
    stacked = oc.constrain({"w": w}, {"w": oc.stacked(TopK(2, 0, "units"))})["w"]
    assert bits(stacked) == bits(want)
    # By itself it counts the units of all layers.
    assert np.array_equal(np.any(TopK(2, 1, "units")(w) != 0, axis=(1, 2)), [False, False, True])


def test_the_derivative_of_units_is_their_mask():
    w, dw = (jnp.asarray(RNG(s).normal(size=(4, 6)), DTYPE) for s in range(2))
    constraint = TopK(2, 0, "units")
    w = w.at[0].set(0)  # an entry that is zero is free in a unit that is not
    kept = np.any(constraint(w) != 0, axis=0)
    want = jnp.where(kept, dw, 0)
    assert bits(jax.jvp(constraint, (w,), (dw,))[1]) == bits(want)
    assert bits(jax.vjp(constraint, w)[1](dw)[0]) == bits(want)
    assert bits(jax.jvp(constraint, (jnp.zeros_like(w),), (dw,))[1]) == bits(dw)


def test_top_k_of_units_needs_some():
    with pytest.raises(ValueError, match=r"of='rows' is not allowed; write 'entries' for those"):
        TopK(2, 0, "rows")
    with pytest.raises(ValueError, match=r"TopK: axis=None makes the whole leaf one unit, of whi"):
        TopK(2, of="units")
    message = r"TopK on 'b' of shape \(3,\): axis=0 makes the whole leaf one unit, of which"
    with pytest.raises(ValueError, match=message):
        oc.project({"b": TopK(2, 0, "units")}).init({"b": jnp.ones(3)})
    assert oc.deserialize(oc.serialize(TopK(2, 0, "units"))) == TopK(2, 0, "units")


# NM.


def nearest_by_trial(group: np.ndarray, n: int) -> float:
    """The least squared distance over all ways to keep n entries."""
    return min(
        sum(x**2 for i, x in enumerate(group) if i not in kept)
        for kept in itertools.combinations(range(len(group)), n)
    )


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, 0), (1, 4, 1), (3, 6, -1), (1, 2, 2)])
def test_nm_keeps_the_best_of_all_choices(n, m, axis):
    rng = RNG(0)
    for w in (rng.normal(size=(8, 4, 12)), rng.integers(-2, 3, (8, 4, 12))):
        w = jnp.asarray(w, DTYPE)
        got = NM(n, m, axis)(w)
        rows, kept = (np.moveaxis(float64(x), axis, -1).reshape(-1, m) for x in (w, got))
        assert np.max(np.count_nonzero(kept, axis=1)) <= n
        assert np.all((kept == rows) | (kept == 0))
        want = [nearest_by_trial(row, n) for row in rows]
        np.testing.assert_allclose(np.sum((rows - kept) ** 2, axis=1), want, rtol=1e-6)


def test_nm_keeps_the_first_of_equal_entries():
    got = NM(2, 4)(jnp.array([1.0, -1.0, 1.0, 1.0, 0.0, 2.0, -2.0, 2.0]))
    np.testing.assert_array_equal(got, [1, -1, 0, 0, 0, 2, -2, 0])


def test_nm_takes_a_traced_number():
    w = jnp.asarray(RNG(0).normal(size=(8, 3)), DTYPE)
    project = jax.jit(lambda w, n: NM(n, 4)(w))
    for n in range(1, 5):
        assert bits(project(w, n)) == bits(NM(n, 4)(w))
        assert np.count_nonzero(project(w, n)) == 6 * n


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 5}, ValueError, r"n=5 is not allowed; write a number from 1 to 4"),
        ({"n": 1.0}, TypeError, r"n=1\.0 is not an integer"),
        ({"m": 0}, ValueError, r"m=0 is not allowed"),
        ({"m": 4.0}, TypeError, r"m=4\.0 is not an int"),
    ],
)
def test_nm_checks_its_numbers(arguments, error, message):
    with pytest.raises(error, match=message):
        NM(**arguments)


def test_nm_needs_a_divisor():
    with pytest.raises(ValueError, match=r"array of shape \(6, 4\): m=4 does not divide the 6 ent"):
        NM()(jnp.ones((6, 4)))
    with pytest.raises(ValueError, match=r"NM on 'a/kernel' of shape \(6, 4\): m=4 does not"):
        oc.project({"kernel": NM()}).init({"a": {"kernel": jnp.ones((6, 4))}})
    assert np.count_nonzero(NM(axis=1)(jnp.ones((6, 4)))) == 12


def test_configs():
    for constraint in (Monotone(1, False), TopK(3, axis=0), TopK(0.5), NM(1, 3, axis=2)):
        assert type(constraint).from_config(constraint.get_config()) == constraint
