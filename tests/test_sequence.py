"""Sequences that bend one way or have one peak, against references that nobody here wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import bits, float64
from cases.polyhedron import by_nnls
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc
from optax_constraints.sets import sequence

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
EPS = float(jnp.finfo(DTYPE).eps)


def columns(n: int) -> np.ndarray:
    """Units of many kinds side by side."""
    rng, t = np.random.default_rng(n), np.linspace(-1, 1, n)
    noise = rng.normal(size=(n, 6))
    kinds = [
        noise[:, 0],
        t**2 + 0.1 * noise[:, 1],
        t**2 + 1e-3 * noise[:, 2],
        -(t**2),
        t**2,
        t**3,
        np.where(np.arange(n) == n // 2, 10, t**2),
        np.where(np.arange(n) == n // 2, -10, t**2),
        np.sin(6 * t),
        (-1.0) ** np.arange(n),
        np.cumsum(noise[:, 3]),
        np.cumsum(np.cumsum(noise[:, 4])),
        np.exp(4 * t) * (1 + 0.1 * noise[:, 5]),
        100 + noise[:, 0],
        np.ones(n),
    ]
    return np.stack(kinds, axis=1)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("n", [3, 8, 40])
def test_convex_sequences(n, spread):
    gaps = np.random.default_rng(n).uniform(0.1, 1, n - 1) if spread else np.ones(n - 1)
    knots = np.concatenate([[0], np.cumsum(gaps)]) if spread else None
    w = jnp.asarray(columns(n), DTYPE)
    constraint = oc.convex_sequence(knots=knots)
    project = jax.jit(constraint)
    got = project(w)
    bends = np.diff(np.diff(np.eye(n), axis=0) / gaps[:, None], axis=0)
    scale = np.max(np.abs(float64(w)), axis=0)
    want = by_nnls(float64(w), -bends, np.zeros(n - 2))
    np.testing.assert_allclose(float64(got) / scale, want / scale, atol=5e-6)
    largest = np.max(np.abs(float64(got)), axis=0)
    stiffness = (1 / gaps[1:] + 1 / gaps[:-1])[:, None]
    assert np.all(bends @ float64(got) >= -8 * EPS * largest * stiffness)
    assert bits(project(got)) == bits(got)
    concave = jax.jit(oc.concave_sequence(knots=knots))
    np.testing.assert_array_equal(concave(-w), -got)


def test_one_more_bend_at_the_end_of_a_long_line():
    # Its gain is small beside the moments of all that is behind it.
    walks = np.cumsum(np.random.default_rng(3).normal(size=(128, 64)), axis=0)
    w = float64(jnp.asarray(walks[:, [38, 52]], jnp.float32))
    got = float64(oc.convex_sequence()(jnp.asarray(w, DTYPE)))
    middle = np.mean(w, axis=0)
    want = by_nnls(w - middle, -np.diff(np.eye(128), 2, axis=0), np.zeros(126)) + middle
    np.testing.assert_allclose(got, want, atol=5e-6 * np.max(np.abs(w)))


def test_long_sequences():
    walks = np.cumsum(np.random.default_rng(600).normal(size=(4, 600, 64))[3], axis=0)
    w = float64(jnp.asarray(walks[:, [44, 57, 61]], jnp.float32))
    got = float64(oc.convex_sequence()(jnp.asarray(w, DTYPE)))
    middle = np.mean(w, axis=0)
    want = by_nnls(w - middle, -np.diff(np.eye(600), 2, axis=0), np.zeros(598)) + middle
    scale = np.max(np.abs(w), axis=0)
    np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


@pytest.mark.parametrize("seed", [100, 105])
def test_what_enters_and_leaves_by_rounding_alone_does_not_do_so_to_the_limit(seed, monkeypatch):
    noise = np.random.default_rng(seed).normal(size=(256, 64))
    w = jnp.asarray(np.cumsum(np.cumsum(noise, axis=0), axis=0), DTYPE)
    fits, fit = [], sequence._fit

    def counted(*args):
        jax.debug.callback(lambda: fits.append(1))
        return fit(*args)

    monkeypatch.setattr(sequence, "_fit", counted)
    held = jnp.ones((254, 64), bool)
    # Not by way of the set, whose program may have been compiled before.
    jax.jit(lambda w: sequence._fitted(w, jnp.ones(255, DTYPE), held))(w).block_until_ready()
    jax.effects_barrier()
    assert 1 < len(fits) < 200


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_knots_at_very_different_distances(ratio):
    n, rng = 6, np.random.default_rng(53)
    for _ in range(8):
        near = rng.random(n - 1) < 0.5
        gaps = np.where(near, 1 / ratio, 1) * rng.uniform(0.5, 1, n - 1)
        knots = np.concatenate([[0], np.cumsum(gaps)])
        knots = np.asarray(knots - knots[np.argmin(gaps)], np.float32)  # exact where they are near
        gaps = np.diff(float64(knots))
        noise = rng.normal(size=(n, 8))
        w = float64(jnp.asarray(np.concatenate([noise, knots[:, None] + 1e-6 * noise], 1), DTYPE))
        project = oc.convex_sequence(knots=knots)
        got = project(jnp.asarray(w, DTYPE))
        assert bits(project(got)) == bits(got)
        bends = np.diff(np.diff(np.eye(n), axis=0) / gaps[:, None], axis=0)
        bends *= 1 / (1 / gaps[1:] + 1 / gaps[:-1])[:, None]  # rows near 1
        want = by_nnls(w, -bends, np.zeros(n - 2))
        scale = np.max(np.abs(w), axis=0)
        np.testing.assert_allclose(float64(got) / scale, want / scale, atol=5e-6)


def test_second_derivatives():
    w = jnp.asarray([0.0, 4.0, 2.0, 8.0], DTYPE)  # the first three are on a line
    line = np.array([[5.0, 2, -1], [2, 2, 2], [-1, 2, 5]]) / 6
    rows = np.zeros((4, 4))
    rows[:3, :3], rows[3, 3] = line, 1
    fit = rows @ float64(w)
    hessian = jax.hessian(lambda w: jnp.sum(oc.convex_sequence()(w) ** 3))(w)
    np.testing.assert_allclose(hessian, rows @ np.diag(6 * fit) @ rows, atol=1e-4)


def test_large_weights_in_long_sequences():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(600, 2)) * [1e30, 1.0], DTYPE)
    got = oc.convex_sequence()(w)
    np.testing.assert_allclose(got[:, 0] / 1e30, oc.convex_sequence()(w / 1e30)[:, 0], rtol=1e-4)
    assert np.all(np.isfinite(got))


def test_ranks_are_never_promoted():
    with jax.numpy_rank_promotion("raise"):  # a size that nothing else has compiled
        np.testing.assert_allclose(oc.convex_sequence()(jnp.arange(9.0) ** 2), np.arange(9) ** 2)


@pytest.mark.parametrize("constraint", [oc.convex_sequence(), oc.unimodal(), oc.unimodal(peak=4)])
def test_units_are_alone(constraint):
    w = jnp.asarray(columns(12), DTYPE)
    got = constraint(w)
    for other in (0, 1e3, jnp.nan, jnp.inf):
        beside = constraint(w.at[:, 1:].set(other))
        assert bits(beside[:, 0]) == bits(got[:, 0])


def test_other_knots_compile_nothing():
    traces = []

    @jax.jit
    def project(constraint, w):
        traces.append(None)
        return constraint(w)

    w = jnp.asarray(columns(6), DTYPE)
    for seed in range(3):
        knots = np.cumsum(np.random.default_rng(seed).uniform(0.5, 1, 6))
        got = project(oc.convex_sequence(knots=knots), w)
        slopes = np.diff(float64(got), axis=0) / np.diff(knots)[:, None]
        assert np.min(np.diff(slopes, axis=0)) > -1e-4
    assert len(traces) == 1


def test_where_entries_stand_matters():
    w = jnp.array([0.0, 1.0, 1.5])
    assert bits(oc.convex_sequence(knots=[0, 1, 1.25])(w)) == bits(w)
    assert np.ptp(np.diff(oc.convex_sequence()(w))) < 1e-6
    # Distances count, and not where they are.
    far = oc.convex_sequence(knots=[100, 102, 104])(w)
    np.testing.assert_allclose(far, oc.convex_sequence()(w), atol=1e-6)


def test_short_units_and_empty_arrays():
    for constraint in (oc.convex_sequence(), oc.concave_sequence(), oc.unimodal()):
        for shape in [(0, 4), (4, 0), (1, 3), (2, 3)]:
            w = -jnp.ones(shape)
            assert bits(constraint(w)) == bits(w)


@pytest.mark.parametrize("n", [2, 7, 20])
@pytest.mark.parametrize("peak", [0, 3, -1])
def test_unimodal_around_a_given_peak(n, peak):
    peak = min(peak, n - 1)
    w = jnp.asarray(columns(n), DTYPE)
    got = float64(oc.unimodal(peak=peak)(w))
    place = peak % n
    assert np.all(np.diff(got[: place + 1], axis=0) >= 0)
    assert np.all(np.diff(got[place:], axis=0) <= 0)
    rises = np.where(np.arange(n - 1) < place, -1, 1)[:, None] * np.diff(np.eye(n), axis=0)
    scale = np.max(np.abs(float64(w)), axis=0)
    want = by_nnls(float64(w), rises, np.zeros(n - 1))
    np.testing.assert_allclose(got / scale, want / scale, atol=2e-6)


def test_unimodal_finds_the_peak():
    # What is before a split and what is behind it, each sorted by itself: one of them is best.
    n = 15
    w = columns(n)
    got = float64(oc.unimodal()(jnp.asarray(w, DTYPE)))

    def halves(unit: np.ndarray, i: int) -> np.ndarray:
        rising, falling = isotonic_regression(unit[:i]), -isotonic_regression(-unit[i:])
        return np.concatenate([rising, falling])

    for unit, mine in zip(w.T, got.T, strict=True):
        distances = [np.sum((halves(unit, i) - unit) ** 2) for i in range(1, n)]
        best = min(distances)
        assert np.sum((mine - unit) ** 2) <= best + 1e-5 * np.max(np.abs(unit)) ** 2
        assert np.sum(np.diff(np.sign(np.diff(mine))[np.diff(mine) != 0]) != 0) <= 1


def test_on_bound():
    w = jnp.array([[0.0, 0.0], [1.0, 0.5], [2.0, 2.0]])
    assert oc.convex_sequence().on_bound(w).tolist() == [[True, False]]
    peaks = jnp.array([[0.0, 0.0], [1.0, 2.0], [0.5, 2.0]])
    assert oc.unimodal(peak=1).on_bound(peaks).tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("knots", "error", "message"),
    [
        ([0.0, 2.0, 1.0], ValueError, r"ConvexSequence: knots=.* does not rise"),
        ([0.0, 1.0, np.inf], ValueError, r"does not rise; write finite numbers"),
        ([[0.0, 1.0]], ValueError, r"has shape \(1, 2\); write one number for each entry"),
        (["a", "b"], TypeError, r"is not an array of real numbers"),
        ([[0.0], [0.0, 1.0]], ValueError, r"is ragged"),
    ],
)
def test_knots_are_checked(knots, error, message):
    with pytest.raises(error, match=message):
        oc.convex_sequence(knots=knots)


def test_units_that_do_not_fit():
    with pytest.raises(ValueError, match=r"of shape \(4, 2\): there are 3 knots, and 4 e"):
        oc.convex_sequence(knots=[0, 1, 2])(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"on 'a/w' of shape \(4, 2\): peak=4 is none of the"):
        oc.project({"w": oc.unimodal(peak=4)}).init({"a": {"w": jnp.ones((4, 2))}})
    with pytest.raises(ValueError, match="entries have an order along one axis only"):
        oc.concave_sequence(axis=None)(jnp.ones((4, 2)))
    with pytest.raises(TypeError, match=r"peak=1\.0 is not an int"):
        oc.unimodal(peak=1.0)


def test_configs():
    concave = oc.concave_sequence(knots=[0.0, 1.0, 3.0])
    for constraint in (oc.convex_sequence(1), concave, oc.unimodal(0, 2)):
        assert oc.deserialize(oc.serialize(constraint)) == constraint
