"""Constraints that remember: where it is kept, and what it holds."""

import collections
import dataclasses
import functools
import json

import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64, norms
from flax import nnx

import optax_constraints as oc
from optax_constraints import flax as ocf
from optax_constraints._walk import memory_in

PARAMS = {
    "dense": {"kernel": 3 * jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)},
    "out": {"kernel": jax.random.normal(jax.random.key(1), (3, 2))},
}
RULES = {"kernel": oc.fixed_norm("init"), "bias": oc.non_neg()}


@functools.partial(jax.jit, static_argnames="update")
def scanned(update, params, state, grads):
    def step(carry, grads):
        params, state = carry
        updates, state = update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), grads)[0]


def train(tx, params, state, steps: int, seed: int = 0):
    # From NumPy: JAX's generator would be compiled into each program.
    rng = np.random.default_rng(seed)
    grads = jax.tree.map(lambda p: rng.normal(size=(steps, *p.shape)).astype(p.dtype), params)
    return scanned(tx.update, params, state, grads)


def test_the_state_has_the_norms_at_init_by_path():
    state = oc.project(RULES).init(PARAMS)
    assert list(state.memory) == ["dense/kernel", "out/kernel"]
    np.testing.assert_allclose(
        state.memory["dense/kernel"], norms(float64(PARAMS["dense"]["kernel"]), None), rtol=1e-6
    )


def test_without_memory_the_state_is_one_count():
    assert oc.project({"bias": oc.non_neg()}).init(PARAMS) == oc.ProjectState(jnp.int32(0), ())


@dataclasses.dataclass(frozen=True, eq=False)
class Highest(oc.Constraint):
    """A user's own set that moves: no entry falls below the largest so far, less 1."""

    remembers = True

    def __call__(self, w):
        return self.advance(w, self.remember(w))[0]

    def remember(self, w):
        return jnp.max(w)

    def advance(self, w, memory):
        memory = jnp.maximum(memory, jnp.max(w))
        return jnp.maximum(w, memory - 1), memory


def test_what_is_remembered_may_change():
    params = {"w": jnp.array([0.0, 1.0]), "free": jnp.zeros(2)}
    tx = oc.project({"w": Highest()})
    state = tx.init(params)
    for update, highest, want in [
        ([0.0, 4.0], 5, [4, 5]),
        ([-9.0, -9.0], 5, [4, 4]),
        ([5.0, 0.0], 9, [9, 8]),
    ]:
        updates = {"w": jnp.array(update), "free": jnp.ones(2)}
        updates, state = jax.jit(tx.update)(updates, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], want)
        assert state.memory == {"w": highest}
    assert np.all(oc.constrain({"w": jnp.zeros(2)}, {"w": Highest()}, state=state)["w"] == 8)


@pytest.mark.parametrize(
    ("constraint", "low", "high"),
    [
        (oc.fixed_norm("init"), 1, 1),
        (oc.fixed_norm("0.5x init", axis=0), 0.5, 0.5),
        (oc.max_norm("1.5x init"), 0, 1.5),
        (oc.min_max_norm("0.5x init", "2x init"), 0.5, 2),
        (oc.min_max_norm("init", "init"), 1, 1),
        (oc.min_max_norm(0.0, "2x init"), 0, 2),
        (oc.min_max_norm("0.5x init", 1e6), 0.5, 1e6),
        (oc.max_rms(".25x init"), 0, 0.25),
        (oc.Soft(oc.fixed_norm("init"), 1.0), 1, 1),
        (oc.Part(oc.fixed_norm("init", axis=0), "..."), 1, 1),
        (oc.Compose(oc.max_norm(1e6), oc.fixed_norm("init")), 1, 1),
        (oc.Intersection(oc.max_norm(1e6), oc.max_norm("1.5x init")), 0, 1.5),
    ],
    ids=str,
)
def test_norms_relative_to_init(constraint, low, high):
    w = 3 * jax.random.normal(jax.random.key(0), (4, 3))
    tx = optax.chain(optax.sgd(0.3), oc.project(constraint))
    axis = getattr(constraint, "axis", None)
    if isinstance(constraint, (oc.Part, oc.Intersection)):
        axis = 0
    ratio = []
    params, state = w, tx.init(w)
    for seed in range(5):
        params, state = train(tx, params, state, 1, seed)
        ratio.append(norms(float64(params), axis) / norms(float64(w), axis))
    assert np.min(ratio) >= low * (1 - 1e-6)
    assert np.max(ratio) <= high * (1 + 1e-6)
    # Outward or inward, a pull of this size leads across what lies between the bounds.
    if low < high and not isinstance(constraint, oc.MaxRMS):
        assert np.max(ratio) > np.min(ratio) * 1.01


def test_fixed_norm_does_not_drift_in_10_000_steps():
    tx = optax.chain(optax.adam(1e-2), oc.project(oc.fixed_norm("init")))
    params, _ = train(tx, PARAMS, tx.init(PARAMS), 10_000)
    for before, after in zip(jax.tree.leaves(PARAMS), jax.tree.leaves(params), strict=True):
        drift = norms(float64(after), None) / norms(float64(before), None) - 1
        assert np.max(np.abs(drift)) <= 1e-6
        assert not np.allclose(after, before, atol=0.01)


def test_stacked_layers_remember_each_their_own():
    w = jax.random.normal(jax.random.key(0), (5, 4, 3)) * jnp.arange(1.0, 6)[:, None, None]
    fixed = oc.fixed_norm("init", axis=None)
    for constraint in (oc.Stacked(fixed), oc.Stacked(oc.Soft(fixed, 1.0))):
        tx = optax.chain(optax.sgd(1.0), oc.project(constraint))
        params, _ = train(tx, w, tx.init(w), 3)
        want = norms(float64(w), (1, 2))
        np.testing.assert_allclose(norms(float64(params), (1, 2)), want, rtol=1e-6)
        assert np.ptp(want) > 5


def test_without_the_state_weights_count_as_those_at_init():
    w = PARAMS["dense"]["kernel"]
    for constraint in (oc.fixed_norm("init"), oc.max_norm("2x init"), oc.max_rms("init")):
        assert bits(oc.constrain(w, constraint)) == bits(w)
        assert bits(jax.jit(constraint)(w)) == bits(w)
    np.testing.assert_allclose(oc.constrain(w, oc.fixed_norm("2x init")), 2 * w, rtol=1e-6)


def test_the_other_verbs_take_the_state():
    tx = optax.chain(optax.sgd(0.1), oc.project(RULES))
    state = tx.init(PARAMS)
    twice = jax.tree.map(lambda p: 2 * p, PARAMS)
    back = oc.constrain(twice, RULES, state=state)
    np.testing.assert_allclose(back["out"]["kernel"], PARAMS["out"]["kernel"], rtol=1e-6)
    found = oc.violations(twice, RULES, state=state)
    np.testing.assert_allclose(
        found["out/kernel"], norms(float64(PARAMS["out"]["kernel"]), None)[0, 0], rtol=1e-5
    )
    rows = {row.path: row for row in oc.report(twice, RULES, state=state).rows}
    np.testing.assert_allclose(rows["out/kernel"].outside, found["out/kernel"], rtol=1e-6)


@pytest.mark.parametrize("verb", [oc.violations, oc.report, oc.assert_feasible])
def test_what_is_relative_to_init_needs_the_state(verb):
    name = verb.__name__
    message = (
        rf"^{name}: FixedNorm\('init'\) on 'dense/kernel' is relative to what the weights were at "
        rf"init.*write {name}\(params, rules, state=state\)"
    )
    with pytest.raises(ValueError, match=message):
        verb(PARAMS, RULES)
    verb({"bias": PARAMS["dense"]["bias"]}, {"bias": oc.non_neg()})


@pytest.mark.parametrize("verb", [oc.violations, oc.report, oc.assert_feasible, oc.constrain])
def test_the_states_of_two_models_are_refused(verb):
    tx = optax.chain(optax.sgd(0.1), oc.project(RULES))
    both = {"generator": tx.init(PARAMS), "critic": tx.init(jax.tree.map(jnp.ones_like, PARAMS))}
    with pytest.raises(ValueError, match=r"several states of project .* 'dense/kernel', such as"):
        verb(PARAMS, RULES, state=both)
    verb(PARAMS, RULES, state=both["generator"])


def test_a_state_without_project_is_refused():
    with pytest.raises(ValueError, match=r"There is no state of project in .*; pass what tx.init"):
        oc.constrain(PARAMS, RULES, state=optax.adam(0.1).init(PARAMS))


def test_the_state_of_other_rules_is_refused():
    tx, other = oc.project(RULES), oc.project({"dense/kernel": oc.fixed_norm("init")})
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    with pytest.raises(
        ValueError, match=r"remembers nothing of 'out/kernel'.*state of other rules"
    ):
        tx.update(grads, other.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="remembers 'out/kernel', and no constraint of these"):
        other.update(grads, tx.init(PARAMS), PARAMS)
    free = oc.project({"bias": oc.non_neg()})
    with pytest.raises(ValueError, match="remembers 'dense/kernel', and no constraint of these"):
        free.update(grads, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="remembers nothing of 'dense/kernel'"):
        tx.update(grads, free.init(PARAMS), PARAMS)
    shaped = oc.project({"kernel": oc.fixed_norm("init", axis=0), "bias": oc.non_neg()})
    with pytest.raises(ValueError, match=r"remembers \(\(1, 3\), dtype.*\) \(shape, dtype\) of"):
        tx.update(grads, shaped.init(PARAMS), PARAMS)


def test_every_keeps_the_memory():
    tx = optax.chain(optax.sgd(0.3), oc.project(oc.fixed_norm("init"), every=3))
    state = tx.init(PARAMS)
    params, after = train(tx, PARAMS, state, 6)
    for name in ("dense", "out"):
        np.testing.assert_allclose(
            norms(float64(params[name]["kernel"]), None),
            norms(float64(PARAMS[name]["kernel"]), None),
            rtol=1e-6,
        )
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_tree_map_params_leaves_the_memory_alone():
    tx = optax.chain(optax.adam(0.1), oc.project(RULES))
    state = tx.init(PARAMS)
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert bits(mapped[1].memory["out/kernel"]) == bits(state[1].memory["out/kernel"])
    assert bits(mapped[0][0].mu["out"]["kernel"]) != bits(state[0][0].mu["out"]["kernel"])


def test_tree_map_params_leaves_the_memory_of_projected_alone():
    tx = oc.projected(optax.adam(0.1), oc.fixed_norm("init"))
    state = tx.init(PARAMS)
    mapped = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    for ours, theirs in ((mapped[0].at_init, state[0].at_init), (mapped[2], state[2])):
        assert bits(ours) == bits(theirs)


def test_masked_and_partitioned_leaves():
    labels = {"dense": {"kernel": "a", "bias": "b"}, "out": {"kernel": "b"}}
    tx = optax.partition(
        {
            "a": optax.chain(optax.sgd(0.3), oc.project(oc.fixed_norm("init"))),
            "b": optax.sgd(0.3),
        },
        labels,
    )
    state = tx.init(PARAMS)
    params, _ = train(tx, PARAMS, state, 3)
    np.testing.assert_allclose(
        norms(float64(params["dense"]["kernel"]), None),
        norms(float64(PARAMS["dense"]["kernel"]), None),
        rtol=1e-6,
    )


def test_two_leaves_of_one_path():
    params = {"a": {"b": jnp.ones(2)}, "a/b": 3 * jnp.ones(2)}
    tx = optax.chain(optax.sgd(0.1), oc.project(oc.fixed_norm("init")))
    state = tx.init(params)
    assert sorted(state[1].memory) == ["a/b", "a/b#2"]
    params, _ = train(tx, params, state, 3)
    np.testing.assert_allclose(norms(float64(params["a"]["b"]), None), [2**0.5], rtol=1e-6)
    np.testing.assert_allclose(norms(float64(params["a/b"]), None), [18**0.5], rtol=1e-6)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.inject_hyperparams(lambda rate: optax.chain(optax.scale(rate), tx))(0.5),
    ],
    ids=["MultiSteps", "apply_if_finite", "inject_hyperparams"],
)
def test_wrappers_of_optax(wrap):
    tx = wrap(optax.chain(optax.sgd(0.3), oc.project(oc.fixed_norm("init"))))
    params, _ = train(tx, PARAMS, tx.init(PARAMS), 4)
    after, before = params["out"]["kernel"], PARAMS["out"]["kernel"]
    np.testing.assert_allclose(norms(float64(after), None), norms(float64(before), None), rtol=1e-6)
    assert not np.allclose(after, before, atol=0.01)


def test_linen_train_state():
    model = ocf.linen.Dense(3, kernel_constraint=oc.fixed_norm("init"))
    x = jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    state = ocf.linen.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(0.5), rules=ocf.declared(model, x)
    )
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for seed in range(3):
        grads = jax.tree.map(
            lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape), params
        )
        state = step(state, grads)
    want = norms(float64(params["kernel"]), None)
    np.testing.assert_allclose(norms(float64(state.params["kernel"]), None), want, rtol=1e-6)
    assert list(state.memory) == ["kernel"]


ENTRIES = [
    oc.mask("init"),
    oc.sign(),
    oc.around(oc.box(-0.01, 0.01)),
    oc.around(oc.max_norm("0.1x init")),
]
"""Sets that remember something of each entry."""


def half_zero(w: jax.Array) -> jax.Array:
    return w.at[: len(w) // 2].set(0)


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ENTRIES, ids=str)
@pytest.mark.parametrize("wrap", [lambda tx: tx, lambda tx: optax.MultiSteps(tx, 2)])
def test_what_entries_were_is_kept_for_the_whole_training(constraint, wrap):
    start = {"w": half_zero(PARAMS["dense"]["kernel"].astype(jnp.bfloat16))}
    tx = wrap(optax.chain(optax.adam(0.5), oc.project(constraint, stats=True)))
    state = tx.init(start)
    params, after = train(tx, start, state, 30)
    memory = constraint.remember(start["w"])
    # To the bit: another set would not leave them alone.
    assert bits(constraint.advance(params["w"], memory)[0]) == bits(params["w"]) or (
        not constraint.elementwise
    )
    away = oc.violations(params, constraint, state=after)["w"]
    assert away <= (0 if constraint.elementwise else 0.05)
    assert not np.allclose(float64(params["w"]), float64(start["w"]), rtol=1e-3)
    for old, new in zip(
        jax.tree.leaves(memory_in(state)), jax.tree.leaves(memory_in(after)), strict=True
    ):
        assert bits(old) == bits(new)


@pytest.mark.parametrize("constraint", ENTRIES, ids=str)
def test_what_entries_were_with_nnx_and_a_checkpoint(constraint, tmp_path):
    import orbax.checkpoint as ocp

    model = ocf.nnx.Linear(4, 3, kernel_constraint=constraint, rngs=nnx.Rngs(0))
    model.kernel[...] = half_zero(model.kernel[...])
    start = jnp.asarray(model.kernel[...])
    optimizer = ocf.nnx.Optimizer(model, optax.sgd(0.5))

    @nnx.jit
    def step(model, optimizer, x):
        optimizer.update(model, nnx.grad(lambda model: (model(x) ** 2).sum())(model))

    def steps():
        for seed in range(3):
            step(model, optimizer, jax.random.normal(jax.random.key(seed), (2, 4)))
        return jnp.asarray(model.kernel[...])

    steps()
    saved = nnx.state((model, optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        like = jax.tree.map(jnp.zeros_like, saved)
        want = steps()
        nnx.update((model, optimizer), checkpointer.restore(tmp_path / "state", like))
    assert bits(steps()) == bits(want)
    near = constraint.advance(want, constraint.remember(start))[0]
    np.testing.assert_allclose(near, want, atol=0 if constraint.elementwise else 1e-6)
    assert not np.allclose(want, start)


def test_nnx_optimizers():
    from flax import nnx

    tx = optax.chain(optax.sgd(0.5), oc.project({"kernel": oc.fixed_norm("init")}))
    for make in (
        lambda model: ocf.nnx.Optimizer(model, optax.sgd(0.5)),
        lambda model: nnx.Optimizer(model, tx, wrt=nnx.Param),
    ):
        model = ocf.nnx.Linear(4, 3, kernel_constraint=oc.fixed_norm("init"), rngs=nnx.Rngs(0))
        want = norms(float64(model.kernel[...]), None)
        optimizer = make(model)

        @nnx.jit
        def step(model, optimizer, x):
            grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
            optimizer.update(model, grads)

        for seed in range(3):
            step(model, optimizer, jax.random.normal(jax.random.key(seed), (2, 4)))
        np.testing.assert_allclose(norms(float64(model.kernel[...]), None), want, rtol=1e-6)


def test_orbax_keeps_the_memory(tmp_path):
    import orbax.checkpoint as ocp

    tx = optax.chain(optax.adam(0.1), oc.project(RULES))
    _, state = train(tx, PARAMS, tx.init(PARAMS), 2)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert list(map(bits, jax.tree.leaves(restored))) == list(map(bits, jax.tree.leaves(state)))


# How relative bounds are written.


@pytest.mark.parametrize(
    "text", ["2 init", "2xinit", "initial", "-1x init", "x init", "", "init(2)", "init ** 2"]
)
def test_other_texts_are_errors(text):
    for constraint in (oc.max_norm, oc.fixed_norm, oc.max_rms, oc.min_max_norm):
        with pytest.raises(
            ValueError, match=r"is not a number: .* Write a number, 'init' or '2x init' for"
        ):
            constraint(text)


def test_relative_bounds_of_an_interval_are_compared():
    with pytest.raises(ValueError, match=r"min_value='2x init' is above max_value='init'"):
        oc.min_max_norm("2x init", "init")


def test_relative_bounds_have_a_json_form():
    config = json.loads(json.dumps(oc.serialize(oc.max_norm("2x init", axis=None))))
    assert oc.deserialize(config) == oc.max_norm("2x init", axis=None)


def test_the_report_does_not_guess_which_units_are_at_a_relative_bound():
    w, constraint = PARAMS["out"]["kernel"], oc.max_norm("2x init")
    (row,) = oc.report(w, constraint, state=oc.project(constraint).init(w)).rows
    assert (row.constraint, row.units) == ("MaxNorm('2x init')", None)


# States that come back as something else.


def _step_and_violations(tx, rules, state):
    far = jax.tree.map(lambda p: 10 * p, PARAMS)
    updates, after = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    return list(
        map(bits, jax.tree.leaves((updates, oc.violations(far, rules, state=state))))
    ), after


@pytest.mark.parametrize(
    "changed",
    [
        lambda memory: collections.OrderedDict(reversed(memory.items())),
        lambda memory: {k: jax.tree.map(np.asarray, v) for k, v in reversed(memory.items())},
        lambda memory: {k: list(v) for k, v in memory.items()},
        flax.core.freeze,
    ],
    ids=["another order", "NumPy in another order", "lists", "frozen"],
)
def test_what_is_remembered_is_found_by_its_key(changed):
    rules = {"kernel": oc.compose(oc.max_norm("0.5x init"), oc.fixed_norm("init", axis=0))}
    tx = oc.project(rules)
    state = tx.init(PARAMS)
    assert isinstance(state.memory["out/kernel"], tuple)
    want, _ = _step_and_violations(tx, rules, state)
    other = state._replace(memory=changed(state.memory))
    got, after = _step_and_violations(tx, rules, other)
    assert got == want
    # And it stays what it was: a scan has to give back what it got.
    assert jax.tree.structure(after) == jax.tree.structure(other)
    for key, value in state.memory.items():
        same = zip(jax.tree.leaves(after.memory[key]), jax.tree.leaves(value), strict=True)
        assert all(bits(a) == bits(b) for a, b in same)


def test_a_state_that_lost_its_type():
    tx = oc.project(RULES)
    state = tx.init(PARAMS)
    want, _ = _step_and_violations(tx, RULES, state)
    got, after = _step_and_violations(tx, RULES, state._asdict())
    assert got == want
    assert isinstance(after, oc.ProjectState)
    # Somewhere in a larger one, as well.
    far = jax.tree.map(lambda p: 10 * p, PARAMS)
    found = oc.violations(far, RULES, state=[{"trace": PARAMS}, state._asdict()])
    assert bits(found["out/kernel"]) == bits(oc.violations(far, RULES, state=state)["out/kernel"])


def test_containers_without_anything_in_them_may_be_lost():
    rules = {"kernel": oc.compose(oc.fixed_norm("init"), oc.non_neg())}
    tx = oc.project(rules)
    state = tx.init(PARAMS)
    assert state.memory["out/kernel"][1] == ()
    restored = flax.serialization.msgpack_restore(flax.serialization.to_bytes(state))
    want, _ = _step_and_violations(tx, rules, state)
    assert _step_and_violations(tx, rules, restored)[0] == want


def test_states_of_flax_have_the_memory():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    rules = {"kernel": oc.max_norm("2x init")}
    tx = optax.chain(optax.adam(1.0), oc.project(rules))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    own = ocf.nnx.Optimizer(model, optax.adam(1.0), rules=rules)
    first = {"kernel": jnp.asarray(model.kernel[...])}
    params = {"kernel": 10 * first["kernel"]}
    state = ocf.linen.TrainState.create(apply_fn=print, params=first, tx=optax.sgd(1), rules=rules)
    want = 8 * norms(float64(first["kernel"]), 0)
    for known in (optimizer.opt_state, own, state, {"model": state}):
        found = oc.violations(params, rules, state=known)
        np.testing.assert_allclose(found["kernel"], np.linalg.norm(want), rtol=1e-5)


def test_one_state_seen_twice_is_one():
    state = oc.project(RULES).init(PARAMS)
    oc.violations(PARAMS, RULES, state={"now": state, "again": state})


def test_a_path_that_looks_like_a_number_of_another_is_one_of_its_own():
    w = jnp.arange(1.0, 4)
    # Two leaves of the path a/b, and one that is called as the second might be.
    params = {"a": {"b": w, "b#2": 3 * w}, "a/b": 2 * w}
    tx = oc.project(oc.fixed_norm("init"))
    state = tx.init(params)
    assert len(state.memory) == 3
    back = oc.constrain(jax.tree.map(lambda p: 10 * p, params), oc.fixed_norm("init"), state=state)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, params)


class _Remembers(oc.Constraint):
    """Remembers the weights themselves."""

    remembers = True

    def __call__(self, w):
        return jnp.asarray(w)

    def remember(self, w):
        return w

    def advance(self, w, memory):
        return memory, memory


def test_what_is_remembered_is_a_copy():
    params = {"w": jnp.ones(3)}
    tx = oc.project({"w": _Remembers()})

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    new, state = step(params, tx.init(params))
    assert params["w"].is_deleted()
    np.testing.assert_array_equal(new["w"], 1)
    np.testing.assert_array_equal(state.memory["w"], 1)


def test_init_takes_abstract_parameters():
    abstract = jax.eval_shape(lambda: PARAMS)
    for tx in (oc.project(RULES), optax.chain(optax.adam(0.1), oc.project(RULES))):
        state, want = tx.init(abstract), tx.init(PARAMS)
        assert jax.tree.structure(state) == jax.tree.structure(want)
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(want), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert jax.tree.structure(jax.eval_shape(tx.init, abstract)) == jax.tree.structure(want)
    # What nobody has filled in passes for no norm.
    state = oc.project(RULES).init(abstract)
    assert np.all(np.isnan(oc.violations(PARAMS, RULES, state=state)["out/kernel"]))


def test_constrain_without_a_state_takes_these_weights_for_the_first():
    twice = oc.compose(oc.max_norm(1.0), oc.fixed_norm("2x init", axis=0))
    w = PARAMS["dense"]["kernel"]
    want = 2 * norms(float64(w), 0)
    np.testing.assert_allclose(norms(float64(oc.constrain(w, twice)), 0), want, rtol=1e-6)
    np.testing.assert_allclose(norms(float64(twice(w)), 0), want, rtol=1e-6)
