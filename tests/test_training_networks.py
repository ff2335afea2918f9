"""A network whose kernels have three values: `straight_through` trains it, `project` does not."""

import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_constraints as oc

WIDTHS, STEPS, BATCH, SEEDS, TEST = (64, 128, 128, 10), 800, 32, 3, 450
SIZES = {f"{i}/kernel": 1.22 / fan_in**0.5 for i, fan_in in enumerate(WIDTHS[:-1])}
TERNARY = {path: oc.grid([-size, 0, size]) for path, size in SIZES.items()}


def networks(rng: np.random.Generator) -> Any:
    """Free weights at the start, for each seed."""
    return {
        str(i): {
            "kernel": np.float32(rng.normal(size=(SEEDS, rows, columns)) / rows**0.5),
            "bias": np.zeros((SEEDS, columns), np.float32),
        }
        for i, (rows, columns) in enumerate(itertools.pairwise(WIDTHS))
    }


def logits(params: Any, x: jax.Array) -> jax.Array:
    *hidden, last = params.values()
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]


def test_ternary_digits_by_straight_through_and_by_project():
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(images))
    x, y = jnp.asarray(images[order] / 16, jnp.float32), jnp.asarray(labels[order])
    batches = rng.integers(TEST, len(x), (SEEDS, STEPS, BATCH))
    adam = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))

    def loss(params, rows):
        losses = optax.losses.softmax_cross_entropy_with_integer_labels
        return losses(logits(params, x[rows]), y[rows]).mean()

    def train(start, loss, *last, end=lambda params: params):
        """The test accuracy of each seed, and the parameters."""
        tx = optax.chain(adam, *last)

        def step(carry, rows):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, rows), state, params)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        @jax.vmap
        def run(params, batches):
            params = end(jax.lax.scan(step, (params, tx.init(params)), batches)[0][0])
            return jnp.mean(logits(params, x[:TEST]).argmax(-1) == y[:TEST]), params

        return run(start, batches)

    def constrained(params):
        return oc.constrain(params, TERNARY)

    def loss_in_set(params, rows):
        return loss(oc.straight_through(params, TERNARY), rows)

    start = networks(rng)
    dense, _ = train(start, loss)
    ternary, _ = train(start, loss_in_set, end=constrained)
    print(f"dense {dense}, ternary {ternary}")
    assert np.mean(dense) > 0.95
    assert np.mean(ternary) > np.mean(dense) - 0.02

    before = jax.jit(constrained)(start)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which says what follows
        _, after = train(before, loss, oc.project(TERNARY))
    for name, layer in before.items():
        np.testing.assert_array_equal(after[name]["kernel"], layer["kernel"])
        assert not np.array_equal(after[name]["bias"], layer["bias"])
