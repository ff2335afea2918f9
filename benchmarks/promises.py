"""How accurate every set is, in every dtype.

Each case of the tests trains for 50 steps with random gradients, with SGD and with Adam, from
several starts. Elementwise sets are to be met exactly; for the others it prints the largest
distance from the set, relative to its bound, in machine epsilons of the dtype. Beside that, for
random weights in float32, how far the projection is from what NumPy says in float64, in machine
epsilons of the largest entry.

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


def from_nearest(case: Case, seeds: int) -> float:
    """How far projections in float32 are from the nearest point, in eps of the largest entry."""
    worst = 0.0
    for seed in range(seeds):
        for scale in (0.1, 1, 30):
            w = np.random.default_rng(seed).normal(size=case.shape) * scale
            w = jnp.asarray(w, jnp.float32)
            want = case.project(float64(w))
            error = np.max(np.abs(float64(jax.jit(case.constraint)(w)) - want), initial=0)
            # Where entries are lowered by one number, that rounds as the largest one does.
            largest = np.max(np.abs(float64(w))) if case.adds else np.max(np.abs(want))
            worst = max(worst, float(error / largest))
    return worst / float(jnp.finfo(jnp.float32).eps)


def main() -> None:
    parser = argparse.ArgumentParser(description="How accurate every set is.")
    parser.add_argument("--quick", action="store_true", help="one start, as a smoke test")
    seeds = 1 if parser.parse_args().quick else 5
    dtypes = [jnp.float32, jnp.bfloat16, jnp.float16]
    entries = broken = states = 0
    rows: dict[str, list[float]] = {}
    for case in CASES:
        row = rows.setdefault(type(case.constraint).__name__, [0.0] * (1 + len(dtypes)))
        row[0] = max(row[0], from_nearest(case, seeds))
        for i, dtype in enumerate(dtypes, start=1):
            for optimizer in OPTIMIZERS:
                for start in after_each_step(case, dtype, optimizer, seeds):
                    for w in start:
                        outside = case.outside(w)
                        states += 1
                        if case.constraint.elementwise:
                            entries += w.size
                            broken += int(np.sum(outside > 0))
                        row[i] = max(row[i], float(np.max(outside)) / float(jnp.finfo(dtype).eps))
    print(f"{len(CASES)} cases of {len(rows)} sets, {states:,} states after a step")
    print(f"elementwise sets: {broken} of {entries:,} entries outside\n")
    names = [f"outside, {jnp.dtype(dtype).name}" for dtype in dtypes]
    print("| set | from the nearest point |", *(f"{name} |" for name in names))
    print("|---" * (2 + len(dtypes)) + "|")
    for name, row in rows.items():
        print(f"| `{name}` |", *(f"{x:.1f} |" for x in row))


if __name__ == "__main__":
    main()
