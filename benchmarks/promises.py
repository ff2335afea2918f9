"""How far outside its set a leaf is after steps of training, for every set and dtype.

Each case of the tests trains for 50 steps with random gradients, with SGD and with Adam, from
several starts. Elementwise sets are to be met exactly; for the others it prints the largest
distance from the set, relative to its bound, in machine epsilons of the dtype.

    python benchmarks/promises.py [--quick]
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_constraints as oc

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from cases import CASES, Case, float64

STEPS = 50
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1, eps=1e-3)}


def after_each_step(case: Case, dtype: jnp.dtype, optimizer: str, seeds: int) -> np.ndarray:
    """The weights after each step from each start: (starts, steps, *shape)."""
    tx = optax.chain(OPTIMIZERS[optimizer], oc.project(case.constraint))

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = jnp.asarray(optax.apply_updates(params, updates))
        return (params, state), params

    @jax.jit
    def train(start, gradients):
        start = case.constraint(start)
        return jax.lax.scan(step, (start, tx.init(start)), gradients)[1]

    out = []
    for seed in range(seeds):
        draw = np.random.default_rng(seed).normal(size=(STEPS + 1, *case.shape))
        draw = jnp.asarray(draw, jnp.float32).astype(dtype)
        out.append(float64(train(draw[0], draw[1:])))
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="How far outside weights are after steps.")
    parser.add_argument("--quick", action="store_true", help="one start, as a smoke test")
    seeds = 1 if parser.parse_args().quick else 5
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16]
    entries = broken = states = 0
    worst = {jnp.dtype(dtype).name: (0.0, "") for dtype in dtypes}
    for case in CASES:
        for dtype in dtypes:
            for optimizer in OPTIMIZERS:
                for start in after_each_step(case, dtype, optimizer, seeds):
                    for w in start:
                        outside = np.max(case.outside(w))
                        states += 1
                        if case.constraint.elementwise:
                            entries += w.size
                            broken += int(np.sum(case.outside(w) > 0))
                        else:
                            name = jnp.dtype(dtype).name
                            found = float(outside) / float(jnp.finfo(dtype).eps), str(case)
                            worst[name] = max(worst[name], found)
    print(f"{len(CASES)} cases, {states:,} states after a step")
    print(f"elementwise sets: {broken} of {entries:,} entries outside")
    for name, (distance, case) in worst.items():
        print(f"other sets, {name}: at most {distance:.2f} eps outside, by {case}")


if __name__ == "__main__":
    main()
