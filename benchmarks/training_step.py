"""What a constraint adds to a training step, in time and in memory.

The model is an MLP of four 2048x2048 tanh layers, on a batch of 64, with Adam. Each variant
is compiled with its parameters and state donated. The variants take turns in one process, in
another order each round, and ratios are medians of the ratios within a round, so that a
machine that gets slower or faster on the way does not favour one. Keras trains the same model
with its own `fit`, and is compared only with itself. The steps under `orthogonal` are of the
optimizer alone, on one 512x512 matrix.

    python benchmarks/training_step.py [--quick]
"""

import argparse
import functools
import os
import time
from collections.abc import Callable
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax

import optax_constraints as oc

LAYERS, WIDTH, BATCH, BOUND = 4, 2048, 64, 2
LEAF_BYTES = WIDTH * WIDTH * 4
STEPS = 3  # a round times so many steps of a variant at once

NONE = "no constraint"
HAND = "Keras' formula by hand"
HAND_PARENTHESES = "the same, in parentheses"
CONSTRAIN = "constrain, max_norm"
CHAIN = "chain, max_norm"
STATS = "chain, max_norm, stats"
UNIT_NORM = "chain, unit_norm"
PROJECTED = "projected, max_norm"
PROJECTED_UNIT = "projected, unit_norm"
NON_NEG = "chain, non_neg"
NON_NEG_STATS = "chain, non_neg, stats"
FIT = "Keras fit"
FIT_MAX_NORM = "Keras fit, MaxNorm"
ORTHOGONAL = "chain, orthogonal, alone"
PROJECTED_ORTHOGONAL = "projected, orthogonal, alone"

Variant = Callable[[], None]  # runs STEPS steps


def weights() -> dict[str, dict[str, jax.Array]]:
    """Random kernels with columns of norm 2.04 +- 0.03, so that the bound holds most back."""
    keys = jax.random.split(jax.random.key(0), LAYERS)
    return {
        f"Dense_{i}": {"kernel": 0.045 * jax.random.normal(key, (WIDTH, WIDTH))}
        for i, key in enumerate(keys)
    }


def data(steps: int = 1) -> tuple[jax.Array, jax.Array]:
    x_key, y_key = jax.random.split(jax.random.key(1))
    shape = (steps * BATCH, WIDTH)
    return jax.random.normal(x_key, shape), jnp.tanh(jax.random.normal(y_key, shape))


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    for layer in params.values():
        x = jnp.tanh(x @ layer["kernel"])
    return jnp.mean((x - y) ** 2)


def keras_formula(w: jax.Array) -> jax.Array:
    """`keras.constraints.MaxNorm`, which divides every weight."""
    norm = jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))
    return w * jnp.clip(norm, 0, BOUND) / (1e-7 + norm)


def keras_formula_parentheses(w: jax.Array) -> jax.Array:
    """The same, which divides every norm instead."""
    norm = jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))
    return w * (jnp.clip(norm, 0, BOUND) / (1e-7 + norm))


def chain(*projection: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.adam(1e-3), *projection)


def projected(constraint: oc.Constraint) -> optax.GradientTransformation:
    return oc.projected(optax.adam(1e-3), constraint)


def make_step(
    tx: optax.GradientTransformation, after: Callable[[Any], Any] = lambda params: params
) -> tuple[Variant, float]:
    """A training step: how to run it, and its temporary memory in leaves."""

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return after(optax.apply_updates(params, updates)), state

    params = weights()
    state = tx.init(params)
    x, y = data()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, x, y).compile()
    carry = params, state

    def run() -> None:
        nonlocal carry
        for _ in range(STEPS):
            carry = compiled(*carry, x, y)
        jax.block_until_ready(carry)

    memory = compiled.memory_analysis()
    return run, memory.temp_size_in_bytes / LEAF_BYTES if memory else float("nan")


def make_update(tx: optax.GradientTransformation) -> Variant:
    """A step of the optimizer alone, on an orthogonal matrix and a gradient of noise."""
    params = oc.orthogonal()(jax.random.normal(jax.random.key(0), (512, 512)))
    grads = jax.random.normal(jax.random.key(1), params.shape)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: jax.Array, state: Any, grads: jax.Array) -> tuple[jax.Array, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state  # pyright: ignore[reportReturnType]

    carry = params, tx.init(params)

    def run() -> None:
        nonlocal carry
        for _ in range(STEPS):
            carry = step(*carry, grads)
        jax.block_until_ready(carry)

    return run


def make_fit(constraint: keras.constraints.Constraint | None) -> Variant:
    """Keras' own training loop; one call is one epoch of STEPS steps."""
    layers = [
        keras.layers.Dense(WIDTH, "tanh", use_bias=False, kernel_constraint=constraint)
        for _ in range(LAYERS)
    ]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    model.set_weights([np.asarray(layer["kernel"]) for layer in weights().values()])
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    x, y = map(np.asarray, data(STEPS))

    def run() -> None:
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)  # pyright: ignore[reportArgumentType]
        jax.block_until_ready([w.value for w in model.trainable_weights])

    return run


def measure(variants: dict[str, Variant], rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds a step of each variant in each round."""
    for run in variants.values():
        run()
        run()
    order = np.random.default_rng(0)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in order.permutation(list(variants)):
            start = time.perf_counter()
            variants[name]()
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """The median, and bounds between which it lies with a probability of about 95%."""
    half = len(ratios) ** -0.5
    low, median, high = np.quantile(ratios, np.clip([0.5 - half, 0.5, 0.5 + half], 0, 1))
    return median, low, high


def verdict(what: str, ratios: np.ndarray, limit: float, leaves: float, more: int) -> str:
    """One line on a target: a ratio of times, and a difference of temporaries in leaves."""
    median, low, high = interval(ratios)
    fast = "met" if median <= limit else "missed" if low > limit else "not told from noise"
    # Activations are temporaries, too: how many of them share the memory of a leaf varies.
    small = "met" if leaves <= more + LAYERS * BATCH / WIDTH else "missed"
    return (
        f"{what}: time {median:.3f} ({low:.3f} to {high:.3f}), target {limit:.2f}: {fast}; "
        f"leaves {leaves:+.2f}, target {more:+d}: {small}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What a constraint adds to a training step.")
    parser.add_argument("--quick", action="store_true", help="a few rounds, as a smoke test")
    rounds = 3 if parser.parse_args().quick else 24

    max_norm = oc.max_norm(BOUND)
    steps = {
        NONE: make_step(chain()),
        HAND: make_step(chain(), lambda params: jax.tree.map(keras_formula, params)),
        HAND_PARENTHESES: make_step(
            chain(), lambda params: jax.tree.map(keras_formula_parentheses, params)
        ),
        CONSTRAIN: make_step(chain(), lambda params: oc.constrain(params, max_norm)),
        CHAIN: make_step(chain(oc.project(max_norm))),
        STATS: make_step(chain(oc.project(max_norm, stats=True))),
        PROJECTED: make_step(projected(max_norm)),
        NON_NEG: make_step(chain(oc.project(oc.non_neg()))),
        NON_NEG_STATS: make_step(chain(oc.project(oc.non_neg(), stats=True))),
        UNIT_NORM: make_step(chain(oc.project(oc.unit_norm()))),
        PROJECTED_UNIT: make_step(projected(oc.unit_norm())),
        "chain, min_max_norm": make_step(chain(oc.project(oc.min_max_norm(0.5, BOUND)))),
    }
    leaves = {name: temporaries for name, (_, temporaries) in steps.items()}
    fits = {FIT: make_fit(None), FIT_MAX_NORM: make_fit(keras.constraints.MaxNorm(BOUND))}
    alone = {
        ORTHOGONAL: make_update(chain(oc.project(oc.orthogonal()))),
        PROJECTED_ORTHOGONAL: make_update(projected(oc.orthogonal())),
    }
    times = measure({name: run for name, (run, _) in steps.items()} | fits | alone, rounds)

    hand = min((HAND, HAND_PARENTHESES), key=lambda name: float(np.median(times[name])))
    print(f"{'variant':28}{'ms':>8}{'to none':>10}{'to hand':>10}{'leaves':>9}")
    for name, values in times.items():
        if name in alone:
            print(f"{name:28}{np.median(values):8.1f}")
            continue
        to_none = np.median(values / times[FIT if name in fits else NONE])
        row = f"{name:28}{np.median(values):8.1f}{to_none:10.3f}"
        if name in steps:
            row += f"{np.median(values / times[hand]):10.3f}{leaves[name]:9.2f}"
        print(row)
    print(
        f"\n{rounds} rounds of {STEPS} steps. To none: Keras fit counts against its own fit. "
        f"To hand: against {hand!r},\nthe faster of the two forms. In brackets: where the median "
        "lies, at about 95%.\n"
    )
    for what, one, other, limit, more in (
        ("constrain to hand", CONSTRAIN, hand, 1.0, 0),
        ("chain to constrain", CHAIN, CONSTRAIN, 1.06, 1),
    ):
        print(verdict(what, times[one] / times[other], limit, leaves[one] - leaves[other], more))
    for one, other in (
        (STATS, CHAIN),
        (NON_NEG_STATS, NON_NEG),
        (PROJECTED, CHAIN),
        (PROJECTED_UNIT, UNIT_NORM),
        (PROJECTED_ORTHOGONAL, ORTHOGONAL),
    ):
        median, low, high = interval(times[one] / times[other])
        more = f", leaves {leaves[one] - leaves[other]:+.2f}" if one in leaves else ""
        print(f"{one!r} to {other!r}: time {median:.3f} ({low:.3f} to {high:.3f}){more}")


if __name__ == "__main__":
    main()
