"""Networks trained under constraints that their layers declare, or that rules give by path."""

import dataclasses
import functools
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import optax_constraints as oc
from optax_constraints.flax import linen as cl
from optax_constraints.flax import nnx as cx

# Keras' annotations are inferred from its defaults, and would have whole numbers as bounds.
KC: Any = keras.constraints

BATCH, STEPS, CHUNKS = 64, 240, 4
TOLERANCE = 2e-6


class Within(NamedTuple):
    """What a test knows of a leaf: the axes of a unit, and the interval of its norm."""

    axes: tuple[int, ...]
    low: float
    high: float

    def outside(self, w, np=np):
        """How far the worst unit is outside, relative to its bound."""
        n = np.sqrt(np.sum(np.square(w), axis=self.axes))
        below = 1 - n / self.low if self.low else np.zeros_like(n)
        return np.max(np.maximum(n / self.high - 1, below))

    def at_bound(self, w):
        """The share of units at a bound."""
        n = np.sqrt(np.sum(np.square(w), axis=self.axes))
        return np.mean((n > self.high * (1 - 1e-4)) | (n < self.low * (1 + 1e-4)))


class NotNegative(NamedTuple):
    """What a test knows of a leaf without negative entries."""

    def outside(self, w, np=np):
        """The lowest entry, if it is negative. Nothing is lost to rounding here."""
        return np.where(np.min(w) < 0, 1.0 - np.min(w), 0.0)


def at_most(high, *axes):
    return Within(axes, 0, high)


def unit(*axes):
    return Within(axes, 1, 1)


Limits = Mapping[str, Within | NotNegative]


def by_path(params) -> dict[str, Any]:
    """The arrays by their path, read without the library."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value"): w
        for keys, w in found
    }


def limited(params, limits: Limits):
    """Each array that has a limit, with its path; each limit has one, or this raises."""
    arrays = by_path(params)
    for pattern, limit in limits.items():
        paths = [path for path in arrays if re.fullmatch(pattern, path)]
        assert paths, (pattern, list(arrays))
        for path in paths:
            yield path, arrays[path], limit


def outside(params, limits: Limits):
    """How far the worst leaf is outside, by path, inside jit."""
    return {path: limit.outside(w, jnp) for path, w, limit in limited(params, limits)}


@dataclasses.dataclass(frozen=True)
class Model:
    """A network as functions: its parameters, its loss, and what its layers declare."""

    params: Any
    rest: Any
    """Whatever else is carried along: batch statistics."""
    loss: Callable[[Any, Any, Any], tuple[jax.Array, Any]]
    """Parameters, rest and a batch -> the loss and the new rest."""
    predict: Callable[[Any, Any, Any], Any]
    rules: Any
    layout: Any
    limits: Limits


class Trained(NamedTuple):
    """What a training came to."""

    params: Any
    rest: Any
    losses: np.ndarray


def train(model: Model, batches, optimizer) -> Trained:
    """Trains in chunks of a scan; asserts that constraints hold and bind on the way."""
    limits = model.limits
    projection = oc.project(model.rules, layout=model.layout)
    grad = jax.value_and_grad(model.loss, has_aux=True)

    def step(carry, batch):
        params, rest, state, projection_state = carry
        (loss, rest), gradient = grad(params, rest, batch)
        updates, state = optimizer.update(gradient, state, params)
        # As optax.chain does it, with a look between the two.
        before = outside(optax.apply_updates(params, updates), limits)
        updates, projection_state = projection.update(updates, projection_state, params)
        params = optax.apply_updates(params, updates)
        return (params, rest, state, projection_state), (loss, before, outside(params, limits))

    @jax.jit
    def chunk(carry, batches):
        return jax.lax.scan(step, carry, batches)

    params = oc.constrain(model.params, model.rules, layout=model.layout)
    carry = params, model.rest, optimizer.init(params), projection.init(params)
    steps = len(jax.tree.leaves(batches)[0])
    losses, pulled = [], dict.fromkeys(outside(params, limits), 0.0)
    for part in range(CHUNKS):
        some = slice(part * steps // CHUNKS, (part + 1) * steps // CHUNKS)
        carry, (loss, before, after) = chunk(carry, jax.tree.map(lambda a, s=some: a[s], batches))
        losses.append(np.asarray(loss))
        for path in pulled:
            assert np.max(after[path]) <= TOLERANCE, (path, np.max(after[path]))
            pulled[path] = max(pulled[path], float(np.max(before[path])))
        check(carry[0], limits)
    # Without the constraint, the optimizer would have left each set.
    for path, worst in pulled.items():
        assert worst > 1e-3, (path, worst)
    return Trained(carry[0], carry[1], np.concatenate(losses))


def check(params, limits: Limits) -> None:
    """Asserts in float64 that each leaf is in its set."""
    for path, w, limit in limited(params, limits):
        assert limit.outside(np.asarray(w, np.float64)) <= TOLERANCE, path


def check_at_bound(params, limits: Limits) -> None:
    """Asserts that each set of norms holds some unit at its boundary."""
    for path, w, limit in limited(params, limits):
        if isinstance(limit, Within):
            assert limit.at_bound(np.asarray(w, np.float64)) > 0, path


# Data.


@functools.cache
def digits():
    """Handwritten digits, 8 x 8 pixels: training and test images and labels."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / 16).astype(np.float32).reshape(-1, 8, 8)
    y = y[order].astype(np.int32)
    return (x[:1347], y[:1347]), (x[1347:], y[1347:])


def batches_of(x, y, steps=STEPS, batch=BATCH):
    """Batches drawn at random, steps of them."""
    rng = np.random.default_rng(1)
    index = rng.integers(len(x), size=(steps, batch))
    return x[index], y[index]


def classified(predict):
    """A loss for `Model`: cross-entropy of logits."""

    def loss(params, rest, batch):
        x, y = batch
        logits, rest = predict(params, rest, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), rest

    return loss


def accuracy(model: Model, trained: Trained, x, y) -> float:
    logits = model.predict(trained.params, trained.rest, x)
    return float(np.mean(np.argmax(logits, -1) == y))


def linen_model(net, x, limits, make_loss=classified) -> Model:
    """A Linen module, with or without batch statistics; it takes train=."""
    variables = net.init(jax.random.key(0), x[:2], train=True)
    rest = {name: part for name, part in variables.items() if name != "params"}

    def apply(params, rest, x):
        logits, changed = net.apply({"params": params, **rest}, x, train=True, mutable=list(rest))
        return logits, changed

    return Model(
        variables["params"],
        rest,
        make_loss(apply),
        jax.jit(lambda params, rest, x: net.apply({"params": params, **rest}, x, train=False)),
        cl.declared(net, x[:2], train=True),
        cl.layout(net, x[:2], train=True),
        limits,
    )


def nnx_model(net, limits, make_loss=classified) -> Model:
    """An NNX module as functions of its parameters."""
    graph, params, rest = nnx.split(net, nnx.Param, ...)

    def apply(params, rest, x):
        net = nnx.clone(nnx.merge(graph, params, rest))  # Statistics of its own, to write on.
        net.train()
        logits = net(x)
        return logits, nnx.state(net, nnx.Not(nnx.Param))

    @jax.jit
    def predict(params, rest, x):
        net = nnx.clone(nnx.merge(graph, params, rest))
        net.eval()
        return net(x)

    return Model(params, rest, make_loss(apply), predict, cx.declared(net), cx.layout(net), limits)


def check_digits(model: Model, bar: float, optimizer, steps=STEPS) -> Trained:
    """Trains on digits, and asserts that it learns them at its bounds."""
    (x, y), (test_x, test_y) = digits()
    trained = train(model, batches_of(x, y, steps), optimizer)
    assert np.mean(trained.losses[-20:]) < 0.4 * np.mean(trained.losses[:5])
    assert accuracy(model, trained, test_x, test_y) > bar
    check_at_bound(trained.params, model.limits)
    return trained


# A convolutional network with batch normalisation.


CONV = oc.max_norm(1.0, axis="fan_in")
SCALE = oc.min_max_norm(2.0, 2.0)
CLASSIFIER = oc.min_max_norm(0.5, 2.0)


class LinenCNN(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = x[..., None]
        for features in (8, 16):
            x = cl.Conv(features, (3, 3), kernel_constraint=CONV, bias_constraint="non_neg")(x)
            x = cl.BatchNorm(not train, momentum=0.9, scale_constraint=SCALE)(x)
            x = nn.avg_pool(nn.relu(x), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        return cl.Dense(10, kernel_constraint=CLASSIFIER, bias_constraint=oc.non_neg())(x)


class NNXCNN(nnx.Module):
    def __init__(self, rngs):
        def conv(features_in, features):
            return cx.Conv(
                features_in,
                features,
                (3, 3),
                kernel_constraint=CONV,
                bias_constraint="non_neg",
                rngs=rngs,
            )

        def norm(features):
            return cx.BatchNorm(features, momentum=0.9, scale_constraint=SCALE, rngs=rngs)

        self.Conv_0, self.Conv_1 = conv(1, 8), conv(8, 16)
        self.BatchNorm_0, self.BatchNorm_1 = norm(8), norm(16)
        self.Dense_0 = cx.Linear(
            64, 10, kernel_constraint=CLASSIFIER, bias_constraint=oc.non_neg(), rngs=rngs
        )

    def __call__(self, x):
        x = x[..., None]
        for conv, norm in ((self.Conv_0, self.BatchNorm_0), (self.Conv_1, self.BatchNorm_1)):
            x = nnx.avg_pool(nnx.relu(norm(conv(x))), (2, 2), (2, 2))
        return self.Dense_0(x.reshape(len(x), -1))


CNN_LIMITS: Limits = {
    r"Conv_\d/kernel": at_most(1.0, 0, 1, 2),
    r"BatchNorm_\d/scale": Within((0,), 2.0, 2.0),
    "Dense_0/kernel": Within((0,), 0.5, 2.0),
    r"(Conv|Dense)_\d/bias": NotNegative(),
}


@pytest.mark.slow
def test_cnn_in_linen():
    (x, _), _ = digits()
    check_digits(linen_model(LinenCNN(), x, CNN_LIMITS), 0.93, optax.adam(0.01))


@pytest.mark.slow
def test_cnn_in_nnx():
    check_digits(nnx_model(NNXCNN(nnx.Rngs(0)), CNN_LIMITS), 0.93, optax.adam(0.01))


@pytest.mark.slow
def test_cnn_with_a_train_state():
    (x, y), (test_x, test_y) = digits()
    net = LinenCNN()
    model = linen_model(net, x, CNN_LIMITS)
    state = cl.TrainState.create(
        apply_fn=net.apply,
        params=model.params,
        tx=optax.adam(0.01),
        rules=model.rules,
        layout=model.layout,
    )

    def step(carry, batch):
        state, rest = carry
        (loss, rest), gradient = jax.value_and_grad(model.loss, has_aux=True)(
            state.params, rest, batch
        )
        state = state.apply_gradients(grads=gradient)
        return (state, rest), (loss, outside(state.params, CNN_LIMITS))

    (state, rest), (losses, after) = jax.jit(lambda *args: jax.lax.scan(step, *args))(
        (state, model.rest), batches_of(x, y, 120)
    )
    assert int(state.step) == 120
    assert max(float(np.max(w)) for w in after.values()) <= TOLERANCE
    check(state.params, CNN_LIMITS)
    check_at_bound(state.params, CNN_LIMITS)
    trained = Trained(state.params, rest, np.asarray(losses))
    assert accuracy(model, trained, test_x, test_y) > 0.9


@pytest.mark.slow
def test_cnn_with_an_nnx_optimizer():
    (x, y), (test_x, test_y) = digits()
    net = NNXCNN(nnx.Rngs(0))
    optimizer = cx.Optimizer(net, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer, x, y):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), y).mean()

        value, gradient = nnx.value_and_grad(loss)(net)
        optimizer.update(net, gradient)
        return value, outside(nnx.state(net, nnx.Param), CNN_LIMITS)

    net.train()
    for batch in zip(*batches_of(x, y, 120), strict=True):
        _, after = step(net, optimizer, *batch)
        assert max(map(float, after.values())) <= TOLERANCE
    net.eval()
    check(nnx.state(net, nnx.Param), CNN_LIMITS)
    check_at_bound(nnx.state(net, nnx.Param), CNN_LIMITS)
    assert np.mean(np.argmax(net(test_x), -1) == test_y) > 0.9


# A transformer over the rows of an image, whose blocks are one stack.


DEPTH, WIDTH, HEADS = 3, 16, 2
ATTENTION = oc.max_norm(0.8, axis="fan_in")
HIDDEN = oc.unit_norm(axis="fan_in")


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = cl.LayerNorm(scale_constraint=oc.non_neg())(x)
        y = cl.MultiHeadDotProductAttention(HEADS, kernel_constraint=ATTENTION, name="attention")(y)
        x = x + y
        y = nn.gelu(cl.Dense(2 * WIDTH, kernel_constraint=HIDDEN)(x))
        return x + cl.Dense(WIDTH, kernel_constraint=HIDDEN)(y), None


class LinenTransformer(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = cl.Dense(WIDTH, kernel_constraint=ATTENTION, name="embed")(x)
        x = x + self.param("position", nn.initializers.normal(0.1), x.shape[1:])
        blocks = nn.scan(
            LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=DEPTH
        )
        x, _ = blocks(name="blocks")(x, None)
        return nn.Dense(10, name="head")(x.mean(1))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.LayerNorm_0 = cx.LayerNorm(WIDTH, scale_constraint=oc.non_neg(), rngs=rngs)
        self.attention = cx.MultiHeadAttention(
            HEADS, WIDTH, decode=False, kernel_constraint=ATTENTION, rngs=rngs
        )
        self.Dense_0 = cx.Linear(WIDTH, 2 * WIDTH, kernel_constraint=HIDDEN, rngs=rngs)
        self.Dense_1 = cx.Linear(2 * WIDTH, WIDTH, kernel_constraint=HIDDEN, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.LayerNorm_0(x))
        return x + self.Dense_1(nnx.gelu(self.Dense_0(x)))


class NNXTransformer(nnx.Module):
    def __init__(self, rngs):
        self.embed = cx.Linear(8, WIDTH, kernel_constraint=ATTENTION, rngs=rngs)
        self.position = nnx.Param(0.1 * rngs.params.normal((8, WIDTH), jnp.float32))
        self.blocks = nnx.split_rngs(splits=DEPTH)(nnx.vmap(NNXBlock))(rngs)
        self.head = nnx.Linear(WIDTH, 10, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(block, x):
            return block(x)

        x = self.embed(x) + self.position[...]
        return self.head(forward(self.blocks, x).mean(1))


TRANSFORMER_LIMITS: Limits = {
    "embed/kernel": at_most(0.8, 0),
    # (block, in, heads, depth): a unit for each block, head and feature.
    "blocks/attention/(query|key|value)/kernel": at_most(0.8, 1),
    # (block, heads, depth, out)
    "blocks/attention/out/kernel": at_most(0.8, 1, 2),
    r"blocks/Dense_\d/kernel": unit(1),
}


def check_transformer(model: Model) -> None:
    shapes = {path: w.shape for path, w in by_path(model.params).items()}
    assert shapes["blocks/attention/query/kernel"] == (DEPTH, WIDTH, HEADS, WIDTH // HEADS)
    assert shapes["blocks/attention/out/kernel"] == (DEPTH, HEADS, WIDTH // HEADS, WIDTH)
    assert shapes["blocks/Dense_0/kernel"] == (DEPTH, WIDTH, 2 * WIDTH)
    for path, w, limit in limited(model.params, TRANSFORMER_LIMITS):
        # More than one unit: the axes are not those of the whole leaf.
        assert len(limit.axes) < w.ndim, path
    stacked = {path for path, rule in model.rules.items() if isinstance(rule, oc.Stacked)}
    assert stacked == {path for path in model.rules if path.startswith("/blocks/")}
    assert len(stacked) == 4 + 2 + 1
    trained = check_digits(model, 0.9, optax.adam(0.005), steps=300)
    assert np.all(np.asarray(by_path(trained.params)["blocks/LayerNorm_0/scale"]) >= 0)


@pytest.mark.slow
def test_transformer_in_linen():
    (x, _), _ = digits()
    check_transformer(linen_model(LinenTransformer(), x, TRANSFORMER_LIMITS))


@pytest.mark.slow
def test_transformer_in_nnx():
    check_transformer(nnx_model(NNXTransformer(nnx.Rngs(0)), TRANSFORMER_LIMITS))


# A compact network for electroencephalograms: convolutions over time and over electrodes.


DEPTHWISE = oc.max_norm(0.7, axis="fan_in")
EEG_CLASSIFIER = oc.max_norm(0.25, axis="fan_in")
ELECTRODES, TIMES = 8, 64


@functools.cache
def eeg():
    """Oscillations in noise: three classes differ in frequency and in where they are seen."""
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=900)
    time = np.arange(TIMES) / TIMES
    wave = np.sin(2 * np.pi * (np.array([4, 8, 8])[y, None] * time + rng.uniform(size=(900, 1))))
    place = rng.normal(size=(2, ELECTRODES))[np.array([0, 0, 1])[y]]
    x = 0.5 * place[:, :, None] * wave[:, None] + rng.normal(size=(900, ELECTRODES, TIMES))
    x, y = x.astype(np.float32), y.astype(np.int32)
    return (x[:700], y[:700]), (x[700:], y[700:])


class LinenEEG(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (1, 16), use_bias=False, name="temporal")(x[..., None])
        x = cl.Conv(
            8,
            (ELECTRODES, 1),
            padding="VALID",
            feature_group_count=4,
            use_bias=False,
            kernel_constraint=DEPTHWISE,
            name="spatial",
        )(x)
        x = nn.avg_pool(nn.elu(x), (1, 4), (1, 4))
        x = cl.Conv(
            8, (1, 8), feature_group_count=8, kernel_constraint=DEPTHWISE, name="depthwise"
        )(x)
        x = nn.Conv(8, (1, 1), name="pointwise")(x)
        x = nn.avg_pool(nn.elu(x), (1, 4), (1, 4))
        x = x.reshape(len(x), -1)
        return cl.Dense(3, kernel_constraint=EEG_CLASSIFIER, name="classifier")(x)


class NNXEEG(nnx.Module):
    def __init__(self, rngs):
        self.temporal = nnx.Conv(1, 4, (1, 16), use_bias=False, rngs=rngs)
        self.spatial = cx.Conv(
            4,
            8,
            (ELECTRODES, 1),
            padding="VALID",
            feature_group_count=4,
            use_bias=False,
            kernel_constraint=DEPTHWISE,
            rngs=rngs,
        )
        self.depthwise = cx.Conv(
            8, 8, (1, 8), feature_group_count=8, kernel_constraint=DEPTHWISE, rngs=rngs
        )
        self.pointwise = nnx.Conv(8, 8, (1, 1), rngs=rngs)
        self.classifier = cx.Linear(TIMES // 16 * 8, 3, kernel_constraint=EEG_CLASSIFIER, rngs=rngs)

    def __call__(self, x):
        x = nnx.elu(self.spatial(self.temporal(x[..., None])))
        x = self.depthwise(nnx.avg_pool(x, (1, 4), (1, 4)))
        x = nnx.avg_pool(nnx.elu(self.pointwise(x)), (1, 4), (1, 4))
        return self.classifier(x.reshape(len(x), -1))


EEG_LIMITS: Limits = {
    "spatial/kernel": at_most(0.7, 0, 1, 2),
    "depthwise/kernel": at_most(0.7, 0, 1, 2),
    "classifier/kernel": at_most(0.25, 0),
}


def check_eeg(model: Model) -> None:
    (x, y), (test_x, test_y) = eeg()
    # A depthwise kernel has one input channel, and a unit for each output channel.
    shapes = {path: w.shape for path, w in by_path(model.params).items()}
    assert shapes["spatial/kernel"] == (ELECTRODES, 1, 1, 8)
    assert shapes["depthwise/kernel"] == (1, 8, 1, 8)
    trained = train(model, batches_of(x, y, batch=32), optax.adam(0.01))
    assert np.mean(trained.losses[-20:]) < 0.7 * np.mean(trained.losses[:5])
    assert accuracy(model, trained, test_x, test_y) > 0.9
    check_at_bound(trained.params, EEG_LIMITS)


@pytest.mark.slow
def test_depthwise_separable_in_linen():
    (x, _), _ = eeg()
    check_eeg(linen_model(LinenEEG(), x, EEG_LIMITS))


@pytest.mark.slow
def test_depthwise_separable_in_nnx():
    check_eeg(nnx_model(NNXEEG(nnx.Rngs(0)), EEG_LIMITS))


# A recurrent network over the rows of an image.


CELL: dict[str, Any] = {
    "kernel_constraint": oc.max_norm(1.1),
    "recurrent_kernel_constraint": oc.min_max_norm(0.2, 0.7),
    "bias_constraint": oc.non_neg(),
}


class LinenLSTM(nn.Module):
    cell: Any

    @nn.compact
    def __call__(self, x, train):
        x = nn.RNN(self.cell(24, **CELL, name="cell"))(x)
        return nn.Dense(10, name="head")(x[:, -1])


class NNXLSTM(nnx.Module):
    def __init__(self, cell, rngs):
        self.cell = cell(8, 24, **CELL, rngs=rngs)
        self.head = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.RNN(self.cell, rngs=nnx.Rngs(0))(x)[:, -1])


LSTM_LIMITS: Limits = {
    "cell/i[ifgo]_?/kernel": at_most(1.1, 0),
    "cell/h[ifgo]/kernel": Within((0,), 0.2, 0.7),
    "cell/h[ifgo]/bias": NotNegative(),
}


def check_lstm(model: Model) -> None:
    assert len(list(limited(model.params, LSTM_LIMITS))) == 12
    check_digits(model, 0.9, optax.adam(0.02))


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["LSTMCell", "OptimizedLSTMCell"])
def test_lstm_in_linen(cell):
    (x, _), _ = digits()
    check_lstm(linen_model(LinenLSTM(getattr(cl, cell)), x, LSTM_LIMITS))


@pytest.mark.slow
def test_lstm_in_nnx():
    check_lstm(nnx_model(NNXLSTM(cx.LSTMCell, nnx.Rngs(0)), LSTM_LIMITS))


# Two critics, which are one network mapped over its parameters.


class LinenCritic(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.tanh(cl.Dense(32, kernel_constraint="unit_norm")(x))
        return nn.Dense(1, name="value")(x)[..., 0]


class LinenCritics(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        critics = nn.vmap(
            LinenCritic,
            in_axes=None,
            axis_size=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return critics(name="critics")(x)


class NNXCritic(nnx.Module):
    def __init__(self, rngs):
        self.Dense_0 = cx.Linear(6, 32, kernel_constraint="unit_norm", rngs=rngs)
        self.Dense_1 = cx.Linear(32, 32, kernel_constraint="unit_norm", rngs=rngs)
        self.value = nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, x):
        return self.value(nnx.tanh(self.Dense_1(nnx.tanh(self.Dense_0(x)))))[..., 0]


class NNXCritics(nnx.Module):
    def __init__(self, rngs):
        self.critics = nnx.split_rngs(splits=2)(nnx.vmap(NNXCritic))(rngs)

    def __call__(self, x):
        return nnx.vmap(lambda critic, x: critic(x), in_axes=(0, None))(self.critics, x)


CRITIC_LIMITS: Limits = {r"critics/Dense_\d/kernel": unit(1)}


@functools.cache
def values():
    """Observations with actions, and what they are worth."""
    x = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
    y = np.sin(2 * x[:, 0]) * x[:, 1] + np.tanh(x[:, 2:].sum(1))
    return x, y.astype(np.float32)


def regressed(predict):
    def loss(params, rest, batch):
        x, y = batch
        value, rest = predict(params, rest, x)
        return jnp.mean((value - y) ** 2), rest

    return loss


def check_critics(model: Model) -> None:
    x, y = values()
    assert by_path(model.params)["critics/Dense_1/kernel"].shape == (2, 32, 32)
    trained = train(model, batches_of(x, y, 300), optax.adam(0.01))
    assert np.mean(trained.losses[-20:]) < 0.4 * np.mean(trained.losses[:5])
    both = model.predict(trained.params, trained.rest, x)
    assert both.shape == (2, len(x))
    # Each of the two has learned, by itself.
    assert np.all(np.mean((both - y) ** 2, axis=1) < 0.2 * np.var(y))
    assert np.mean((both[0] - both[1]) ** 2) > 1e-4


@pytest.mark.slow
def test_critics_in_linen():
    x, _ = values()
    check_critics(linen_model(LinenCritics(), x, CRITIC_LIMITS, regressed))


@pytest.mark.slow
def test_critics_in_nnx():
    check_critics(nnx_model(NNXCritics(nnx.Rngs(0)), CRITIC_LIMITS, regressed))


# Equinox and Haiku: rules by path.


def bare_model(params, apply, rules, limits) -> Model:
    """A network without declarations."""

    def predict(params, rest, x):
        return apply(params, x.reshape(len(x), -1))

    loss = classified(lambda params, rest, x: (predict(params, rest, x), rest))
    return Model(params, {}, loss, jax.jit(predict), rules, None, limits)


@pytest.mark.slow
def test_mlp_in_equinox():
    net = eqx.nn.MLP(64, 10, 32, 2, dtype=jnp.float32, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_inexact_array)
    rules = {
        "weight": oc.max_norm(1.2, axis="fan_in"),
        "layers/2/bias": None,
        "bias": oc.non_neg(),
    }
    limits: Limits = {  # (out, in)
        r"layers/\d/weight": at_most(1.2, 1),
        "layers/[01]/bias": NotNegative(),
    }
    model = bare_model(
        params, lambda params, x: jax.vmap(eqx.combine(params, static))(x), rules, limits
    )
    trained = check_digits(model, 0.9, optax.adam(0.01))
    assert np.any(np.asarray(by_path(trained.params)["layers/2/bias"]) < 0)


@pytest.mark.slow
def test_mlp_in_haiku():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([32, 32, 10])(x)))
    params = net.init(jax.random.key(0), jnp.zeros((1, 64), jnp.float32))
    rules = {
        "w": oc.max_norm(1.2, axis="fan_in"),
        "linear_2/b": None,
        "b": oc.non_neg(),
    }
    limits: Limits = {  # (in, out)
        r"mlp/~/linear_\d/w": at_most(1.2, 0),
        "mlp/~/linear_[01]/b": NotNegative(),
    }
    trained = check_digits(bare_model(params, net.apply, rules, limits), 0.9, optax.adam(0.01))
    assert np.any(np.asarray(by_path(trained.params)["mlp/~/linear_2/b"]) < 0)


# Side by side with Keras.


class LinenPair(nn.Module):
    """A convolution and a classifier, with constraints on all that they own."""

    @nn.compact
    def __call__(self, x):
        x = cl.Conv(
            6,
            (3, 3),
            padding="VALID",
            kernel_constraint=oc.max_norm(0.5, axis=[0, 1, 2]),
            bias_constraint=oc.non_neg(),
        )(x[..., None])
        x = nn.relu(x).reshape(len(x), -1)
        return cl.Dense(
            10,
            kernel_constraint=oc.max_norm(0.9),
            bias_constraint=oc.max_norm(0.03),
        )(x)


def pair_in_keras(start, x, y):
    """The weights of the same network in Keras after the same batches."""
    conv = keras.layers.Conv2D(
        6,
        3,
        activation="relu",
        kernel_constraint=KC.max_norm(0.5, axis=[0, 1, 2]),
        bias_constraint=KC.non_neg(),
    )
    dense = keras.layers.Dense(
        10, kernel_constraint=KC.max_norm(0.9), bias_constraint=KC.max_norm(0.03)
    )
    model = keras.Sequential([keras.Input((8, 8, 1)), conv, keras.layers.Flatten(), dense])
    layers = {"Conv_0": conv, "Dense_0": dense}
    for name, layer in layers.items():
        layer.set_weights([np.asarray(start[name][part]) for part in ("kernel", "bias")])
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    flat_x, flat_y = x.reshape(-1, 8, 8, 1), y.reshape(-1)
    model.fit(flat_x, flat_y, batch_size=x.shape[1], shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]  # verbose=0 is documented, and typed as a string
    return {
        name: dict(zip(("kernel", "bias"), layer.get_weights(), strict=True))
        for name, layer in layers.items()
    }


def pair_in_flax(start, x, y, rules):
    net = LinenPair()
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), oc.project(rules))

    @jax.jit
    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            x, y = batch

            def loss(params):
                logits = jnp.asarray(net.apply({"params": params}, x))
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), batches)[0][0]

    return run(start, (x, y))


@pytest.mark.slow
def test_a_convolutional_network_stays_together_with_keras():
    (x, y), _ = digits()
    x, y = batches_of(x, y, steps=100, batch=32)
    net = LinenPair()
    start: Any = net.init(jax.random.key(0), x[0])["params"]
    theirs = pair_in_keras(start, x, y)
    ours = pair_in_flax(start, x, y, cl.declared(net, x[0]))
    free = pair_in_flax(start, x, y, {})

    def difference(a, b):
        a, b = by_path(a), by_path(b)
        assert a.keys() == b.keys()
        return {path: float(np.max(np.abs(np.asarray(a[path]) - b[path]))) for path in a}

    far = difference(ours, theirs)
    assert max(far.values()) <= 1e-5, far
    # It means something: the weights went far, and each constraint made a difference.
    assert min(difference(ours, start).values()) > 0.005, difference(ours, start)
    assert min(difference(ours, free).values()) > 0.005, difference(ours, free)
    limits: Limits = {
        "Conv_0/kernel": at_most(0.5, 0, 1, 2),
        "Conv_0/bias": NotNegative(),
        "Dense_0/kernel": at_most(0.9, 0),
        "Dense_0/bias": at_most(0.03, 0),
    }
    check(ours, limits)
    check_at_bound(ours, limits)


# Many leaves.


def many_leaves():
    """A model of 1,000 leaves, in blocks of ten."""
    kernel, bias = jnp.full((4, 3), 2.0, jnp.float32), jnp.full(3, -1.0, jnp.float32)
    attention = {name: {"kernel": kernel, "bias": bias} for name in ("query", "key", "value")}
    block = {**attention, "mlp": {"kernel": kernel, "bias": bias}, "norm": {"scale": bias}}
    block["embed"] = {"embedding": kernel}
    return {f"block_{i}": block for i in range(100)}


def mixed_rules(predicate):
    return {
        "block_7/mlp/kernel": None,
        "/block_[1-3]?/**/kernel": oc.unit_norm(axis="fan_in"),
        re.compile(r"block_\d+/(query|key)/kernel"): oc.max_norm(1.0),
        predicate: oc.max_norm(0.5, axis=None),
        "mlp": {"kernel": oc.min_max_norm(0.1, 1.0), "bias": "non_neg"},
        "value/*": lambda w: jnp.clip(w, -0.5, 0.5),
        "embedding": oc.unit_norm(axis=-1),
        "**/bias": oc.max_norm(0.7),
    }


def is_scale(path, leaf):
    return path.endswith("scale") and leaf.ndim == 1


def test_a_thousand_leaves_bind_in_well_under_a_second():
    params = many_leaves()
    assert len(jax.tree.leaves(params)) == 1000
    asked, times = [], []

    def predicate(path, leaf):
        asked.append(path)
        return is_scale(path, leaf)

    for _ in range(3):
        tx = oc.project(mixed_rules(predicate))
        started = time.perf_counter()
        with warnings.catch_warnings(action="error"):  # Every rule has leaves of its own.
            tx.init(params)
        times.append(time.perf_counter() - started)
    print(f"1,000 leaves bind in {min(times):.3f} s")
    assert len(set(asked)) == 1000
    assert min(times) < 1


def test_binding_is_not_repeated():
    asked = []

    def predicate(path, leaf):
        asked.append(path)
        return is_scale(path, leaf)

    params: Any = many_leaves()
    params = {name: params[name] for name in ("block_7", "block_11", "block_99")}
    tx = optax.chain(optax.sgd(0.1), oc.project(mixed_rules(predicate)))
    state = tx.init(params)
    seen = len(asked)
    assert seen >= 30 - 1  # Each leaf that the rules before did not settle by name.
    gradient = jax.tree.map(jnp.ones_like, params)

    for _ in range(3):
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert len(asked) == seen

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert len(asked) == seen
    np.testing.assert_allclose(np.linalg.norm(params["block_7"]["norm"]["scale"]), 0.5, rtol=1e-6)

    # Another tree is bound by itself, once.
    other = {**params, "block_99": {**params["block_99"], "more": jnp.zeros(3, jnp.float32)}}
    for _ in range(2):
        tx.update(jax.tree.map(jnp.ones_like, other), tx.init(other), other)
    assert seen < len(asked) <= 2 * seen + 1
