"""A network whose kernels have three values: `straight_through` trains it, `project` does not."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_constraints as oc

WIDTHS, STEPS, BATCH, SEEDS, TEST = (64, 128, 128, 10), 600, 64, 3, 450
SIZES = {f"{i}/kernel": 1.22 / fan_in**0.5 for i, fan_in in enumerate(WIDTHS[:-1])}
TERNARY = {path: oc.grid([-size, 0, size]) for path, size in SIZES.items()}

rng = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


def network() -> Any:
    """Starts, one for each seed."""
    return {
        str(i): {
            "kernel": normal(SEEDS, *sizes) / sizes[0] ** 0.5,
            "bias": jnp.zeros((SEEDS, sizes[1]), jnp.float32),
        }
        for i, sizes in enumerate(zip(WIDTHS, WIDTHS[1:], strict=False))
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def test_ternary_digits_by_straight_through_and_by_project():
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    rows = jnp.asarray(rng.integers(TEST, len(x), (SEEDS, STEPS, BATCH)))
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, STEPS))

    def loss(params, rows):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits(params, x[rows]), y[rows]).mean()

    def train(params, tx=adam, at=lambda params: params):
        def step(carry, rows):
            params, state = carry
            gradient = jax.grad(lambda params: loss(at(params), rows))(params)
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        def run(params, rows):
            return jax.lax.scan(step, (params, tx.init(params)), rows)[0][0]

        return jax.jit(jax.vmap(run))(params, rows)

    def accuracy(params):
        right = jax.vmap(logits, (0, None))(params, x[:TEST]).argmax(-1) == y[:TEST]
        return np.mean(right, axis=-1)

    start = network()
    dense = accuracy(train(start))
    through = train(start, at=lambda params: oc.straight_through(params, TERNARY))
    ternary = accuracy(oc.constrain(through, TERNARY))
    print(dense, ternary)
    assert np.mean(dense) > 0.95
    assert np.mean(ternary) > np.mean(dense) - 0.02

    allowed = oc.constrain(start, TERNARY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says what follows
        stayed = train(allowed, tx=optax.chain(adam, oc.project(TERNARY)))
    for name, layer in allowed.items():
        np.testing.assert_array_equal(stayed[name]["kernel"], layer["kernel"])
        assert not np.array_equal(stayed[name]["bias"], layer["bias"])
