"""The four shared constraints, side by side with the real Keras on its JAX backend."""

import ast
import doctest
import functools
import json
import os
import types
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from keras import ops

import optax_constraints as oc

# Keras' annotations are inferred from its defaults, and would have whole numbers as bounds.
KC: Any = keras.constraints

KERAS_EPSILON = 1e-7
EPS = float(np.finfo(np.float32).eps)

SHAPES = {1: (7,), 2: (6, 5), 3: (3, 4, 5), 4: (3, 2, 4, 5), 5: (2, 3, 2, 4, 3)}
AXES = (0, 1, -1, [0, 1, 2], None)
NORMS = (0.1, 0.1234, 0.5, 0.999, 1.0, 1.5, 2.0, 7.7, 31.0, 100.0)

PAIRS = {
    "MaxNorm": ("MaxNorm", {}),
    "MaxNorm-0.7": ("MaxNorm", {"max_value": 0.7}),
    "MaxNorm-int": ("MaxNorm", {"max_value": 3}),
    "MinMaxNorm": ("MinMaxNorm", {}),
    "MinMaxNorm-0.5-2": ("MinMaxNorm", {"min_value": 0.5, "max_value": 2.0}),
    "MinMaxNorm-rate": ("MinMaxNorm", {"min_value": 0.5, "max_value": 2.0, "rate": 0.3}),
    "MinMaxNorm-rate-0": ("MinMaxNorm", {"min_value": 0.5, "max_value": 2.0, "rate": 0.0}),
    "UnitNorm": ("UnitNorm", {}),
    "NonNeg": ("NonNeg", {}),
}


def fits(axis, rank):
    axes = axis if isinstance(axis, list) else [axis]
    return axis is None or all(-rank <= a < rank for a in axes)


def axis_of_units(axis):
    return tuple(axis) if isinstance(axis, list) else axis


def norms_of(w, axis):
    """Norms of the units in float64."""
    squares = np.square(np.asarray(w, np.float64))
    return np.sqrt(np.sum(squares, axis=axis_of_units(axis), keepdims=True))


def weights(shape, axis, turn):
    """Random float32 weights whose units have the norms in NORMS, the first one NORMS[turn]."""
    w = np.random.default_rng(turn).normal(size=shape)
    norms = norms_of(w, axis)
    wanted = np.resize(np.roll(NORMS, -turn), norms.shape)
    return (w / norms * wanted).astype(np.float32)


# The projections.


@functools.cache
def projected(rank, axis):
    """For each turn of the weights: the weights, and by pair our projection and Keras'."""

    def both(w):
        results = {}
        for pair, (name, arguments) in PAIRS.items():
            if name != "NonNeg":
                arguments = arguments | {"axis": list(axis) if isinstance(axis, tuple) else axis}
            ours, theirs = getattr(oc, name)(**arguments), getattr(KC, name)(**arguments)
            results[pair] = ours(w), theirs(w)
        return results

    both = jax.jit(both)
    turns = [weights(SHAPES[rank], axis, turn) for turn in range(len(NORMS))]
    return [(w, both(w)) for w in turns]


@pytest.mark.parametrize(
    ("rank", "axis"), [(rank, axis) for rank in SHAPES for axis in AXES if fits(axis, rank)]
)
@pytest.mark.parametrize("pair", PAIRS)
def test_projections_agree_with_keras(pair, rank, axis):
    for w, results in projected(rank, tuple(axis) if isinstance(axis, list) else axis):
        got, wanted = results[pair]
        assert got.dtype == wanted.dtype == jnp.float32
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        if pair == "NonNeg":
            np.testing.assert_array_equal(got, wanted)
            continue
        # Keras multiplies by norm / (norm + 1e-7), which at a norm of 0.1 uses up all of the
        # 1e-6. With that known factor taken out, what is left is rounding...
        factor = 1 + KERAS_EPSILON / norms_of(w, axis)
        np.testing.assert_allclose(got, wanted * factor, rtol=5e-7, atol=0)
        # ...and two ulps of the unit's norm are left for rounding where it is not.
        unit = norms_of(wanted, axis)
        np.testing.assert_allclose(got / unit, wanted / unit, rtol=1e-6, atol=2 * EPS)


def test_the_weights_have_the_norms_that_the_parity_is_about():
    for rank, shape in SHAPES.items():
        for axis in (axis for axis in AXES if fits(axis, rank)):
            seen = [norms_of(weights(shape, axis, turn), axis) for turn in range(len(NORMS))]
            seen = np.concatenate([norms.ravel() for norms in seen])
            for norm in NORMS:
                assert np.min(np.abs(seen / norm - 1)) < 1e-6, (rank, axis, norm)
            assert np.min(seen) > 0.1 * (1 - 1e-6)
            assert np.max(seen) < 100 * (1 + 1e-6)


def test_the_defaults_are_those_of_keras():
    w = weights((6, 5), 0, 0)
    for name in ("MaxNorm", "MinMaxNorm", "UnitNorm", "NonNeg", "Constraint"):
        ours, theirs = getattr(oc, name)(), getattr(KC, name)()
        assert ours.get_config() == theirs.get_config()
        np.testing.assert_allclose(ours(w), theirs(w), rtol=1e-6, atol=2 * EPS)


# Training. In Keras a unit that nothing pushes out loses 1e-7 of its norm on each step, which
# adds up to 2e-5 in 200. So the bounds are tight and the targets large: each unit stays at its
# bound. A unit that does not is told apart below, by the rules made of Keras' own constraints.

STEPS, BATCH, EPOCHS = 200, 16, 20
SIZES = (12, 10, 8)


@functools.cache
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS // EPOCHS * BATCH, 9)).astype(np.float32)
    teacher = rng.normal(size=(9, SIZES[-1])).astype(np.float32)
    return x, 5 * (np.tanh(x @ teacher) - np.float32(0.5))


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(SIZES[0])(x))
        x = nn.relu(nn.Dense(SIZES[1])(x))
        return nn.Dense(SIZES[2])(x)


def rules(library):
    """The same rules out of either library: Keras' constraints are functions of an array."""
    return {
        "Dense_0/kernel": library.max_norm(0.5),
        "Dense_1/kernel": library.min_max_norm(0.4, 0.6),
        "Dense_2/kernel": library.unit_norm(),
        "Dense_2/bias": library.max_norm(0.25),
        "bias": library.non_neg(),
    }


def initial_weights():
    return Network().init(jax.random.key(0), data()[0])["params"]


def trained_in_keras(optimizer):
    """The network after Keras' own training, in the form of Flax's parameters."""
    held = rules(KC)
    layers = [
        keras.layers.Dense(
            units,
            None if i == 2 else "relu",
            kernel_constraint=held[f"Dense_{i}/kernel"],
            bias_constraint=held.get(f"Dense_{i}/bias", held["bias"]),
        )
        for i, units in enumerate(SIZES)
    ]
    x, y = data()
    model = keras.Sequential([keras.Input(x.shape[1:]), *layers])
    start = initial_weights()
    for i, layer in enumerate(layers):
        layer.set_weights([np.asarray(start[f"Dense_{i}"][name]) for name in ("kernel", "bias")])
    model.compile(optimizer, loss="mse")
    model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]  # verbose=0 is documented, and typed as a string
    return {
        f"Dense_{i}": dict(zip(("kernel", "bias"), layer.get_weights(), strict=True))
        for i, layer in enumerate(layers)
    }


def trained_in_flax(optimizer, held=None):
    """The network after the same steps in Optax, held by rules if there are any."""
    tx = optimizer if held is None else optax.chain(optimizer, oc.project(held))
    x, y = (a.reshape(STEPS // EPOCHS, BATCH, -1) for a in data())
    params = initial_weights()

    @jax.jit
    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            x, y = batch
            grads = jax.grad(
                lambda params: jnp.mean(jnp.square(Network().apply({"params": params}, x) - y))
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return run(params, (np.tile(x, (EPOCHS, 1, 1)), np.tile(y, (EPOCHS, 1, 1))))


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), a, b)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("in_keras", "in_optax", "tolerance"),
    [
        pytest.param(
            lambda: keras.optimizers.SGD(0.02, momentum=0.9),
            lambda: optax.sgd(0.02, momentum=0.9),
            1e-5,
            id="sgd",
        ),
        # Keras adds its epsilon to the root of the uncorrected second moment, Optax to that
        # of the corrected one: hence the wider tolerance.
        pytest.param(
            lambda: keras.optimizers.Adam(1e-3, epsilon=1e-7),
            lambda: optax.adam(1e-3, eps=1e-7),
            1e-3,
            id="adam",
        ),
    ],
)
def test_training_stays_together_with_keras(in_keras, in_optax, tolerance):
    theirs = trained_in_keras(in_keras())
    ours = trained_in_flax(in_optax(), rules(oc))
    free = trained_in_flax(in_optax())
    start = initial_weights()

    assert largest_difference(ours, theirs) <= tolerance
    assert largest_difference(trained_in_flax(in_optax(), rules(KC)), theirs) <= tolerance

    # It means something: the weights went far, and every constraint held some unit back.
    assert largest_difference(ours, start) > 0.3
    assert largest_difference(ours, free) > max(0.3, 100 * tolerance)
    norms = {name: norms_of(ours[name]["kernel"], 0) for name in ours}
    at = functools.partial(np.isclose, rtol=1e-6, atol=0)
    assert np.all(at(norms["Dense_0"], 0.5))
    assert np.mean(at(norms["Dense_1"], 0.6)) >= 0.5
    assert np.all(norms["Dense_1"] > 0.4 * (1 - 1e-6))
    assert np.all(at(norms["Dense_2"], 1.0))
    assert at(norms_of(ours["Dense_2"]["bias"], 0), 0.25)
    biases = np.concatenate([ours["Dense_0"]["bias"], ours["Dense_1"]["bias"]])
    assert np.any(biases == 0)
    assert np.all(biases >= 0)
    for name in ours:
        assert not np.any(at(norms_of(free[name]["kernel"], 0), norms[name]))


# Keras' documented examples.


def documented_examples():
    """The examples in the docstring of Keras' base class, with our module in place of theirs."""
    parsed = doctest.DocTestParser().get_examples(keras.constraints.Constraint.__doc__ or "")
    namespace = {"keras": types.SimpleNamespace(constraints=oc), "ops": ops, "__name__": "example"}
    return parsed, namespace


def test_the_example_of_a_subclass_in_keras_docs_runs():
    (definition, tensor, call, layer), namespace = documented_examples()
    assert "class NonNegative(keras.constraints.Constraint)" in definition.source
    assert "keras.layers" in layer.source
    exec(definition.source + "\n" + tensor.source, namespace)
    result = eval(call.source, namespace)

    assert issubclass(namespace["NonNegative"], oc.Constraint)
    np.testing.assert_array_equal(namespace["weight"], [-1.0, 1.0])
    np.testing.assert_array_equal(result, [0.0, 1.0])
    np.testing.assert_array_equal(result, ast.literal_eval(call.want))
    assert result.dtype == namespace["weight"].dtype


def test_the_documented_subclass_works_in_a_chain():
    (definition, *_), namespace = documented_examples()
    exec(definition.source, namespace)
    params = {"a": jnp.array([-1.0, 1.0]), "b": jnp.array([-1.0, 1.0])}
    tx = optax.chain(optax.sgd(0.5), oc.project({"a": namespace["NonNegative"]()}))
    update = jax.jit(tx.update)
    updates, _ = update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["a"], [0.0, 1.0])
    np.testing.assert_array_equal(new["b"], [-1.0, 1.0])


class CenterAround(oc.Constraint):
    """Constrains weight tensors to be centered around `ref_value`."""

    def __init__(self, ref_value):
        self.ref_value = ref_value

    def __call__(self, w):
        mean = ops.mean(w)
        return w - mean + self.ref_value  # pyright: ignore[reportOperatorIssue]  # Keras types w loosely

    def get_config(self):
        return {"ref_value": self.ref_value}


# Powers of two and small integers: the mean and the sums are exact in float32.
UNCENTERED = np.array([[1.0, 2.0], [3.0, 6.0]], np.float32)
CENTERED = np.array([[-1.5, -0.5], [0.5, 3.5]], np.float32)


def test_center_around_by_hand():
    np.testing.assert_array_equal(CenterAround(0.5)(UNCENTERED), CENTERED)


def test_center_around_in_a_chain():
    params = {"layer": {"kernel": jnp.asarray(UNCENTERED), "bias": jnp.ones(2, jnp.float32)}}
    tx = optax.chain(optax.sgd(1.0), oc.project({"kernel": CenterAround(0.5)}))

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(lambda p: jnp.full_like(p, -1.0), params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    new, _ = step(params, tx.init(params))
    # One more everywhere changes nothing in what is left after centring.
    np.testing.assert_array_equal(new["layer"]["kernel"], CENTERED)
    np.testing.assert_array_equal(new["layer"]["bias"], [2.0, 2.0])


@pytest.mark.usefixtures("registry")
def test_center_around_has_a_config_once_it_is_registered():
    with pytest.raises(TypeError, match=r"CenterAround.* has no JSON form.*register"):
        oc.serialize(CenterAround(0.5))
    # The library has one of this name, too.
    with pytest.raises(ValueError, match=r"The name 'CenterAround' is taken by .*name=\.\.\."):
        oc.register(CenterAround)
    oc.register(CenterAround, name="Centred")
    config = json.loads(json.dumps(oc.serialize(CenterAround(0.5))))
    assert config["class_name"] == "CenterAround"
    assert config["registered_name"] == "Centred"
    assert config["config"] == {"ref_value": 0.5}
    again = oc.deserialize(config)
    assert type(again) is CenterAround
    assert again.ref_value == 0.5
    np.testing.assert_array_equal(again(UNCENTERED), CENTERED)


# What Keras does and we do not.


def test_feasible_weights_do_not_shrink():
    steps = 10_000
    start = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    start *= (1e-3 / norms_of(start, 0)).astype(np.float32)
    tx = oc.project(oc.max_norm(1.0))

    @jax.jit
    def ours(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jnp.zeros_like(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    theirs = jax.jit(
        lambda params, steps: jax.lax.fori_loop(0, steps, lambda _, w: KC.MaxNorm(1.0)(w), params)
    )

    params, state = ours(start)
    assert state.updates_seen == steps
    np.testing.assert_array_equal(np.asarray(params).view(np.int32), start.view(np.int32))
    # A norm n loses n * 1e-7 / (n + 1e-7) on each step: very nearly 1e-7.
    np.testing.assert_allclose(norms_of(theirs(start, 1_000), 0), 9e-4, rtol=1e-3)
    np.testing.assert_allclose(norms_of(theirs(start, 5_000), 0), 5e-4, rtol=1e-3)
    assert np.all(norms_of(theirs(start, steps), 0) < 1e-5)


@pytest.mark.parametrize(
    ("value", "theirs"),
    # In float16 Keras' epsilon is the subnormal 2 ** -23, and a quotient by it is not the same
    # in every version of XLA.
    [(0.0, (np.nan, 0.0)), (300.0, (0.0,)), (1e-4, (np.inf, 1e-4 / 2**-23))],
    ids=["0", "300", "1e-4"],
)
def test_float16_units_have_norms_in_float32(value, theirs):
    w = jnp.full((4, 3), value, jnp.float16)
    result = np.asarray(KC.UnitNorm()(w), np.float32)
    assert any(np.allclose(result, wanted, rtol=2e-3, equal_nan=True) for wanted in theirs)

    result = oc.unit_norm()(w)
    assert result.dtype == jnp.float16
    # Four equal entries of a unit vector are a half each, and zeros have no direction.
    wanted = 0.0 if value == 0 else 0.5
    np.testing.assert_array_equal(result, np.full((4, 3), wanted))


def test_float16_bounds_hold_where_squares_overflow_or_vanish():
    huge, tiny = jnp.full((4, 1), 300.0, jnp.float16), jnp.full((4, 1), 1e-4, jnp.float16)
    np.testing.assert_array_equal(KC.MaxNorm(1.0)(huge), np.zeros((4, 1)))
    np.testing.assert_array_equal(oc.max_norm(1.0)(huge), np.full((4, 1), 0.5))
    np.testing.assert_array_equal(KC.MaxNorm(1.0)(tiny), np.zeros((4, 1)))
    np.testing.assert_array_equal(oc.max_norm(1.0)(tiny), tiny)


@pytest.mark.parametrize(
    ("name", "arguments", "norm"),
    [("MaxNorm", {"max_value": 2.0}, 2.0), ("UnitNorm", {}, 1.0)],
)
def test_huge_float32_units_are_not_lost(name, arguments, norm):
    w = np.full((4, 2), 1e20, np.float32)
    np.testing.assert_array_equal(getattr(KC, name)(**arguments)(w), np.zeros((4, 2)))
    result = getattr(oc, name)(**arguments)(w)
    assert result.dtype == jnp.float32
    # Four equal entries: each is half the norm.
    np.testing.assert_allclose(result, np.full((4, 2), norm / 2), rtol=1e-6)


def test_a_huge_step_does_not_lose_float32_units():
    params = {"kernel": jnp.ones((4, 2), jnp.float32)}
    tx = oc.project({"kernel": oc.max_norm(2.0)})
    huge = jax.tree.map(lambda p: jnp.full_like(p, 1e20), params)
    updates, _ = tx.update(huge, tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], np.ones((4, 2)), rtol=1e-6)


@pytest.mark.parametrize("bound", [-1, -1.0, -1e-30, float("nan")])
def test_a_negative_bound_is_an_error(bound):
    with pytest.raises(ValueError, match=rf"MaxNorm: max_value={bound}.*at least 0"):
        oc.max_norm(bound)
    with pytest.raises(ValueError, match=rf"MinMaxNorm: max_value={bound}.*at least 0"):
        oc.min_max_norm(0.0, bound)
    with pytest.raises(ValueError, match=rf"MinMaxNorm: min_value={bound}.*at least 0"):
        oc.min_max_norm(bound, 1.0)


def test_a_negative_bound_flips_signs_in_keras():
    w = np.array([[3.0], [-4.0]], np.float32)
    result = np.asarray(KC.MaxNorm(-1.0)(w))
    np.testing.assert_array_equal(np.sign(result), -np.sign(w))
