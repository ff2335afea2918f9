"""What a projection costs beside the usual way to compute it.

Each pair is compiled (scikit-learn and NumPy aside), warmed up, and runs in turns in one
process; a ratio is the time of the usual way over ours, its median over rounds, with bounds
between which the median lies at about 95%.

    python benchmarks/sets.py [--quick]
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.isotonic import isotonic_regression

import optax_constraints as oc

PRECISION = jax.lax.Precision.HIGHEST


class Pair(NamedTuple):
    """Two ways to the same projection."""

    what: str
    ours: Callable[[], Any]
    usual: Callable[[], Any]
    target: float | None
    """How many times as fast ours should be at least."""
    rounds: int
    error: float
    """The largest difference of the two results; NaN if they are not the same projection."""
    temporaries: float
    """Temporary memory of ours, in arrays of the size of its weights."""


def pair(
    what: str,
    constraint: oc.Constraint,
    usual: Callable[[jax.Array], Any],
    w: jax.Array,
    target: float | None,
    rounds: int,
    same: bool = True,
) -> Pair:
    compiled = jax.jit(constraint).lower(w).compile()
    error = float(jnp.max(jnp.abs(compiled(w) - usual(w)))) if same else float("nan")
    memory = compiled.memory_analysis()
    temporaries = memory.temp_size_in_bytes / w.nbytes if memory else float("nan")
    return Pair(what, lambda: compiled(w), lambda: usual(w), target, rounds, error, temporaries)


def polar_by_svd(w: jax.Array) -> jax.Array:
    u, _, vt = jnp.linalg.svd(w, full_matrices=False)
    return jnp.matmul(u, vt, precision=PRECISION)


def clip_by_svd(w: jax.Array) -> jax.Array:
    u, s, vt = jnp.linalg.svd(w, full_matrices=False)
    return jnp.matmul(u * jnp.minimum(s, 1.0), vt, precision=PRECISION)


def clip_by_eigh(w: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh(w)
    return jnp.matmul(vectors * jnp.maximum(values, 0), vectors.T, precision=PRECISION)


def each_column(w: jax.Array) -> np.ndarray:
    columns = np.asarray(w).T
    return np.stack([isotonic_regression(column) for column in columns]).T


def largest_by_sort(w: jax.Array) -> jax.Array:
    kept = jax.lax.top_k(jnp.abs(w).T, round(0.1 * len(w)))[0][:, -1]
    return jnp.where(jnp.abs(w) >= kept, w, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description="What a projection costs.")
    parser.add_argument("--quick", action="store_true", help="two rounds, as a smoke test")
    quick = parser.parse_args().quick

    wide = jax.random.normal(jax.random.key(0), (2048, 2048))
    square = jax.random.normal(jax.random.key(1), (1024, 1024))
    orthogonal = oc.orthogonal()(square)
    near = orthogonal + 1e-3 * square
    inside = 0.9 * orthogonal
    semidefinite = oc.positive_semidefinite()(square)
    pairs = [
        pair(
            "simplex, 2048 columns of 2048, to vmapped optax",
            oc.simplex(),
            jax.jit(jax.vmap(optax.projections.projection_simplex, 1, 1)),
            wide,
            8,
            8,
        ),
        pair(
            "l1_ball, 2048 columns of 2048, to vmapped optax",
            oc.l1_ball(),
            jax.jit(jax.vmap(optax.projections.projection_l1_ball, 1, 1)),
            wide,
            8,
            8,
        ),
        pair(
            "monotone, 2048 columns of 2048, to scikit-learn",
            oc.monotone(),
            each_column,
            wide,
            1,
            8,
        ),
        pair(
            "top_k, 10% of 2048 columns of 2048, to lax.top_k",
            oc.top_k(0.1, axis=0),
            jax.jit(largest_by_sort),
            wide,
            None,
            8,
        ),
        pair(
            "orthogonal, 1e-3 away, 1024x1024, to SVD",
            oc.orthogonal(),
            jax.jit(polar_by_svd),
            near,
            4,
            8,
        ),
        pair(
            "orthogonal, from a normal matrix, to SVD",
            oc.orthogonal(),
            jax.jit(polar_by_svd),
            square,
            None,
            8,
        ),
        pair(
            "max_spectral_norm, nothing exceeds, to SVD clip",
            oc.max_spectral_norm(1.0),
            jax.jit(clip_by_svd),
            inside,
            10,
            8,
        ),
        pair(
            "max_spectral_norm, exceeded by 10%, to SVD clip",
            oc.max_spectral_norm(1.0),
            jax.jit(clip_by_svd),
            square * (1.1 / jnp.linalg.norm(square, 2)),
            None,
            4,
        ),
        pair(
            "max_spectral_norm, a normal matrix, to SVD clip",
            oc.max_spectral_norm(1.0),
            jax.jit(clip_by_svd),
            square,
            None,
            4,
        ),
        pair(
            "positive_semidefinite, inside, to eigh",
            oc.positive_semidefinite(),
            jax.jit(clip_by_eigh),
            semidefinite,
            None,
            4,
        ),
        pair(
            "doubly_stochastic, a normal matrix, to one SVD",
            oc.doubly_stochastic(),
            jax.jit(polar_by_svd),
            square,
            None,
            4,
            same=False,
        ),
    ]
    print(f"{'projection':52}{'ms':>8}{'usual':>9}{'times as fast':>24}{'leaves':>8}{'differ':>9}")
    for one in pairs:
        ours, usual = measure(one, 2 if quick else one.rounds)
        ratios = np.sort(usual / ours)
        half = len(ratios) ** -0.5
        low, median, high = np.quantile(ratios, np.clip([0.5 - half, 0.5, 0.5 + half], 0, 1))
        verdict = ""
        if one.target is not None:
            verdict = f"  target {one.target:g}: {'met' if median >= one.target else 'missed'}"
        times = f"{median:.2f} ({low:.2f} to {high:.2f})"
        print(
            f"{one.what:52}{1e3 * np.median(ours):8.1f}{1e3 * np.median(usual):9.1f}"
            f"{times:>24}{one.temporaries:8.2f}{one.error:9.1e}{verdict}"
        )


def measure(one: Pair, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of both ways in each round, in turns."""
    times: tuple[list[float], list[float]] = [], []
    for i in range(rounds):
        for way in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            jax.block_until_ready((one.ours, one.usual)[way]())
            times[way].append(time.perf_counter() - start)
    return np.array(times[0]), np.array(times[1])


if __name__ == "__main__":
    main()
