"""Times of single steps: all leaves on every eighth step, or some of them on each.

Sixteen square matrices are kept orthogonal under SGD. A step that projects takes longer than the
others; with `stagger=True` each projects two of the matrices.

Usage:
    python benchmarks/stagger.py
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import optax

import optax_constraints as oc


def times(tx: optax.GradientTransformation, params: dict, steps: int) -> list[float]:
    """The seconds that each step takes, after the first ones."""

    @jax.jit
    def step(params, state):
        grads = jax.tree.map(jnp.cos, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, taken = tx.init(params), []
    for _ in range(steps):
        start = time.perf_counter()
        params, state = jax.block_until_ready(step(params, state))
        taken.append(time.perf_counter() - start)
    return taken[steps // 4 :]


def main() -> None:
    """Prints a row for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a matrix")
    parser.add_argument("--every", type=int, default=8)
    given = parser.parse_args()
    keys = jax.random.split(jax.random.key(0), 16)
    shape = (given.size, given.size)
    params = {f"{i}": oc.orthogonal()(jax.random.normal(key, shape)) for i, key in enumerate(keys)}
    print(f"16 matrices of {given.size}x{given.size}, every={given.every}, milliseconds of a step")
    for stagger in (False, True):
        rule = oc.project(oc.orthogonal(), every=given.every, stagger=stagger)
        taken = times(optax.chain(optax.sgd(1e-3), rule), params, 12 * given.every)
        most, median, mean = max(taken), statistics.median(taken), statistics.mean(taken)
        print(
            f"stagger={stagger!s:5}: median {1e3 * median:.1f}, largest {1e3 * most:.1f} "
            f"({most / median:.1f} of the median), mean {1e3 * mean:.1f}"
        )


if __name__ == "__main__":
    main()
