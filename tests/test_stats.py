"""Live statistics: what `project(rules, stats=True)` says of each step."""

import functools
import itertools
import pickle

import cvxpy
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CASES, bits, float64
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_constraints as oc
from optax_constraints import flax as ocf

partition = getattr(optax, "partition", None) or optax.multi_transform


def normal(*shape: int, seed: int, scale: float = 1.0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray((scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype))


PARAMS = {
    "dense": {"kernel": normal(4, 3, seed=0), "bias": jnp.ones(3)},
    "out": {"kernel": normal(3, 2, seed=1)},
}
RULES = {"dense/kernel": oc.max_norm(1.0), "bias": oc.non_neg(), "out/kernel": oc.unit_norm()}
KEYS = ["dense/bias", "dense/kernel", "out/kernel"]


def grads_like(params, seed=0, scale=1.0):
    seeds = itertools.count(10 * seed)
    return jax.tree.map(
        lambda p: normal(*p.shape, seed=next(seeds), scale=scale, dtype=p.dtype), params
    )


def numbers(stats):
    return {key: tuple(map(float, leaf)) for key, leaf in stats.items()}


def one_step(rules, params, updates, **options):
    """Statistics, and the weights before, without and with the projection, of one update."""
    tx = oc.project(rules, stats=True, **options)
    new, state = jax.jit(tx.update)(updates, tx.init(params), params)
    without = optax.apply_updates(params, updates)
    return oc.stats(state), without, optax.apply_updates(params, new)


def distance(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return np.sqrt(sum(np.sum((float64(x) - float64(y)) ** 2) for x, y in pairs))


# What the numbers are.

NAMES = ("NonNeg", "Box", "MaxNorm", "UnitNorm", "Simplex", "HalfSpace", "TopK", "Orthogonal")
SOME = [next(c for c in CASES if type(c.constraint).__name__ == name) for name in NAMES]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", SOME, ids=NAMES)
def test_values(case, dtype):
    # Weights that the update does not dwarf: their sum rounds to the dtype, as it does when stored.
    start = case.project(np.random.default_rng(0).normal(size=case.shape))
    params = {"w": jnp.asarray(start, dtype)}
    updates = {"w": normal(*case.shape, seed=1, dtype=dtype)}
    leaf, without, after = one_step({"w": case.constraint}, params, updates)
    leaf = leaf["w"]
    assert [x.dtype for x in leaf] == [jnp.float32, jnp.float32, jnp.int32, jnp.int32]
    np.testing.assert_allclose(leaf.update, np.linalg.norm(float64(updates["w"])), rtol=1e-6)
    far = float64(without["w"])
    want = np.linalg.norm(far - case.project(far))
    rounding = 2 * float(jnp.finfo(dtype).eps) * np.linalg.norm(far)
    np.testing.assert_allclose(leaf.correction, want, rtol=1e-5, atol=rounding)
    assert want > 2 * rounding
    settled = case.constraint.settle("w", case.shape)
    at_bound = settled.on_bound(after["w"])
    if at_bound is None:
        assert (leaf.units, leaf.at_bound) == (0, -1)
    else:
        assert (leaf.units, leaf.at_bound) == (at_bound.size, at_bound.sum())
        assert leaf.at_bound > 0


@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 7),
    reason="before JAX 0.7 zeros like an array that varies do not, and loops cannot start there",
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_inside_of_shard_map(case):
    # What JAX complains of while it traces needs no program.
    tx = oc.project({"w": case.constraint}, stats=True)

    def step(w, u):
        _, state = tx.update({"w": u}, tx.init({"w": w}), {"w": w})
        return jax.tree.map(lambda x: x[None], oc.stats(state)["w"])

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(step, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    w = jax.ShapeDtypeStruct(case.shape, jnp.float32)
    assert [x.shape for x in jax.eval_shape(sharded, w, w)] == 4 * [(1,)]


def test_units_at_their_bound():
    params = {"w": jnp.array([[0.1, 0.1], [0.1, 0.1]]), "b": jnp.array([1.0, 1.0, 0.0])}
    updates = {"w": jnp.array([[5.0, 0.0], [0.0, 0.1]]), "b": jnp.array([-1.0, -3.0, 0.5])}
    found, _, _ = one_step({"w": oc.max_norm(1.0), "b": oc.non_neg()}, params, updates)
    assert found["w"][2:] == (2, 1)
    assert found["b"][2:] == (3, 2)
    assert found["b"].correction == 2
    # No entry is at 0 before the projection.
    found, _, _ = one_step(oc.simplex(), jnp.array([0.2, 0.4, 0.4]), jnp.array([0.0, 5.0, 5.0]))
    assert found[""][2:] == (1, 1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_entries_of_a_part_of_a_single_number_and_of_a_group(dtype):
    params = {"w": [0.5, 1.0, -3.0], "s": 1.0, "a": [1.0, 2.0], "b": [1.0, 1.0]}
    updates = {"w": [-1.0, 1.0, 1.0], "s": -3.0, "a": [-2.0, 0.0], "b": [0.0, -4.0]}
    rules = {
        "w": oc.part(oc.non_neg(), ":2"),
        "s": oc.non_neg(),
        oc.across("a", "b"): oc.non_neg(),
    }
    params, updates = (
        {name: jnp.asarray(x, dtype) for name, x in tree.items()} for tree in (params, updates)
    )
    found, _, _ = one_step(rules, params, updates)
    (group,) = (leaf for name, leaf in found.items() if name not in ("w", "s"))
    want = {(3**0.5, 0.5, 2, 1): found["w"], (3, 2, 1, 1): found["s"], (20**0.5, 10**0.5): group}
    for numbers, leaf in want.items():
        np.testing.assert_allclose(leaf[: len(numbers)], numbers, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_allowed_updates_are_no_correction(dtype):
    # In bfloat16 most of such an update is lost in the weights, and that is not the constraint.
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    updates = jax.tree.map(lambda p: 1e-4 * jnp.ones_like(p), params)
    found, _, _ = one_step({"kernel": oc.max_norm(9.0), "bias": oc.non_neg()}, params, updates)
    assert [leaf.correction for leaf in found.values()] == [0, 0, 0]
    assert [leaf.at_bound for leaf in found.values()] == [0, 0, 0]
    assert all(leaf.update > 0 for leaf in found.values())


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_numbers(size):
    params = {"w": jnp.zeros((4, 3))}
    updates = {"w": size * jnp.array(3 * [[-3.0, 0.0, 4.0]] + [[0.0, 0.0, 0.0]])}
    found, _, _ = one_step({"w": oc.non_neg()}, params, updates)
    np.testing.assert_allclose(found["w"].update, size * 75**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["w"].correction, size * 27**0.5, rtol=1e-6)


def test_gradients_of_another_dtype_leave_the_dtypes_of_the_state():
    tx = oc.project(RULES, stats=True)
    state = tx.init(PARAMS)
    grads = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    _, after = jax.eval_shape(tx.update, grads, state, PARAMS)
    assert jax.tree.map(jnp.result_type, after) == jax.tree.map(jnp.result_type, state)


def test_sets_that_remember_and_functions_do_not_say():
    rules = {
        "out/kernel": oc.fixed_norm("init"),
        "dense/kernel": oc.max_norm("1x init"),
        "bias": jnp.tanh,
    }
    updates = jax.tree.map(jnp.ones_like, PARAMS)
    found, without, after = one_step(rules, PARAMS, updates)
    assert found["dense/bias"][2:] == found["dense/kernel"][2:] == (0, -1)
    assert found["out/kernel"][2:] == (1, 1)
    want = distance(without["out"], after["out"])
    np.testing.assert_allclose(found["out/kernel"].correction, want, rtol=1e-5)
    assert want > 0.1


def test_groups_have_one_entry():
    rules = {
        oc.across("out/*"): oc.max_norm(0.5, axis=None),
        oc.joint("kernel", "bias"): oc.max_norm(1.0),
    }
    params = {**PARAMS, "out": {"kernel": PARAMS["out"]["kernel"], "gain": jnp.ones(2)}}
    updates = grads_like(params)
    found, without, after = one_step(rules, params, updates)
    groups = {row.group for row in oc.report(params, rules).rows}
    assert set(found) == groups
    assert len(groups) == 2
    for key, leaf in found.items():
        name, units = ("dense", 3) if "dense" in key else ("out", 1)
        np.testing.assert_allclose(leaf.update, distance(without[name], params[name]), rtol=1e-5)
        np.testing.assert_allclose(leaf.correction, distance(without[name], after[name]), rtol=1e-5)
        assert leaf.correction > 0.1
        assert (leaf.units, leaf.at_bound) == (units, units)


# What they mean.


@pytest.mark.parametrize("kind", ["half_space", "max_norm"])
def test_correction_over_rate_is_the_multiplier(kind):
    rng = np.random.default_rng(3)
    n, rate = 8, 0.02
    square = rng.normal(size=(n, n))
    hessian, linear = square @ square.T / n + np.eye(n), 4 * rng.normal(size=n)
    normal = rng.normal(size=n)
    x = cvxpy.Variable(n)
    if kind == "half_space":
        constraint, bound = oc.half_space(normal.astype(np.float32), 0.5), normal @ x <= 0.5
        linear = -4 * np.abs(linear) * np.sign(normal)
    else:
        constraint, bound = oc.max_norm(1.5, axis=None), cvxpy.norm(x) <= 1.5
    loss = cvxpy.quad_form(x, cvxpy.psd_wrap(hessian)) / 2 + linear @ x
    cvxpy.Problem(cvxpy.Minimize(loss), [bound]).solve()
    # The gradient of a norm has the norm 1.
    want = float(bound.dual_value) * (np.linalg.norm(normal) if kind == "half_space" else 1)
    assert want > 0.5

    tx = optax.chain(optax.sgd(rate), oc.project({"x": constraint}, stats=True))
    params = {"x": jnp.zeros(n)}

    @jax.jit
    def train(params, state):
        def step(carry, _):
            params, state = carry
            grads = {"x": jnp.asarray(hessian, jnp.float32) @ params["x"] + linear.astype("f4")}
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), length=2000)[0]

    params, state = train(params, tx.init(params))
    np.testing.assert_allclose(params["x"], x.value, atol=1e-3)
    leaf = oc.stats(state)["x"]
    np.testing.assert_allclose(leaf.correction / rate, want, rtol=0.01)
    # At the optimum the projection takes all of the update away.
    np.testing.assert_allclose(leaf.correction / leaf.update, 1, rtol=0.01)
    assert leaf.at_bound == leaf.units == 1


# When they change, and how they are kept.


def test_before_the_first_update_all_is_zero():
    state = oc.project(RULES, stats=True).init(PARAMS)
    assert list(oc.stats(state)) == KEYS
    assert isinstance(oc.stats(state)["dense/bias"], oc.LeafStats)
    assert set(numbers(oc.stats(state)).values()) == {(0, 0, 0, 0)}


def test_free_leaves_have_none():
    state = oc.project({"bias": oc.non_neg(), "kernel": None}, stats=True).init(PARAMS)
    assert list(oc.stats(state)) == ["dense/bias"]


@pytest.mark.parametrize("every", [1, 2])
def test_updates_are_the_same_with_and_without(every):
    states, updates = {}, {}
    for on in (True, False):
        tx = oc.project(RULES, every=every, stats=on)
        states[on] = tx.init(PARAMS)
        for seed in range(2):
            grads = grads_like(PARAMS, seed)
            updates[on], states[on] = jax.jit(tx.update)(grads, states[on], PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates[True], updates[False])
    assert states[True].updates_seen == states[False].updates_seen == 2


def test_scan_without_recompilation():
    tx = optax.chain(optax.adam(0.1), oc.project(RULES, stats=True))
    compiled = 0

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        nonlocal compiled
        compiled += 1
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, oc.stats(state)

    params = jax.tree.map(jnp.array, PARAMS)
    state, shown, grads = tx.init(params), [], [grads_like(PARAMS, i) for i in range(3)]
    for own in grads:
        params, state, stats = step(params, state, own)
        shown.append(numbers(stats))
    assert compiled == 1

    def body(carry, own):
        params, state = carry
        updates, state = tx.update(own, state, params)
        return (optax.apply_updates(params, updates), state), oc.stats(state)

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
    _, history = jax.lax.scan(body, (PARAMS, tx.init(PARAMS)), stacked)
    for i, want in enumerate(shown):
        got = numbers(jax.tree.map(lambda x, i=i: x[i], history))
        for key in KEYS:
            np.testing.assert_allclose(got[key], want[key], rtol=1e-4)
    assert len({own["dense/kernel"] for own in shown}) == 3


def test_every_keeps_what_the_last_projection_showed():
    tx = optax.chain(optax.sgd(1.0), oc.project({"w": oc.non_neg()}, every=3, stats=True))
    params = {"w": jnp.zeros(2)}
    state, shown = tx.init(params), []
    for size in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0):
        updates, state = jax.jit(tx.update)({"w": jnp.array([size, 0.0])}, state, params)
        params = optax.apply_updates(params, updates)
        shown.append(numbers(oc.stats(state))["w"])
    # What is taken away is what three updates have led to.
    assert shown == 2 * [(0, 0, 0, 0)] + 3 * [(3, 6, 2, 2)] + [(6, 15, 2, 2)]


def test_multi_steps_and_inject_hyperparams():
    inner = optax.inject_hyperparams(
        lambda rate: optax.chain(optax.sgd(rate), oc.project({"w": oc.non_neg()}, stats=True))
    )(0.5)
    tx = optax.MultiSteps(inner, 2).gradient_transformation()
    params = {"w": jnp.zeros(2)}
    state = tx.init(params)
    assert numbers(oc.stats(state)) == {"w": (0, 0, 0, 0)}
    for _ in range(2):
        _, state = jax.jit(tx.update)({"w": jnp.array([4.0, 0.0])}, state, params)
    assert numbers(oc.stats(state)) == {"w": (2, 2, 2, 2)}


def test_partition_and_masked():
    labels = {"dense": {"kernel": "a", "bias": "b"}, "out": {"kernel": "c"}}
    tx = partition(
        {
            "a": oc.project({"kernel": oc.max_norm(0.1)}, stats=True),
            "b": oc.project({"bias": oc.non_neg()}, stats=True),
            "c": optax.set_to_zero(),
        },
        labels,
    )
    _, state = jax.jit(tx.update)(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
    found = oc.stats(state)
    assert sorted(found) == KEYS[:2]
    assert found["dense/kernel"].at_bound == 3
    mask = {"dense": {"kernel": True, "bias": False}, "out": {"kernel": False}}
    tx = optax.masked(oc.project({"dense/kernel": oc.max_norm(0.1)}, stats=True), mask)
    _, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
    assert list(oc.stats(state)) == ["dense/kernel"]


def test_leaves_without_updates_keep_zeros():
    tx = oc.project(RULES, stats=True)
    for absent in (None, optax.MaskedNode()):
        updates = {"dense": {"kernel": jnp.ones((4, 3)), "bias": absent}, "out": {"kernel": absent}}
        _, state = tx.update(updates, tx.init(PARAMS), PARAMS)
        found = numbers(oc.stats(state))
        assert found["dense/bias"] == found["out/kernel"] == (0, 0, 0, 0)
        assert found["dense/kernel"][0] > 0


def test_memory_is_beside_them():
    rules = {"kernel": oc.fixed_norm("init")}
    tx = optax.chain(optax.sgd(0.1), oc.project(rules, stats=True))
    state = tx.init(PARAMS)
    params = PARAMS
    for seed in range(2):
        updates, state = jax.jit(tx.update)(grads_like(PARAMS, seed), state, params)
        params = optax.apply_updates(params, updates)
    for name in ("dense", "out"):
        after, before = (np.linalg.norm(p[name]["kernel"]) for p in (params, PARAMS))
        np.testing.assert_allclose(after, before, rtol=1e-6)
    oc.assert_feasible(params, rules, state=state)
    far = oc.constrain(jax.tree.map(lambda p: 9 * p, params), rules, state=state)
    oc.assert_feasible(far, rules, state=state)


def test_numbers_of_the_step_and_of_arguments():
    rules = {"w": oc.box(-9.0, oc.arg("top"))}
    tx = oc.project(rules, stats=True)
    params = {"w": jnp.zeros(3)}
    _, state = tx.update({"w": jnp.arange(3.0)}, tx.init(params), params, top=1.0)
    assert oc.stats(state)["w"][2:] == (3, 2)
    tx = oc.project({"w": oc.box(-9.0, lambda step: step + 1.0)}, stats=True)
    state = tx.init(params)
    for want in (2, 1):
        _, state = tx.update({"w": jnp.arange(3.0)}, state, params)
        assert oc.stats(state)["w"].at_bound == want


def test_tree_map_params_and_abstract_parameters():
    tx = optax.chain(optax.adam(0.1), oc.project(RULES, stats=True))
    state = tx.init(PARAMS)
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert numbers(oc.stats(mapped)) == numbers(oc.stats(state))
    abstract = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    assert jax.tree.structure(tx.init(jax.eval_shape(lambda: PARAMS))) == jax.tree.structure(state)
    assert int(optax.tree_utils.tree_get(state, "count")) == 0


# States that come back.


def saved():
    tx = oc.project({**RULES, "out/kernel": oc.fixed_norm("init")}, stats=True)
    _, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
    return tx, state


def without_type(state):
    return flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))


@pytest.mark.parametrize(
    "changed",
    [
        lambda state: pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state))),
        lambda state: flax.serialization.from_bytes(
            jax.tree.map(jnp.zeros_like, state), flax.serialization.to_bytes(state)
        ),
        without_type,
        lambda state: state._replace(memory=without_type(state.memory)),
    ],
    ids=["pickle", "flax", "flax without a target", "memory without its type"],
)
def test_states_that_come_back(changed):
    tx, state = saved()
    other = changed(state)
    assert numbers(oc.stats(other)) == numbers(oc.stats(state))
    assert isinstance(oc.stats(other)["dense/bias"], oc.LeafStats)
    # None of these leaves moves: what is shown is what was restored.
    none = jax.tree.map(lambda p: None, PARAMS)
    _, after = tx.update(none, other, PARAMS)
    assert numbers(oc.stats(after)) == numbers(oc.stats(state))
    if isinstance(other, oc.ProjectState):
        assert jax.tree.structure(after) == jax.tree.structure(other)
    a, _ = tx.update(grads_like(PARAMS, 5), other, PARAMS)
    b, _ = tx.update(grads_like(PARAMS, 5), state, PARAMS)
    assert list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def test_orbax(tmp_path):
    tx, state = saved()
    _, plain = saved_without(RULES)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.save(tmp_path / "plain", plain)
        checkpointer.wait_until_finished()
        target = jax.tree.map(jnp.zeros_like, state)
        restored = checkpointer.restore(tmp_path / "state", target)
        untyped = checkpointer.restore(tmp_path / "state")
        old = checkpointer.restore(tmp_path / "plain", jax.tree.map(jnp.zeros_like, plain))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert jax.tree.structure(old) == jax.tree.structure(plain)
    for other in (restored, untyped):
        assert numbers(oc.stats(other)) == numbers(oc.stats(state))
        tx.update(grads_like(PARAMS), other, PARAMS)


def saved_without(rules):
    tx = oc.project(rules)
    _, state = tx.update(grads_like(PARAMS), tx.init(PARAMS), PARAMS)
    return tx, state


@pytest.mark.parametrize("rules", [RULES, {"kernel": oc.fixed_norm("init")}], ids=["", "memory"])
def test_states_from_before_there_were_statistics(rules):
    tx, state = saved_without(rules)
    assert state._fields == ("updates_seen", "memory")
    # As a version wrote it that knew of two fields only.
    old = flax.serialization.msgpack_serialize(
        {"updates_seen": np.int32(1), "memory": jax.tree.map(np.asarray, dict(state.memory or {}))}
    )
    back = flax.serialization.from_bytes(tx.init(PARAMS), old)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    # A run may go on with statistics, and without them again.
    shows = oc.project(rules, stats=True)
    want, _ = tx.update(grads_like(PARAMS), back, PARAMS)
    for transformation, has in ((shows, True), (tx, False)):
        got, back = transformation.update(grads_like(PARAMS), back, PARAMS)
        fresh = transformation.init(PARAMS)
        assert list(map(bits, jax.tree.leaves(got))) == list(map(bits, jax.tree.leaves(want)))
        assert jax.tree.structure(back) == jax.tree.structure(fresh)
        assert bool(oc.stats(back)) if has else True


def test_other_rules_start_at_zero():
    tx = oc.project({"bias": oc.non_neg(), "dense/kernel": oc.max_norm(1.0)}, stats=True)
    other = oc.project({"bias": oc.non_neg()}, stats=True)
    _, state = other.update(grads_like(PARAMS), other.init(PARAMS), PARAMS)
    none = jax.tree.map(lambda p: None, PARAMS)
    _, after = tx.update(none, state, PARAMS)
    found = numbers(oc.stats(after))
    assert found["dense/bias"] == numbers(oc.stats(state))["dense/bias"] != (0, 0, 0, 0)
    assert found["dense/kernel"] == (0, 0, 0, 0)


# Flax.

X = normal(5, 4, seed=7)


@pytest.mark.parametrize("constraint", [oc.max_norm(0.2), oc.fixed_norm("init")], ids=str)
def test_linen_train_state(constraint):
    model = ocf.linen.Dense(3, kernel_constraint=constraint)
    params = model.init(jax.random.key(0), X)["params"]
    rules = ocf.declared(model, X)
    create = functools.partial(
        ocf.linen.TrainState.create, apply_fn=model.apply, params=params, rules=rules
    )
    state = create(tx=optax.sgd(0.5), stats=True)
    assert numbers(oc.stats(state)) == {"kernel": (0, 0, 0, 0)}
    grads = grads_like(params)
    after = jax.jit(lambda s, g: s.apply_gradients(grads=g))(state, grads)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    leaf = oc.stats(after)["kernel"]
    moved = params["kernel"] - 0.5 * grads["kernel"]
    np.testing.assert_allclose(leaf.update, 0.5 * np.linalg.norm(grads["kernel"]), rtol=1e-5)
    want = np.linalg.norm(moved - after.params["kernel"])
    np.testing.assert_allclose(leaf.correction, want, rtol=1e-5)
    assert leaf.units == leaf.at_bound > 0
    plain = create(tx=optax.sgd(0.5))
    same = plain.apply_gradients(grads=grads)
    np.testing.assert_allclose(same.params["kernel"], after.params["kernel"], rtol=1e-6)
    restored = flax.serialization.from_bytes(state, flax.serialization.to_bytes(after))
    assert numbers(oc.stats(restored)) == numbers(oc.stats(after))
    # In its optimizer there may be others.
    tx = optax.chain(optax.sgd(0.5), oc.project({"bias": oc.non_neg()}, stats=True))
    assert list(oc.stats(create(tx=tx))) == ["bias"]
    assert sorted(oc.stats(create(tx=tx, stats=True))) == ["bias", "kernel"]


@pytest.mark.parametrize("own", [True, False], ids=["ours", "Flax'"])
def test_nnx_optimizer(own):
    model = ocf.nnx.Linear(4, 3, kernel_constraint=oc.max_norm(0.2), rngs=nnx.Rngs(0))
    if own:
        optimizer = ocf.nnx.Optimizer(model, optax.sgd(0.5), stats=True)
    else:
        tx = optax.chain(optax.sgd(0.5), oc.project(ocf.declared(model), stats=True))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: (model(X) ** 2).sum())(model)
        before = model.kernel[...]
        optimizer.update(model, grads)
        return before, grads["kernel"][...], model.kernel[...]

    assert set(numbers(oc.stats(optimizer)).values()) == {(0, 0, 0, 0)}
    want = 0.0
    for _ in range(2):
        before, grad, after = step(model, optimizer)
        (leaf,) = oc.stats(optimizer).values()
        np.testing.assert_allclose(leaf.update, 0.5 * np.linalg.norm(grad), rtol=1e-5)
        want = np.linalg.norm(before - 0.5 * grad - after)
        np.testing.assert_allclose(leaf.correction, want, rtol=1e-4)
        assert (leaf.units, leaf.at_bound) == (3, 3)
    assert want > 0.1


# Errors.


def test_a_state_without_statistics_says_what_to_write():
    message = r"There are no statistics in .*; write project\(rules, stats=True\), and pass what"
    for state in (oc.project(RULES).init(PARAMS), optax.adam(0.1).init(PARAMS), (), None):
        with pytest.raises(ValueError, match=message):
            oc.stats(state)


def test_the_statistics_of_two_models_are_refused():
    state = oc.project(RULES, stats=True).init(PARAMS)
    other = oc.project(RULES, stats=True).init(PARAMS)
    message = r"several states of project here that have statistics of 'dense/bias', .* stats\("
    with pytest.raises(ValueError, match=message):
        oc.stats({"generator": state, "critic": other})
    assert numbers(oc.stats({"now": state, "again": state})) == numbers(oc.stats(state))
