"""Every set in the modes that users of JAX switch on, and with what they do to a state.

What JAX complains of while it traces (types, ranks, what varies over a mesh) needs no program,
so that those tests compile none. `conftest.py` prints how many cases and modes there were.
"""

import copy
import dataclasses
import functools
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from cases import DTYPES, Case, bits, float64
from jax.sharding import PartitionSpec as P
from test_conformance import ALL, relative

import optax_constraints as oc
from optax_constraints.sets._common import MatrixSet

WIDEST = DTYPES[0]
# Of several constraints in one, of which some remember: a tuple.
ALL = [*ALL, relative(oc.Compose(oc.non_neg(), oc.fixed_norm("init")), None, 1, 1)]
each_case = pytest.mark.parametrize("case", ALL, ids=str)


FIRST = list({type(case.constraint).__module__: case for case in reversed(ALL)}.values())
"""A case of each family of sets."""


def each_set(cases: list[Case]) -> pytest.MarkDecorator:
    """A case of each family of sets in `make test`, and the others in `make test-all`.

    Outside of jit each operation is compiled by itself, for each shape.
    """
    marked = [c if c in FIRST else pytest.param(c, marks=pytest.mark.slow) for c in cases]
    return pytest.mark.parametrize("case", marked, ids=str)


each_dtype = pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: jnp.dtype(d).name)


def normal(case: Case, seed: int, dtype=WIDEST) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=case.shape), dtype)


def allowed(case: Case) -> jax.Array:
    w = case.allowed() if case.allowed else 0.75 * case.project(float64(normal(case, 0)))
    return jnp.asarray(w, WIDEST)


def uses(case: Case) -> dict[str, Callable[[Any, Any], Any]]:
    """What can be done with a set, as functions of weights and of an update of them."""
    constraint = case.constraint
    rules = {"w": constraint}
    tx = oc.project(rules)

    def update(w, u):
        return tx.update({"w": u}, tx.init({"w": w}), {"w": w})[0]["w"]

    def through(w, u, decay):
        free = jax.vjp(lambda w: oc.straight_through({"w": w}, rules, decay=decay)["w"], w)
        return free[0], free[1](u)[0]

    return {
        "call": lambda w, u: constraint(w),
        "update": update,
        "constrain": lambda w, u: oc.constrain({"w": w}, rules)["w"],
        "straight_through": lambda w, u: through(w, u, 0),
        "straight_through with decay": lambda w, u: through(w, u, 0.5),
        "violations": lambda w, u: oc.violations({"w": w}, rules, state=tx.init({"w": w})),
        "on_bound": lambda w, u: constraint.on_bound(w),
        "jvp": lambda w, u: jax.jvp(constraint, (w,), (u,))[1],
        "grad": lambda w, u: jax.vjp(constraint, w)[1](u)[0],
        "jvp of update": lambda w, u: jax.jvp(lambda u: update(w, u), (u,), (w,))[1],
        "grad of update": lambda w, u: jax.vjp(lambda u: update(w, u), u)[1](w)[0],
        **({"tangent": constraint.tangent} if constraint.has_tangent else {}),
    }


def failures(run: Callable[[Callable], Any], uses: dict[str, Callable]) -> dict[str, str]:
    """The first line of what each use raises, if it does."""
    failed = {}
    for name, use in uses.items():
        try:
            run(use)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return failed


def without(uses: dict[str, Callable], *names: str) -> dict[str, Callable]:
    return {name: use for name, use in uses.items() if name not in names}


def near(case: Case, got: Any, want: Any) -> None:
    """Equal but for rounding: other programs, other sums."""
    got, want = float64(got), float64(want)
    scale = max(1, np.max(np.abs(want)))
    accuracy = case.near_in(WIDEST)
    atol = (4 * accuracy + 64 * float(jnp.finfo(WIDEST).eps)) * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


# Strict modes, and shard_map.


def traced(case: Case, dtype: Any) -> dict[str, str]:
    w = jax.ShapeDtypeStruct(case.shape, dtype)
    return failures(lambda use: jax.eval_shape(use, w, w), uses(case))


@functools.cache
def passes_strictly(case: Case, dtype: Any) -> bool:
    """Whether all can be traced in the two strict modes at once: then each alone has nothing
    to complain of either, and one trace is enough for both tests."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        return traced(case, dtype) == {}


@each_dtype
@each_case
def test_strict_dtype_promotion(case: Case, dtype):
    with jax.numpy_dtype_promotion("strict"):
        assert passes_strictly(case, dtype) or traced(case, dtype) == {}


@each_dtype
@each_case
def test_rank_promotion_raises(case: Case, dtype):
    with jax.numpy_rank_promotion("raise"):
        assert passes_strictly(case, dtype) or traced(case, dtype) == {}


@pytest.mark.parametrize("mode", ["dtype", "rank"])
def test_strict_modes_are_seen_inside_programs_that_were_traced_before(mode):
    # Else the two tests above could pass on what an earlier test has left in a cache.
    @jax.jit
    def mixed(x):
        return x + (jnp.ones((), jnp.bfloat16) if mode == "dtype" else x[0])

    w = jax.ShapeDtypeStruct((3, 3), jnp.float32)
    jax.eval_shape(mixed, w)
    strict = (
        jax.numpy_dtype_promotion("strict")
        if mode == "dtype"
        else jax.numpy_rank_promotion("raise")
    )
    with strict, pytest.raises((TypeError, ValueError), match="promotion"):
        jax.eval_shape(mixed, w)


@pytest.mark.skipif(
    tuple(map(int, jax.__version__.split(".")[:2])) < (0, 7),
    reason="before JAX 0.7 zeros like an array that varies do not, and loops cannot start there",
)
@each_case
def test_shard_map(case: Case):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    every = without(uses(case), "constrain", "violations", "on_bound")
    tx = oc.project({"w": case.constraint})
    w, u = normal(case, 0), normal(case, 1)
    state = tx.init({"w": w})
    every["update with a state"] = lambda w, u: tx.update({"w": u}, state, {"w": w})[0]["w"]

    def sharded(use):
        return jax.shard_map(use, mesh=mesh, in_specs=P("data"), out_specs=P("data"))

    assert failures(lambda use: jax.eval_shape(sharded(use), w, u), every) == {}
    run = {name: every[name] for name in ("call", "update")}

    def both(w, u):
        return {name: use(w, u) for name, use in run.items()}

    got, want = jax.jit(sharded(both))(w, u), jax.jit(both)(w, u)
    for name in run:
        near(case, got[name], want[name])


# Without jit, and with a look at each result.


LOOPS = {"sequence", "lattice", "unimodal", "transport", "operator", "polyhedron", "section"}
LOOPS |= {"matrix", "order", "scaled", "intersection"}


def family(case: Case) -> str:
    return type(case.constraint).__module__.rpartition(".")[2]


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if family(case) in LOOPS else [])
        for case in FIRST
    ],
    ids=str,
)
def test_disable_jit(case: Case):
    w, u = normal(case, 0), normal(case, 1)
    names = ("call", "update") if family(case) in LOOPS else ("call", "update", "on_bound", "jvp")
    some = {name: uses(case)[name] for name in names}
    want = {name: use(w, u) for name, use in some.items() if name in ("call", "update")}
    got = {}
    with jax.disable_jit():
        for w_ in (w, allowed(case)):
            failed = failures(lambda use, w=w_: got.setdefault(use, use(w, u)), some)
            assert failed == {}
    for name in want:
        near(case, got[some[name]], want[name])


# A box that is open to one side has an infinity for the other bound.
INFINITE = [case for case in ALL if isinstance(case.constraint, oc.Box)]


def looked_at(case: Case) -> dict[str, dict[str, str]]:
    some = without(uses(case), "jvp", "jvp of update")
    rules = {"w": case.constraint}
    tx = oc.project(rules)
    some["report"] = lambda w, u: oc.report({"w": w}, rules, state=tx.init({"w": w}))
    if case not in FIRST:  # others of its family are asked for the rest
        some = {name: some[name] for name in ("update", "grad of update", "report")}
    weights = {"outside": normal(case, 0), "inside": allowed(case)}
    u = normal(case, 1)
    return {
        where: failed
        for where, w in weights.items()
        if (failed := failures(lambda use, w=w: use(w, u), some))
    }


@each_set(ALL)
def test_debug_nans(case: Case):
    with jax.debug_nans(True):
        assert looked_at(case) == {}


@each_set([case for case in ALL if case not in INFINITE])
def test_debug_infs(case: Case):
    with jax.debug_infs(True):
        assert looked_at(case) == {}


# Derivatives through an update.


@each_case
def test_derivatives_through_the_update(case: Case):
    constraint = case.constraint
    tx = oc.project({"w": constraint})

    def derivatives(p, u, du, v):
        state = tx.init({"w": p})
        memory = constraint.remember(p)

        def update(u):
            return tx.update({"w": u}, state, {"w": p})[0]["w"]

        forward = jax.jvp(update, (u,), (du,))[1]
        want = jax.jvp(lambda x: constraint.advance(x, memory)[0], (p + u,), (du,))[1]
        return forward, want, jax.vjp(update, u)[1](v)[0]

    derivatives = jax.jit(derivatives)
    p, u, du, v = (normal(case, seed) for seed in range(4))
    forward, want, backward = map(float64, derivatives(p, u, du, v))
    assert np.all(np.isfinite(backward))
    np.testing.assert_allclose(forward, want, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(np.sum(backward * float64(du)), np.sum(forward * float64(v)), 1e-3)

    # Weights that end at zero, where a norm has no direction.
    for derivative in derivatives(p, -p, du, v):
        assert np.all(np.isfinite(derivative))


# States that were somewhere else.


@functools.cache
def chain(case: Case) -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.trace(0.9), oc.project({"w": case.constraint}))


@functools.cache
def step(case: Case) -> Callable[..., Any]:
    """A step of `chain`, compiled, and with it how far outside ten times the weights are."""

    @jax.jit
    def step(params, state, updates):
        far = {"w": 10 * params["w"]}
        seen = oc.violations(far, {"w": case.constraint}, state=state)
        return *chain(case).update(updates, state, params), seen

    return step


@functools.cache
def after_a_step(case: Case) -> tuple[Any, Any]:
    """Parameters and the state of `chain`."""
    params = {"w": normal(case, 0)}
    updates, state, _ = step(case)(params, chain(case).init(params), {"w": normal(case, 1)})
    return optax.apply_updates(params, updates), state


def next_step(case: Case, state: Any) -> list[bytes]:
    params, _ = after_a_step(case)
    return list(map(bits, jax.tree.leaves(step(case)(params, state, {"w": normal(case, 2)}))))


def from_bytes(state: Any) -> Any:
    return flax.serialization.from_bytes(state, flax.serialization.to_bytes(state))


def from_state_dict(state: Any) -> Any:
    saved = jax.device_get(flax.serialization.to_state_dict(state))
    return flax.serialization.from_state_dict(state, saved)


ROUTES: dict[str, Callable[[Any], Any]] = {
    "NumPy": jax.device_get,
    "bytes": from_bytes,
    "state dict": from_state_dict,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
    "deepcopy": copy.deepcopy,
}


@each_case
def test_states(case: Case):
    _, live = after_a_step(case)
    want = next_step(case, live)
    changed = [name for name, go in ROUTES.items() if next_step(case, go(live)) != want]
    assert not changed


def test_states_through_orbax(tmp_path: Path):
    # All in one checkpoint: to write it is what takes time. Without memory all states are alike.
    cases = [case for case in ALL if case.constraint.remembers or case is ALL[0]]
    live = {f"case {i}": after_a_step(case)[1] for i, case in enumerate(cases)}
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", live)
        checkpointer.wait_until_finished()
        # Without a target all is dicts and lists.
        restored = checkpointer.restore(tmp_path / "states")
    changed = []
    for case, (name, state) in zip(cases, live.items(), strict=True):
        parts = zip(state, restored[name], strict=True)
        again = tuple(type(own)(**new) for own, new in parts)
        if next_step(case, again) != next_step(case, state):
            changed.append(str(case))
    assert not changed


# Weights that are not finite, in another process, lest a loop in LAPACK stops the suite.

LIMIT = 10
BAD = {"inf": np.inf, "-inf": -np.inf, "nan": np.nan, "all inf": np.inf}
# The mean of an infinity and a number is an infinity.
ENTRY_ONLY = (oc.Symmetric, oc.SkewSymmetric, oc.Radial, oc.Tied)
# LAPACK has other ways for larger matrices.
LARGER = [
    dataclasses.replace(case, shape=(2, 32, 32), allowed=lambda: np.zeros((2, 32, 32)))
    for case in ALL
    if isinstance(case.constraint, MatrixSet) and case.constraint.axis is None
    if not isinstance(case.constraint, oc.Transport)  # whose sums are for one shape
]
ASKED_OF = [*ALL, *LARGER]


def asked(case: Case, p: jax.Array, w: jax.Array) -> dict[str, Any]:
    """What becomes of some weights, also when an update from allowed ones leads to them."""
    some = uses(case)
    return {
        "call": some["call"](w, w),
        "update": some["update"](p, w - p) + p,
        "violations": some["violations"](w, w),
        "jvp": some["jvp"](w, normal(case, 0)),
    }


def serve(connection: Any) -> None:
    """Answers for one case and some weights, as NumPy arrays."""
    compiled = {}
    while True:
        index, p, w = connection.recv()
        if index not in compiled:
            compiled[index] = jax.jit(functools.partial(asked, ASKED_OF[index]))
        connection.send(jax.device_get(compiled[index](p, w)))


class Worker:
    """Another process that computes, and is replaced when it does not answer in time."""

    def __init__(self):
        self.process: Any = None

    def ask(self, case: Case, p: np.ndarray, w: np.ndarray, limit: float) -> dict[str, Any]:
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.connection, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
        self.connection.send((ASKED_OF.index(case), p, w))
        if not self.connection.poll(limit):
            self.close()
            pytest.fail(f"has not returned after {limit} s")
        return self.connection.recv()

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("case", ASKED_OF, ids=str)
def test_weights_that_are_not_finite(case: Case, worker: Worker):
    good = np.asarray(normal(case, 0))
    p = np.asarray(allowed(case))
    # With room for a start of the process, and for a program that is compiled.
    clean = worker.ask(case, p, good, 300)
    for kind, value in BAD.items():
        w = good.copy()
        w[... if kind == "all inf" else (0,) * w.ndim] = value
        got = worker.ask(case, p, w, LIMIT)
        for name in ("call", "jvp", "update"):
            check_not_finite(case, name, w, got[name], clean[name])


def check_not_finite(case: Case, name: str, w: np.ndarray, got: np.ndarray, clean: np.ndarray):
    bad = ~np.isfinite(w)
    unit = np.broadcast_to(np.any(bad, axis=case.unit_axes, keepdims=True), w.shape)
    # The other units do not notice, but that these take as many steps for all.
    rounding = 2e-6 if isinstance(case.constraint, (oc.Intersection, oc.Orthogonal)) else 0
    np.testing.assert_allclose(got[~unit], clean[~unit], rtol=0, atol=rounding, err_msg=name)
    if name == "jvp":
        if isinstance(case.constraint, MatrixSet) and not isinstance(case.constraint, ENTRY_ONLY):
            assert np.all(np.isnan(got[unit])), name
    elif case.constraint.elementwise and case.constraint.remembers:
        # By hand, weights are those at init.
        assert np.array_equal(np.isnan(got[unit]), np.isnan(w[unit])), name
    elif case.constraint.elementwise or isinstance(case.constraint, (oc.TopK, oc.NM)):
        # An infinity is a number beyond the bound, or the largest one; a NaN stays.
        want = case.project(float64(np.where(np.isnan(w), np.inf, w)))
        want = np.where(np.isnan(w), np.nan, want).astype(w.dtype)
        rounding = 1e-6 if name == "update" else 0
        np.testing.assert_allclose(got[unit], want[unit], rtol=rounding, err_msg=name)
    elif np.any(w == -np.inf) and isinstance(case.constraint, oc.Compose):
        # A non-negative set before the norm has made a zero of it, but not of a norm at init.
        assert case.constraint.remembers or not np.any(np.isnan(got[unit])), name
    elif isinstance(case.constraint, (oc.Part, *ENTRY_ONLY)):
        assert not np.any(np.isfinite(got[bad])), name
    else:
        assert np.all(np.isnan(got[unit])), name


# NumPy's float64 where JAX has none.

float32_only = pytest.mark.skipif(jax.config.jax_enable_x64, reason="float64 stays with x64")


@float32_only
@each_case
def test_numpy_float64(case: Case):
    some = {name: uses(case)[name] for name in ("call", "update", "constrain", "violations")}
    w, u = (np.random.default_rng(seed).normal(size=case.shape) for seed in (0, 1))
    for name, use in some.items():
        got, want = use(w, u), use(jnp.asarray(w), jnp.asarray(u))
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(got)), name
        assert list(map(bits, jax.tree.leaves(got))) == list(map(bits, jax.tree.leaves(want))), name


@float32_only
def test_numpy_float64_and_a_plain_function():
    params = {"w": np.array([-1.0, 0.5, 2.0])}
    rules = {"w": lambda w: jnp.clip(w, 0, 1)}
    assert np.array_equal(oc.constrain(params, rules)["w"], [0, 0.5, 1])
    assert oc.violations(params, rules)["w"] == np.float32(np.sqrt(2))
    tx = oc.project(rules)
    updates, _ = tx.update({"w": np.array([2.0, 0.0, 0.0])}, tx.init(params), params)
    assert np.array_equal(updates["w"], [2, 0, -1])
    assert updates["w"].dtype == jnp.float32
