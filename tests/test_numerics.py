"""What a constraint promises, one test for each promise."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, DTYPES, Case, Interval, bits, derivatives, float64, norms

import optax_constraints as oc
from optax_constraints import _numerics

both_modes = pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
each_case = pytest.mark.parametrize("case", CASES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
WIDEST = DTYPES[0]


def weights(
    scale: float = 1.0, dtype=WIDEST, seed: int = 0, shape: tuple[int, ...] = (7, 5, 3)
) -> jax.Array:
    w = np.random.default_rng(seed).normal(size=shape) * scale
    # NumPy rounds as JAX does, and compiles nothing for it. So it is all over this file.
    return jnp.asarray(w.astype(WIDEST).astype(dtype))


def eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def close(case: Case, got, want: np.ndarray, dtype, factor: float = 1) -> None:
    """Checks a projection against its reference, which is in float64."""
    near = case.near_in(dtype)
    assert np.all(np.isfinite(want))
    largest = np.max(np.abs(want), initial=0)
    tiny = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(
        float64(got),
        want,
        rtol=2 * factor * eps(dtype),
        atol=factor * (near + (eps(dtype) if case.adds else 0)) * largest + tiny,
    )


def test_every_exported_set_has_a_case():
    exported = {
        thing
        for thing in vars(oc).values()
        if isinstance(thing, type) and issubclass(thing, oc.Constraint)
    }
    assert {type(case.constraint) for case in CASES} == exported - {oc.Constraint, oc.Scale}


@each_case
def test_sets_do_not_change(case: Case):
    for name in ("axis", *(f.name for f in dataclasses.fields(case.constraint))):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(case.constraint, name, None)


@each_case
@each_dtype
def test_shape_and_dtype_kept(case: Case, dtype):
    out = case.constraint(weights(dtype=dtype, shape=case.shape))
    assert (out.shape, out.dtype) == (case.shape, jnp.dtype(dtype))


@each_case
@each_dtype
@both_modes
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_nearest_point(case: Case, dtype, jit, scale):
    w = weights(scale, dtype, shape=case.shape)
    project = jax.jit(case.constraint) if jit else case.constraint
    close(case, project(w), case.project(float64(w)), dtype)


@each_case
@each_dtype
@both_modes
def test_feasible_weights_come_back_bit_for_bit(case: Case, dtype, jit):
    project = jax.jit(case.constraint) if jit else case.constraint
    if case.allowed is not None:
        want = case.allowed()
        allowed = want.astype(WIDEST).astype(dtype)
        assert np.array_equal(float64(allowed), want)
    else:
        # A little inside, so that rounding to the dtype does not lead out again.
        inside = case.project(float64(weights(shape=case.shape))) * (1 - 2 * eps(dtype))
        allowed = inside.astype(WIDEST).astype(dtype)
        allowed = np.where(case.outside(float64(allowed)) > 0, np.zeros((), dtype), allowed)
    allowed = jnp.asarray(allowed)
    assert allowed.dtype == dtype
    assert np.any(float64(allowed) != 0)
    assert np.max(case.outside(float64(allowed))) == 0
    assert bits(project(allowed)) == bits(allowed)


@each_case
@each_dtype
@both_modes
def test_projecting_twice_changes_nothing(case: Case, dtype, jit):
    project = jax.jit(case.constraint) if jit else case.constraint
    for seed in range(3):
        once = project(weights(2.0, dtype, seed, case.shape))
        twice = project(once)
        if case.constraint.elementwise:
            assert bits(twice) == bits(once)
        else:
            size = np.abs(np.asarray(once))
            if case.adds:
                size = np.max(size, axis=case.unit_axes, keepdims=True)
            ulp = float64(np.nextafter(size, np.asarray(np.inf, dtype))) - float64(size)
            assert np.max(np.abs(float64(twice) - float64(once)) / ulp) <= 2


@each_case
@both_modes
def test_what_was_projected_is_allowed_to_the_bit(case: Case, jit):
    # In float32 or float64, where storing the result does not round any further.
    project = jax.jit(case.constraint) if jit else case.constraint
    for seed in range(20):
        once = project(weights((2.0, 0.02)[seed % 2], seed=seed, shape=case.shape))
        assert bits(project(once)) == bits(once)


@each_case
def test_convex_says_whether_points_between_two_are_inside(case: Case):
    points = [
        float64(case.constraint(weights((2.0, 0.05)[seed % 2], seed=seed, shape=case.shape)))
        for seed in range(4)
    ]
    outside = [np.max(case.outside((a + b) / 2)) for a, b in itertools.combinations(points, 2)]
    # Compose makes no claim.
    convex = case.constraint.convex or type(case.constraint) is oc.Compose
    # Nor do those say that their set is convex that do not lead to its nearest point.
    assert case.nearest or not convex
    convex = convex or not case.nearest
    assert (max(outside) < 1e-6) == convex


# float16 has no room for Adam's default eps.
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1, eps=1e-3)}


def either(adam: jax.Array) -> optax.GradientTransformation:
    """The one optimizer or the other, as an argument: one program for both."""
    moments = optax.scale_by_adam(eps=1e-3)

    def update(gradient, state, params=None):
        direction, state = moments.update(gradient, state, params)
        return jnp.where(adam, direction, gradient), state

    return optax.chain(
        optax.GradientTransformation(moments.init, update), optax.scale_by_learning_rate(0.1)
    )


def trained(tx: optax.GradientTransformation, params: jax.Array, gradients: jax.Array, scan):
    """The weights after each step."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = jnp.asarray(optax.apply_updates(params, updates))
        return (params, state), params

    return scan(step, (params, tx.init(params)), gradients)[1]


def eager_scan(step, carry, xs):
    after = []
    for x in xs:
        carry, y = step(carry, x)
        after.append(y)
    return carry, after


@functools.cache
def updates_of_optimizers(shape: tuple[int, ...], dtype) -> dict[str, np.ndarray]:
    """Those of fifty steps: the weights make no difference to them."""

    def updates(tx: optax.GradientTransformation, gradients: jax.Array):
        def step(state, gradient):
            update, state = tx.update(gradient, state)
            return state, update

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1]

    @jax.jit
    def every(gradients):
        return {name: updates(optimizer, gradients) for name, optimizer in OPTIMIZERS.items()}

    return jax.device_get(every(weights(dtype=dtype, seed=1, shape=(50, *shape))))


@each_case
@each_dtype
@both_modes
def test_outside_after_apply_updates(case: Case, dtype, jit):
    projection = oc.project(case.constraint)
    params = case.constraint(weights(dtype=dtype, shape=case.shape))
    gradients = weights(dtype=dtype, seed=1, shape=(50, *case.shape))

    @jax.jit
    def compiled(adam, params, gradients):
        tx = optax.chain(either(adam), projection)
        return trained(tx, params, gradients, jax.lax.scan)

    for name, updates in updates_of_optimizers(case.shape, dtype).items():
        if jit:
            after = compiled(name == "adam", params, gradients)
        else:
            after = trained(projection, params, updates[::5], eager_scan)
        # Not one after the other from a JAX array: to take that apart is a program of its own.
        worst = max(np.max(case.outside(params)) for params in map(float64, np.asarray(after)))
        limit = 0 if case.constraint.elementwise else case.slack * eps(dtype)
        assert worst <= limit, f"after a step with {name}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_either_is_the_one_optimizer_or_the_other(dtype):
    # What the test above relies on.
    params, gradients = weights(dtype=dtype), weights(dtype=dtype, seed=1, shape=(5, 7, 5, 3))
    for name, optimizer in OPTIMIZERS.items():
        got = trained(either(jnp.asarray(name == "adam")), params, gradients, eager_scan)
        want = trained(optimizer, params, gradients, eager_scan)
        assert list(map(bits, got)) == list(map(bits, want)), name


@pytest.mark.parametrize(
    "dtype", [d for d in DTYPES if d != jnp.float16], ids=lambda d: jnp.dtype(d).name
)
@each_case
@both_modes
@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_huge_and_tiny_values(case: Case, dtype, jit, scale):
    project = jax.jit(case.constraint) if jit else case.constraint
    w = weights(scale, dtype, shape=case.shape)
    want = case.project(float64(w))
    np.testing.assert_allclose(
        float64(project(w)),
        want,
        rtol=4 * eps(dtype),
        atol=(max(1e-6, case.near) + (eps(dtype) if case.adds else 0)) * np.max(np.abs(want)),
    )


@pytest.mark.float16
@pytest.mark.skipif(jnp.float16 not in DTYPES, reason="float16 is for the run without x64")
@pytest.mark.parametrize("scale", [6e4, 1e-4, 6e-8])
@each_case
def test_ends_of_the_range_of_float16(case: Case, scale):
    w = np.clip(weights(scale, shape=case.shape), -65504, 65504).astype(np.float16)
    w = jnp.asarray(w)
    want = case.project(float64(w))
    # Where the result is itself subnormal, float16 has a spacing of 6e-8; and what adds to
    # entries may add more than it can hold.
    largest = np.max(np.abs(want)) if case.adds else 0
    holds = np.abs(want) < 65520
    assert np.mean(holds) > 0.75
    np.testing.assert_allclose(
        float64(case.constraint(w))[holds], want[holds], rtol=2e-3, atol=6e-8 + 2e-3 * largest
    )


@each_case
@each_dtype
def test_zero_vectors(case: Case, dtype):
    zeros = jnp.asarray(np.zeros(case.shape, dtype))
    want = case.project(float64(zeros))
    if np.any(want != 0):
        close(case, case.constraint(zeros), want, dtype)
    else:
        assert bits(case.constraint(zeros)) == bits(zeros)


@each_case
@each_dtype
@both_modes
def test_nan_stays_in_its_own_unit(case: Case, dtype, jit):
    project = jax.jit(case.constraint) if jit else case.constraint
    w = weights(dtype=dtype, shape=case.shape)
    position = tuple(min(1, n - 1) for n in case.shape)
    spoilt = np.array(w)
    spoilt[position] = np.nan
    spoilt = jnp.asarray(spoilt)
    with jax.debug_nans(False):
        out = float64(project(spoilt))
    assert np.isnan(out[position])
    clean = ~np.any(np.isnan(float64(spoilt)), axis=case.unit_axes, keepdims=True)
    clean = np.broadcast_to(clean, case.shape)
    # All units of an intersection go on until the last is done.
    further = 4 * eps(dtype) if isinstance(case.constraint, oc.Intersection) else 0
    np.testing.assert_allclose(out[clean], float64(project(w))[clean], rtol=further, atol=further)


@each_case
def test_jvp_is_that_of_the_projection_and_vjp_its_transpose(case: Case):
    w, dw, cotangent = (
        weights(scale, seed=seed, shape=case.shape) for seed, scale in enumerate((2.0, 1.0, 1.0))
    )
    forward, backward = derivatives(case.constraint, w, dw, cotangent)
    h = 1e-6
    want = (
        case.project(float64(w) + h * float64(dw)) - case.project(float64(w) - h * float64(dw))
    ) / (2 * h)
    np.testing.assert_allclose(float64(forward), want, rtol=1e-4, atol=1e-5, err_msg="jvp")
    np.testing.assert_allclose(
        np.sum(float64(forward) * float64(cotangent)),
        np.sum(float64(dw) * float64(backward)),
        rtol=1e-4,
        atol=1e-5,
        err_msg="vjp",
    )


def test_derivative_at_a_unit_vector_is_the_tangent_part():
    # There the projection changes nothing, but its derivative is not the identity.
    w = oc.unit_norm()(weights())
    _, got = jax.jvp(oc.unit_norm(), (w,), (weights(seed=1),))
    radial = np.sum(float64(got) * float64(w), axis=0)
    np.testing.assert_allclose(radial, 0, atol=1e-6)


@each_case
@pytest.mark.parametrize("value", [0.0, 1e-18, 1e30])
def test_gradients_are_finite(case: Case, value):
    w = np.full(case.shape, value, WIDEST)
    w[0] *= 2
    gradients = derivatives(case.constraint, *map(jnp.asarray, (w, w, np.ones_like(w))))[1]
    assert np.all(np.isfinite(gradients))


@each_case
def test_vmap_equals_a_loop(case: Case):
    stack = np.stack([weights(3.0, seed=seed, shape=case.shape) for seed in range(4)])
    got = jax.jit(jax.vmap(case.constraint))(stack)
    want = np.stack([jax.jit(case.constraint)(w) for w in stack])
    largest = np.max(np.abs(want))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6 * largest if case.adds else 0)


# Norms, on the CPU and as other backends take them.


def test_norms_are_taken_in_float32_or_wider():
    for dtype, want in {
        jnp.bfloat16: jnp.float32,
        jnp.float16: jnp.float32,
        jnp.float32: jnp.float32,
        jnp.float64: jnp.float64,
    }.items():
        assert _numerics.compute_dtype(dtype) == jnp.dtype(want)


wide_sums = pytest.mark.skipif(
    _numerics.enable_x64 is None, reason="before JAX 0.8 there are no sums in float64 for a while"
)
NORMS = [
    _numerics.norm,
    _numerics._three_range_norm,
    pytest.param(_numerics._wide_norm, marks=wide_sums),
]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("exponent", [-35, -30, -20, -12, -10, 0, 10, 18, 20, 30, 37])
def test_norm_over_the_whole_range(norm, exponent):
    w = weights(10.0**exponent)
    # Beside a unit of ordinary size, so that one unit decides nothing for the others.
    w = jnp.asarray(np.concatenate([w, weights(seed=1)], axis=1))
    got = norm(w, (0,))
    np.testing.assert_allclose(float64(got), norms(float64(w), 0), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 1e-30, -3.0, 1e30])
def test_norm_of_a_single_number(value):
    for x in (jnp.full(1, value), jnp.full((1, 1), value), jnp.full((1, 3), value)):
        for axis in ((0,), None):
            want = norms(float64(x), axis)
            np.testing.assert_allclose(_numerics.norm(x, axis), want, rtol=1e-6)
    assert bits(oc.max_norm(2.0)(jnp.zeros(1))) == bits(jnp.zeros(1))


@pytest.mark.parametrize("norm", NORMS)
def test_norm_of_mixed_magnitudes(norm):
    w = jnp.array([[1e-25, 3e30, 1.0], [3e-25, 1e-30, 1e-20]], jnp.float32)
    np.testing.assert_allclose(float64(norm(w, (0,))), norms(float64(w), 0), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e30])
def test_norm_has_the_derivative_of_a_norm(scale):
    w, v = weights(scale), weights(seed=1)
    _, got = jax.jvp(lambda w: _numerics.norm(w, (0,)), (w,), (v,))
    direction = float64(w) / np.maximum(norms(float64(w), 0), 1e-300)
    want = np.sum(direction * float64(v), axis=0, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@wide_sums
def test_norm_takes_one_sum_on_a_cpu():
    # In float64, so that no condition parts it from what makes the weights. Where these are in
    # float64 themselves, the scaled sums are under one.
    def compiled(w):
        return str(jax.jit(lambda w: _numerics.norm(2 * w, (0,))).lower(w).compile().as_text())

    text = compiled(jnp.asarray(weights(), jnp.float32))
    assert text.count(" reduce(") == 1
    assert "f64" in text
    assert "conditional" not in text
    with _numerics.enable_x64(True):
        assert "conditional" in compiled(jnp.asarray(weights(), jnp.float64))


@wide_sums
def test_norm_takes_one_sum_on_a_gpu():
    # In float64, also where that is built from float32 alone: in a batch, and for a derivative.
    def one(w):
        return _numerics.norm(w, (0,))

    def derivative(w):
        return jax.jvp(one, (w,), (w,))[1]

    w = jnp.asarray(weights(), jnp.float32)
    for function in (one, derivative, jax.vmap(one, in_axes=1), jax.checkpoint(one)):
        traced = jax.jit(function).trace(w)
        cuda, tpu = (traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu"))
        assert "f64" in cuda
        assert "f64" not in tpu
        assert cuda.count("stablehlo.reduce(") == tpu.count("stablehlo.reduce(") - 2


@wide_sums
@pytest.mark.parametrize(
    ("shape", "axis", "parts"),
    [
        ((512, 5), (0,), 4),
        ((256, 3, 5), (0, 1), 2),
        ((384, 5), (0,), 2),
        ((257, 5), (0,), 1),
        ((5, 256), (1,), 1),
        ((256, 5), None, 1),
    ],
)
def test_columns_are_summed_in_parts_on_a_gpu(shape, axis, parts):
    w = jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert _numerics._parts(w, axis) == parts
    want = np.sqrt(np.sum(float64(w) ** 2, axis=axis, keepdims=True))
    np.testing.assert_allclose(_numerics._wide_norm(w, axis, in_parts=True), want, rtol=1e-6)
    # As one leaf after the other, and in a chain, which besides does not keep what it sums.
    tx = oc.project(oc.max_norm(2.0, axis=axis))
    programs = {
        lambda w: oc.constrain(w, oc.max_norm(2.0, axis=axis)): int(parts > 1),
        lambda w: tx.update(w, tx.init(w), w)[0]: int(parts > 1) + 1,
    }
    for function, barriers in programs.items():
        traced = jax.jit(function).trace(w)
        texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu", "tpu")]
        assert [t.count("optimization_barrier") for t in texts] == [barriers, 0, 0]


# Elementwise sets: exact after apply_updates.


def _train(constraint, params, dtype, steps, jit):
    tx = optax.chain(optax.sgd(1.0), oc.project(constraint))
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    rng = np.random.default_rng(0)
    outside = 0
    for _ in range(steps):
        grads = rng.normal(size=params.shape) * 0.01
        grads = jnp.asarray(grads.astype(np.float32).astype(dtype))
        updates, state = update(grads, state, params)
        params = jnp.asarray(optax.apply_updates(params, updates))
        low, high = (float64(np.asarray(v, dtype)) for v in (constraint.low, constraint.high))
        values = float64(params)
        outside += int(np.sum((values < low) | (values > high)))
    return outside


@each_dtype
@both_modes
@pytest.mark.parametrize("start", [0.0, 3.0], ids=["feasible", "infeasible"])
@pytest.mark.parametrize(("low", "high"), [(-0.01, 0.01), (1e-3, 1.0), (-0.3, 0.007)])
def test_elementwise_sets_are_exact_after_apply_updates(dtype, jit, start, low, high):
    params = weights(start, dtype, seed=1, shape=(100, 100))
    assert _train(Interval(low, high), params, dtype, 10, jit) == 0


def test_without_the_correction_they_are_not():
    class Uncorrected(Interval):
        elementwise = False

    params = jnp.asarray(np.random.default_rng(1).normal(size=(100, 100)), jnp.bfloat16)
    assert _train(Uncorrected(-0.01, 0.01), params, jnp.bfloat16, 10, jit=True) > 100


def test_nan_passes_through_an_elementwise_update():
    tx = oc.project(Interval(-1.0, 1.0))
    params = jnp.array([0.5, 0.5])
    updates, _ = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates), [np.nan, 1.0])


# The update of norms, which does without the second pass.


@each_dtype
@pytest.mark.parametrize(
    "constraint",
    [oc.max_norm(1.0), oc.max_rms(0.3), oc.min_max_norm(0.2, 0.4), oc.unit_norm(axis=1)],
    ids=str,
)
def test_the_update_of_a_norm_is_that_of_its_projection(dtype, constraint):
    params, updates = weights(0.5, dtype), weights(dtype=dtype, seed=1)
    got, *_ = constraint.update(params, updates)
    want, *_ = oc.Constraint.update(constraint, params, updates)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(float64(got), float64(want), rtol=0, atol=4 * eps(dtype))


def test_a_rate_goes_part_of_the_way():
    w = weights(0.3)
    norm = norms(float64(w), 0)
    got = norms(float64(oc.min_max_norm(0.5, 0.7, rate=0.25)(w)), 0)
    np.testing.assert_allclose(got, 0.25 * np.clip(norm, 0.5, 0.7) + 0.75 * norm, rtol=1e-6)
    assert len(np.unique(np.clip(norm, 0.5, 0.7))) > 2


def test_the_root_mean_square_of_one_entry_is_its_size():
    np.testing.assert_array_equal(
        oc.max_rms(0.5, axis=0)(jnp.array([[3.0, -0.25]])), [[0.5, -0.25]]
    )


older_xla = pytest.mark.skipif(
    jax.__version_info__ < (0, 8), reason="XLA before JAX 0.8 keeps two leaves of a training step"
)


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=older_xla)])
def test_leaves_take_turns(trains, monkeypatch):
    # XLA's CPU backend would keep the candidates of all leaves at once.
    monkeypatch.setattr(_numerics, "AT_ONCE", 0)
    leaves, width = 4, 256
    params = {f"Dense_{i}": weights(shape=(width, width), seed=i) for i in range(leaves)}
    tx = optax.chain(optax.adam(0.1), oc.project(oc.unit_norm()))
    state = tx.init(params)

    def loss(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    def step(params, state, grads):
        grads = jax.grad(loss)(params, grads["Dense_0"][:4]) if trains else grads
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=(0, 1) if trains else ())
    analysis = compiled.lower(params, state, params).compile().memory_analysis()
    leaf = params["Dense_0"].nbytes
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 1.5 * leaf


def test_small_leaves_share_a_turn(monkeypatch):
    def waits(sizes):
        def sums(leaves):
            turns, out = _numerics.InTurn(max(sizes)), []
            for x in leaves:
                x = turns.wait(x)
                out.append(jnp.sum(x))
                turns.end(out[-1])
            return out

        text = jax.jit(sums).lower([jnp.ones(n) for n in sizes]).as_text()
        return text.count("call @_one_after")

    assert waits([8, 8, 8]) == 0  # of which all are small
    monkeypatch.setattr(_numerics, "AT_ONCE", 0)
    assert waits([8, 8, 8]) == 2
    assert waits([8, 2, 8, 2]) == 1  # a kernel with its bias
    assert waits([100, *[5] * 20]) == 1


def test_a_turn_waits_for_small_leaves_only_if_there_are_no_others(monkeypatch):
    monkeypatch.setattr(_numerics, "AT_ONCE", 0)

    def waited_for(sizes):
        def sums(leaves):
            turns = _numerics.InTurn(128)
            for x in leaves:
                turns.end(jnp.sum(turns.wait(x)))
            return turns.wait(jnp.ones(160))

        text = jax.jit(sums).lower([jnp.ones(n) for n in sizes]).as_text()
        (arguments,) = re.findall(r"call @_one_after\(([^)]*)\)", text)
        return arguments.count("%")

    assert waited_for([64, 3, 5, 3]) == 2
    assert waited_for([3, 3, 3]) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_what_waits_for_its_turn_stays_the_same_to_the_bit(dtype):
    special = [0.0, -0.0, 1.5, -np.inf, np.inf, np.nan, float(jnp.finfo(dtype).tiny)]
    x = jnp.asarray([*special, float(jnp.finfo(dtype).max)], dtype)
    for before in (jnp.asarray(v, jnp.float32) for v in (0.0, -0.0, 3.0, -np.inf, np.nan)):
        waits = jax.jit(_numerics.in_turn)
        assert bits(waits(x, before[None])) == bits(x)
        assert before.ndim == 0
        assert "population_count" in str(jax.make_jaxpr(_numerics.in_turn)(x, before))
    assert _numerics.in_turn(x, x) is x  # nothing is ordered outside of jit


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("scale", [1e14, 1e20, 1e30, 3e38])
def test_a_huge_update_of_max_norm_ends_inside(dtype, scale):
    params, updates = weights(0.1, dtype), float64(weights(dtype=dtype, seed=1)) * scale
    updates = np.clip(updates, -scale, scale).astype(np.float32).astype(dtype)
    updates = jnp.asarray(updates)
    out = float64(params + oc.max_norm(1.0).update(params, updates)[0])
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(norms(out, 0), 1, rtol=4 * eps(dtype))
    assert np.array_equal(np.sign(out), np.sign(float64(updates)))
    if scale < 1e17:
        want = float64(updates) / norms(float64(updates), 0)
        np.testing.assert_allclose(out, want, atol=4 * eps(dtype))


def test_the_sum_of_a_float16_update_does_not_overflow():
    params = jnp.full((2, 1), 6e4, jnp.float16)
    out = float64(params + oc.max_norm(1.0).update(params, params)[0])
    assert np.all(out >= 0)
    assert norms(out, 0) <= 1


# Dtypes of updates.


@pytest.mark.parametrize(
    ("params", "updates", "result"),
    [
        (jnp.float32, jnp.float32, jnp.float32),
        (jnp.float32, jnp.bfloat16, jnp.float32),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float16, jnp.float16, jnp.float16),
    ],
)
@pytest.mark.parametrize("constraint", [oc.max_norm(0.1), oc.unit_norm(), oc.non_neg()], ids=str)
def test_updates_keep_their_dtype_unless_the_sum_is_wider(params, updates, result, constraint):
    tx = oc.project(constraint)
    p, u = weights(dtype=params), weights(dtype=updates, seed=1)
    new, _ = tx.update(u, tx.init(p), p)
    assert jnp.asarray(new).dtype == result


def test_norms_of_float64_are_taken_in_float64():
    if not jax.config.jax_enable_x64:
        pytest.skip("needs JAX_ENABLE_X64=1: `make test-float64` has it")
    w = jnp.asarray(np.random.default_rng(0).normal(size=(50, 4)))
    for scale in (1.0, 1e200, 1e-200):
        got = np.linalg.norm(np.asarray(oc.unit_norm()(w * scale)), axis=0)
        np.testing.assert_allclose(got, 1, rtol=1e-15)
