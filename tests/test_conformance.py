"""Every set as an Optax transformation, through one list of promises."""

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, DTYPES, Case, bits, float64, norms

import optax_constraints as oc

WIDEST = DTYPES[0]
RATE = 0.5  # a power of two: products with it are exact
MULTI_STEPS = inspect.signature(optax.MultiSteps).parameters
PAIRS = [*((d, d) for d in DTYPES), (WIDEST, jnp.bfloat16), (jnp.bfloat16, WIDEST)]

# Newer versions of Optax accumulate in float32 if not told otherwise.
WIDE = {"accumulator_dtype": WIDEST} if "accumulator_dtype" in MULTI_STEPS else {}


def normal(shape: tuple[int, ...], seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), WIDEST)


# Sets that remember their first weights have no entry of their own in CASES.
START = float64(normal((7, 5, 3), 0))


def relative(constraint: oc.Constraint, axis, low: float, high: float) -> Case:
    """A set whose norms are multiples of those at init."""

    def outside(w: np.ndarray) -> np.ndarray:
        ratio = norms(w, axis) / norms(START, axis)
        return np.maximum(np.maximum(ratio / high - 1, low - ratio), 0)

    unit = tuple(range(START.ndim)) if axis is None else tuple(np.atleast_1d(axis))
    return Case(constraint, lambda w: w, outside, unit=unit)


def _held(w: np.ndarray) -> np.ndarray:
    return np.where(ZERO, 0, w)


ZERO = np.random.default_rng(4).random((7, 5, 3)) < 0.5
_EVERY = [
    *CASES,
    Case(oc.mask("init"), _held, lambda w: np.abs(np.where(ZERO, w, 0))),
    Case(oc.sign(), lambda w: w, lambda w: np.maximum(-w * np.sign(START), 0)),
    Case(
        oc.around(oc.max_norm("0.25x init")),
        lambda w: w,
        lambda w: np.maximum(norms(w - START, 0) / norms(START, 0) / 0.25 - 1, 0),
        unit=(0,),
        adds=True,
    ),
    relative(oc.fixed_norm("init"), None, 1, 1),
    relative(oc.max_norm("init", axis=1), 1, 0, 1),
    relative(oc.Stacked(oc.Soft(oc.fixed_norm("init"), rate=1.0)), (1, 2), 1, 1),
]


def program(constraint: oc.Constraint) -> Any:
    """What is compiled in another way, beside numbers and axes."""
    several = isinstance(constraint, oc.Monotone) and isinstance(constraint.axis, tuple)
    how = (getattr(constraint, name, None) for name in ("method", "of"))
    return type(constraint), constraint.remembers, several, *how


# Compiling is what takes time, and a second entry of a set is much the same program.
ALL = list({program(case.constraint): case for case in reversed(_EVERY)}.values())[::-1]
each_case = pytest.mark.parametrize("case", ALL, ids=str)


def eps(dtype) -> float:
    return float(jnp.finfo(dtype).eps)


def avals(tree) -> Any:
    """Structure, shapes, dtypes and weak types: what a compiled step is compiled for."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in leaves]


# The numbers of a set, of those inside it, too.


def numbers(constraint: oc.Constraint) -> list[Any]:
    found = []
    for f in dataclasses.fields(constraint):  # pyright: ignore[reportArgumentType]
        value = getattr(constraint, f.name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, oc.Constraint):
                found += numbers(part)
        if f.metadata.get("number") and isinstance(value, (int, float)):
            found.append(value)
    return found


def with_numbers(constraint: oc.Constraint, new: Iterator[Any]) -> oc.Constraint:
    if isinstance(constraint, (oc.Compose, oc.Intersection)):
        return type(constraint)(*[with_numbers(c, new) for c in constraint.constraints])
    values = {}
    for f in dataclasses.fields(constraint):  # pyright: ignore[reportArgumentType]
        value = getattr(constraint, f.name)
        if isinstance(value, oc.Constraint):
            values[f.name] = with_numbers(value, new)
        elif f.metadata.get("number") and isinstance(value, (int, float)):
            values[f.name] = next(new)
    return dataclasses.replace(constraint, **values)  # pyright: ignore[reportArgumentType]


def others(value: Any) -> list[Any]:
    """Other numbers in the place of one, of which at least one is another set."""
    if isinstance(value, int):
        return [value + 1, value - 1]
    return [value / 2, value * 8] if value else [0.25, -0.25]


def injected(constraint: oc.Constraint) -> tuple[Any, dict[str, Any]]:
    """A chain whose numbers are in its state, traced, and those numbers by name."""
    # An int becomes an array here: Optax would make a weakly typed one, and compile twice.
    named = {
        f"number_{i}": jnp.int32(value) if isinstance(value, int) else value
        for i, value in enumerate(numbers(constraint))
    }

    def build(**new):
        return optax.chain(
            optax.sgd(RATE), oc.project(with_numbers(constraint, iter(new.values())))
        )

    # inject_hyperparams goes by the signature.
    names = ", ".join(named)
    scope: dict[str, Any] = {"build": build}
    exec(f"def make({names}): return build({', '.join(f'{n}={n}' for n in named)})", scope)
    return optax.inject_hyperparams(scope["make"])(**named), named


def test_numbers_are_found():
    found = {str(case): numbers(case.constraint) for case in ALL}
    assert numbers(oc.min_max_norm(0.5, 1.5)) == [0.5, 1.5, 1.0]
    assert numbers(oc.Compose(oc.non_neg(), oc.max_norm(3.0))) == [3.0]
    assert numbers(oc.Soft(oc.max_norm("init"), 0.5)) == [0.5]
    assert sum(bool(values) for values in found.values()) >= 30


@each_case
def test_steps_scans_and_accumulation(case: Case):
    constraint = case.constraint
    gradients = normal((4, *case.shape), 1)
    tx, named = injected(constraint)
    # One program is both: four gradients with a step for each, and then a step for two.
    steps = optax.MultiSteps(tx, lambda done: jnp.where(jnp.less(done, 4), 1, 2), **WIDE)
    traces = []

    @jax.jit
    def step(params, state, gradient):
        traces.append(None)
        updates, state = steps.update(gradient, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    allowed = 0 if constraint.elementwise else case.slack * eps(WIDEST)

    def check(params, allowed=allowed):
        assert np.max(case.outside(float64(params))) <= allowed

    near = case.near_in(WIDEST) + 8 * eps(WIDEST)

    def check_same(got, want):
        want = np.asarray(want)
        np.testing.assert_allclose(got, want, rtol=0, atol=near * np.max(np.abs(want)))

    # Each step ends in the set, and leaves the state as it was but for its values.
    start: Any = jnp.asarray(case.project(float64(normal(case.shape, 0))), WIDEST)
    params, state = start, steps.init(start)
    first = state
    for gradient in gradients:
        params, state = step(params, state, gradient)
        check(params)
        assert avals(params) == avals(start)
        assert avals(state) == avals(first)
    assert np.any(float64(params) != float64(start))

    # With accumulation nothing happens half-way; then comes the step for the mean.
    half, state = step(params, state, gradients[0])
    assert np.array_equal(half, params)
    after, state = step(half, state, gradients[1])
    check(after)
    begin = first.inner_opt_state
    mean, _ = step(params, first, (gradients[0] + gradients[1]) / 2)
    check_same(float64(after), float64(mean))

    # Another number in the state is another set, whichever of them it is.
    here, _ = step(start, first, gradients[0])
    for name, value in named.items():
        moved = []
        for other in others(value):
            numbers = dict(begin.hyperparams)
            numbers[name] = jnp.asarray(other, numbers[name].dtype)
            changed = first._replace(inner_opt_state=begin._replace(hyperparams=numbers))
            there, _ = step(start, changed, gradients[0])
            moved.append(np.max(np.abs(float64(there) - float64(here))))
        assert max(moved) > 1e-3, name

    # All of that was one program.
    assert len(traces) == 1

    # A scan in a loop with a projection on every second step, of a set with concrete numbers,
    # into the memory of its arguments: the same as step by step.
    sparse = optax.chain(optax.sgd(RATE), oc.project(constraint, every=2))

    def scanned(params, state):
        def step(carry, gradient):
            params, state = carry
            updates, state = sparse.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        def round(i, carry):
            carry, seen = carry
            some = jax.lax.dynamic_slice_in_dim(gradients, 2 * i, 2)
            carry, new = jax.lax.scan(step, carry, some)
            return carry, jax.lax.dynamic_update_slice_in_dim(seen, new, 2 * i, 0)

        return jax.lax.fori_loop(0, 2, round, ((params, state), jnp.zeros_like(gradients)))

    wanted, params, state = [], start, first
    for i, gradient in enumerate(gradients):
        if i % 2:
            params, state = step(params, state, gradient)
        else:
            params = params - gradient * params.dtype.type(RATE)
        wanted.append(float64(params))
    given = jnp.copy(start), sparse.init(start)
    (params, state), seen = jax.jit(scanned, donate_argnums=(0, 1))(*given)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not start.is_deleted()
    assert bits(params) == bits(seen[-1])
    assert avals(state) == avals(sparse.init(start))
    assert int(state[-1].updates_seen) == len(gradients)
    # From weights that are not in the set, p + (t - p) rounds; with every=1 they are.
    rounds = isinstance(constraint, (oc.Grid, oc.Symmetric, oc.SkewSymmetric))
    for projected in seen[1::2]:
        check(projected, eps(WIDEST) if rounds else allowed)
    check_same(float64(seen), wanted)


@each_case
def test_dtypes_of_updates_and_of_the_state(case: Case):
    tx = optax.chain(optax.trace(0.9), oc.project(case.constraint))
    for param, update in PAIRS:
        params, updates = (jax.ShapeDtypeStruct(case.shape, dtype) for dtype in (param, update))
        state = jax.eval_shape(tx.init, params)
        # The momentum has the dtype of updates from the first step on.
        moments = jax.tree.map(lambda x, d=update: x.update(dtype=d), state[0])
        state = (moments, *state[1:])
        new, after = jax.eval_shape(tx.update, updates, state, params)
        assert (new.shape, new.dtype) == (case.shape, jnp.promote_types(param, update))
        assert avals(after[-1]) == avals(state[-1])


@each_case
def test_tree_map_params(case: Case):
    tx = optax.chain(optax.adam(RATE), oc.project(case.constraint))
    state = tx.init(normal(case.shape, 0))
    kept = []
    named = optax.tree_utils.tree_map_params(
        tx, lambda leaf: "of a parameter", state, transform_non_params=lambda x: kept.append(x) or x
    )
    assert jax.tree.structure(named) == jax.tree.structure(state)
    assert jax.tree.leaves(named).count("of a parameter") == 2
    # What project has in the state belongs to no parameter, and came through as it was.
    own = jax.tree.leaves(state[-1])
    assert [id(x) for x in jax.tree.leaves(named[-1])] == [id(x) for x in own]
    assert {id(x) for x in own} <= {id(x) for x in jax.tree.leaves(kept)}


@each_case
def test_a_checkpointed_loss_has_gradients(case: Case):
    # Weights that are projected inside the loss; the program is not run.
    def loss(w):
        return jnp.sum(jnp.sin(case.constraint(w)))

    w = jax.ShapeDtypeStruct(case.shape, WIDEST)
    gradient = jax.eval_shape(jax.grad(jax.checkpoint(loss)), w)
    assert avals(gradient) == avals(w)


@pytest.mark.parametrize(
    "constraint", [oc.unit_norm(), oc.simplex(), oc.monotone(), oc.top_k(10)], ids=str
)
def test_a_checkpointed_loss_has_the_same_gradients(constraint):
    def loss(w):
        return jnp.sum(jnp.sin(constraint(w)))

    def step(w):
        return jax.grad(loss)(w), jax.grad(jax.checkpoint(loss))(w)

    want, got = jax.jit(step)(normal((7, 5, 3), 0))
    assert np.any(float64(want))
    np.testing.assert_allclose(float64(got), float64(want), rtol=1e-5, atol=1e-6)
