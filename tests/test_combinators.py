"""Constraints made of others: what they project to, settle, remember and refuse."""

import functools
import json
import re
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, derivatives, float64, norms

import optax_constraints as oc
from optax_constraints._axes import LeafLayout

X64 = bool(jax.config.jax_enable_x64)


def normal(*shape: int, seed: int = 0, scale: float = 1.0, dtype: Any = float) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), dtype)


W = normal(6, 4, scale=3)


# Soft.


@pytest.mark.parametrize("rate", [0.0, 0.25, 1.0])
def test_soft_goes_part_of_the_way(rate):
    hard = float64(oc.max_norm(1.0)(W))
    got = oc.soft(oc.max_norm(1.0), rate)(W)
    np.testing.assert_allclose(got, float64(W) + rate * (hard - float64(W)), rtol=1e-6, atol=1e-6)


def test_soft_leaves_what_is_inside_and_is_hard_at_rate_1():
    inside = oc.max_norm(1.0)(W)
    for rate in (0.1, 0.5, 1.0):
        assert bits(oc.soft(oc.max_norm(1.0), rate)(inside)) == bits(inside)
    assert bits(oc.soft(oc.max_norm(1.0), 1.0)(W)) == bits(inside)


def test_soft_fades_in_with_a_schedule():
    tx = oc.project(oc.soft(oc.max_norm(1.0), optax.linear_schedule(0.0, 1.0, 2)))
    params, state = W, tx.init(W)
    outside = []
    for _ in range(3):
        updates, state = tx.update(jnp.zeros_like(W), state, params)
        params = optax.apply_updates(params, updates)
        outside.append(np.max(norms(float64(params), 0)) - 1)
    assert outside[0] == pytest.approx(np.max(norms(float64(W), 0)) - 1)
    assert outside[0] > outside[1] > 1e-3
    assert outside[2] < 1e-6


def test_soft_in_the_chain_is_not_corrected_into_the_set():
    # Elementwise sets are, entry by entry; half way to one there is nothing to correct.
    tx = oc.project(oc.soft(oc.non_neg(), 0.5))
    w = jnp.array([-1.0, 1.0])
    updates, _ = tx.update(jnp.zeros(2), tx.init(w), w)
    np.testing.assert_array_equal(optax.apply_updates(w, updates), [-0.5, 1.0])


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_soft_rates_are_checked(rate):
    with pytest.raises(ValueError, match=r"Soft: rate=.* is not allowed; write a number from 0 to"):
        oc.soft(oc.non_neg(), rate)


# Part.


@pytest.mark.parametrize(
    ("index", "text"),
    [
        (np.s_[:, :2], ":, :2"),
        (np.s_[1], "1"),
        (np.s_[..., -1], "..., -1"),
        (np.s_[::2, 1:-1], "::2, 1:-1"),
        ("[:, 0]", ":, 0"),
        (" 1:,:2 ", "1:, :2"),
        ((np.int64(2), slice(None, None, -1)), "2, ::-1"),
    ],
)
def test_parts_are_those_of_numpy(index, text):
    constraint = oc.part(oc.non_neg(), index)
    assert constraint.index == text
    want = np.array(W)
    parsed = eval(f"np.s_[{text}]")
    want[parsed] = np.maximum(want[parsed], 0)
    np.testing.assert_array_equal(constraint(W), want)
    assert oc.deserialize(json.loads(json.dumps(oc.serialize(constraint)))) == constraint


def test_the_rest_of_a_part_is_free_to_the_bit():
    tx = optax.chain(optax.sgd(0.1), oc.project(oc.part(oc.max_norm(0.5), ":, :2")))
    updates, _ = tx.update(W, tx.init(W), W)
    after = optax.apply_updates(W, updates)
    np.testing.assert_allclose(after[:, 2:], 0.9 * W[:, 2:], rtol=1e-6)
    np.testing.assert_allclose(norms(float64(after[:, :2]), 0), 0.5, rtol=1e-6)


def test_axes_are_those_of_the_part():
    kernel = normal(5, 4, 12)
    layout = LeafLayout("LSTMCell", fan_in=(1,), stacked=(0,))
    part = oc.part(oc.max_norm(1.0, axis="fan_in"), "2, :, :3").settle("w", kernel.shape, layout)
    assert part.constraint.axis == (0,)
    out = float64(part(kernel))
    np.testing.assert_array_equal(np.delete(out, 2, axis=0), np.delete(kernel, 2, axis=0))
    assert np.max(norms(out[2, :, :3], 0)) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        ("a", ValueError, "index='a' is not an index; write integers, slices and '...'"),
        ("__import__('os')", ValueError, "is not an index"),
        ("", ValueError, "is not an index"),
        ("1::2:3", ValueError, "is not an index"),
        ("..., ...", ValueError, "has more than one '...'"),
        (1.5, TypeError, "index=1.5 is not an index"),
        (True, TypeError, "index=True is not an index"),
        (np.array([True, False]), TypeError, "is not an index"),
        (None, TypeError, "index=None is not an index"),
        ("9" * 50, ValueError, "is not an index"),
    ],
)
def test_bad_indices(index, error, message):
    with pytest.raises(error, match=re.escape(message)):
        oc.part(oc.non_neg(), index)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("9", "Part on 'a/w' of shape (6, 4): there is no [9]: index 9 is out of bounds"),
        (":, :, 0", "there is no [:, :, 0]: too many indices"),
        ("4:2", "[4:2] is empty, so that nothing is constrained"),
    ],
)
def test_parts_that_a_leaf_does_not_have(index, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        oc.project({"w": oc.part(oc.non_neg(), index)}).init({"a": {"w": W}})


def test_elementwise_parts_are_exact_in_the_chain():
    tx = optax.chain(optax.sgd(1.0), oc.project(oc.part(oc.box(-0.01, 0.01), "1:")))
    w = normal(6, 4, seed=1, dtype=jnp.bfloat16)
    updates, _ = tx.update(w, tx.init(w), w)
    after = float64(optax.apply_updates(w, updates))
    assert np.max(np.abs(after[1:])) <= float(jnp.bfloat16(0.01))


# Compose.


def test_compose_applies_in_order():
    first, last = oc.max_norm(1.0), oc.box(-0.1, 0.1)
    np.testing.assert_array_equal(oc.compose(first, last)(W), last(first(W)))
    assert not np.array_equal(oc.compose(last, first)(W), last(first(W)))


def test_compose_settles_reports_and_serialises():
    constraint = oc.compose(oc.non_neg(), oc.max_norm(1.0, axis="fan_in"))
    rules = {"kernel": constraint}
    params = {"Conv_0": {"kernel": jnp.ones((3, 3, 2, 4))}}
    row = oc.report(params, rules).rows[0]
    assert (row.constraint, row.units, row.at_bound) == ("Compose(NonNeg(), MaxNorm(1))", 4, 4)
    config = json.loads(json.dumps(oc.serialize(rules)))
    assert oc.deserialize(config) == rules


def test_a_composition_of_elementwise_sets_is_one():
    assert oc.compose(oc.non_neg(), oc.box(-1, 1)).elementwise
    assert not oc.compose(oc.non_neg(), oc.max_norm(1.0)).elementwise


# Intersection.


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_nearest_point_of_an_intersection(scale):
    w = scale * np.random.default_rng(1).normal(size=(6, 4))
    got = oc.intersection(
        oc.center_around(0.25, axis=0), oc.sum_to(1.0, axis=1), oc.box(-0.5, 1.0), iterations=5000
    )(jnp.asarray(w, jnp.float64 if X64 else jnp.float32))
    x = cp.Variable((6, 4))
    sets = [cp.sum(x, axis=0) == 1.5, cp.sum(x, axis=1) == 1, x >= -0.5, x <= 1]
    cp.Problem(cp.Minimize(cp.sum_squares(x - w)), sets).solve(
        solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12
    )
    # The solver itself is right to some 1e-8.
    np.testing.assert_allclose(got, x.value, atol=1e-7 if X64 else 1e-5)


def test_an_intersection_of_planes_is_smooth_and_one_of_balls_is_not():
    planes = oc.intersection(oc.sum_to(1.0, axis=0), oc.sum_to(1.5, axis=1))
    assert planes.smooth
    assert not oc.intersection(oc.sum_to(1.0), oc.non_neg()).smooth


def test_gradients_go_through_an_intersection():
    both = oc.intersection(oc.non_neg(), oc.max_norm(1.0))
    w, dw, cotangent = (normal(6, 4, seed=seed) for seed in range(3))
    forward, backward = derivatives(both, w, dw, cotangent)
    np.testing.assert_allclose(jnp.vdot(forward, cotangent), jnp.vdot(dw, backward), rtol=1e-4)


PLANES = oc.intersection(oc.sum_to(0.0), oc.hyperplane([1.0, 2.0, 3.0], 0.0))
BOXED = oc.intersection(*PLANES.constraints, oc.box(-5.0, 5.0))
# Onto the one line that is in both.
ONTO_LINE = np.outer([1, -2, 1], [1, -2, 1]) / 6


@functools.cache
def jacobians(constraint: oc.Constraint) -> Any:
    """By forward and by reverse mode: one program for all tests."""
    return jax.jit(lambda w: (jax.jacfwd(constraint)(w), jax.jacrev(constraint)(w)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("constraint", "offsets"),
    [
        (PLANES, ([0, 0, 0], [0.3, 0.1, -0.7], [1, 1, 1])),
        # Where all of them hold, the box makes no difference.
        (BOXED, ([0, 0, 0],)),
    ],
    ids=["planes", "planes and a box"],
)
def test_the_derivative_of_planes_is_that_of_the_projection(constraint, offsets):
    accuracy = 1e-9 if X64 else 5e-5

    hessian = jax.jit(jax.hessian(lambda w: jnp.sum(jnp.square(constraint(w)))))
    start = jnp.array([1.0, -2.0, 1.0])
    for offset in offsets:
        w = start + jnp.array(offset)
        forward, backward = jacobians(constraint)(w)
        np.testing.assert_allclose(forward, ONTO_LINE, atol=accuracy)
        np.testing.assert_allclose(backward, ONTO_LINE, atol=accuracy)
        np.testing.assert_allclose(hessian(w), 2 * ONTO_LINE, atol=4 * accuracy)
    # Outside of jit, too.
    np.testing.assert_allclose(jax.jacfwd(constraint)(start), ONTO_LINE, atol=accuracy)


def test_the_tangent_of_planes():
    w, v = jnp.array([1.0, -2.0, 1.0]), jnp.array([1.0, 0.0, 0.0])
    np.testing.assert_allclose(PLANES.tangent(w, v), ONTO_LINE @ v, atol=2e-5)
    # What jnp.asarray takes will do.
    np.testing.assert_allclose(
        PLANES.tangent([1.0, -2.0, 1.0], [1.0, 0.0, 0.0]), ONTO_LINE @ v, atol=2e-5
    )
    tx = oc.tangent(PLANES)
    part, _ = tx.update(v, tx.init(w), w)
    np.testing.assert_allclose(part, ONTO_LINE @ v, atol=2e-5)


def test_the_derivative_of_planes_by_their_offset():
    def nearest(offset):
        return oc.intersection(oc.sum_to(offset), PLANES.constraints[1])(
            jnp.array([1.0, -2.0, 1.0])
        )

    # Of the plane sum = t, <(1, 2, 3), x> = 0, the nearest point to the start.
    want = [4 / 3, 1 / 3, -2 / 3]
    np.testing.assert_allclose(jax.jacfwd(nearest)(0.0), want, atol=5e-5)
    np.testing.assert_allclose(jax.jacrev(nearest)(0.0), want, atol=5e-5)


def test_allowed_points_of_an_intersection_have_finite_gradients():
    both = oc.intersection(oc.non_neg(), oc.max_norm(1.0))
    for w in (jnp.zeros((6, 4)), jnp.full((6, 4), 0.1)):
        np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(both(w)))(w), 1)


def test_what_an_intersection_returned_is_allowed_also_to_its_derivative():
    # It need not be so to the bit.
    for seed in range(20):
        w = BOXED(normal(3, seed=seed))
        np.testing.assert_allclose(jacobians(BOXED)(w)[0], ONTO_LINE, atol=1e-3)


def test_the_derivative_close_to_a_set_is_as_right_as_far_from_it():
    # Where the point needs few rounds and its derivative as many as ever.
    inside = jnp.array([1.0, -2.0, 1.0])
    for away in (1e-4, 1e-2, 1.0):
        w = inside + away * jnp.array([0.3, 0.1, -0.7])
        for jacobian in jacobians(BOXED)(w):
            np.testing.assert_allclose(jacobian, ONTO_LINE, atol=2e-4)


def test_an_infinity_in_one_unit_does_not_end_the_rounds_of_others():
    both = oc.intersection(oc.non_neg(), oc.sum_to(1.0))
    w = jnp.array([[3.0, jnp.inf], [2.0, 1.0], [-3.0, 1.0]])
    np.testing.assert_allclose(both(w)[:, 0], [1, 0, 0], atol=1e-6)
    assert np.all(np.isnan(both(w)[:, 1]))


@pytest.mark.parametrize("order", [0, 1])
def test_sets_that_meet_at_a_flat_angle_converge_or_say_that_they_did_not(order):
    sets = [oc.sum_to(1.0), oc.box(0.0, 0.3)]
    sets = sets[::-1] if order else sets
    w = normal(50, 20)
    near, far = oc.intersection(*sets), oc.intersection(*sets, iterations=20)
    x = near(w)
    assert np.max(np.abs(np.sum(float64(x), axis=0) - 1)) <= 1e-4
    assert oc.violations(x, near)[""] <= 1e-3
    for k in range(3):
        wanted = cp.Variable(50)
        nearest = cp.Minimize(cp.sum_squares(wanted - float64(w)[:, k]))
        cp.Problem(nearest, [cp.sum(wanted) == 1, wanted >= 0, wanted <= 0.3]).solve()
        np.testing.assert_allclose(x[:, k], wanted.value, atol=1e-4)
    # What twenty rounds leave is in the violations, and no less than one of the sets shows.
    left = far(30 * w)
    outside = max(oc.violations(left, c)[""] for c in sets)
    assert outside > 0.1
    assert oc.violations(left, far)[""] >= 0.9 * outside


def test_the_units_of_an_intersection_have_each_their_own_momentum():
    both = oc.intersection(oc.sum_to(1.0), oc.box(0.0, 0.3))
    w = normal(50, 6, scale=30)
    together, alone = both(w), jnp.concatenate([both(w[:, k : k + 1]) for k in range(6)], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-3)


def test_traced_bounds_and_schedules_inside():
    project = jax.jit(lambda w, bound: oc.intersection(oc.non_neg(), oc.max_norm(bound))(w))
    for bound in (0.5, 1.0):
        np.testing.assert_allclose(norms(float64(project(jnp.abs(W), bound)), 0), bound, rtol=1e-6)
    tx = oc.project(oc.intersection(oc.non_neg(), oc.max_norm(lambda step: 1.0 + step)))
    params, state = W, tx.init(W)
    for bound in (1.0, 2.0):
        updates, state = tx.update(10 * jnp.abs(W), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(norms(float64(params), 0), bound, rtol=1e-6)


def test_steps_with_a_schedule_compile_once():
    tx = oc.project(oc.intersection(oc.max_norm(lambda step: 1.0 + step), oc.non_neg()))
    updates, state = tx.update(W, tx.init(W), W)
    updates, state = tx.update(updates, state, W)
    assert _count_compilations(lambda: [tx.update(W, state, W) for _ in range(3)]) == 0


def test_eager_calls_compile_once():
    both = oc.intersection(oc.non_neg(), oc.max_norm(1.0))
    assert _count_compilations(lambda: both(2 * W)) > 0
    other = 3 * W
    assert _count_compilations(lambda: both(other)) == 0


def _count_compilations(function) -> int:
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    function()
    return sum("backend_compile" in name for name in events)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: oc.compose(oc.non_neg()),
            ValueError,
            "Compose: 1 constraints are given;",
        ),
        (lambda: oc.compose(oc.non_neg(), None), ValueError, "constraint=None constrains nothing"),
        (
            lambda: oc.intersection(oc.non_neg(), oc.unit_norm()),
            ValueError,
            "Intersection: UnitNorm() is not known to be convex",
        ),
        (
            lambda: oc.intersection(oc.stacked(oc.max_norm(axis_name="m")), oc.non_neg()),
            ValueError,
            "Intersection: Stacked(MaxNorm(2)) sums over 'm', an axis of a mesh",
        ),
        (
            lambda: oc.intersection(oc.min_max_norm(0.0, 1.0, rate=0.1), oc.non_neg()),
            ValueError,
            "Intersection: MinMaxNorm(0, 1, 0.1) is not known to be convex",
        ),
        (
            lambda: oc.intersection(oc.stacked(oc.soft(oc.max_norm(), 0.5)), oc.non_neg()),
            ValueError,
            "Intersection: Stacked(Soft(MaxNorm(2), 0.5)) is not known to be convex",
        ),
        (
            lambda: oc.intersection(oc.soft(oc.max_norm(), lambda step: 1.0), oc.non_neg()),
            ValueError,
            "is not known to be convex",
        ),
        (
            lambda: oc.intersection(oc.non_neg(), oc.max_norm(), iterations=0),
            ValueError,
            "iterations=0 is not allowed",
        ),
        (
            lambda: oc.intersection(oc.non_neg(), oc.max_norm(), iterations=1.5),
            TypeError,
            "iterations=1.5 is not an int",
        ),
        (lambda: oc.soft(None, 0.5), ValueError, "Soft: constraint=None constrains nothing"),
        (lambda: oc.part(None, "0"), ValueError, "Part: constraint=None constrains nothing"),
    ],
)
def test_bad_combinations(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"constraints": "non_neg"},
        {"constraints": [], "iterations": 3},
        {"constraints": ["non_neg", "max_norm"], "other": 1},
        {"constraints": ["non_neg", {"class_name": "Compose", "config": {}}]},
    ],
)
@pytest.mark.parametrize("name", ["Compose", "Intersection"])
def test_bad_configs_end_in_a_value_error(name, config):
    with pytest.raises(ValueError, match=r"does not fit|constraints are given"):
        oc.deserialize({"class_name": name, "config": config})


def test_nested_combinators():
    constraint = oc.Stacked(
        oc.compose(oc.part(oc.non_neg(), "0"), oc.soft(oc.max_norm(1.0), 1.0)), axis=-1
    )
    w = normal(4, 3, 2)
    got = float64(oc.constrain({"w": w}, {"w": constraint})["w"])
    assert np.min(got[0]) >= 0
    assert np.max(norms(got, 0)) <= 1 + 1e-6
    assert oc.deserialize(json.loads(json.dumps(oc.serialize(constraint)))) == constraint
