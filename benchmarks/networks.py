"""Networks trained under constraints: where small steps are lost, and with momentum carried along.

`ternary` and `sparse` train a classifier of handwritten digits whose kernels have three values, or
two nonzeros in each four weights: the test accuracy of `straight_through` beside that of free
weights and of `project`. `recurrent` and `sphere` ask whether `projected` ends lower for carrying
momentum along, at several rates: a recurrent network with an orthogonal kernel that copies symbols
over a delay, and a classifier of digits whose weights and activations live on spheres. Each prints
a table; all trainings of a seed have the same start and the same batches.

    python benchmarks/networks.py [--seeds N] [--steps N] [--quick] [EXPERIMENT ...]
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from scipy.stats import binomtest
from sklearn.datasets import load_digits

import optax_constraints as oc

BATCH, TEST = 64, 450


def train(
    params: Any, tx: Any, loss: Callable[[Any, jax.Array], jax.Array], keys: jax.Array
) -> tuple[Any, jax.Array]:
    """The parameters after one step for each key, which draws its batch, and the way they went."""

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, key), state, params)
        return (optax.apply_updates(params, updates), state), optax.tree.norm(updates)

    (params, _), lengths = jax.lax.scan(step, (params, tx.init(params)), keys)
    return params, lengths.sum()


def table(*rows: tuple[str, ...]) -> None:
    """Prints Markdown."""
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not i:
            print("|---" * len(row) + "|")


# Digits.


class Digits(NamedTuple):
    """Images and labels, split by a key."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array

    def batch(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images of the training set, with their labels."""
        rows = jax.random.randint(key, (BATCH,), 0, len(self.x))
        return self.x[rows], self.y[rows]


def digits(key: jax.Array) -> Digits:
    images, labels = map(jnp.asarray, load_digits(return_X_y=True))
    order = jax.random.permutation(key, len(images))
    x, y = images[order] / 16, labels[order]
    return Digits(x[TEST:], y[TEST:], x[:TEST], y[:TEST])


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# Sets in which small steps are lost.


class Classifier(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x):
        """Returns one logit a class."""
        for _ in range(2):
            x = nn.relu(nn.Dense(128)(x))
        return nn.Dense(10)(x)


def ternary(fan_in: int) -> oc.Constraint:
    """Three values that are nearest to normal weights of variance ``1 / fan_in``."""
    size = 1.22 / fan_in**0.5
    return oc.grid((-size, 0, size))


TRAININGS = (
    "no constraint",
    "no constraint, `constrain` at the end",
    "`straight_through`, `constrain` at the end",
    "`project` after each step",
)
TERNARY = {f"Dense_{i}/kernel": ternary(fan_in) for i, fan_in in enumerate((64, 128, 128))}
SPARSE = {"kernel": oc.nm(2, 4)}


def accuracies(rules: Any, steps: int, key: jax.Array) -> tuple[jax.Array, ...]:
    """The test accuracy after each of `TRAININGS`."""
    split, start, batches = jax.random.split(key, 3)
    data, model = digits(split), Classifier()
    params = model.init(start, data.x[:1])["params"]
    adam = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    keys = jax.random.split(batches, steps)

    def logits(params: Any, x: jax.Array) -> jax.Array:
        return jnp.asarray(model.apply({"params": params}, x))

    def loss(params: Any, key: jax.Array) -> jax.Array:
        x, y = data.batch(key)
        return cross_entropy(logits(params, x), y)

    def loss_in_set(params: Any, key: jax.Array) -> jax.Array:
        return loss(oc.straight_through(params, rules), key)

    free, _ = train(params, adam, loss, keys)
    through, _ = train(params, adam, loss_in_set, keys)
    tx = optax.chain(adam, oc.project(rules))
    projected, _ = train(oc.constrain(params, rules), tx, loss, keys)  # warns of a grid
    ends = (
        free,
        oc.constrain(free, rules),
        oc.constrain(through, rules),
        projected,
    )
    return tuple(jnp.mean(logits(end, data.x_test).argmax(-1) == data.y_test) for end in ends)


def compare_trainings(rules: Any, steps: int, keys: jax.Array) -> None:
    found = 100 * np.asarray(jax.jit(jax.vmap(lambda key: accuracies(rules, steps, key)))(keys))
    rows = [("training", "test accuracy", "lowest", "below no constraint")]
    for name, values in zip(TRAININGS, found, strict=True):
        below = found[0] - values
        rows.append(
            (
                name,
                f"{values.mean():.1f}% ± {values.std(ddof=1):.1f}%",
                f"{values.min():.1f}%",
                f"{below.mean():.1f} (at most {below.max():.1f}) points",
            )
        )
    table(*rows)


# Momentum that is carried along.


class Task(NamedTuple):
    """What is trained: where it starts, its loss on a batch, and what counts at the end."""

    params: Any
    rules: Any
    loss: Callable[[Any, jax.Array], jax.Array]
    final: Callable[[Any], jax.Array]


SYMBOLS, LENGTH, DELAY = 8, 4, 12


class Copier(nn.Module):
    """A recurrent network that says at the end what it read at the start."""

    @nn.compact
    def __call__(self, tokens):
        """Returns one logit a symbol, of the last tokens."""
        states = jnp.asarray(nn.RNN(nn.SimpleCell(32))(jax.nn.one_hot(tokens, SYMBOLS + 2)))
        return nn.Dense(SYMBOLS)(states[:, -LENGTH:])


def recurrent(key: jax.Array) -> Task:
    """Copies symbols after a delay; a blank and a signal to begin are two more symbols."""
    start, last = jax.random.split(key)
    model, blank = Copier(), SYMBOLS

    def loss(params: Any, key: jax.Array, size: int = 32) -> jax.Array:
        symbols = jax.random.randint(key, (size, LENGTH), 0, SYMBOLS)
        tokens = jnp.pad(symbols, ((0, 0), (0, DELAY + LENGTH)), constant_values=blank)
        tokens = tokens.at[:, -LENGTH - 1].set(SYMBOLS + 1)
        return cross_entropy(jnp.asarray(model.apply({"params": params}, tokens)), symbols)

    params = model.init(start, jnp.zeros((1, LENGTH + DELAY), int))["params"]
    return Task(params, {"h/kernel": oc.orthogonal()}, loss, lambda p: loss(p, last, 1000))


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class Sphere(nn.Module):
    """Activations and weights on spheres, and steps between as in nGPT (arXiv:2410.01131)."""

    @nn.compact
    def __call__(self, x):
        """Returns one logit a class."""
        x = unit(nn.Dense(64, use_bias=False)(unit(x)))
        for i in range(4):
            step = self.param(f"step_{i}", nn.initializers.constant(0.3), (64,))
            x = unit(x + step * (unit(nn.relu(nn.Dense(64, use_bias=False)(x))) - x))
        size = self.param("size", nn.initializers.constant(10.0), ())
        return size * nn.Dense(10, use_bias=False)(x)


def sphere(key: jax.Array) -> Task:
    """Digits by a network of unit vectors."""
    split, start = jax.random.split(key)
    data, model = digits(split), Sphere()

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return cross_entropy(jnp.asarray(model.apply({"params": params}, x)), y)

    return Task(
        params=model.init(start, data.x[:1])["params"],
        rules={"kernel": oc.unit_norm()},
        loss=lambda params, key: loss(params, *data.batch(key)),
        final=lambda params: loss(params, data.x, data.y),
    )


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "carried": oc.projected,
    "not carried": lambda tx, rules: oc.projected(tx, rules, transport=False),
    "`project` alone": lambda tx, rules: optax.chain(tx, oc.project(rules)),
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9),
    "Adam": optax.adam,
}


def compare_momentum(
    task: Callable[[jax.Array], Task], rates: dict[str, tuple[float, ...]], steps: int, keys: Any
) -> None:
    def run(optimizer: Any, way: Any, rate: jax.Array, key: jax.Array) -> Any:
        """The final loss, and the length of the way to there."""
        start, batches = jax.random.split(key)
        params, rules, loss, final = task(start)
        schedule = optax.cosine_decay_schedule(cast(float, rate), steps)
        clipped = optax.chain(optax.clip_by_global_norm(1.0), optimizer(schedule))
        start, keys = oc.constrain(params, rules), jax.random.split(batches, steps)
        end, length = train(start, way(clipped, rules), loss, keys)
        return final(end), length

    head = ("optimizer", "rate", *WAYS, "lower if carried", "loss: ratio", "way: ratio")
    rows: list[tuple[str, ...]] = [head]
    for name, optimizer in OPTIMIZERS.items():
        ends, lengths = {}, {}
        for way, make in WAYS.items():
            over_seeds = jax.vmap(functools.partial(run, optimizer, make), (None, 0))
            over_rates = jax.jit(jax.vmap(over_seeds, (0, None)))
            found = over_rates(jnp.asarray(rates[name]), keys)
            ends[way], lengths[way] = map(np.asarray, found)
        for i, rate in enumerate(rates[name]):
            ratio = np.log(ends["carried"][i] / ends["not carried"][i])
            longer = np.log(lengths["carried"][i] / lengths["not carried"][i])
            wins, count = int(np.sum(ratio < 0)), len(ratio)
            chance = binomtest(wins, count).pvalue
            rows.append(
                (
                    name,
                    f"{rate:g}",
                    *(quartiles(losses[i]) for losses in ends.values()),
                    f"{wins} of {count} (p = {chance:.2g})",
                    *map(mean_ratio, (ratio, longer)),
                )
            )
    table(*rows)


def quartiles(values: np.ndarray) -> str:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def mean_ratio(logarithms: np.ndarray) -> str:
    """The geometric mean, with its standard error."""
    mean = np.exp(logarithms.mean())
    error = mean * logarithms.std(ddof=1) / len(logarithms) ** 0.5
    return f"{mean:.2f} ± {error:.2f}"


RECURRENT_RATES = {"momentum": (0.1, 0.3, 1.0, 3.0), "Adam": (0.003, 0.01, 0.03, 0.1)}
SPHERE_RATES = {"momentum": (0.03, 0.1, 0.3, 1.0), "Adam": (0.001, 0.003, 0.01, 0.03)}

EXPERIMENTS: dict[str, tuple[Callable[[int, jax.Array], None], int]] = {
    "ternary": (functools.partial(compare_trainings, TERNARY), 1000),
    "sparse": (functools.partial(compare_trainings, SPARSE), 1000),
    "recurrent": (functools.partial(compare_momentum, recurrent, RECURRENT_RATES), 500),
    "sphere": (functools.partial(compare_momentum, sphere, SPHERE_RATES), 500),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Networks trained under constraints.")
    parser.add_argument("experiments", nargs="*", default=list(EXPERIMENTS), metavar="EXPERIMENT")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, help="default: 1000 and 500")
    parser.add_argument("--quick", action="store_true", help="3 seeds and 100 steps")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.steps = 3, 100
    keys = jax.random.split(jax.random.key(0), options.seeds)
    for name in options.experiments:
        print(f"\n{name}\n")
        compare, steps = EXPERIMENTS[name]
        compare(options.steps or steps, keys)


if __name__ == "__main__":
    main()
