"""`project` inside and around the transformations of Optax that change when an update happens."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64, norms
from flax import nnx

import optax_constraints as oc

X = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(32, 2)).astype(np.float32)
ALL = np.arange(32)

# Optax 0.2.5 has it under its older name only.
partition: Any = getattr(optax, "partition", None) or optax.multi_transform


class _LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(8)(x)))


class _NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


@dataclasses.dataclass(frozen=True)
class Net:
    """A network of two layers, in some framework."""

    params: Any
    predict: Callable[[Any, Any], Any]
    kernel: str
    """The name of a layer's kernel."""
    axis: int
    """The axis of a kernel along which a unit's incoming weights run."""
    layers: tuple[str, str]

    def rules(self, kernels, biases=None):
        return {self.kernel: kernels} | ({} if biases is None else {"bias": biases})

    def loss(self, params, batch):
        x, y = jnp.asarray(X)[batch], jnp.asarray(Y)[batch]
        return jnp.mean((self.predict(params, x) - y) ** 2)

    def gradient(self, params, batch=ALL):
        return jax.grad(self.loss)(params, batch)


@functools.cache
def _linen() -> Net:
    model = _LinenNet()
    params = model.init(jax.random.key(0), X)["params"]
    return Net(
        params,
        lambda params, x: model.apply({"params": params}, x),
        kernel="kernel",
        axis=0,
        layers=("Dense_0", "Dense_1"),
    )


@functools.cache
def _nnx() -> Net:
    graph, params = nnx.split(_NNXNet(nnx.Rngs(0)), nnx.Param)
    return Net(
        params,
        lambda params, x: nnx.merge(graph, params)(x),
        kernel="kernel",
        axis=0,
        layers=("first", "second"),
    )


@functools.cache
def _equinox() -> Net:
    model = eqx.nn.MLP(5, 2, 8, 1, activation=jnp.tanh, dtype=jnp.float32, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return Net(
        jax.tree.map(lambda w: 2 * w, params),  # Equinox starts with smaller norms.
        lambda params, x: jax.vmap(eqx.combine(params, static))(x),
        kernel="weight",
        axis=1,
        layers=("layers/0", "layers/1"),
    )


NETS = {"linen": _linen, "nnx": _nnx, "equinox": _equinox}
each_net = pytest.mark.parametrize("net", NETS, indirect=True)


@pytest.fixture
def net(request) -> Net:
    return NETS[getattr(request, "param", "linen")]()


def leaves(params) -> dict[str, np.ndarray]:
    """The leaves by their path, read without the library."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value"): np.asarray(w)
        for keys, w in found
    }


def kernel_norms(net: Net, params) -> np.ndarray:
    """The norm of each unit of each layer, in float64."""
    kernels = [w for path, w in leaves(params).items() if path.endswith(net.kernel)]
    assert len(kernels) == 2
    return np.concatenate([norms(float64(w), net.axis).ravel() for w in kernels])


def biases(params) -> np.ndarray:
    return np.concatenate([w for path, w in leaves(params).items() if path.endswith("bias")])


def assert_equal(a, b):
    """Asserts that two trees are the same to the bit."""
    assert [bits(x) for x in jax.tree.leaves(a)] == [bits(x) for x in jax.tree.leaves(b)]


def assert_close(a, b, rtol=1e-5, atol=1e-7):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def step_of(tx):
    """A compiled update with a gradient that is given."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


# Gradient accumulation.


MICRO = np.arange(32).reshape(4, 8)


def accumulated(net, tx, cycles):
    """The parameters after each micro-batch, by cycle."""
    step, gradient = step_of(tx), jax.jit(net.gradient)
    params, state = net.params, tx.init(net.params)
    for _ in range(cycles):
        seen = []
        for batch in MICRO:
            params, state = step(params, state, gradient(params, batch))
            seen.append(params)
        yield seen


@each_net
def test_accumulation_ends_in_the_sets_and_does_nothing_between(net):
    rules = net.rules(oc.min_max_norm(0.7, 0.8, axis=net.axis), oc.non_neg())
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.5), oc.project(rules)), len(MICRO))
    before = net.params
    assert np.max(kernel_norms(net, before)) > 0.9
    for *between, after in accumulated(net, tx, 4):
        for params in between:
            assert_equal(params, before)
        n = kernel_norms(net, after)
        assert np.all(n <= 0.8 * (1 + 1e-6))
        assert np.all(n >= 0.7 * (1 - 1e-6))
        assert np.all(biases(after) >= 0)
        before = after
    assert np.any(biases(before) == 0)


RATE = 0.25


@each_net
def test_accumulation_projects_once_for_all_micro_batches(net):
    rules = net.rules(oc.min_max_norm(0.4, 0.5, rate=RATE, axis=net.axis))
    optimizer = optax.sgd(0.1)
    tx = optax.MultiSteps(optax.chain(optimizer, oc.project(rules)), len(MICRO))
    one = optax.chain(optimizer, oc.project(rules))
    step, params, state = step_of(one), net.params, one.init(net.params)

    @jax.jit
    def gradient(params):
        gradients = [net.gradient(params, batch) for batch in MICRO]
        return jax.tree.map(lambda *g: sum(g) / len(g), *gradients)

    for *_, after in accumulated(net, tx, 3):
        # The same in one step, on the mean of the gradients...
        mean = gradient(params)
        free = optax.apply_updates(params, optimizer.update(mean, optimizer.init(params))[0])
        params, state = step(params, state, mean)
        assert_close(after, params)
        # ...in which a norm goes a quarter of its way, once.
        n = kernel_norms(net, free)
        wanted = RATE * np.clip(n, 0.4, 0.5) + (1 - RATE) * n
        np.testing.assert_allclose(kernel_norms(net, after), wanted, rtol=1e-5)


def test_around_accumulation_projections_add_up(net):
    # What the docs advise against: after k micro-batches the rate counts k times.
    rules = net.rules(oc.min_max_norm(0.4, 0.5, rate=RATE, axis=net.axis))
    tx = optax.chain(optax.MultiSteps(optax.sgd(0.0), len(MICRO)), oc.project(rules))
    (seen,) = accumulated(net, tx, 1)
    n = kernel_norms(net, net.params)
    target = np.clip(n, 0.4, 0.5)
    for k, params in enumerate(seen, 1):
        wanted = target + (1 - RATE) ** k * (n - target)
        np.testing.assert_allclose(kernel_norms(net, params), wanted, rtol=1e-5)


def test_accumulation_counts_real_updates_for_schedules_and_every(net):
    bound = optax.piecewise_constant_schedule(0.8, {2: 0.5})  # 0.8, 0.8, 0.4, 0.4, ...
    rules = net.rules(oc.max_norm(bound, axis=net.axis))
    project = oc.project(rules, every=2)
    # Up the slope, where norms grow.
    tx = optax.MultiSteps(optax.chain(optax.sgd(-0.5), project), len(MICRO))
    largest = [np.max(kernel_norms(net, seen[-1])) for seen in accumulated(net, tx, 4)]
    assert largest[0] > 0.81
    assert largest[1] == pytest.approx(0.8, rel=1e-6)
    assert largest[2] > 0.81
    assert largest[3] == pytest.approx(0.4, rel=1e-6)


# Averages of weights.


def trajectory(net, rules, steps=20, optimizer=None):
    """The parameters after each step of a training under rules."""
    tx = optax.chain(optimizer or optax.adam(0.1), oc.project(rules))
    step, gradient = step_of(tx), jax.jit(net.gradient)
    params = oc.constrain(net.params, rules)
    state = tx.init(params)
    seen = [params]
    for _ in range(steps):
        params, state = step(params, state, gradient(params))
        seen.append(params)
    return seen


def by_optax(seen):
    ema = optax.ema(0.9)
    state, average, update = ema.init(seen[0]), None, jax.jit(ema.update)
    for params in seen:
        average, state = update(params, state)
    return average


def by_hand(seen):
    average = seen[0]
    for params in seen[1:]:
        average = optax.incremental_update(params, average, 0.1)
    return average


@pytest.mark.parametrize("average_of", [by_optax, by_hand])
def test_an_average_leaves_a_set_that_is_not_convex(net, average_of):
    rules = net.rules(oc.unit_norm(axis=net.axis), oc.non_neg())
    average = average_of(trajectory(net, rules))
    n = kernel_norms(net, average)
    assert np.all(n < 1 - 1e-4)
    distance = oc.violations(average, rules)
    kernels = {path: d for path, d in distance.items() if path.endswith(net.kernel)}
    for path, w in leaves(average).items():
        if path in kernels:
            # The nearest unit vector is as far away as the norm is from one.
            wanted = np.linalg.norm(1 - norms(float64(w), net.axis))
            np.testing.assert_allclose(kernels[path], wanted, rtol=1e-4)
    # Half-spaces are convex.
    assert np.all(biases(average) >= 0)

    inside: Any = oc.constrain(average, rules)
    np.testing.assert_allclose(kernel_norms(net, inside), 1, rtol=1e-6)
    assert np.all(biases(inside) >= 0)
    assert float(net.loss(inside, ALL)) < float(net.loss(net.params, ALL))


def test_an_average_stays_in_a_convex_set(net):
    rules = net.rules(oc.max_norm(0.5, axis=net.axis), oc.non_neg())
    average = by_optax(trajectory(net, rules))
    n = kernel_norms(net, average)
    assert np.all(n <= 0.5 * (1 + 1e-6))
    assert np.max(n) > 0.4
    assert_close(oc.constrain(average, rules), average, rtol=1e-6)


# Frozen leaves.


def labels(net):
    """The first layer is frozen."""

    def label(keys, _):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return "frozen" if path.startswith(net.layers[0] + "/") else "trained"

    return lambda params: jax.tree_util.tree_map_with_path(label, params)


@each_net
@pytest.mark.parametrize("where", ["inside", "around", "around, after constrain"])
def test_frozen_leaves_stay_to_the_bit(net, where):
    bound = 0.3
    rules: Any = net.rules(oc.max_norm(bound, axis=net.axis), oc.non_neg())
    frozen, params = optax.set_to_zero(), net.params
    if where == "inside":
        trained = optax.chain(optax.adam(0.1), oc.project(rules))
        tx = partition({"trained": trained, "frozen": frozen}, labels(net))
    else:
        if where == "around":
            rules = {f"/{net.layers[0]}/**": None, **rules}
        else:
            params = oc.constrain(params, rules)
        tx = partition({"trained": optax.adam(0.1), "frozen": frozen}, labels(net))
        tx = optax.chain(tx, oc.project(rules))
    start, largest = leaves(params), []
    step, gradient, state = step_of(tx), jax.jit(net.gradient), tx.init(params)
    for _ in range(10):
        params, state = step(params, state, gradient(params))
        now = leaves(params)
        first, second = ([path for path in now if path.startswith(f)] for f in net.layers)
        assert len(first) == len(second) == 2
        for path in first:
            assert bits(now[path]) == bits(start[path])
        for path in second:
            assert np.all(now[path] != start[path]) or path.endswith("bias")
            if path.endswith("bias"):
                assert np.all(now[path] >= 0)
            else:
                n = norms(float64(now[path]), net.axis)
                assert np.all(n <= bound * (1 + 1e-6))
                largest.append(np.max(n))
    assert np.mean(np.array(largest) > bound * (1 - 1e-5)) > 0.5
    # The frozen layer is outside, unless it was put inside before.
    kernel = start[f"{net.layers[0]}/{net.kernel}"]
    outside = np.max(norms(float64(kernel), net.axis)) > bound * 1.1
    assert outside == (where != "around, after constrain")


def test_around_frozen_leaves_projection_still_moves_what_is_outside(net):
    rules = net.rules(oc.max_norm(0.5, axis=net.axis))
    tx = partition({"trained": optax.sgd(0.1), "frozen": optax.set_to_zero()}, labels(net))
    tx = optax.chain(tx, oc.project(rules))
    params, _ = step_of(tx)(net.params, tx.init(net.params), net.gradient(net.params))
    assert np.all(kernel_norms(net, params) <= 0.5 * (1 + 1e-6))


# Weight decay.


def test_weight_decay_before_project_does_not_pull_norms_below_their_bound(net):
    rules = net.rules(oc.min_max_norm(0.5, 0.6, axis=net.axis))
    decay = optax.adamw(0.01, weight_decay=20.0)
    seen = trajectory(net, rules, optimizer=decay)
    for params in seen:
        n = kernel_norms(net, params)
        assert np.all(n >= 0.5 * (1 - 1e-6))
        assert np.all(n <= 0.6 * (1 + 1e-6))
    assert np.max(kernel_norms(net, seen[-1])) < 0.5 * (
        1 + 1e-5
    )  # Decay has brought every unit to the lower bound.
    free = trajectory(net, {}, optimizer=decay)[-1]
    assert np.min(kernel_norms(net, free)) < 0.4


def test_weight_decay_after_project_leaves_the_set(net):
    rules = net.rules(oc.unit_norm(axis=net.axis))
    params = oc.constrain(net.params, rules)
    tx = optax.chain(optax.sgd(0.1), oc.project(rules), optax.add_decayed_weights(-0.1))
    params, _ = step_of(tx)(params, tx.init(params), net.gradient(params))
    np.testing.assert_allclose(kernel_norms(net, params), 0.9, atol=0.02)
    assert min(map(float, oc.violations(params, rules).values())) > 0.1


# Hyperparameters in the state.


@each_net
def test_inject_hyperparams_with_a_scheduled_bound(net):
    bound = optax.linear_schedule(1.0, 0.2, 16)

    @optax.inject_hyperparams
    def make(learning_rate, bound):
        rules = net.rules(oc.max_norm(bound, axis=net.axis))
        return optax.chain(optax.adam(learning_rate), oc.project(rules))

    tx = make(learning_rate=optax.linear_schedule(0.2, 0.1, 16), bound=bound)
    traces = []

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(net.gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = net.params, tx.init(net.params)
    for i in range(20):
        params, state = step(params, state)
        wanted = 1 - 0.05 * min(i, 16)
        assert float(state.hyperparams["bound"]) == pytest.approx(wanted)
        assert np.max(kernel_norms(net, params)) == pytest.approx(wanted, rel=1e-6)
    assert len(traces) == 1


def test_inject_hyperparams_by_hand(net):
    @optax.inject_hyperparams
    def make(bound):
        rules = net.rules(oc.max_norm(bound, axis=net.axis))
        return optax.chain(optax.adam(0.2), oc.project(rules))

    tx = make(bound=0.9)
    step, params, state = step_of(tx), net.params, tx.init(net.params)
    for bound in (0.9, 0.3, 0.6, 0.6, 0.6, 0.6):
        state.hyperparams["bound"] = jnp.asarray(bound, jnp.float32)
        params, state = step(params, state, net.gradient(params))
        assert np.max(kernel_norms(net, params)) <= bound * (1 + 1e-6)
        if bound != 0.6:
            assert np.max(kernel_norms(net, params)) >= bound * (1 - 1e-5)
    assert np.max(kernel_norms(net, params)) > 0.5  # Above the bound that was.


# Steps that are not taken.


@each_net
def test_apply_if_finite(net):
    bound = optax.piecewise_constant_schedule(0.6, {2: 0.5})  # 0.6, 0.6, 0.3, ...
    rules = net.rules(oc.max_norm(bound, axis=net.axis), oc.non_neg())
    tx = optax.apply_if_finite(optax.chain(optax.adam(0.1), oc.project(rules)), 3)
    step, params, state = step_of(tx), net.params, tx.init(net.params)
    good = net.gradient(params)
    bad = jax.tree.map(lambda g: jnp.full_like(g, jnp.nan), good)

    params, state = step(params, state, good)
    assert np.max(kernel_norms(net, params)) == pytest.approx(0.6, rel=1e-6)
    for _ in range(3):
        skipped, state = step(params, state, bad)
        assert_equal(skipped, params)
    # The schedule did not move on while nothing happened.
    for wanted in (0.6, 0.3):
        params, state = step(params, state, net.gradient(params))
        assert np.max(kernel_norms(net, params)) == pytest.approx(wanted, rel=1e-6)
        assert np.all(biases(params) >= 0)


def test_apply_if_finite_gives_up_with_nan_in_what_was_nan_only(net):
    rules = net.rules(oc.max_norm(0.6, axis=net.axis))
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), oc.project(rules)), 0)
    gradient = net.gradient(net.params)
    kernel = f"{net.layers[0]}/{net.kernel}"

    def spoil(keys, g):
        path = jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")
        return g.at[0, 0].set(jnp.nan) if path == kernel else g

    bad = jax.tree_util.tree_map_with_path(spoil, gradient)
    params, _ = step_of(tx)(net.params, tx.init(net.params), bad)
    now = leaves(params)
    unit = now[kernel][:, 0] if net.axis == 0 else now[kernel][0]
    assert np.all(np.isnan(unit))
    assert sum(int(np.sum(np.isnan(w))) for w in now.values()) == unit.size
    n = kernel_norms(net, params)
    assert np.nanmax(n) <= 0.6 * (1 + 1e-6)


# Slow and fast weights.


def looked_ahead(net, tx, params, steps=12):
    """The fast and slow weights after each step."""
    step, gradient, state = step_of(tx), jax.jit(net.gradient), tx.init(params)
    seen = []
    for _ in range(steps):
        params, state = step(params, state, gradient(params.fast))
        seen.append(params)
    return seen


def test_lookahead_keeps_fast_and_slow_weights_in_a_convex_set(net):
    rules = net.rules(oc.max_norm(0.5, axis=net.axis), oc.non_neg())
    tx = optax.lookahead(optax.chain(optax.adam(0.1), oc.project(rules)), 4, 0.5)
    start = optax.LookaheadParams.init_synced(oc.constrain(net.params, rules))
    seen = looked_ahead(net, tx, start)
    for params in seen:
        for weights in (params.fast, params.slow):
            n = kernel_norms(net, weights)
            assert np.all(n <= 0.5 * (1 + 1e-6))
            assert np.all(biases(weights) >= -1e-8)
    assert np.max(kernel_norms(net, seen[-1].fast)) > 0.45
    first, last = leaves(start.slow), leaves(seen[-1].slow)
    assert all(np.any(last[path] != first[path]) for path in first)


@each_net
def test_around_lookahead_both_weights_are_under_the_rules(net):
    # Unit vectors: not convex, so a mean of fast and slow weights would be outside.
    rules = net.rules(oc.unit_norm(axis=net.axis))
    fast = optax.adam(0.1)
    start = optax.LookaheadParams.init_synced(oc.constrain(net.params, rules))

    inside = optax.lookahead(optax.chain(fast, oc.project(rules)), 4, 0.5)
    last = looked_ahead(net, inside, start)[-1]
    assert np.min(kernel_norms(net, last.slow)) < 1 - 1e-4

    around = optax.chain(optax.lookahead(fast, 4, 0.5), oc.project(rules))
    for params in looked_ahead(net, around, start):
        for weights in (params.fast, params.slow):
            np.testing.assert_allclose(kernel_norms(net, weights), 1, rtol=1e-6)
