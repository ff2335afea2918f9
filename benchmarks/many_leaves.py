"""What a constraint on each of many leaves adds to the time to trace and to compile.

The model is a stack of blocks of twelve leaves, as in a transformer: four kernels of 64x64, one of
64x256, one of 256x64, and their biases; and a head. All leaves are under `max_norm`. A training
step with Adam is traced and compiled once in a process of its own; `report` is called once, on
weights that are outside. Numbers are medians over rounds in which the variants take turns, in
seconds of processors, which other programs on the machine disturb less than those of a clock.

    python benchmarks/many_leaves.py [--leaves 169,289,673,1345] [--rounds 3] [--only REPORT ...]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import optax_constraints as oc

PER_BLOCK = 12
WIDTH, HIDDEN, BATCH, BOUND = 64, 256, 32, 2.0
SHAPES = {
    **dict.fromkeys(("query", "key", "value", "out"), (WIDTH, WIDTH)),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}

NONE = "none"
STEPS = (NONE, "by hand", "chain", "constrain", "projected")
CALLS = ("report", "violations", "assert_feasible")


def weights(leaves: int) -> Any:
    """Weights of which some columns are outside."""

    def dense(shape: tuple[int, int]) -> Any:
        return {"kernel": jnp.full(shape, 0.2), "bias": jnp.full(shape[1:], 0.1)}

    blocks = {
        f"block_{i}": {name: dense(shape) for name, shape in SHAPES.items()}
        for i in range(leaves // PER_BLOCK)
    }
    head = {"head": {"kernel": jnp.full((WIDTH, WIDTH), 0.2)}} if leaves % PER_BLOCK else {}
    return {**blocks, **head}


def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    def apply(layer: Any, x: jax.Array) -> jax.Array:
        return x @ layer["kernel"] + layer.get("bias", 0.0)

    for name, own in params.items():
        if name == "head":
            x = apply(own, x)
            continue
        scores = apply(own["query"], x) @ apply(own["key"], x).T
        x = x + apply(own["out"], jax.nn.softmax(scores) @ apply(own["value"], x))
        x = x + apply(own["down"], jnp.tanh(apply(own["up"], x)))
    return jnp.mean((x - y) ** 2)


def keras_formula(w: jax.Array) -> jax.Array:
    """`keras.constraints.MaxNorm`."""
    norm = jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))
    return w * (jnp.clip(norm, 0, BOUND) / (1e-7 + norm))


def step_of(variant: str) -> tuple[optax.GradientTransformationExtraArgs, Any]:
    """The optimizer of a variant, and what comes after it."""
    adam, rules = optax.adam(1e-3), oc.max_norm(BOUND)
    return {
        NONE: (adam, lambda params: params),
        "by hand": (adam, lambda params: jax.tree.map(keras_formula, params)),
        "chain": (optax.chain(adam, oc.project(rules)), lambda params: params),
        "constrain": (adam, lambda params: oc.constrain(params, rules)),
        "projected": (oc.projected(adam, rules), lambda params: params),
    }[variant]


def measure(variant: str, leaves: int) -> dict[str, float]:
    """Seconds, of a step to trace and to compile, of a call the first time and the second."""
    params = jax.block_until_ready(weights(leaves))
    assert len(jax.tree.leaves(params)) == leaves
    if variant in CALLS:
        return calls(variant, params)
    tx, after = step_of(variant)
    state = tx.init(params)
    x = y = jnp.ones((BATCH, WIDTH))

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return after(optax.apply_updates(params, updates)), state

    start = time.process_time()
    traced = jax.jit(step, donate_argnums=(0, 1)).trace(params, state, x, y)
    lowered = traced.lower()
    middle = time.process_time()
    lowered.compile()
    return {"trace": middle - start, "compile": time.process_time() - middle}


def calls(variant: str, params: Any) -> dict[str, float]:
    rules = oc.max_norm(BOUND)
    if variant == "assert_feasible":
        params = jax.tree.map(lambda w: w / 100, params)
    times = {}
    for which in ("first", "second"):
        start = time.process_time()
        jax.block_until_ready(getattr(oc, variant)(params, rules))
        times[which] = time.process_time() - start
    return times


def in_a_process(variant: str, leaves: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", variant, "--leaves", str(leaves)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore[reportOptionalMemberAccess]
    parser.add_argument("--leaves", default="169,289,673,1345")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[*STEPS, *CALLS], help="variants")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = list(map(int, given.leaves.split(",")))
    if given.one:
        print(json.dumps(measure(given.one, sizes[0])))
        return
    print(f"{'variant':18}{'leaves':>7}{'trace s':>10}{'compile s':>11}{'sum s':>8}{'to none':>9}")
    for leaves in sizes:
        rounds = [
            {variant: in_a_process(variant, leaves) for variant in given.only}
            for _ in range(given.rounds)
        ]
        for variant in given.only:
            one, two = zip(*(own[variant].values() for own in rounds), strict=True)
            first, second = statistics.median(one), statistics.median(two)
            row = f"{variant:18}{leaves:7}{first:10.2f}{second:11.2f}"
            if variant in STEPS:
                sums = [sum(own[variant].values()) for own in rounds]
                row += f"{statistics.median(sums):8.2f}"
                if NONE in given.only:
                    none = [sum(own[NONE].values()) for own in rounds]
                    ratios = [a / b for a, b in zip(sums, none, strict=True)]
                    row += f"{statistics.median(ratios):9.2f}"
            print(row, flush=True)
    print("\nOf calls: seconds the first time, compiling, and the second time.")


if __name__ == "__main__":
    main()
