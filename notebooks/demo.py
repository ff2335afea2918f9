"""Max-norm and non-negativity on a small classifier with dropout.

Trains the same network on scikit-learn's handwritten digits three times, from the same seed
and on the same batches: without a constraint, with max-norm on every kernel, and with a
non-negative output bias on top. Prints the accuracies and the report of the last model, and
plots the norms against their bound. The test set has 450 images: the accuracies differ by
about as much as they do between seeds, the norms by what the constraint does.

Run it with `make demo`, or with `--plot PATH` to say where the plot goes.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import optax_constraints as oc

SEED, EPOCHS, BATCH, BOUND = 0, 60, 64, 1.5

WAYS: dict[str, dict[str, oc.Constraint]] = {
    "no constraint": {},
    "max-norm kernels": {"kernel": oc.max_norm(BOUND)},
    "max-norm kernels, non-negative output bias": {
        "kernel": oc.max_norm(BOUND),
        "Dense_2/bias": oc.non_neg(),
    },
}


class Classifier(nn.Module):
    """Two hidden layers with dropout."""

    @nn.compact
    def __call__(self, x, train):
        """Returns one logit a class."""
        for _ in range(2):
            x = nn.relu(nn.Dense(256)(x))
            x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10)(x)


def predict(params, x, **rngs) -> Any:
    return Classifier().apply({"params": params}, x, train="dropout" in rngs, rngs=rngs)


def train(rules, x, y, progress):
    params = Classifier().init(jax.random.key(SEED), x[:1], train=False)["params"]
    tx = optax.chain(optax.adam(5e-3), oc.project(rules))

    def loss(params, dropout, x, y):
        logits = predict(params, x, dropout=dropout)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def step(carry, inputs):
        params, state = carry
        dropout, batch = inputs
        grads = jax.grad(loss)(params, dropout, x[batch], y[batch])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(params, state, key):
        shuffle, dropout = jax.random.split(key)
        steps = len(x) // BATCH
        batches = jax.random.permutation(shuffle, len(x))[: steps * BATCH].reshape(steps, BATCH)
        return jax.lax.scan(step, (params, state), (jax.random.split(dropout, steps), batches))[0]

    state = tx.init(params)
    for key in jax.random.split(jax.random.key(SEED + 1), EPOCHS):
        params, state = jax.block_until_ready(epoch(params, state, key))
        progress.update()
    return params


def norms(params):
    """The norm of each unit's incoming weights, by the path of its kernel."""
    leaves = flatten_dict(params, sep="/").items()
    return {path: jnp.linalg.norm(w, axis=0) for path, w in leaves if path.endswith("kernel")}


def plot(models, path):
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    for way, params in models.items():
        for panel, (name, norm) in zip(panels, norms(params).items(), strict=True):
            panel.plot(jnp.sort(norm), label=way, marker="o" if len(norm) <= 10 else "")
            panel.set(title=name, xlabel="unit, sorted by norm")
    for panel in panels:
        panel.axhline(BOUND, color="black", linestyle="--", linewidth=1, label=f"bound: {BOUND}")
        panel.grid(alpha=0.3)
    panels[0].set(ylabel="norm of incoming weights", ylim=(0, None))
    panels[0].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description="Weight constraints on a small classifier.")
    parser.add_argument("--plot", default="demo.png", metavar="PATH", help="where the plot goes")
    path = parser.parse_args().plot

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, random_state=SEED, stratify=labels)
    x, x_test, y, y_test = map(jnp.asarray, split)
    with tqdm(total=len(WAYS) * EPOCHS, unit="epoch") as progress:
        trained = {way: train(rules, x, y, progress) for way, rules in WAYS.items()}

    print(f"{'':42}  test accuracy  largest norm")
    for way, params in trained.items():
        accuracy = (predict(params, x_test).argmax(-1) == y_test).mean()
        largest = max(norm.max() for norm in norms(params).values())
        print(f"{way:42}  {accuracy:13.4f}  {largest:12.4f}")

    *_, (way, params) = trained.items()
    rules = WAYS[way]
    print(f"\n{way}:")
    print(oc.report(params, rules))

    plot({"no constraint": trained["no constraint"], "max-norm": params}, path)
    print(f"\nNorms against their bound: {path}")


if __name__ == "__main__":
    main()
