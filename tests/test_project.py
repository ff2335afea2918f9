"""`project` as an Optax transformation, and the verbs beside it."""

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64, norms

import optax_constraints as oc


def make_params() -> dict[str, dict[str, jax.Array]]:
    rng = np.random.default_rng(0)
    return {
        "Dense_0": {
            "kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=4), jnp.float32),
        },
        "Dense_1": {"kernel": jnp.asarray(rng.normal(size=(4, 2)), jnp.float32)},
    }


def gradient(seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), make_params())


RULES = {"kernel": oc.max_norm(0.7), "bias": oc.non_neg()}


def feasible(params) -> bool:
    kernels = [params["Dense_0"]["kernel"], params["Dense_1"]["kernel"]]
    fits = [np.all(norms(float64(k), 0) <= 0.7 * (1 + 1e-6)) for k in kernels]
    return bool(all(fits) and np.all(float64(params["Dense_0"]["bias"]) >= 0))


# Wrappers of Optax that choose between the updates of what they wrap and others.
CONDITIONS = {
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(
        tx, lambda step: jnp.greater_equal(step, 0)
    ),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step: jnp.greater_equal(step, 0)
    ),
}


def test_the_chain_ends_inside():
    params = make_params()
    assert not feasible(params)
    tx = optax.chain(optax.adam(0.1), oc.project(RULES))
    state = tx.init(params)
    for seed in range(5):
        updates, state = tx.update(gradient(seed), state, params)
        params = optax.apply_updates(params, updates)
        assert feasible(params)


def test_updates_of_free_leaves_are_passed_on():
    tx = oc.project({"bias": oc.non_neg()})
    params, updates = make_params(), gradient(1)
    new, _ = tx.update(updates, tx.init(params), params)
    assert new["Dense_0"]["kernel"] is updates["Dense_0"]["kernel"]


@pytest.mark.parametrize("absent", [None, optax.MaskedNode()], ids=str)
def test_an_update_that_is_not_there_stays_so(absent):
    tx = oc.project({"w": oc.non_neg(), "b": oc.non_neg()})
    params = {"w": jnp.ones(2), "b": jnp.ones(2)}
    updates = {"w": absent, "b": jnp.full(2, -3.0)}
    new, _ = tx.update(updates, tx.init(params), params)
    assert new["w"] is absent
    np.testing.assert_array_equal(new["b"], [-1, -1])


def test_without_updates_allowed_weights_stay_to_the_bit():
    params = oc.constrain(make_params(), RULES)
    tx = oc.project(RULES)
    zeros = jax.tree.map(jnp.zeros_like, params)
    new, _ = tx.update(zeros, tx.init(params), params)
    chex.assert_trees_all_equal(optax.apply_updates(params, new), params)


def test_a_small_column_survives_10_000_steps():
    params = {"kernel": jnp.full((4, 3), 5e-4, jnp.float32)}
    tx = oc.project({"kernel": oc.max_norm(1.0)})

    def step(carry, _):
        params, state = carry
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=10_000)
    assert bits(after["kernel"]) == bits(params["kernel"])
    assert state.updates_seen == 10_000


def test_params_are_needed():
    tx = oc.project(RULES)
    params = make_params()
    with pytest.raises(ValueError, match=r"write tx.update\(grads, state, params\)"):
        tx.update(gradient(0), tx.init(params))


def test_extra_arguments_are_passed_over():
    params = make_params()
    tx = optax.chain(optax.sgd(0.1), oc.project(RULES))
    updates, _ = tx.update(gradient(0), tx.init(params), params, value=1.0, grad_fn=None)
    assert feasible(optax.apply_updates(params, updates))


# Schedules, traced numbers, `every`.


def test_the_state_is_a_count_of_updates():
    params = make_params()
    tx = oc.project(RULES)
    state = tx.init(params)
    assert isinstance(state, oc.ProjectState)
    assert state.memory == ()
    assert (state.updates_seen.dtype, state.updates_seen.shape, int(state.updates_seen)) == (
        jnp.int32,
        (),
        0,
    )
    _, state = tx.update(gradient(0), state, params)
    assert int(state.updates_seen) == 1


def bounds_seen(tx, steps: int) -> list[float]:
    """The norm at which each of some steps ends, with updates that always lead outside."""
    params = jnp.ones((4, 1))
    state = tx.init(params)
    seen = []
    for _ in range(steps):
        updates, state = tx.update(jnp.full((4, 1), 100.0), state, params)
        params = jnp.asarray(optax.apply_updates(params, updates))
        seen.append(float(jnp.linalg.norm(params)))
    return seen


def test_a_schedule_sees_0_at_the_first_update():
    schedule = optax.linear_schedule(8.0, 2.0, 3)
    seen = bounds_seen(oc.project(oc.max_norm(schedule)), 5)
    np.testing.assert_allclose(seen, [8, 6, 4, 2, 2], rtol=1e-6)


def test_constrain_and_violations_agree_with_the_step_of_project():
    rules = {"w": oc.max_norm(optax.linear_schedule(8.0, 2.0, 3))}
    params = {"w": jnp.full((4, 1), 100.0)}
    for step, bound in enumerate([8, 6, 4, 2, 2]):
        out = oc.constrain(params, rules, step=step)
        np.testing.assert_allclose(norms(float64(out["w"]), 0), bound, rtol=1e-6)
        distance = oc.violations(params, rules, step=step)["w"]
        np.testing.assert_allclose(distance, 200 - bound, rtol=1e-6)
    np.testing.assert_allclose(norms(float64(oc.constrain(params, rules)["w"]), 0), 8, rtol=1e-6)
    np.testing.assert_allclose(oc.violations(params, rules)["w"], 192, rtol=1e-6)


@pytest.mark.parametrize(
    ("constraint", "size"),
    [
        (lambda number: oc.max_norm(number), 1.0),
        (lambda number: oc.min_max_norm(0.0, number), 1.0),
        (lambda number: oc.min_max_norm(number, 50.0), 0.01),
        (lambda number: oc.min_max_norm(0.0, 1.0, rate=number), 1.0),
    ],
)
def test_every_number_may_be_a_schedule_or_traced(constraint, size):
    w = size * jnp.array([[3.0], [4.0]])
    want = constraint(0.5)(w)
    assert not np.allclose(want, w)
    traced = jax.jit(lambda number: constraint(number)(w))(0.5)
    array = constraint(jnp.float32(0.5))(w)
    scheduled = oc.constrain(w, constraint(lambda step: 0.25 + 0.05 * step), step=5)
    for got in (traced, array, scheduled):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_by_hand_a_schedule_needs_its_step():
    constraint = oc.max_norm(optax.linear_schedule(8.0, 2.0, 3))
    with pytest.raises(TypeError, match=r"write constraint.at\(step\)\(w\)"):
        constraint(jnp.ones((4, 1)))
    np.testing.assert_allclose(
        norms(float64(constraint.at(1)(jnp.full((4, 1), 9.0))), 0), 6, rtol=1e-6
    )


def test_every_k_projects_on_steps_k_2k_and_so_on():
    seen = bounds_seen(oc.project(oc.max_norm(1.0), every=3), 7)
    inside = [norm <= 1 + 1e-6 for norm in seen]
    assert inside == [False, False, True, False, False, True, False]


def test_between_projections_updates_pass_through():
    params, updates = make_params(), gradient(1)
    tx = oc.project(RULES, every=2)
    new, _ = tx.update(updates, tx.init(params), params)
    chex.assert_trees_all_equal(new, updates)


def test_every_keeps_dtypes_on_all_steps():
    params = jnp.ones((3, 2), jnp.float32)
    tx = oc.project(oc.max_norm(1.0), every=2)
    state = tx.init(params)
    for _ in range(2):
        new, state = tx.update(jnp.ones((3, 2), jnp.bfloat16), state, params)
        assert jnp.asarray(new).dtype == jnp.float32


SIZES = {"a": 60, "b": 30, "c": 20, "d": 20, "free": 5, "e": 10, "f": 1}


def staggered(steps: int, every: int = 3, save: int = -1, **options: Any) -> tuple[Any, list[Any]]:
    """The last state, and for each step the norms that leaves end with; updates lead outside."""
    rules = {
        **dict.fromkeys(("/a", "/b", "/c", "/d"), oc.max_norm(lambda step: 1.0 + step, axis=None)),
        "/e": oc.fixed_norm("init"),
        "/f": oc.box(-2.0, 2.0),
    }
    params = {name: jnp.full(size, -1.0) for name, size in SIZES.items()}
    tx = oc.project(rules, every=every, stagger=True, **options)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(lambda w: 8 * w, params), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for i in range(steps):
        if i == save:  # as it comes back from a file
            state = oc.ProjectState(*jax.device_get(state))
        params, state = step(params, state)
        seen.append({name: float(jnp.linalg.norm(w)) for name, w in params.items()})
    return state, seen


def test_a_staggered_leaf_is_projected_once_in_k_steps():
    before = {name: size**0.5 for name, size in SIZES.items()}
    when: dict[str, list[int]] = {name: [] for name in SIZES}
    for step, lengths in enumerate(staggered(7)[1]):
        for name, norm in lengths.items():
            if norm < 5 * before[name]:  # else nine times as long
                when[name].append(step)
                bound = {"e": 10**0.5, "f": 2}.get(name, 1 + step)
                np.testing.assert_allclose(norm, bound, rtol=1e-5)
        before = lengths
    assert when.pop("free") == []
    assert all(np.all(np.diff(steps) == 3) and len(steps) > 1 for steps in when.values())
    # The largest by itself, and the others where there is least: 60; 30, 10 and 1; 20 and 20.
    turns = {frozenset(n for n in when if when[n][0] == step) for step in range(3)}
    assert turns == {frozenset("a"), frozenset("bef"), frozenset("cd")}


def test_factorisations_are_most_of_the_work():
    # 64 x 64 count for 74,000 entries. If they were much more, or much less, turns would differ.
    sizes = {"a": (80_000,), "b": (75_000,), "c": (64, 64), "d": (70_000,), "e": (600,)}
    rules = {"c": oc.orthogonal(), "e": oc.max_norm(1.0), "*": oc.box(-1.0, 1.0)}
    params = {name: jnp.full(shape, 2.0) for name, shape in sizes.items()}
    tx = oc.project(rules, every=2, stagger=True)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert {name for name, update in updates.items() if jnp.any(update)} == set("bce")


def test_staggered_steps_go_on_from_a_saved_state():
    (_, want), (_, got) = staggered(6), staggered(6, save=4)
    assert got == want


def test_statistics_of_staggered_leaves_are_those_of_their_last_projection():
    state, _ = staggered(4, stats=True)
    measured = oc.stats(state)
    assert sorted(measured) == sorted(set(SIZES) - {"free"})
    assert all(leaf.correction > 0 and leaf.update > 0 for leaf in measured.values())
    fresh, _ = staggered(1, stats=True)
    assert sum(leaf.update > 0 for leaf in oc.stats(fresh).values()) < len(measured)


def test_stagger_with_more_steps_than_leaves():
    seen = staggered(8, every=7)[1]
    lengths = [step["a"] for step in seen]
    assert sum(after < before for before, after in itertools.pairwise(lengths)) == 1


@pytest.mark.parametrize(("every", "error"), [(0, ValueError), (-1, ValueError)])
def test_every_below_one(every, error):
    with pytest.raises(error, match="write 1 to project on every step"):
        oc.project(RULES, every=every)


@pytest.mark.parametrize("every", [1.5, "2", True, None])
def test_every_of_another_kind(every):
    with pytest.raises(TypeError, match="is not an int; write a number of steps"):
        oc.project(RULES, every=every)


def test_inject_hyperparams():
    @optax.inject_hyperparams
    def optimizer(bound):
        return optax.chain(optax.sgd(1.0), oc.project(oc.max_norm(bound)))

    tx = optimizer(bound=optax.linear_schedule(8.0, 2.0, 3))
    params = jnp.ones((4, 1))
    state = tx.init(params)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jnp.full((4, 1), -100.0), state, params)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    seen = []
    for _ in range(4):
        params, state = step(params, state)
        seen.append(float(jnp.linalg.norm(jnp.asarray(params))))
    np.testing.assert_allclose(seen, [8, 6, 4, 2], rtol=1e-6)


# Compiled programs.


def training_step(tx):
    def loss(params, x, y):
        hidden = jax.nn.relu(x @ params["Dense_0"]["kernel"] + params["Dense_0"]["bias"])
        return jnp.mean((hidden @ params["Dense_1"]["kernel"] - y) ** 2)

    def step(params, state, x, y):
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


SCHEDULED = optax.chain(
    optax.adam(1e-2),
    oc.project({"kernel": oc.max_norm(optax.linear_schedule(1.0, 0.3, 100)), "bias": oc.non_neg()}),
)


def batch(seed: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=(8, 6)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 2)), jnp.float32),
    )


def test_a_training_step_compiles_once_over_100_steps():
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(training_step(SCHEDULED), n=1), donate_argnums=(0, 1))
    params = make_params()
    state = SCHEDULED.init(params)
    for seed in range(100):
        params, state = step(params, state, *batch(seed))
    for name in ("Dense_0", "Dense_1"):
        # The last of the 100 updates was step 99 of the schedule.
        assert np.all(norms(float64(params[name]["kernel"]), 0) <= 0.307 * (1 + 1e-6))


def test_the_same_in_scan_and_fori_loop():
    step = training_step(SCHEDULED)
    params = make_params()
    start = (params, SCHEDULED.init(params))
    x, y = batch(0)
    looped = jax.jit(lambda carry: jax.lax.fori_loop(0, 20, lambda _, c: step(*c, x, y), carry))(
        start
    )
    scanned, _ = jax.lax.scan(lambda c, _: (step(*c, x, y), None), start, length=20)
    stepped = start
    for _ in range(20):
        stepped = jax.jit(step)(*stepped, x, y)
    chex.assert_trees_all_close(looped, stepped, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(scanned, stepped, rtol=1e-4, atol=1e-6)


def with_rules(kernel: oc.Constraint):
    return optax.chain(optax.adam(1e-2), oc.project({"kernel": kernel, "bias": oc.non_neg()}))


@pytest.mark.parametrize(
    "tx", [SCHEDULED, with_rules(oc.unit_norm()), with_rules(oc.min_max_norm(0.5, 1.0))]
)
def test_a_training_step_exports_for_cpu_cuda_and_tpu(tx):
    params = make_params()
    args = (params, tx.init(params), *batch(0))
    step = jax.jit(training_step(tx))
    exported = jax.export.export(step, platforms=["cpu", "cuda", "tpu"])(*args)
    got = exported.call(*args)
    chex.assert_trees_all_close(got, step(*args), rtol=1e-5, atol=1e-7)


def test_violations_run_under_jit():
    params = make_params()
    got = jax.jit(lambda params: oc.violations(params, RULES))(params)
    kernel = float64(params["Dense_0"]["kernel"])
    n = norms(kernel, 0)
    want = np.sqrt(np.sum((kernel - kernel * np.minimum(0.7 / n, 1)) ** 2))
    np.testing.assert_allclose(got["Dense_0/kernel"], want, rtol=1e-5)
    bias = float64(params["Dense_0"]["bias"])
    np.testing.assert_allclose(got["Dense_0/bias"], np.linalg.norm(np.minimum(bias, 0)), rtol=1e-5)
    assert set(got) == {"Dense_0/kernel", "Dense_0/bias", "Dense_1/kernel"}


def test_violations_of_allowed_weights_are_zero():
    params = oc.constrain(make_params(), RULES)
    assert all(float(v) == 0 for v in oc.violations(params, RULES).values())


def test_violations_of_bfloat16_are_float32_and_do_not_overflow():
    params = {"w": jnp.full((4, 4), -1e30, jnp.bfloat16)}
    distance = oc.violations(params, {"w": oc.non_neg()})["w"]
    assert distance.dtype == jnp.float32
    np.testing.assert_allclose(distance, 4e30, rtol=1e-2)


def test_violations_show_nan():
    got = oc.violations({"w": jnp.array([[jnp.nan], [1.0]])}, {"w": oc.max_norm(1.0)})
    assert np.isnan(got["w"])


# Inside other transformations.


def test_gradient_accumulation():
    tx = optax.MultiSteps(optax.chain(optax.sgd(1.0), oc.project(RULES)), every_k_schedule=3)
    params = make_params()
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(6):
        updates, state = update(gradient(seed), state, params)
        params = optax.apply_updates(params, updates)
        assert feasible(params) == (seed >= 2)


def test_apply_if_finite():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(1.0), oc.project(RULES)), 5)
    params = oc.constrain(make_params(), RULES)
    state = tx.init(params)
    for seed in range(4):
        grads = optax.tree_utils.tree_scale(jnp.nan if seed % 2 else 1.0, gradient(seed))
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        assert feasible(params)


def test_before_the_optimizer_it_does_not_hold_and_violations_say_so():
    tx = optax.chain(oc.project(RULES), optax.adam(0.1))
    params = oc.constrain(make_params(), RULES)
    state = tx.init(params)
    for seed in range(5):
        updates, state = tx.update(gradient(seed), state, params)
        params = optax.apply_updates(params, updates)
    assert not feasible(params)
    assert max(float(v) for v in oc.violations(params, RULES).values()) > 1e-3


# Hyperparameters.


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oc.max_norm(-1.0), ValueError, r"MaxNorm: max_value=-1.0 .* at least 0"),
        (lambda: oc.max_norm(float("nan")), ValueError, r"MaxNorm: max_value=nan .* at least 0"),
        (lambda: oc.max_norm(jnp.float32(-2)), ValueError, "MaxNorm: max_value=.* at least 0"),
        (lambda: oc.max_norm("two"), ValueError, "max_value='two' is not a number"),
        (lambda: oc.max_norm(True), TypeError, "max_value=True is not a number"),
        (lambda: oc.max_norm(None), TypeError, "max_value=None is not a number"),
        (lambda: oc.max_norm(1j), TypeError, "is not a number"),
        (lambda: oc.max_norm(jnp.ones(3)), ValueError, r"has shape \(3,\); write one number"),
        (lambda: oc.max_norm(10**400), ValueError, "too large for a float"),
        (lambda: oc.min_max_norm(-0.1, 1.0), ValueError, "min_value=-0.1 .* at least 0"),
        (lambda: oc.min_max_norm(2.0, 1.0), ValueError, "min_value=2.0 is above max_value=1.0"),
        (lambda: oc.min_max_norm(rate=1.5), ValueError, "rate=1.5 .* from 0 to 1"),
        (lambda: oc.min_max_norm(rate=-0.5), ValueError, "rate=-0.5 .* from 0 to 1"),
        (lambda: oc.min_max_norm(rate=float("nan")), ValueError, "rate=nan .* from 0 to 1"),
    ],
)
def test_hyperparameters_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("constraint", [oc.max_norm(1.0), oc.min_max_norm(), oc.unit_norm()])
def test_norms_of_integers_are_refused(constraint):
    with pytest.raises(TypeError, match="takes floating-point weights, and these are int32"):
        constraint(jnp.ones((2, 2), jnp.int32))


def test_by_hand_a_constraint_takes_what_asarray_takes():
    for w in ([[3.0], [4.0]], ((3.0,), (4.0,)), np.array([[3.0], [4.0]], np.float32)):
        np.testing.assert_allclose(oc.max_norm(1.0)(w), [[0.6], [0.8]], rtol=1e-6)
    np.testing.assert_array_equal(oc.non_neg()([-1.0, 2.0]), [0, 2])
    np.testing.assert_array_equal(oc.Constraint()([-1.0, 2.0]), [-1, 2])


@pytest.mark.parametrize("bound", [0.0, jnp.float32(0)])
def test_a_bound_of_zero(bound):
    w = jnp.array([[1e-3, 5.0, 0.0]])
    assert jnp.max(jnp.abs(oc.max_norm(bound)(w))) <= jnp.finfo(jnp.float32).tiny
    np.testing.assert_array_equal(oc.min_max_norm(bound, 10.0)(w), w)


def test_a_bound_of_zero_leaves_nothing():
    w = jnp.array([[1.0, -1e-38, -0.0]])
    for constraint in (oc.max_norm(0.0), oc.fixed_norm(0.0), oc.min_max_norm(0.0, 0.0)):
        assert np.all(float64(constraint(w)) == 0)
        updates, _ = oc.project(constraint).update(w, oc.project(constraint).init(w), w)
        assert np.all(float64(optax.apply_updates(w, updates)) == 0)


@pytest.mark.parametrize("value", [-1.0, -0.0, -jnp.inf])
def test_a_schedule_below_its_range_counts_as_zero_with_and_without_jit(value):
    w = jnp.array([3.0, 4.0])
    tx = oc.project(oc.max_norm(lambda step: value))
    state = tx.init(w)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(w, state, w)
        np.testing.assert_array_equal(optax.apply_updates(w, updates), 0)
    for constraint in (oc.soft(oc.non_neg(), lambda step: value), oc.simplex(lambda step: value)):
        eager = oc.constrain(-w, constraint)
        assert bits(eager) == bits(jax.jit(lambda w, c=constraint: oc.constrain(w, c))(-w))


def test_the_count_in_a_state_is_that_of_the_optimizer():
    tx = optax.chain(oc.tangent(oc.unit_norm()), optax.adam(0.1), oc.project(oc.unit_norm()))
    state = tx.init(jnp.ones(3))
    assert optax.tree_utils.tree_get(state, "count") == 0
    own = {field for cls in (oc.ProjectState, oc.TangentState) for field in cls._fields}
    assert own == {"updates_seen", "memory", "at_init"}


@pytest.mark.parametrize("wrap", CONDITIONS)
@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    "constraint", [oc.non_neg(), oc.box(-0.1, 0.3), oc.max_norm(1.0), oc.grid([-1, 0, 1])], ids=str
)
def test_wrappers_with_a_condition_take_other_dtypes(wrap, jitted, constraint):
    # They compare with the updates that they were given, so these keep their dtype.
    p = jnp.asarray(constraint(jnp.linspace(-1, 1, 7)))
    tx = CONDITIONS[wrap](optax.chain(optax.sgd(0.5), oc.project(constraint)))
    update, state = (jax.jit(tx.update) if jitted else tx.update), tx.init(p)
    for seed in range(3):
        grads = jax.random.normal(jax.random.key(seed), (7,), jnp.bfloat16)
        updates, state = update(grads, state, p)
        assert updates.dtype == jnp.bfloat16
        p = optax.apply_updates(p, updates)
        outside = float(oc.violations(p, constraint)[""])
        assert outside == 0 if constraint.elementwise else outside < 4e-3
    # By itself the chain returns what the weights can take.
    grads = jnp.ones(7, jnp.bfloat16)
    alone = optax.chain(optax.sgd(0.5), oc.project(constraint))
    assert alone.update(grads, alone.init(p), p)[0].dtype == p.dtype


@pytest.mark.parametrize("value", [jnp.inf, -jnp.inf, jnp.nan])
@pytest.mark.parametrize(
    "constraint", [oc.max_norm(1.0), oc.unit_norm(), oc.min_max_norm(0.5, 1.0), oc.max_rms(1.0)]
)
def test_an_update_that_is_not_finite_shows_in_its_unit_alone(constraint, value):
    p, u = jnp.full((3, 2), 0.25), jnp.full((3, 2), 0.125)
    bad = u.at[0, 0].set(value)
    constraint = dataclasses.replace(constraint, axis=0)
    tx = oc.project({"w": constraint})
    updates, _ = tx.update({"w": bad}, tx.init({"w": p}), {"w": p})
    assert np.all(np.isnan(updates["w"][:, 0]))
    assert np.all(np.isfinite(updates["w"][:, 1]))
    projected = oc.constrain({"w": p + bad}, {"w": constraint})["w"]
    assert np.array_equal(np.isnan(projected), np.isnan(updates["w"]))


# Units that are split over devices: `vmap` gives an axis a name, as `shard_map` does.


@pytest.mark.parametrize(
    "constraint",
    [
        oc.max_norm(1.0),
        oc.unit_norm(),
        oc.min_max_norm(0.5, 1.0),
        oc.max_rms(0.2, axis=0),
        oc.fixed_norm("init", axis=0),
        oc.max_norm("0.5x init"),
    ],
    ids=str,
)
def test_norms_over_all_parts_of_a_unit(constraint):
    keys = jax.random.split(jax.random.key(0), 3)
    w, u, v = (jax.random.normal(key, (8, 3)) for key in keys)

    def everything(constraint, w, u, v):
        tx = oc.project(constraint)
        updates, _ = tx.update(u, tx.init(w), w)
        return constraint(w), updates, jax.vjp(constraint, w)[1](v)[0]

    split = dataclasses.replace(constraint, axis_name="parts")
    parts = [x.reshape(4, 2, 3) for x in (w, u, v)]
    got = jax.vmap(functools.partial(everything, split), axis_name="parts")(*parts)
    for a, b in zip(got, everything(constraint, w, u, v), strict=True):
        np.testing.assert_allclose(a.reshape(8, 3), b, rtol=1e-5, atol=1e-6)
    # Without the name, each part counts by itself.
    alone = jax.vmap(functools.partial(everything, constraint), axis_name="parts")(*parts)[0]
    assert constraint.remembers or not np.allclose(alone.reshape(8, 3), constraint(w), atol=1e-3)
    # One part that is not finite shows in the whole unit.
    for bad in (jnp.nan, jnp.inf):
        got = jax.vmap(split, axis_name="parts")(parts[0].at[0, 0, 0].set(bad))
        assert np.all(np.isnan(got[..., 0]))
        assert np.all(np.isfinite(got[..., 1:]))
    zeros = jnp.zeros((4, 2, 3))
    got = jax.vmap(lambda w: jax.vjp(split, w)[1](w + 1)[0], axis_name="parts")(zeros)
    assert np.all(np.isfinite(got))


def test_names_of_axes_are_checked_and_kept():
    constraint = oc.max_norm(2.0, axis_name=["x", "y"])
    assert constraint == oc.max_norm(2.0, axis_name=("x", "y")) != oc.max_norm(2.0)
    assert repr(constraint) == "MaxNorm(max_value=2.0, axis=0, axis_name=('x', 'y'))"
    assert oc.deserialize(oc.serialize(constraint)) == constraint
    assert oc.max_norm(2.0).get_config() == {"max_value": 2.0, "axis": 0}
    with pytest.raises(TypeError, match=r"MaxNorm: axis_name=3 is not a name; write"):
        oc.max_norm(2.0, axis_name=3)  # pyright: ignore[reportArgumentType]  # it is refused
    with pytest.raises(ValueError, match=r"MaxNorm: axis_name='model' is no axis here; it is for"):
        oc.max_norm(2.0, axis_name="model")(jnp.ones(3))


def test_leaves_of_one_shape_under_equal_constraints_are_traced_once():
    class Own(oc.Constraint):
        def __call__(self, w):
            calls.append(w.shape)
            return w

    def functions(rules, params):
        tx = oc.project(rules)
        lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
        return lowered.as_text().count("func.func private @_called")

    calls: list[tuple[int, ...]] = []
    params = {name: jnp.ones((4, 3)) for name in "abcdef"}
    assert functions(oc.max_norm(1.0), params) == 1
    assert functions({"a": oc.max_norm(1), "*": oc.max_norm(2.0)}, params) == 2
    # A set of a user's own may count on being called.
    assert functions(Own(), params) == 0
    assert calls.count((4, 3)) >= len(params)


def test_numbers_that_are_traced_are_not_kept_in_a_shared_trace():
    params = {"a": 3 * jnp.ones(4), "b": 3 * jnp.ones(4)}
    rules = {"a": oc.max_norm(lambda step: 1.0 + step), "b": oc.max_norm(oc.arg("most"))}
    constrained = jax.jit(lambda most, step: oc.constrain(params, rules, step=step, extra=most))
    for most, step in ((1.0, 2), (4.0, 0)):
        new = constrained({"most": most}, step)
        got = [float(jnp.linalg.norm(new[name])) for name in "ab"]
        np.testing.assert_allclose(got, [1.0 + step, most], rtol=1e-6)
