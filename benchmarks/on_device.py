"""What constraints cost on an accelerator, measured on one.

1. An Adam step on given gradients with about a billion parameters in float32. Adam reads four
   numbers a parameter and writes three, 28 bytes: the table has the bandwidth that this comes to,
   and what share that is of a copy's.
2. Each set's projection beside the usual way to compute it, and beside a copy of the weights.
3. Every choice that the library makes by platform: both branches, forced.
4. Sets of singular values beside a decomposition, and beside matrix products alone.

Programs are compiled first, several at once, and then take turns. A part stops where its seconds
are over; what fails is said, and the rest goes on.

    python benchmarks/on_device.py [--parts 1,2,3,4] [--seconds 50] [--json FILE] [--toy]
"""

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
# Products are timed while others compile, and would be tuned for minutes.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_autotune_level=0"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import optax_constraints as oc
from optax_constraints.sets.polar import _QUINTICS

HIGHEST = lax.Precision.HIGHEST
FLOOR = 28  # bytes a parameter that Adam reads and writes
RECORD: dict[str, Any] = {}
"""What is written as JSON: by part, the rows of its tables."""


class Clock:
    """The seconds that are left of a part."""

    def __init__(self, seconds: float):
        """Starts it."""
        self._end = time.perf_counter() + seconds

    @property
    def left(self) -> float:
        """How many there are."""
        return self._end - time.perf_counter()


def say(*words: Any) -> None:
    print(*words, flush=True)


@contextlib.contextmanager
def going_on(what: str) -> Iterator[None]:
    """Says what failed, and lets the rest go on."""
    try:
        yield
    except Exception as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        say(f"FAILED {what}: {line}")
        RECORD.setdefault("failed", {})[what] = line


# Compiling and timing.

Lowered = Callable[[], Any]


def compiled(programs: Mapping[Any, Lowered], clock: Clock) -> dict[Any, Any]:
    """Programs by name, compiled several at once; those that were not in time are left out.

    Args:
        programs: By name, what traces and lowers a function.
        clock: Half of what it has left is there for compiling.
    """
    start, limit, waiting = time.perf_counter(), clock.left / 2, {}
    pool = futures.ThreadPoolExecutor(min(12, os.cpu_count() or 1))
    for name, lower in programs.items():
        if time.perf_counter() - start > limit:
            break
        with going_on(f"tracing {name}"):
            waiting[pool.submit(lower().compile)] = name
    found = {}
    with contextlib.suppress(futures.TimeoutError):
        for done in futures.as_completed(waiting, limit - (time.perf_counter() - start)):
            with going_on(f"compiling {waiting[done]}"):
                found[waiting[done]] = done.result()
    pool.shutdown(wait=False, cancel_futures=True)
    late = [name for name in programs if name not in found]
    say(f"{len(found)} programs compiled in {time.perf_counter() - start:.0f} s")
    if late:
        say(f"not compiled, or not in time: {', '.join(map(str, late))}")
    return {name: found[name] for name in programs if name in found}


def lowering(function: Callable[..., Any], *args: Any) -> Lowered:
    # Not the function itself: `jax.jit` copies its attributes, and a box has one called `lower`.
    return lambda: jax.jit(lambda *args: function(*args)).lower(*args)


def in_turns(
    runs: Mapping[Any, Callable[[int], None]], clock: Clock, most: float = np.inf
) -> dict[Any, np.ndarray]:
    """Milliseconds a call in each round: (rounds,) by name.

    Args:
        runs: By name, what calls a program so many times and waits for the last result.
        clock: Ends the rounds, of which there are three at least and thirty at most.
        most: How many seconds the rounds may take, if that is less than is left.
    """
    calls, end = {}, time.perf_counter() + min(clock.left, most)
    for name, run in runs.items():
        with going_on(f"running {name}"):
            run(1)
            start = time.perf_counter()
            run(1)
            once = time.perf_counter() - start
            calls[name] = int(np.clip(0.02 / once, 1, 50))
            run(calls[name])
    times: dict[Any, list[float]] = {name: [] for name in calls}
    order = np.random.default_rng(0)
    for k in range(30):
        if k >= 3 and time.perf_counter() > end:
            break
        for i in order.permutation(len(calls)):
            name = list(calls)[i]
            start = time.perf_counter()
            runs[name](calls[name])
            times[name].append((time.perf_counter() - start) / calls[name] * 1e3)
    return {name: np.array(values) for name, values in times.items()}


def table(part: str, rows: list[dict[str, Any]]) -> None:
    """Prints rows, and keeps them for the JSON file."""
    RECORD.setdefault(part, []).extend(rows)
    if not rows:
        return
    width = max(len(str(row["what"])) for row in rows)
    say(f"{'':{width}}", *(f"{name:>11}" for name in rows[0] if name != "what"))
    for row in rows:
        cells = (value for name, value in row.items() if name != "what")
        say(f"{row['what']:{width}}", *(f"{cell(value):>11}" for value in cells))


def cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.1e}" if value and abs(value) < 1e-2 else f"{value:.4g}"


def copy_bandwidth(size: int) -> float:
    """Bytes a second of reading an array of `size` numbers and writing another."""
    x = jnp.ones((size,))
    copy = jax.jit(lambda x: x + 1)
    times = in_turns({"copy": calling(copy, x)}, Clock(1))["copy"]
    return 8 * size / (float(np.median(times)) / 1e3)


# Steps of an optimizer.


class Steps:
    """Steps that take turns on the same weights and moments, which are donated.

    Args:
        leaves: How many there are.
        size: Their rows and columns.
    """

    def __init__(self, leaves: int, size: int):
        """Draws weights and gradients."""
        self.leaves, self.size = leaves, size
        draw = jax.jit(lambda key, s: s * jax.random.normal(key, (size, size)))
        keys = jax.random.split(jax.random.key(0), 2 * leaves)
        # Columns have a norm near 2, the bound below.
        self._draw = lambda: [draw(key, 2 * size**-0.5) for key in keys[:leaves]]
        self.grads = [draw(key, 1.0) for key in keys[leaves:]]
        self._carry: list[Any] = []

    @property
    def carry(self) -> list[Any]:
        """The weights and both moments, made anew where a step that failed has lost them."""
        if not self._carry or any(x.is_deleted() for x in jax.tree.leaves(self._carry)):
            self._carry = []  # the old ones go first
            self._carry = [self._draw()]
            self._carry += [[jnp.zeros_like(g) for g in self.grads] for _ in range(2)]
        return self._carry

    def lowered(self, tx: optax.GradientTransformation, after: Callable[[Any], Any]) -> Any:
        """A step, and what its state has beside the moments."""
        shapes = [jax.ShapeDtypeStruct(g.shape, g.dtype) for g in self.grads]
        leaf = shapes[0].shape
        like, treedef = jax.tree.flatten(jax.eval_shape(tx.init, shapes))
        large = [x.shape == leaf for x in like]
        assert sum(large) == 2 * self.leaves, "a state of two moments and little else"

        def step(params: Any, mu: Any, nu: Any, rest: Any, grads: Any) -> Any:
            moments, others = iter([*mu, *nu]), iter(rest)
            state = treedef.unflatten(next(moments if big else others) for big in large)
            updates, state = tx.update(grads, state, params)
            params = after(optax.apply_updates(params, updates))
            new = jax.tree.leaves(state)
            moments = [x for x, big in zip(new, large, strict=True) if big]
            rest = [x for x, big in zip(new, large, strict=True) if not big]
            return params, moments[: self.leaves], moments[self.leaves :], rest

        small = [x for x, big in zip(like, large, strict=True) if not big]
        rest = [jnp.zeros(x.shape, x.dtype) for x in small]
        moments = [shapes, shapes]
        donated = jax.jit(step, donate_argnums=(0, 1, 2, 3))
        return donated.lower(shapes, *moments, small, shapes), rest

    def run(self, program: Any, rest: Any) -> Callable[[int], None]:
        """What runs a step so many times."""

        def run(calls: int) -> None:
            nonlocal rest
            for _ in range(calls):
                *self._carry, rest = program(*self.carry, rest, self.grads)
            jax.block_until_ready((self._carry, rest))

        return run

    def temporaries(self, program: Any) -> float:
        """Temporary memory in leaves."""
        memory = program.memory_analysis()
        return memory.temp_size_in_bytes / self.grads[0].nbytes if memory else float("nan")


def keras_formula(axis: int | None) -> Callable[[jax.Array], jax.Array]:
    """`keras.constraints.MaxNorm` with a bound of 2."""

    def formula(w: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(w * w, axis=axis, keepdims=True))
        return w * (jnp.clip(norm, 0, 2) / (1e-7 + norm))

    return formula


UNITS = {"columns": 0, "rows": 1, "whole tensor": None}


def same(x: Any) -> Any:
    return x


def variants(few: bool) -> dict[str, Any]:
    """By name, an optimizer and what comes after its step."""
    adam = optax.adam(1e-3)
    found: dict[str, Any] = {"none": (adam, same)}
    for name, axis in UNITS.items():
        bound = oc.max_norm(2.0, axis=axis)
        hand = keras_formula(axis)
        found[f"by hand, {name}"] = adam, lambda p, hand=hand: jax.tree.map(hand, p)
        found[f"constrain max_norm, {name}"] = adam, lambda p, b=bound: oc.constrain(p, b)
        found[f"chain max_norm, {name}"] = optax.chain(adam, oc.project(bound)), same
        if few and name == "rows":
            return found
    columns = oc.max_norm(2.0)
    return found | {
        "chain non_neg": (optax.chain(adam, oc.project(oc.non_neg())), same),
        "chain unit_norm, columns": (optax.chain(adam, oc.project(oc.unit_norm())), same),
        "projected max_norm, columns": (oc.projected(adam, columns), same),
        "projected unit_norm, columns": (oc.projected(adam, oc.unit_norm()), same),
    }


def part_1(clock: Clock, toy: bool) -> None:
    """A step with a billion parameters."""
    bandwidth = RECORD["copy_bandwidth"]
    sizes = ((16, 64), (64, 32)) if toy else ((16, 8192), (64, 4096))
    for k, (leaves, size) in enumerate(sizes):
        with going_on(f"{leaves} leaves of {size}"):
            left = Clock(clock.left if k else 0.65 * clock.left)
            say(f"\n{leaves} leaves of {size}x{size}")
            steps = Steps(leaves, size)
            rows = step_rows(steps, variants(few=k > 0), left)
            for row in rows:
                row["GB/s"] = FLOOR * leaves * size**2 / row["ms"] / 1e6
                row["of a copy"] = row["GB/s"] * 1e9 / bandwidth
                row["bytes"] = FLOOR / row["of a copy"]
            table("steps", [{**row, "leaves": leaves, "size": size} for row in rows])
            del steps
    say("\nbytes: what a copy moves in that time, a parameter. temp: temporary memory in leaves.")


def step_rows(
    steps: Steps, found: dict[str, tuple[Any, Any]], clock: Clock
) -> list[dict[str, Any]]:
    """Time and temporaries of each variant, and its ratio to the first."""
    rests: dict[str, Any] = {}

    def lower(name: str) -> Any:
        lowered, rests[name] = steps.lowered(*found[name])
        return lowered

    programs = compiled({name: functools.partial(lower, name) for name in found}, clock)
    runs = {name: steps.run(program, rests[name]) for name, program in programs.items()}
    times = in_turns(runs, clock)
    first = times.get(next(iter(found)))
    return [
        {
            "what": name,
            "ms": float(np.median(own)),
            "to none": float(np.median(own / first)) if first is not None else float("nan"),
            "temp": steps.temporaries(programs[name]),
        }
        for name, own in times.items()
    ]


# Projections.


def largest_by_sort(w: jax.Array) -> jax.Array:
    kept = lax.top_k(jnp.abs(w).T, round(0.1 * len(w)))[0][:, -1]
    return jnp.where(jnp.abs(w) >= kept, w, 0)


def two_of_four_by_sort(w: jax.Array) -> jax.Array:
    groups = jnp.abs(w).reshape(-1, 4, w.shape[1])
    kept = jnp.sort(groups, axis=1)[:, 2:3]
    return jnp.where(groups >= kept, w.reshape(groups.shape), 0).reshape(w.shape)


def sum_to_by_hand(w: jax.Array) -> jax.Array:
    return w + (1 - jnp.sum(w, axis=0)) / len(w)


def in_each_column(projection: Callable[..., Any]) -> Callable[[jax.Array], jax.Array]:
    return jax.vmap(projection, 1, 1)


def sets() -> dict[str, tuple[oc.Constraint, Callable[[jax.Array], jax.Array] | None]]:
    """Sets of columns and of entries, and the usual way to the same projection."""
    optax_sets = optax.projections
    return {
        "non_neg": (oc.non_neg(), optax_sets.projection_non_negative),
        "box": (oc.box(-0.5, 0.5), lambda w: optax_sets.projection_box(w, -0.5, 0.5)),
        "max_norm, columns": (oc.max_norm(2.0), keras_formula(0)),
        "max_norm, rows": (oc.max_norm(2.0, axis=1), keras_formula(1)),
        "max_norm, whole": (oc.max_norm(2.0, axis=None), keras_formula(None)),
        "sum_to": (oc.sum_to(1.0), sum_to_by_hand),
        "simplex": (oc.simplex(), in_each_column(optax_sets.projection_simplex)),
        "l1_ball": (oc.l1_ball(), in_each_column(optax_sets.projection_l1_ball)),
        "top_k, a tenth": (oc.top_k(0.1, axis=0), largest_by_sort),
        "nm, 2 of 4": (oc.nm(2, 4), two_of_four_by_sort),
        "symmetric": (oc.symmetric(), lambda w: (w + w.T) / 2),
        "box_section": (oc.box_section(0.0, 1.0), None),
        "monotone": (oc.monotone(), None),
        "convex_sequence": (oc.convex_sequence(), None),
        "doubly_stochastic": (oc.doubly_stochastic(), None),
    }


Pair = tuple[str | None, str]  # a program, and the weights that it is given


class Row(NamedTuple):
    """A projection beside another way to it."""

    what: str
    ours: str
    usual: str | None
    given: str
    """Of the weights, which."""


def compared(
    rows: list[Row],
    programs: dict[str, Callable[[jax.Array], Any]],
    inputs: dict[str, jax.Array],
    clock: Clock,
    before: dict[Pair, float],
    growth: float,
) -> list[dict[str, Any]]:
    """Times of both ways, and how far apart the results are.

    Args:
        rows: What to compare.
        programs: Functions by name.
        inputs: Weights by name.
        clock: What would take longer than it has left is left out.
        before: Seconds of each program on smaller weights; those on these take their place.
        growth: By how much they grow.
    """
    like = next(iter(inputs.values()))
    made = compiled({name: lowering(f, like) for name, f in programs.items()}, clock)
    results: dict[Pair, Any] = {}
    seconds: dict[Pair, float] = {}
    fast: dict[Any, Callable[[int], None]] = {}
    pairs = [(way, row.given) for row in rows for way in (row.ours, row.usual) if way in made]
    warm = set()
    for way, given in dict.fromkeys(pairs):
        guess = growth * before.get((way, given), 0)
        if 2 * guess > clock.left:
            say(f"{way} on {given} left out: a call would take about {guess:.2g} s")
            continue
        with going_on(f"{way} on {given}"):
            program, w = made[way], inputs[given]
            for _ in range(1 if way in warm else 2):
                start = time.perf_counter()
                results[way, given] = jax.block_until_ready(program(w))
                seconds[way, given] = time.perf_counter() - start
            warm.add(way)
            if seconds[way, given] < 0.25:
                fast[way, given] = calling(program, w)
    times = in_turns(fast, clock, most=0.1 * len(fast))
    seconds |= {pair: float(np.median(own)) / 1e3 for pair, own in times.items()}
    found = []
    for row in rows:
        one, other = (row.ours, row.given), (row.usual, row.given)
        if one not in seconds:
            continue
        own = seconds[one]
        entry: dict[str, Any] = {"what": row.what, "ms": 1e3 * own}
        entry["of a copy"] = own * RECORD["copy_bandwidth"] / (2 * like.nbytes)
        entry |= {"usual": "", "faster": "", "differ": ""}
        if other in seconds:
            far = jnp.max(jnp.abs(results[one] - results[other]))
            entry["usual"] = 1e3 * seconds[other]
            entry["faster"] = seconds[other] / own
            entry["differ"] = float(far / jnp.max(jnp.abs(results[other])))
        found.append(entry)
    before.clear()
    before.update(seconds)
    return found


def calling(program: Callable[..., Any], *args: jax.Array) -> Callable[[int], None]:
    def run(calls: int) -> None:
        for _ in range(calls - 1):
            program(*args)
        jax.block_until_ready(program(*args))

    return run


def part_2(clock: Clock, toy: bool) -> None:
    """Sets of columns and of entries."""
    found = sets()
    programs: dict[str, Any] = {name: ours for name, (ours, _) in found.items()}
    programs |= {f"usual {name}": usual for name, (_, usual) in found.items() if usual}
    rows = [Row(n, n, f"usual {n}" if usual else None, "normal") for n, (_, usual) in found.items()]
    before: dict[Pair, float] = {}
    for size in (64, 128) if toy else (2048, 4096):
        say(f"\n{size}x{size}, a normal matrix with columns of norm 4")
        w = 4 * size**-0.5 * jax.random.normal(jax.random.key(size), (size, size))
        left = Clock(clock.left / (2 if size in (64, 2048) else 1))
        found_rows = compared(rows, programs, {"normal": w}, left, before, 4)
        table("sets", [{**row, "size": size} for row in found_rows])
    say("\nof a copy: ours over a copy of the weights. faster: the usual way over ours.")


# Choices by platform.


@contextlib.contextmanager
def forced(function: str, branch: str) -> Iterator[None]:
    """Has a function of the library take one branch, whatever the platform."""
    choose = lax.platform_dependent

    def forced_choice(*args: Any, default: Any = None, **branches: Any) -> Any:
        if sys._getframe(1).f_code.co_name != function:
            return choose(*args, default=default, **branches)
        return {**branches, "default": default}[branch](*args)

    jax.clear_caches()  # of what was traced with another branch
    lax.platform_dependent = forced_choice
    try:
        yield
    finally:
        lax.platform_dependent = choose
        jax.clear_caches()


class Choice(NamedTuple):
    """A function of the library that chooses by platform, in a program that has it."""

    function: str
    branches: tuple[str, ...]
    program: Any
    """A step, or a constraint of `weights`."""
    weights: tuple[jax.Array, ...] = ()


def choices(toy: bool) -> dict[str, Choice]:
    """Every choice that the library makes."""
    adam, two, three = optax.adam(1e-3), ("cpu", "default"), ("cpu", "default", "cuda")
    found: dict[str, Choice] = {}

    def chain(constraint: oc.Constraint, stats: bool = False) -> Any:
        return optax.chain(adam, oc.project(constraint, stats=stats)), same

    for name, axis in UNITS.items():
        bound = oc.max_norm(2.0, axis=axis)
        step = adam, lambda p, bound=bound: oc.constrain(p, bound)
        found[f"constrain max_norm, {name}"] = Choice("_differentiable_norm", three, step)
        found[f"chain max_norm, {name}"] = Choice("_plain_norm", ("default", "cuda"), chain(bound))
    bound = oc.max_norm(2.0)
    found["chain max_norm, turns"] = Choice("in_turn", two, chain(bound))
    found["chain max_norm, stats"] = Choice("norm_of", two, chain(bound, stats=True))
    found["chain non_neg, stats"] = Choice("norm_of", two, chain(oc.non_neg(), stats=True))
    found["chain non_neg, stats, rows"] = Choice("row_sums", two, chain(oc.non_neg(), stats=True))
    size = 64 if toy else 4096
    w = jax.random.normal(jax.random.key(0), (size, size))
    found[f"simplex, {size}"] = Choice("_apart", two, oc.simplex(), (w,))
    quarter = w[: size // 4, : size // 4]
    found[f"nuclear_norm_ball, {len(quarter)}"] = Choice(
        "svd", two, oc.nuclear_norm_ball(), (quarter,)
    )
    return found


def part_3(clock: Clock, toy: bool) -> None:
    """All branches of each choice."""
    steps = Steps(4, 64 if toy else 8192)
    found = choices(toy)
    programs: dict[Any, Lowered] = {}
    rests: dict[Any, Any] = {}

    def lower(name: str, branch: str) -> Any:
        choice = found[name]
        with forced(choice.function, branch):
            if choice.weights:
                return jax.jit(lambda w: choice.program(w)).lower(*choice.weights)
            lowered, rests[name, branch] = steps.lowered(*choice.program)
            return lowered

    for name, choice in found.items():
        for branch in choice.branches:
            programs[name, branch] = functools.partial(lower, name, branch)
    made = compiled(programs, clock)
    runs = {
        key: steps.run(program, rests[key])
        if key in rests
        else calling(program, *found[key[0]].weights)
        for key, program in made.items()
    }
    times = in_turns(runs, clock)
    rows = []
    for name, choice in found.items():
        row: dict[str, Any] = {"what": f"{name}: {choice.function}"}
        for branch in ("cpu", "default", "cuda"):
            known = times.get((name, branch))
            row[branch] = "" if known is None else float(np.median(known))
        for branch in ("cpu", "default", "cuda"):
            program = made.get((name, branch))
            row[f"temp, {branch}"] = "" if program is None else steps.temporaries(program)
        rows.append(row)
    table("choices", rows)
    say("\nMilliseconds with each branch, and temporary memory in leaves.")


# Matrices.


def polar_by_svd(w: jax.Array) -> jax.Array:
    u, _, vt = jnp.linalg.svd(w, full_matrices=False)
    return jnp.matmul(u, vt, precision=HIGHEST)


def clip_by_svd(w: jax.Array, algorithm: Any = None) -> jax.Array:
    u, s, vt = lax.linalg.svd(w, full_matrices=False, algorithm=algorithm)
    return jnp.matmul(u * jnp.minimum(s, 1.0), vt, precision=HIGHEST)


def clip_by_eigh(w: jax.Array) -> jax.Array:
    values, vectors = jnp.linalg.eigh((w + w.T) / 2)
    return jnp.matmul(vectors * jnp.maximum(values, 0), vectors.T, precision=HIGHEST)


def polar_by_products(w: jax.Array, more: int, precision: Any) -> jax.Array:
    """The polar factor where singular values are not tiny: `more` quintics lift smaller ones."""
    matmul = functools.partial(jnp.matmul, precision=precision)
    gram = matmul(w.T, w)
    # An upper bound of the largest singular value.
    largest = jnp.sqrt(jnp.sqrt(jnp.linalg.norm(matmul(gram, gram)))) * 1.01
    x = w / jnp.maximum(largest, 1e-30)
    rows = _QUINTICS[:1] + _QUINTICS[1:2] * more + _QUINTICS[1:] + _QUINTICS[-1:]
    eye = jnp.eye(w.shape[1], dtype=w.dtype)
    for a, b, c in rows:
        gram = matmul(x.T, x)
        x = matmul(x, a * eye + b * gram + c * matmul(gram, gram))
    return x


def clip_by_products(w: jax.Array, precision: Any = HIGHEST) -> jax.Array:
    """Singular values clipped at 1, from two polar factors.

    With the polar factor Q and the sign S of I - Q^T W this is ((W + Q) + (W - Q) S) / 2. Only
    singular values above 1 need to be right in Q, and a value near 1 of which S does not know
    the side hardly counts.
    """
    matmul = functools.partial(jnp.matmul, precision=precision)
    q = polar_by_products(w, 0, precision)
    inner = matmul(q.T, w)
    sign = polar_by_products(jnp.eye(len(inner)) - (inner + inner.T) / 2, 3, precision)
    return ((w + q) + matmul(w - q, sign)) / 2


def semidefinite_by_products(w: jax.Array, precision: Any = HIGHEST) -> jax.Array:
    """(A + A sign(A)) / 2."""
    a = (w + w.T) / 2
    b = jnp.matmul(a, polar_by_products(a, 3, precision), precision=precision)
    return (a + (b + b.T) / 2) / 2


def precisions() -> dict[str, Any]:
    names = ("TF32_TF32_F32", "TF32_TF32_F32_X3", "BF16_BF16_F32_X6", "BF16_BF16_F32_X9")
    known = {name: getattr(lax.DotAlgorithmPreset, name, None) for name in names}
    return {"highest": HIGHEST} | {name: p for name, p in known.items() if p is not None}


def part_4(clock: Clock, toy: bool) -> None:
    """Sets of singular values."""
    size = 128 if toy else 4096
    a, b = jax.random.normal(jax.random.key(0), (2, size, size))
    products = {
        name: lowering(functools.partial(jnp.matmul, precision=precision), a, b)
        for name, precision in precisions().items()
    }
    made = compiled(products, Clock(clock.left / 2))
    times = in_turns(
        {name: calling(program, a, b) for name, program in made.items()}, clock, most=1
    )
    exact = np.asarray(a[:64], np.float64) @ np.asarray(b, np.float64)
    table(
        "products",
        [
            {
                "what": f"{size}x{size} product, {name}",
                "ms": float(np.median(own)),
                "TFLOP/s": float(2 * size**3 / np.median(own) / 1e9),
                "error": float(
                    np.linalg.norm(np.asarray(made[name](a, b))[:64] - exact)
                    / np.linalg.norm(exact)
                ),
            }
            for name, own in times.items()
        ],
    )
    by_polar = getattr(lax.linalg.SvdAlgorithm, "POLAR", None)
    x3 = precisions().get("TF32_TF32_F32_X3", HIGHEST)
    programs: dict[str, Callable[[jax.Array], Any]] = {
        "clip by SVD": clip_by_svd,
        "polar by SVD": polar_by_svd,
        "clip by eigh": clip_by_eigh,
        "max_spectral_norm": oc.max_spectral_norm(1.0),
        "orthogonal": oc.orthogonal(),
        "positive_semidefinite": lambda w: oc.positive_semidefinite()((w + w.T) / 2),
        "clip by products": clip_by_products,
        "semidefinite by products": semidefinite_by_products,
        "clip by products, x3": functools.partial(clip_by_products, precision=x3),
        "semidefinite by products, x3": functools.partial(semidefinite_by_products, precision=x3),
        "nuclear_norm_ball": oc.nuclear_norm_ball(),
        "low_rank": oc.low_rank(32),
    }
    if by_polar is not None:
        programs["clip by SVD, polar"] = functools.partial(clip_by_svd, algorithm=by_polar)
    clip, eigh = "clip by SVD", "clip by eigh"
    rows = [
        Row("orthogonal, 1e-3 away", "orthogonal", "polar by SVD", "near"),
        Row("orthogonal, normal", "orthogonal", "polar by SVD", "normal"),
        Row("max_spectral_norm, inside", "max_spectral_norm", clip, "inside"),
        Row("max_spectral_norm, 10% beyond", "max_spectral_norm", clip, "beyond"),
        Row("max_spectral_norm, normal", "max_spectral_norm", clip, "normal"),
        Row("clip by products, 10% beyond", "clip by products", clip, "beyond"),
        Row("clip by products, normal", "clip by products", clip, "normal"),
        Row("clip by products, x3, normal", "clip by products, x3", clip, "normal"),
        Row("clip by SVD, polar, normal", "clip by SVD, polar", clip, "normal"),
        Row("positive_semidefinite, inside", "positive_semidefinite", eigh, "semidefinite"),
        Row("positive_semidefinite, normal", "positive_semidefinite", eigh, "normal"),
        Row("semidefinite by products, normal", "semidefinite by products", eigh, "normal"),
        Row("the same, x3, normal", "semidefinite by products, x3", eigh, "normal"),
        Row("nuclear_norm_ball, normal; to a clip", "nuclear_norm_ball", clip, "normal"),
        Row("low_rank, normal; to a clip", "low_rank", clip, "normal"),
    ]
    before: dict[Pair, float] = {}
    sizes = (48, 64) if toy else (1024, 2048, 4096)
    for k, size in enumerate(sizes):
        with going_on(f"matrices of {size}"):
            say(f"\n{size}x{size}")
            normal = jax.random.normal(jax.random.key(size), (size, size))
            q = jax.jit(oc.orthogonal())(normal)
            inputs = {
                "normal": normal,
                "near": q + 1e-3 * normal,
                "inside": 0.9 * q,
                # A normal matrix has a norm of about twice the root of its size.
                "beyond": normal * (1.1 / (2 * size**0.5)),
                "semidefinite": jnp.matmul(normal, normal.T, precision=HIGHEST),
            }
            left = Clock(clock.left / (len(sizes) - k) if k < len(sizes) - 1 else clock.left)
            found = compared(rows, programs, inputs, left, before, 8)
            table("matrices", [{**row, "size": size} for row in found])


PARTS = {1: part_1, 2: part_2, 3: part_3, 4: part_4}


def main() -> None:
    parser = argparse.ArgumentParser(description="What constraints cost on an accelerator.")
    parser.add_argument("--parts", default="1,2,3,4", help="which, such as 1,3")
    parser.add_argument("--seconds", type=float, default=50, help="of each part, about")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    device = jax.devices()[0]
    RECORD.update(device=device.device_kind, jax=jax.__version__, toy=args.toy)
    say(f"{device.device_kind}, JAX {jax.__version__}, {os.cpu_count()} CPUs")
    bandwidth = copy_bandwidth(2**16 if args.toy else 2**30)
    RECORD["copy_bandwidth"] = bandwidth
    say(f"a copy moves {bandwidth / 1e9:.0f} GB/s")
    for number in map(int, args.parts.split(",")):
        part, start = PARTS[number], time.perf_counter()
        say(f"\n== {number}. {part.__doc__}")
        with going_on(f"part {number}"):
            part(Clock(args.seconds), args.toy)
        say(f"part {number}: {time.perf_counter() - start:.0f} s")
        if args.json:
            args.json.write_text(json.dumps(RECORD, indent=1))


if __name__ == "__main__":
    main()
