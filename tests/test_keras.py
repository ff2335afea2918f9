"""The sets in models of Keras on its JAX backend: saved, loaded, cloned, trained and refused."""

import functools
import json
import math
import os
import re
import subprocess
import sys
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import CASES
from flax import linen as nn
from keras import layers

import optax_constraints as oc
import optax_constraints.keras
from optax_constraints.flax import linen as cl

# With NumPy 2.4 Keras' own saving and loading warn of how arrays are copied.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def variable(shape=(5, 4), name="kernel") -> keras.Variable:
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return keras.Variable(w, name=name)


def through_keras(constraint: Any) -> Any:
    """What comes back of a set from the JSON text in a `.keras` file."""
    return keras.constraints.deserialize(
        json.loads(json.dumps(keras.constraints.serialize(constraint)))
    )


# Each set.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_set_comes_back_from_a_config_and_takes_variables(case):
    set_, w = case.constraint, variable(case.shape)
    again = through_keras(set_)
    assert type(again) is type(set_)
    assert oc.serialize(again) == oc.serialize(set_)
    if set_.remembers and not set_.starts_anew:
        with pytest.raises(ValueError, match=r"on 'kernel' of shape .* is relative to the weights"):
            w.constraint = again
        return
    w.constraint = again
    held: Any = w.constraint
    found = jax.eval_shape(lambda: held(w))
    assert (found.shape, found.dtype) == (case.shape, jnp.float32)


def test_the_result_is_that_for_an_array():
    w = variable()
    for constraint in (oc.simplex(), oc.non_neg(), oc.max_norm(0.5), oc.orthogonal()):
        w.constraint = constraint
        np.testing.assert_array_equal(w.constraint(w), constraint(w.value))


def test_names_of_keras_still_mean_its_own_classes():
    assert type(keras.constraints.get("max_norm")) is keras.constraints.MaxNorm
    theirs = keras.constraints.serialize(keras.constraints.MaxNorm(3))
    assert type(keras.constraints.deserialize(theirs)) is keras.constraints.MaxNorm


def test_what_is_no_set_of_ours_is_left_to_keras():
    w = variable()
    for constraint in (keras.constraints.NonNeg(), jnp.abs, None):
        w.constraint = constraint
        assert w.constraint is constraint
    with pytest.raises(ValueError, match="Expected a callable"):
        w.constraint = "simplex"


# Models.


def data(features=6, outputs=4, n=64):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, features)).astype(np.float32)
    return x, np.tanh(x @ rng.normal(size=(features, outputs)).astype(np.float32))


SHARED = oc.soft(oc.unit_norm(), 0.5)
MASK = np.tri(8, 4, dtype=bool)


def model() -> Any:
    keras.utils.set_random_seed(0)
    made = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "tanh", kernel_constraint=oc.simplex(), bias_constraint=oc.non_neg()),
            layers.Dense(8, "tanh", kernel_constraint=SHARED, bias_constraint=oc.box(-np.inf, 0.0)),
            layers.Dense(4, kernel_constraint=oc.mask(MASK), bias_constraint=SHARED),
        ]
    )
    made.compile(keras.optimizers.Adam(0.05), loss="mse")
    return made


def fit(made: Any, epochs: int) -> Any:
    made.fit(*data(), batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return made


def check(made: Any) -> None:
    first, second, third = ([np.asarray(v.value) for v in layer.variables] for layer in made.layers)
    np.testing.assert_allclose(first[0].sum(0), 1, atol=1e-6)
    assert first[0].min() >= 0
    assert first[1].min() >= 0
    assert second[1].max() <= 0
    assert not np.any(third[0][~MASK])
    assert np.any(third[0][MASK])


def test_models_train_save_load_clone_and_train_on(tmp_path):
    trained = fit(model(), 2)
    check(trained)
    trained.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    cloned: Any = keras.models.clone_model(loaded)
    for copy in (loaded, cloned):
        for ours, theirs in zip(trained.layers, copy.layers, strict=True):
            assert theirs.kernel_constraint == ours.kernel_constraint
            assert theirs.bias_constraint == ours.bias_constraint
            assert theirs.kernel.constraint == ours.kernel.constraint
    cloned.set_weights(loaded.get_weights())
    cloned.compile(keras.optimizers.Adam(0.05), loss="mse")
    check(fit(cloned, 1))

    # The optimizer's moments were saved, too, so that both go on alike.
    fit(loaded, 2)
    fit(trained, 2)
    check(loaded)
    for one, other in zip(trained.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(one.value, other.value)


@oc.register
@keras.saving.register_keras_serializable("tests")
class EvenColumns(oc.Constraint):
    """A set of a user's own: all columns alike."""

    def __call__(self, w, /):
        return jnp.broadcast_to(jnp.mean(w, 1, keepdims=True), w.shape)


def test_a_set_of_ones_own():
    for constraint in (EvenColumns(), oc.soft(EvenColumns(), 0.5)):
        assert type(through_keras(constraint)) is type(constraint)
    w = variable()
    w.constraint = EvenColumns()
    np.testing.assert_allclose(w.constraint(w), EvenColumns()(w.value))


# What cannot hold in Keras.


@pytest.mark.parametrize(
    ("constraint", "message"),
    [
        (oc.fixed_norm("init"), r"^FixedNorm\('init'\) on 'dense.*/kernel' of shape \(6, 4\) is "
         r"relative to the weights at init.*Write a number"),
        (oc.soft(oc.max_norm("2x init"), 0.5), r"relative to the weights at init"),
        (oc.around(oc.max_norm(1.0)), r"relative to the weights at init"),
        (oc.max_norm(oc.arg("cap")), r"MaxNorm\(arg\('cap'\)\).*weights alone.*Write a number"),
        (oc.soft(oc.max_norm(optax.linear_schedule(1.0, 2.0, 5)), 0.5), r"no step for a schedule"),
        (oc.max_norm(1.0, axis=2), r"axis 2 is out of range"),
        (oc.nm(2, 5, axis=0), r"'dense.*/kernel' of shape \(6, 4\)"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_hold_is_refused_where_the_layer_is_built(constraint, message):
    layer = layers.Dense(4, kernel_constraint=constraint)
    with pytest.raises(ValueError, match=message):
        layer.build((None, 6))


def test_what_starts_anew_needs_no_memory():
    layer = layers.Dense(4, kernel_constraint=oc.fixed_spectral_norm(1.0))
    layer.build((None, 6))
    kernel: Any = layer.kernel
    norm = np.linalg.norm(np.asarray(kernel.constraint(kernel)), 2)
    assert norm == pytest.approx(1.0, rel=1e-5)


def test_fan_in_is_settled_where_a_name_tells_it():
    layer: Any = layers.Dense(4, kernel_constraint=oc.max_norm("sqrt(fan_in)", axis="fan_in"))
    layer.build((None, 6))
    kernel: Any = layer.kernel
    assert kernel.constraint.axis == (0,)
    assert float(kernel.constraint.max_value) == pytest.approx(math.sqrt(6))
    assert layer.kernel_constraint.axis == "fan_in"
    embedding: Any = layers.Embedding(7, 3, embeddings_constraint=oc.unit_norm(axis="fan_in"))
    embedding.build()
    table: Any = embedding.embeddings
    assert table.constraint.axis == (1,)


@pytest.mark.parametrize("make", [layers.Conv2D, layers.Conv2DTranspose, layers.DepthwiseConv2D])
def test_fan_in_of_a_convolution_is_not_guessed(make):
    name = "depthwise" if make is layers.DepthwiseConv2D else "kernel"
    layer = make(3, 3, **{f"{name}_constraint": oc.max_norm(axis="fan_in")})
    with pytest.raises(ValueError, match=r"layer of Keras. Write the axes.*axis=\(0, 1, 2\) for a"):
        layer.build((None, 8, 8, 2))


OTHER = """
import keras, numpy
import optax_constraints as oc
import optax_constraints.keras
print(oc.serialize(oc.max_norm())["module"])
keras.layers.Dense(3, kernel_constraint=keras.constraints.MaxNorm()).build((None, 2))
keras.layers.Dense(3, kernel_constraint=oc.max_norm()).build((None, 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "error"),
    [
        ("numpy", r"ValueError: MaxNorm\(2\) on 'dense_1/kernel' of shape \(2, 3\): .* Keras' "
         r"backend is 'numpy'. Set the environment variable KERAS_BACKEND to 'jax'"),
        # What Keras takes if nobody says so is TensorFlow, which is not here.
        ("", r"ImportError: Keras' backend, .* not installed.*KERAS_BACKEND to 'jax'"),
    ],
)  # fmt: skip
def test_another_backend_is_told_what_works(backend, error):
    environment = {**os.environ, "KERAS_BACKEND": backend, "KERAS_HOME": "/nonexistent"}
    command = [sys.executable, "-c", OTHER if backend else OTHER.replace("import keras, numpy", "")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1
    assert run.stdout == ("keras.constraints\n" if backend else "")
    assert re.search(error, run.stderr.strip().splitlines()[-1]), run.stderr


# Published models, in Keras and in Flax, from the same weights on the same batches.

STEPS, BATCH = 60, 16


def batches(x, y):
    """Arrays whose leading axes are steps and batches, out of a data set seen over and over."""
    index = np.arange(STEPS * BATCH) % len(x)
    return x[index].reshape(STEPS, BATCH, *x.shape[1:]), y[index].reshape(
        STEPS, BATCH, *y.shape[1:]
    )


def fitted(made: Any, loss: Any, x, y, rate: float) -> Any:
    """The model after Keras' own training."""
    made.compile(keras.optimizers.SGD(rate, momentum=0.9), loss=loss)
    passes = STEPS * BATCH // len(x)
    made.fit(x, y, batch_size=BATCH, epochs=passes, shuffle=False, verbose=0)
    return made


def stepped(net: Any, variables: Any, rules: Any, loss: Any, x, y, rate: float) -> Any:
    """The variables after the same steps in Optax."""
    parts = [optax.sgd(rate, momentum=0.9)] + ([oc.project(rules)] if rules else [])
    tx = optax.chain(*parts)

    @jax.jit
    def run(variables, batches):
        def step(carry, batch):
            params, rest, state = carry
            x, y = batch

            def value(params):
                out, changed = net.apply({"params": params, **rest}, x, mutable=list(rest))
                return loss(out, y), changed

            grads, rest = jax.grad(value, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), rest, state), None

        params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}
        (params, rest, _), _ = jax.lax.scan(step, (params, rest, tx.init(params)), batches)
        return {"params": params, **rest}

    return run(variables, batches(x, y))


def furthest(a: Any, b: Any) -> float:
    """The largest difference between two trees; entries are 3 at most."""
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), a, b)))


def of(layer: Any) -> dict[Any, Any]:
    """The weights of a layer of Keras by the names that Flax has for them."""
    names = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
    return {names.get(v.name, v.name): np.array(v.value) for v in layer.variables}


# EEGNet: Lawhern et al. (2018), Journal of Neural Engineering 15, 056013. Without dropout, of
# which no two frameworks draw the same; logits in place of probabilities.

CHANNELS, SAMPLES, F1, D, F2, CLASSES = 8, 64, 4, 2, 8, 4


def eegnet_in_keras() -> Any:
    return keras.Sequential(
        [
            keras.Input((CHANNELS, SAMPLES, 1)),
            layers.Conv2D(F1, (1, 16), padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(
                (CHANNELS, 1),
                depth_multiplier=D,
                use_bias=False,
                depthwise_constraint=oc.max_norm(1.0),
            ),
            layers.BatchNormalization(),
            layers.Activation("elu"),
            layers.AveragePooling2D((1, 4)),
            layers.SeparableConv2D(F2, (1, 16), padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("elu"),
            layers.AveragePooling2D((1, 8)),
            layers.Flatten(),
            layers.Dense(CLASSES, kernel_constraint=oc.max_norm(0.25)),
        ]
    )


class EEGNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm(name):
            return nn.BatchNorm(False, momentum=0.99, epsilon=1e-3, name=name)

        def conv(features, window, groups, name, padding="SAME"):
            return nn.Conv(
                features,
                window,
                padding=padding,
                feature_group_count=groups,
                use_bias=False,
                name=name,
            )

        x = norm("norm_0")(conv(F1, (1, 16), 1, "temporal")(x))
        x = norm("norm_1")(conv(F1 * D, (CHANNELS, 1), F1, "spatial", "VALID")(x))
        x = nn.avg_pool(nn.elu(x), (1, 4), (1, 4))
        x = conv(F2, (1, 1), 1, "pointwise")(conv(F1 * D, (1, 16), F1 * D, "depthwise")(x))
        x = nn.avg_pool(nn.elu(norm("norm_2")(x)), (1, 8), (1, 8))
        return nn.Dense(CLASSES, name="head")(x.reshape(len(x), -1))


def eegnet_in_flax(made: Any) -> Any:
    """The variables of the model in Keras as those of the one in Flax."""
    weights = [of(layer) for layer in made.layers if layer.weights]
    temporal, norm_0, spatial, norm_1, separable, norm_2, head = weights
    depthwise, pointwise = separable["depthwise_kernel"], separable["pointwise_kernel"]
    norms = {"norm_0": norm_0, "norm_1": norm_1, "norm_2": norm_2}
    params = {
        "temporal": temporal,
        "spatial": {"kernel": spatial["kernel"].reshape(CHANNELS, 1, 1, F1 * D)},
        "depthwise": {"kernel": depthwise.reshape(1, 16, 1, F1 * D)},
        "pointwise": {"kernel": pointwise},
        "head": head,
    }

    def pick(*names):
        return {key: {name: own[name] for name in names} for key, own in norms.items()}

    return {"params": params | pick("scale", "bias"), "batch_stats": pick("mean", "var")}


def trials():
    """Sources of four classes that oscillate, each seen by all channels, and noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(160) % CLASSES
    t = np.arange(SAMPLES) / SAMPLES
    waves = np.sin(2 * np.pi * (3 + 4 * labels[:, None]) * t + rng.uniform(0, 6, (160, 1)))
    seen = rng.normal(size=(CHANNELS, CLASSES))[:, labels].T[..., None] * waves[:, None]
    return (seen + rng.normal(size=seen.shape)).astype(np.float32)[..., None], labels


@pytest.mark.slow
def test_eegnet_is_the_same_in_keras_and_in_flax():
    keras.utils.set_random_seed(0)
    made, (x, y) = eegnet_in_keras(), trials()
    start = eegnet_in_flax(made)
    rules = {
        "spatial/kernel": oc.max_norm(1.0),
        "head/kernel": oc.max_norm(0.25),
    }
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    theirs = eegnet_in_flax(fitted(made, cross_entropy, x, y, 0.2))

    def loss(logits, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    ours = stepped(EEGNet(), start, rules, loss, x, y, 0.2)
    # Rounding of 60 steps, by 1e-6 when this was written. The bias before the second convolution
    # has no influence, and is rounding alone.
    assert furthest(ours, theirs) < 1e-5
    assert furthest(stepped(EEGNet(), start, None, loss, x, y, 0.2), theirs) > 0.05
    for name, bound in (("spatial", 1.0), ("head", 0.25)):
        norms = np.linalg.norm(ours["params"][name]["kernel"], axis=0)
        assert np.max(norms) == pytest.approx(bound, rel=1e-6)


# An input-convex network that learns the entropy of moments: Schotthöfer et al. (2022), ICML, in
# the form of Amos et al. (2017). Weights of what comes from a layer before are not negative.

WIDTH, HIDDEN = 10, 3


def convex_in_keras() -> Any:
    free = keras.initializers.RandomUniform(-0.5, 0.5, seed=0)
    positive = keras.initializers.RandomUniform(0.0, 0.5, seed=1)
    x = keras.Input((3,))
    z = layers.Dense(WIDTH, "softplus", kernel_initializer=free, name="first")(x)
    for i in range(HIDDEN + 1):
        units = WIDTH if i < HIDDEN else 1
        from_z = layers.Dense(
            units, kernel_initializer=positive, kernel_constraint=oc.non_neg(), name=f"z_{i}"
        )
        from_x = layers.Dense(units, use_bias=False, kernel_initializer=free, name=f"x_{i}")
        z = layers.Add()([from_z(z), from_x(x)])
        z = layers.Activation("softplus")(z) if i < HIDDEN else z
    return keras.Model(x, z)


class Convex(nn.Module):
    @nn.compact
    def __call__(self, x):
        z = nn.softplus(nn.Dense(WIDTH, name="first")(x))
        for i in range(HIDDEN + 1):
            units = WIDTH if i < HIDDEN else 1
            from_z = cl.Dense(units, kernel_constraint=oc.non_neg(), name=f"z_{i}")
            z = from_z(z) + nn.Dense(units, use_bias=False, name=f"x_{i}")(x)
            z = nn.softplus(z) if i < HIDDEN else z
        return z


def convex_in_flax(made: Any) -> Any:
    return {"params": {layer.name: of(layer) for layer in made.layers if layer.weights}}


@pytest.mark.slow
def test_an_input_convex_network_is_the_same_in_keras_and_in_flax():
    made = convex_in_keras()
    start = convex_in_flax(made)
    x = np.random.default_rng(0).uniform(0.1, 1, size=(160, 3)).astype(np.float32)
    y = np.sum(x * np.log(x), axis=1, keepdims=True)
    theirs = convex_in_flax(fitted(made, "mse", x, y, 3e-4))

    def loss(out, y):
        return jnp.mean(jnp.square(out - y))

    rules = cl.declared(Convex(), x)
    ours = stepped(Convex(), start, rules, loss, x, y, 3e-4)
    assert furthest(ours, theirs) < 1e-5
    assert furthest(stepped(Convex(), start, None, loss, x, y, 3e-4), theirs) > 0.05
    assert any(np.any(ours["params"][f"z_{i}"]["kernel"] == 0) for i in range(HIDDEN + 1))
    # It is convex: nowhere above the chord.
    a, b = x[:80], x[80:]
    out: Any = functools.partial(Convex().apply, ours)
    assert np.all(out((a + b) / 2) <= (out(a) + out(b)) / 2 + 1e-6)
