"""Other libraries that hold weights in a set, beside ours, in one run.

In each row a peer and ours take turns in one process, on the same two cores, and the best turn of
each counts: what else runs on the machine only makes turns longer. What JAX runs is compiled,
everything is warmed up, and each call is waited for. Peers are imported where they are run.

    python benchmarks/peers.py [--quick] [--markdown] [TEXT]

With a TEXT only rows that have it in them are run. `--markdown` prints the tables of docs/peers.md.
Needs the extra `peers`.
"""

import argparse
import functools
import importlib
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

# Before they are loaded. Threads of OpenBLAS, from which nothing here gains, wait for one another.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import projections

import optax_constraints as oc

THREADS = 2
Run = Callable[[], Any]


class Runs(NamedTuple):
    """Two ways, and what is said of them beside their times: an entry for each column."""

    ours: Run
    theirs: Run
    compare: Callable[[], list[float]]


class Row(NamedTuple):
    """A row of a table."""

    peer: str
    ours: str
    on: str
    make: Callable[[], Runs]


def load(module: str) -> Any:
    """A peer, which need not be installed where this file is only read."""
    return importlib.import_module(module)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def same(ours: Run, theirs: Run) -> Runs:
    """Two ways to the same result, or after one epoch to the same weights."""
    return Runs(ours, theirs, lambda: difference(ours, theirs))


def difference(ours: Run, theirs: Run) -> list[float]:
    pairs = zip(jax.tree.leaves(ours()), jax.tree.leaves(theirs()), strict=True)
    return [max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)]


# Projections onto the same set.

SQUARE, SMALLER = "2048x2048", "1024x1024"


def both(constraint: oc.Constraint, peer: Callable[..., Any], w: jax.Array, *args: Any) -> Runs:
    """Two projections in JAX; what the peer takes beside the weights is no constant, either."""
    one, other = jax.jit(constraint), jax.jit(peer)
    return same(lambda: one(w), lambda: other(w, *args))


def columns(peer: Callable[..., Any]) -> Callable[..., Any]:
    """A projection of vectors on each column."""
    return lambda w, *args: jax.vmap(lambda x: peer(x, *args), 1, 1)(w)


def jaxopt(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    module = load("jaxopt.projection")
    return functools.partial(getattr(module, f"projection_{name}"), **kwargs)


def pot_projection(rows: Any, sums: Any, w: jax.Array) -> Runs:
    ot = load("ot")
    project = jax.jit(oc.transport(rows, sums))
    a, b, cost = (np.asarray(x, np.float64) for x in (rows, sums, -w))
    return same(lambda: project(w), lambda: ot.smooth.smooth_ot_dual(a, b, cost, 1.0))


def isotonic(w: jax.Array) -> Runs:
    fit_one = load("sklearn.isotonic").isotonic_regression
    project, given = jax.jit(oc.monotone()), np.ascontiguousarray(np.asarray(w).T)
    return same(
        lambda: project(w),
        lambda: np.stack([fit_one(column) for column in given]).T,
    )


ONES = np.ones(256, np.float32)
MARGIN = np.linspace(0.5, 1.5, 256, dtype=np.float32)
NORMAL = np.linspace(0.5, 1.5, 2048, dtype=np.float32)
EQUATIONS = np.asarray(np.random.default_rng(0).normal(size=(8, 64)), np.float32)
NONE = np.zeros((1, 64), np.float32)  # jaxopt wants equations beside inequalities

PROJECTIONS = [
    Row(
        "Optax `projection_non_negative`",
        "`non_neg()`",
        SQUARE,
        lambda: both(oc.non_neg(), projections.projection_non_negative, normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_box`",
        "`box(-1, 1)`",
        SQUARE,
        lambda: both(
            oc.box(-1, 1), lambda w: projections.projection_box(w, -1.0, 1.0), normal(2048, 2048)
        ),
    ),
    Row(
        "Optax `projection_hypercube`",
        "`box(0, 1)`",
        SQUARE,
        lambda: both(oc.box(0, 1), projections.projection_hypercube, normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_linf_ball`",
        "`box(-1, 1)`",
        SQUARE,
        lambda: both(oc.box(-1, 1), projections.projection_linf_ball, normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_l2_ball`",
        "`max_norm(1, axis=None)`",
        SQUARE,
        lambda: both(oc.max_norm(1, axis=None), projections.projection_l2_ball, normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_l2_ball`, `vmap`",
        "`max_norm(1)`",
        SQUARE,
        lambda: both(oc.max_norm(1), columns(projections.projection_l2_ball), normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_l2_sphere`",
        "`unit_norm(axis=None)`",
        SQUARE,
        lambda: both(oc.unit_norm(None), projections.projection_l2_sphere, normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_l2_sphere`, `vmap`",
        "`unit_norm()`",
        SQUARE,
        lambda: both(oc.unit_norm(), columns(projections.projection_l2_sphere), normal(2048, 2048)),
    ),
    Row(
        "Optax `projection_hyperplane`, `vmap`",
        "`hyperplane(a, 1)`",
        SQUARE,
        lambda: both(
            oc.hyperplane(NORMAL, 1.0),
            columns(projections.projection_hyperplane),
            normal(2048, 2048),
            NORMAL,
            1.0,
        ),
    ),
    Row(
        "Optax `projection_halfspace`, `vmap`",
        "`half_space(a, 1)`",
        SQUARE,
        lambda: both(
            oc.half_space(NORMAL, 1.0),
            columns(projections.projection_halfspace),
            normal(2048, 2048),
            NORMAL,
            1.0,
        ),
    ),
    Row(
        "Optax `projection_simplex`",
        "`simplex(axis=None)`",
        SMALLER,
        lambda: both(oc.simplex(axis=None), projections.projection_simplex, normal(1024, 1024)),
    ),
    Row(
        "Optax `projection_simplex`, `vmap`",
        "`simplex()`",
        SMALLER,
        lambda: both(oc.simplex(), columns(projections.projection_simplex), normal(1024, 1024)),
    ),
    Row(
        "Optax `projection_l1_ball`",
        "`l1_ball(axis=None)`",
        SMALLER,
        lambda: both(oc.l1_ball(axis=None), projections.projection_l1_ball, normal(1024, 1024)),
    ),
    Row(
        "Optax `projection_l1_ball`, `vmap`",
        "`l1_ball()`",
        SMALLER,
        lambda: both(oc.l1_ball(), columns(projections.projection_l1_ball), normal(1024, 1024)),
    ),
    Row(
        "jaxopt `projection_l2_ball`, `vmap`",
        "`max_norm(1)`",
        SQUARE,
        lambda: both(oc.max_norm(1), columns(jaxopt("l2_ball")), normal(2048, 2048)),
    ),
    Row(
        "jaxopt `projection_simplex`, `vmap`",
        "`simplex()`",
        SMALLER,
        lambda: both(oc.simplex(), columns(jaxopt("simplex")), normal(1024, 1024)),
    ),
    Row(
        "jaxopt `projection_l1_ball`, `vmap`",
        "`l1_ball()`",
        SMALLER,
        lambda: both(oc.l1_ball(), columns(jaxopt("l1_ball")), normal(1024, 1024)),
    ),
    Row(
        "jaxopt `projection_box_section`, `vmap`",
        "`box_section(0, 0.02, a, 1)`",
        "256x1024",
        lambda: both(
            oc.box_section(0.0, 0.02, MARGIN, 1.0),
            columns(jaxopt("box_section")),
            normal(256, 1024),
            (0 * ONES, 0.02 * ONES, MARGIN, 1.0),
        ),
    ),
    Row(
        "jaxopt `projection_affine_set`, `vmap`",
        "`affine(A, b)`, 8 equations",
        "64x1024",
        lambda: both(
            oc.affine(EQUATIONS, ONES[:8]),
            columns(jaxopt("affine_set")),
            normal(64, 1024),
            (EQUATIONS, ONES[:8]),
        ),
    ),
    Row(
        "jaxopt `projection_polyhedron`, `vmap`",
        "`polyhedron(G, h)`, 8 inequalities",
        "64x1024",
        lambda: both(
            oc.polyhedron(EQUATIONS, ONES[:8]),
            columns(jaxopt("polyhedron", check_feasible=False)),
            normal(64, 1024),
            (NONE, NONE[0, :1], EQUATIONS, ONES[:8]),
        ),
    ),
    Row(
        "jaxopt `projection_transport`",
        "`transport(r, c)`",
        "256x256",
        lambda: both(
            oc.transport(MARGIN, ONES),
            jaxopt("transport"),
            normal(256, 256),
            (MARGIN, ONES),
        ),
    ),
    Row(
        "jaxopt `projection_birkhoff`",
        "`doubly_stochastic()`",
        "256x256",
        lambda: both(oc.doubly_stochastic(), jaxopt("birkhoff"), normal(256, 256)),
    ),
    Row(
        "POT `smooth_ot_dual`, float64",
        "`transport(r, c)`",
        "256x256",
        lambda: pot_projection(MARGIN, ONES, normal(256, 256)),
    ),
    Row(
        "scikit-learn `isotonic_regression`",
        "`monotone()`",
        "131072x1",
        lambda: isotonic(normal(131072, 1)),
    ),
    Row(
        "scikit-learn `isotonic_regression`",
        "`monotone()`",
        SMALLER,
        lambda: isotonic(normal(1024, 1024)),
    ),
]

# Training steps of the same model, on the same batches.

LAYERS, WIDTH, BATCH, BATCHES = 4, 1024, 64, 10
# Keras adds it before the correction of the bias, and Optax after it.
EPSILON = 1e-12
MODEL = f"{LAYERS} layers of {WIDTH}x{WIDTH}"


def kernels() -> list[jax.Array]:
    """Columns with a norm of 1.44, so that a bound of 1 holds back all of them."""
    return [0.045 * normal(WIDTH, WIDTH, seed=i) for i in range(LAYERS)]


def batches() -> tuple[np.ndarray, np.ndarray]:
    shape = BATCHES * BATCH, WIDTH
    return np.asarray(normal(*shape, seed=8)), np.tanh(np.asarray(normal(*shape, seed=9)))


def keras_formula(w: jax.Array) -> jax.Array:
    """`keras.constraints.MaxNorm` with a bound of 1."""
    norm = jnp.sqrt(jnp.sum(jnp.square(w), axis=0, keepdims=True))
    return w * jnp.clip(norm, 0, 1) / (1e-7 + norm)


def jitted(
    projection: optax.GradientTransformation | None = None,
    after: Callable[[Any], Any] = lambda params: params,
) -> Run:
    """An epoch of compiled steps."""
    tx = optax.chain(optax.adam(1e-3, eps=EPSILON), *([projection] if projection else []))

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        for w in params:
            x = jnp.tanh(x @ w)
        return jnp.mean((x - y) ** 2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(loss)(params, x, y)
        updates, state = tx.update(grads, state, params)
        return after(optax.apply_updates(params, updates)), state

    params = kernels()
    state, (xs, ys) = tx.init(params), batches()

    def run() -> Any:
        nonlocal params, state
        for i in range(0, len(xs), BATCH):
            params, state = step(params, state, xs[i : i + BATCH], ys[i : i + BATCH])
        return params

    return run


def fit(constraint: Any) -> Run:
    """An epoch of Keras' own loop."""
    keras = load("keras")
    layers = [
        keras.layers.Dense(WIDTH, "tanh", use_bias=False, kernel_constraint=constraint)
        for _ in range(LAYERS)
    ]
    model = keras.Sequential([keras.Input((WIDTH,)), *layers])
    model.set_weights([np.asarray(w) for w in kernels()])
    model.compile(keras.optimizers.Adam(1e-3, epsilon=EPSILON), "mse")
    x, y = batches()

    def run() -> Any:
        model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0)
        return [w.value for w in model.trainable_weights]

    return run


def keras_max_norm() -> Any:
    return load("keras").constraints.MaxNorm(1)


def ours_in_keras() -> Any:
    load("optax_constraints.keras")
    return oc.max_norm(1)


def by_hand() -> Run:
    return jitted(after=lambda params: jax.tree.map(keras_formula, params))


STEPS = [
    Row(
        "Keras `fit`, `MaxNorm(1)`",
        "`project(max_norm(1))`, a compiled step",
        MODEL,
        lambda: same(jitted(oc.project(oc.max_norm(1))), fit(keras_max_norm())),
    ),
    Row(
        "Keras `fit`, `MaxNorm(1)`",
        "`max_norm(1)` in Keras `fit`",
        MODEL,
        lambda: same(fit(ours_in_keras()), fit(keras_max_norm())),
    ),
    Row(
        "Keras' formula by hand, a compiled step",
        "`project(max_norm(1))`",
        MODEL,
        lambda: same(jitted(oc.project(oc.max_norm(1))), by_hand()),
    ),
    Row(
        "Keras' formula by hand, a compiled step",
        "`constrain(params, max_norm(1))`",
        MODEL,
        lambda: same(jitted(after=lambda params: oc.constrain(params, oc.max_norm(1))), by_hand()),
    ),
]

# Steps of an optimizer on given gradients, each library by its own method.

Off = Callable[[np.ndarray], float]  # how far off the set weights are


def off_orthogonal(w: np.ndarray) -> float:
    return float(np.max(np.abs(w.T @ w - np.eye(w.shape[1]))))


def off_sphere(w: np.ndarray) -> float:
    return float(np.max(np.abs(np.linalg.norm(w, axis=1) - 1)))


def off_spectral(w: np.ndarray) -> float:
    return abs(float(np.linalg.norm(w, 2)) - 1)


def apart(ours: Run, theirs: Run, off: Off) -> Runs:
    """Both measured in float64 after 10 steps."""

    def measure(run: Run) -> float:
        for _ in range(9):
            run()
        return off(np.asarray(run(), np.float64))

    return Runs(ours, theirs, lambda: [measure(ours), measure(theirs)])


def gradients(shape: tuple[int, ...]) -> list[np.ndarray]:
    """Noise; steps take them in turn."""
    return [np.asarray(normal(*shape, seed=i)) for i in range(1, 5)]


def adam_step(tx: optax.GradientTransformation, start: jax.Array) -> Run:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(w: jax.Array, state: Any, grads: jax.Array) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, w)
        return optax.apply_updates(w, updates), state

    w, grads, count = jnp.array(start), jax.device_put(gradients(start.shape)), 0
    state = tx.init(w)

    def run() -> Any:
        nonlocal w, state, count
        count += 1
        w, state = step(w, state, grads[count % len(grads)])
        return w

    return run


def geoopt_step(manifold: str, start: jax.Array) -> Run:
    geoopt, torch = load("geoopt"), load("torch")
    w = geoopt.ManifoldParameter(
        torch.tensor(np.asarray(start)), manifold=getattr(geoopt, manifold)()
    )
    optimizer = geoopt.optim.RiemannianAdam([w], lr=1e-3)
    grads, count = [torch.tensor(g) for g in gradients(start.shape)], 0

    def run() -> Any:
        nonlocal count
        count += 1
        w.grad = grads[count % len(grads)]
        optimizer.step()
        return w.detach()

    return run


def torch_step(parametrization: str, start: jax.Array, **kwargs: Any) -> Run:
    """Forward and backward through a parametrization, and Adam."""
    torch, parametrizations = load("torch"), load("torch.nn.utils.parametrizations")
    layer = torch.nn.Linear(start.shape[1], start.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.tensor(np.asarray(start)))
    getattr(parametrizations, parametrization)(layer, **kwargs)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-3)
    grads, count = [torch.tensor(g) for g in gradients(start.shape)], 0

    def run() -> Any:
        nonlocal count
        count += 1
        optimizer.zero_grad()
        weight = layer.weight
        weight.backward(grads[count % len(grads)])
        optimizer.step()
        return weight.detach()

    return run


def stiefel(rows: int, columns: int, peer: Callable[[jax.Array], Run]) -> Runs:
    start = oc.orthogonal()(normal(rows, columns))
    tx = oc.projected(optax.adam(1e-3), oc.orthogonal())
    return apart(adam_step(tx, start), peer(start), off_orthogonal)


def sphere() -> Runs:
    rule = oc.unit_norm(axis=1)
    start = rule(normal(2048, 1024))
    ours = adam_step(oc.projected(optax.adam(1e-3), rule), start)
    return apart(ours, geoopt_step("Sphere", start), off_sphere)


def spectral(rule: oc.Constraint) -> Runs:
    start = oc.fixed_spectral_norm(1.0)(normal(1024, 1024))
    ours = adam_step(optax.chain(optax.adam(1e-3), oc.project(rule)), start)
    return apart(ours, torch_step("spectral_norm", start), off_spectral)


def plan(peer: str) -> Runs:
    """A plan for a cost: what is computed differs, and so does what it is for."""
    w = normal(256, 256)
    project, a, b, cost = jax.jit(oc.transport(MARGIN, ONES)), MARGIN / 256, ONES / 256, -w

    def off(found: Any) -> float:
        x = np.asarray(found, np.float64) * (1 if found.dtype == np.float32 else 256)
        return max(abs(x.sum(1) - MARGIN).max(), abs(x.sum(0) - ONES).max())

    ours = functools.partial(project, w)
    if peer == "OTT":
        geometry = load("ott.geometry.geometry").Geometry(cost, epsilon=0.1)
        solve = jax.jit(lambda a, b: load("ott.solvers.linear").solve(geometry, a, b).matrix)
        theirs = functools.partial(solve, MARGIN, ONES)
    else:
        given = [np.asarray(x, np.float64) for x in (a, b, cost)]
        given[0], given[1] = (x / x.sum() for x in given[:2])
        extra = {"sinkhorn": (0.1,), "emd": ()}[peer]
        theirs = functools.partial(getattr(load("ot"), peer), *given, *extra)
    return Runs(ours, theirs, lambda: [off(ours()), off(theirs())])


def stiefel_row(peer: str, rows: int, columns: int, make: Callable[[jax.Array], Run]) -> Row:
    ours = "`projected(adam, orthogonal())`"
    return Row(peer, ours, f"{rows}x{columns}", lambda: stiefel(rows, columns, make))


METHODS = [
    stiefel_row(
        "geoopt `RiemannianAdam`, `Stiefel`", 512, 512, lambda w: geoopt_step("Stiefel", w)
    ),
    stiefel_row(
        "geoopt `RiemannianAdam`, `Stiefel`", 1024, 128, lambda w: geoopt_step("Stiefel", w)
    ),
    Row(
        "geoopt `RiemannianAdam`, `Sphere`",
        "`projected(adam, unit_norm(axis=1))`",
        "2048x1024",
        sphere,
    ),
    *(
        stiefel_row(
            f"PyTorch `orthogonal`, `{method}`",
            *shape,
            functools.partial(torch_step, "orthogonal", orthogonal_map=method),
        )
        for method, shape in (
            ("matrix_exp", (512, 512)),
            ("cayley", (512, 512)),
            ("householder", (256, 64)),
        )
    ),
    Row(
        "PyTorch `spectral_norm`",
        "`project(fixed_spectral_norm(1))`",
        SMALLER,
        lambda: spectral(oc.fixed_spectral_norm(1.0)),
    ),
    Row(
        "PyTorch `spectral_norm`",
        "`project(max_spectral_norm(1))`",
        SMALLER,
        lambda: spectral(oc.max_spectral_norm(1.0)),
    ),
    Row("POT `sinkhorn`, float64", "`transport(r, c)`", "256x256", lambda: plan("sinkhorn")),
    Row("POT `emd`, float64", "`transport(r, c)`", "256x256", lambda: plan("emd")),
    Row("OTT Sinkhorn", "`transport(r, c)`", "256x256", lambda: plan("OTT")),
]

TABLES = {
    "Projections onto the same set": (["largest difference"], PROJECTIONS),
    "Training steps of the same model": (["largest difference"], STEPS),
    "Other methods for the same purpose": (["ours off the set", "peer off the set"], METHODS),
}


def turn(run: Run, calls: int) -> float:
    """Milliseconds of a call."""
    # Threads of the other library go on looking for work for a while.
    time.sleep(0.02)
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run())
    return (time.perf_counter() - start) / calls * 1e3


def best_turns(runs: tuple[Run, Run], seconds: float) -> np.ndarray:
    calls = [max(1, int(20 / turn(run, 1))) for run in runs]
    best, rounds = np.full(2, np.inf), 0
    end = time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < end:
        # PyTorch may be faster on one: of steps of many small operations two wait for one another.
        load("torch").set_num_threads(1 + rounds % THREADS)
        for i in (0, 1):
            best[i] = min(best[i], turn(runs[i], calls[i]))
        rounds += 1
    return best


def cells(row: Row, seconds: float) -> list[str]:
    ours, theirs, compare = row.make()
    compared = compare()
    own, peer = best_turns((ours, theirs), seconds)
    times = [f"{own:#.3g}", f"{peer:#.3g}", f"{peer / own:#.2g}"]
    return [row.peer, row.ours, row.on, *times, *(f"{x:.0e}" for x in compared)]


def versions() -> str:
    names = "jax", "optax", "jaxopt", "keras", "torch", "geoopt", "POT", "ott-jax", "scikit-learn"
    found = (f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in names)
    return f"{THREADS} threads; {', '.join(found)}."


def main() -> None:
    parser = argparse.ArgumentParser(description="Other libraries beside ours.")
    parser.add_argument("text", nargs="?", default="", help="run only rows with this in them")
    parser.add_argument("--quick", action="store_true", help="few turns, as a smoke test")
    parser.add_argument("--markdown", action="store_true", help="print tables for the page")
    given = parser.parse_args()

    # XLA takes as many threads as there are cores.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    load("torch").set_num_threads(1)
    print(versions())
    for title, (compared, rows) in TABLES.items():
        head = ["peer", "ours", "on", "ours, ms", "peer, ms", "times as fast", *compared]
        lines = [head, ["---"] * len(head)] if given.markdown else [head]
        print(f"\n## {title}\n")
        chosen = [row for row in rows if given.text in f"{title} {row.peer} {row.ours}"]
        found = (cells(row, 0.0 if given.quick else 1.5) for row in chosen)
        for line in itertools.chain(lines, found):
            if given.markdown:
                print("|", " | ".join(line), "|", flush=True)
            else:
                widths = (42, 42, 26, 10, 10, 15, 20, 20)
                print("".join(f"{x:<{n}}" for x, n in zip(line, widths, strict=False)), flush=True)


if __name__ == "__main__":
    main()
