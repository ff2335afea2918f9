"""Which composition arrives at the optimum: convex sets x optimizers x ways to compose them.

Each problem is a least-squares fit of a 6 x 4 (or square) matrix under one convex set, with the
optimum by cvxpy. Printed is the share of the possible decrease that is missed after training, the
median and the worst of all problems; gradients are exact, or those of batches of 8 of 48 rows.
Compared are ``chain(optimizer, project(set))``, ``projected(optimizer, set)``, and free weights
whose loss is taken at ``straight_through(weights, set)``.

    python benchmarks/arrive.py [--problems N] [--steps N] [--quick] [SET ...]
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import optax_constraints as oc

TALL, SQUARE = (6, 4), (5, 5)
ROWS, BATCH = 48, 8
NORMAL = np.linspace(0.5, 1.5, 6)
UPPER = np.linspace(0.05, 0.3, 24).reshape(6, 4)
SIGNS = np.sign(np.linspace(-1, 1, 6))[:, None]
EQUATIONS = np.stack([NORMAL, np.cos(np.arange(6))])
INEQUALITIES, LIMITS = np.stack([NORMAL, -np.ones(6), np.cos(np.arange(6))]), [0.3, 0.2, 0.1]


def columns(condition: Callable[[Any], list]) -> Callable[[Any], list]:
    """A condition for each column."""
    return lambda w: [c for j in range(w.shape[1]) for c in condition(w[:, j])]


SETS: dict[str, tuple[oc.Constraint, tuple[int, int], Callable[[Any], list]]] = {
    "non_neg": (oc.non_neg(), TALL, lambda w: [w >= 0]),
    "box": (oc.box(-0.1, UPPER), TALL, lambda w: [w >= -0.1, w <= UPPER]),
    "mask": (oc.mask(UPPER > 0.15), TALL, lambda w: [cp.multiply(w, UPPER <= 0.15) == 0]),
    "zero_diagonal": (oc.zero_diagonal(), SQUARE, lambda w: [cp.diag(w) == 0]),
    "sign": (oc.sign(SIGNS), TALL, lambda w: [cp.multiply(SIGNS, w) >= 0]),
    "max_norm": (oc.max_norm(0.4), TALL, columns(lambda w: [cp.norm(w) <= 0.4])),
    "max_rms": (oc.max_rms(0.15), TALL, lambda w: [cp.norm(w, "fro") <= 0.15 * 24**0.5]),
    "simplex": (oc.simplex(), TALL, columns(lambda w: [w >= 0, cp.sum(w) == 1])),
    "l1_ball": (oc.l1_ball(0.5), TALL, columns(lambda w: [cp.norm1(w) <= 0.5])),
    "box_section": (
        oc.box_section(-0.1, 0.3, NORMAL, 0.5),
        TALL,
        columns(lambda w: [w >= -0.1, w <= 0.3, NORMAL @ w == 0.5]),
    ),
    "polyhedron": (
        oc.polyhedron(INEQUALITIES, LIMITS),
        TALL,
        columns(lambda w: [INEQUALITIES @ w <= LIMITS]),
    ),
    "sum_to": (oc.sum_to(1.0), TALL, columns(lambda w: [cp.sum(w) == 1])),
    "center_around": (oc.center_around(0.2), TALL, lambda w: [cp.sum(w) == 0.2 * 24]),
    "hyperplane": (oc.hyperplane(NORMAL, 0.5), TALL, columns(lambda w: [NORMAL @ w == 0.5])),
    "affine": (
        oc.affine(EQUATIONS, [0.5, 0.1]),
        TALL,
        columns(lambda w: [EQUATIONS @ w == [0.5, 0.1]]),
    ),
    "half_space": (oc.half_space(NORMAL, -0.5), TALL, columns(lambda w: [NORMAL @ w <= -0.5])),
    "monotone": (oc.monotone(), TALL, columns(lambda w: [cp.diff(w) >= 0])),
    "lattice": (
        oc.monotone(axis=(0, 1)),
        TALL,
        lambda w: [cp.diff(w) >= 0, cp.diff(w, axis=1) >= 0],
    ),
    "convex_sequence": (
        oc.convex_sequence(),
        TALL,
        columns(lambda w: [cp.diff(w, 2) >= 0]),
    ),
    "concave_sequence": (
        oc.concave_sequence(),
        TALL,
        columns(lambda w: [cp.diff(w, 2) <= 0]),
    ),
    "symmetric": (oc.symmetric(), SQUARE, lambda w: [w == w.T]),
    "skew_symmetric": (oc.skew_symmetric(), SQUARE, lambda w: [w == -w.T]),
    "positive_semidefinite": (oc.positive_semidefinite(), SQUARE, lambda w: [w == w.T, w >> 0]),
    "doubly_stochastic": (
        oc.doubly_stochastic(),
        SQUARE,
        lambda w: [w >= 0, cp.sum(w, 0) == 1, cp.sum(w, 1) == 1],
    ),
    "transport": (
        oc.transport([0.5, 0.3, 0.2, 0.4, 0.1, 0.5], [0.7, 0.3, 0.6, 0.4]),
        TALL,
        lambda w: [
            w >= 0,
            cp.sum(w, 1) == [0.5, 0.3, 0.2, 0.4, 0.1, 0.5],
            cp.sum(w, 0) == [0.7, 0.3, 0.6, 0.4],
        ],
    ),
    "max_spectral_norm": (oc.max_spectral_norm(0.5), TALL, lambda w: [cp.sigma_max(w) <= 0.5]),
    "nuclear_norm_ball": (oc.nuclear_norm_ball(0.7), TALL, lambda w: [cp.normNuc(w) <= 0.7]),
    "radial": (
        oc.radial(),
        SQUARE,
        lambda w: [w == sum(cp.sum(cp.multiply(r, w)) / r.sum() * r for r in rings())],
    ),
    "tied": (
        oc.tied(lambda shape: np.subtract.outer(*map(np.arange, shape))),
        SQUARE,
        lambda w: [w[1:, 1:] == w[:-1, :-1]],
    ),
    "around": (
        oc.around(oc.max_norm(0.3), 0.2 * np.ones(TALL)),
        TALL,
        columns(lambda w: [cp.norm(w - 0.2) <= 0.3]),
    ),
    "part": (oc.part(oc.non_neg(), ":3"), TALL, lambda w: [w[:3] >= 0]),
    "compose": (
        oc.compose(oc.non_neg(), oc.max_norm(0.4)),
        TALL,
        lambda w: [w >= 0, *columns(lambda w: [cp.norm(w) <= 0.4])(w)],
    ),
    "intersection": (
        oc.intersection(oc.sum_to(1.0), oc.box(0.0, 0.3)),
        TALL,
        columns(lambda w: [w >= 0, w <= 0.3, cp.sum(w) == 1]),
    ),
}


def rings() -> list[np.ndarray]:
    """The rings of a 5 x 5 window."""
    i = np.abs(np.arange(5) - 2)
    ring = np.maximum(i[:, None], i)
    return [(ring == k).astype(float) for k in range(3)]


def optimizers(steps: int) -> dict[str, optax.GradientTransformation]:
    """Each with a rate that decays to zero."""
    rate = optax.cosine_decay_schedule(0.02, steps)
    return {
        "adam": optax.adam(rate),
        "adamw": optax.adamw(rate, weight_decay=1e-4),
        "sgd": optax.sgd(rate),
        "momentum": optax.sgd(rate, momentum=0.9),
        "muon": optax.contrib.muon(rate),
    }


@functools.cache
def problems(shape: tuple[int, int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices and right-hand sides, whose minimum without constraints is of size 1."""
    rng = np.random.default_rng(0)
    size = shape[0] * shape[1]
    a = rng.normal(size=(count, ROWS, size))
    b = np.einsum("kij,kj->ki", a, rng.normal(size=(count, size))) + rng.normal(size=(count, ROWS))
    return a, b


def loss(w: Any, a: Any, b: Any) -> Any:
    return ((a @ w.reshape(-1) - b) ** 2).sum() / (2 * ROWS)


def optima(name: str, count: int) -> np.ndarray:
    """The least loss of each problem, by cvxpy."""
    _, shape, conditions = SETS[name]
    found = []
    for a, b in zip(*problems(shape, count), strict=True):
        w = cp.Variable(shape)
        residual = a @ cp.vec(w, order="C") - b
        problem = cp.Problem(cp.Minimize(cp.sum_squares(residual) / (2 * ROWS)), conditions(w))
        found.append(problem.solve(solver=cp.CLARABEL))
    return np.array(found)


Composition = Callable[[optax.GradientTransformation, oc.Constraint], Any]

COMPOSITIONS: dict[str, Composition] = {
    "plain": lambda tx, constraint: optax.chain(tx, oc.project(constraint)),
    "projected": oc.projected,
    "straight through": lambda tx, constraint: tx,
}


def trained(
    how: str, tx: Any, constraint: oc.Constraint, shape: tuple[int, int], noisy: bool, options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The losses before and after training of all problems."""
    start = oc.constrain(jnp.zeros(shape), constraint)
    steps, count = options.steps, options.problems
    tx = COMPOSITIONS[how](tx, constraint)

    def at(w: jax.Array) -> Any:
        return oc.straight_through(w, constraint) if how == "straight through" else w

    def train(a: jax.Array, b: jax.Array, key: jax.Array) -> Any:
        def step(carry: Any, key: jax.Array) -> Any:
            w, state = carry
            rows = jax.random.choice(key, ROWS, (BATCH,), replace=False)
            some = (a[rows], b[rows], ROWS / BATCH) if noisy else (a, b, 1)
            gradient = jax.grad(lambda w: loss(at(w), *some[:2]) * some[2])(w)
            updates, state = tx.update(gradient, state, w)
            return (optax.apply_updates(w, updates), state), None

        keys = jax.random.split(key, steps)
        return at(jax.lax.scan(step, (start, tx.init(start)), keys)[0][0])

    a, b = problems(shape, count)
    keys = jax.random.split(jax.random.key(0), count)
    ends = jax.jit(jax.vmap(train))(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), keys)
    first = np.asarray(start, np.float64)
    before = [loss(first, *p) for p in zip(a, b, strict=True)]
    after = [loss(np.asarray(w, np.float64), *p) for w, *p in zip(ends, a, b, strict=True)]
    return np.array(before), np.array(after)


def main() -> None:
    parser = argparse.ArgumentParser(description="Which composition arrives.")
    parser.add_argument("sets", nargs="*", default=list(SETS), metavar="SET")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--quick", action="store_true", help="Adam with exact gradients only")
    options = parser.parse_args()
    print(f"missed share of the possible decrease, median and worst of {options.problems} problems")
    columns = "   ".join(f"{how:>17}" for how in COMPOSITIONS)
    print(f"{'set':22} {'optimizer':9} {'gradients':9}   {columns}")
    for name in options.sets:
        constraint, shape, _ = SETS[name]
        best = optima(name, options.problems)
        for optimizer, tx in optimizers(options.steps).items():
            for noisy in (False, True):
                if options.quick and (noisy or optimizer != "adam"):
                    continue
                texts = []
                for how in COMPOSITIONS:
                    before, after = trained(how, tx, constraint, shape, noisy, options)
                    missed = (after - best) / (before - best)
                    texts.append(f"{np.median(missed):8.1e} {np.max(missed):8.1e}")
                kind = "batches" if noisy else "exact"
                print(f"{name:22} {optimizer:9} {kind:9}   {'   '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
