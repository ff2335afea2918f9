"""Real programs that hold weights in sets by hand, beside rules that do the same.

Prints a table: the program, the rules, how many lines of the program's own code they replace, the
largest difference after 100 steps by the largest weight, and the time of a step. A step is that of
the optimizer with the constraint, without a model; both are compiled with their state donated, and
take turns in one process, in another order each round. The ratio is the median of the ratios
within a round.

    python benchmarks/clients.py [--quick]
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from client_programs import CLIENTS, Client, Program, trained

GROWN = 32  # the tests' 8 becomes 256
STEPS = 5  # a round times so many steps at once


def agreement(client: Client, steps: int) -> float:
    """The largest difference of the two programs by the largest weight."""
    pairs = zip(*map(jax.tree.leaves, trained(client, steps)), strict=True)
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(a))) for a, b in pairs)


def make_step(program: Program, start: Any, inputs: Any) -> Callable[[], None]:
    """Runs STEPS steps."""
    carry = jax.jit(program.init)(start)
    step = jax.jit(program.step, donate_argnums=0)
    # Two parts of a carry may be one buffer, which cannot be donated twice.
    carry = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), carry)

    def run() -> None:
        nonlocal carry
        for _ in range(STEPS):
            carry = step(carry, inputs)
        jax.block_until_ready(carry)

    return run


def times(client: Client, seconds: float) -> tuple[float, float]:
    """Milliseconds of a step of ours, and the ratio to theirs."""
    start, inputs = client.given(1)
    start, inputs = jax.device_put((start, jax.tree.map(lambda x: x[0], inputs)))
    runs = [make_step(program, start, inputs) for program in (client.theirs, client.ours)]
    for run in [*runs, *runs]:
        run()
    order, rounds = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while len(rounds) < 5 or time.perf_counter() < end:
        rounds.append(np.zeros(2))
        for i in order.permutation(2):
            began = time.perf_counter()
            runs[i]()
            rounds[-1][i] = (time.perf_counter() - began) / STEPS * 1e3
    theirs, ours = np.array(rounds).T
    return float(np.median(ours)), float(np.median(ours / theirs))


def main() -> None:
    parser = argparse.ArgumentParser(description="Real programs beside rules.")
    parser.add_argument("--quick", action="store_true", help="a few rounds, as a smoke test")
    quick = parser.parse_args().quick
    print("| program | rules | lines by hand | difference | ms a step | ratio to theirs |")
    print("|---|---|---|---|---|---|")
    for name, make in CLIENTS.items():
        client = make()
        away = agreement(client, 10 if quick else 100)
        own, ratio = times(client.grown(2 if quick else GROWN), 0.1 if quick else 4)
        print(
            f"| {name} | `{client.rule}` | {client.lines} | {away:.0e} | {own:.2f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
