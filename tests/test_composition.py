"""Each row of docs/composition.md does what it says."""

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cvxpy as cp
import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import float64, norms
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from optax import contrib

import optax_constraints as oc
from optax_constraints import flax as ocf

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "composition.md").read_text()

# By row: its result, and the test that shows it, here or in another file.
ROWS = {
    "`chain(optimizer, project)`": ("holds", "test_last"),
    "`projected(optimizer, rules)`": ("holds", "test_projected.test_through_wrappers"),
    "`tx.update(grads, state)`, without parameters": (
        "refused",
        "test_kept_params.test_without_it_the_error_names_it",
    ),
    "`chain(project, optimizer)`": ("does not hold", "test_first"),
    "`chain(optimizer, project, scale)`": ("does not hold", "test_followed"),
    "`add_decayed_weights` before `project`": ("holds", "test_decay_before"),
    "`add_decayed_weights` after `project`": ("does not hold", "test_decay_after"),
    "`ema` of updates before `project`": ("holds", "test_ema_of_updates_before"),
    "`ema` of updates after `project`": ("does not hold", "test_ema_of_updates_after"),
    "`MultiSteps(chain(optimizer, project), k)`": (
        "holds",
        "test_wrappers.test_accumulation_projects_once_for_all_micro_batches",
    ),
    "`chain(MultiSteps(optimizer, k), project)`": (
        "holds",
        "test_wrappers.test_around_accumulation_projections_add_up",
    ),
    "`masked(project)`": ("holds if not masked", "test_masked"),
    "`partition`": ("holds if its label has `project`", "test_partition"),
    "`project` around `partition` with `set_to_zero`": (
        "holds; may move frozen leaves",
        "test_frozen_leaves",
    ),
    "`apply_if_finite`": ("holds", "test_wrappers.test_apply_if_finite"),
    "`conditionally_mask`": ("holds", "test_conditionally_mask"),
    "`conditionally_transform`": ("holds if the condition does", "test_conditionally_transform"),
    "`inject_hyperparams(project)`": ("refused", "test_inject_hyperparams_of_a_constraint"),
    "`inject_hyperparams` with a builder": (
        "holds",
        "test_wrappers.test_inject_hyperparams_with_a_scheduled_bound",
    ),
    "`lookahead` around `project`": ("holds if convex (C)", "test_lookahead_around"),
    "`project` around `lookahead`": ("holds", "test_around_lookahead"),
    "averages of weights": ("holds if convex (C)", "test_averages_of_weights"),
    "`schedule_free` around `project`": ("does not hold", "test_schedule_free_around"),
    "`project` around `schedule_free`": (
        "holds if not evaluated",
        "test_around_schedule_free",
    ),
    "`sam` around `project`": ("holds if synchronised", "test_sam_around"),
    "`project` around `sam`": ("holds", "test_around_sam"),
    "`mechanize` around `project`": ("does not hold", "test_mechanize_around"),
    "`project` around `mechanize`": ("holds", "test_around_mechanize"),
    "`flatten` around `project`": ("refused", "test_flatten_around"),
    "`project` around `flatten`": ("holds", "test_around_flatten"),
    "`project` after a search": ("holds; gradient wrong", "test_after_a_search"),
    "`project` on both sides of a search": (
        "holds; gradient right if convex (C)",
        "test_around_a_search",
    ),
    "`chain(lbfgs(), project)`": ("holds; gradient wrong", "test_lbfgs"),
    "`chain(tangent, lbfgs(), project)`": ("holds; gradient wrong", "test_tangent_before_lbfgs"),
    "Flax `nnx.Optimizer`": ("holds", "test_nnx_optimizer"),
    "Flax `TrainState`": ("holds", "test_train_state"),
    "Equinox `apply_updates`": ("holds", "test_equinox"),
    "Haiku": ("holds", "test_haiku"),
    "float32 weights, bfloat16 gradients": ("holds", "test_mixed_precision"),
    "`split_real_and_imaginary`": ("holds for each part", "test_split_real_and_imaginary"),
    "complex weights in a rule": ("refused", "test_complex_weights_in_a_rule"),
    "`jax.lax.scan` over steps": (
        "holds",
        "test_project.test_the_same_in_scan_and_fori_loop",
    ),
    "`tree_map_params`": ("works", "test_trees.test_tree_map_params_over_the_state"),
}


def test_each_row_of_the_page_has_its_test():
    rows = re.findall(r"^\| (.*?) \| (.*?) \| .* \|$", PAGE, re.MULTILINE)
    rows = {name: result for name, result in rows if name not in ("composition", "---")}
    assert rows == {name: result for name, (result, _) in ROWS.items()}
    for _, test in ROWS.values():
        module, name = test.split(".") if "." in test else (Path(__file__).stem, test)
        tree = ast.parse((TESTS / f"{module}.py").read_text())
        assert name in [f.name for f in tree.body if isinstance(f, ast.FunctionDef)], test


# A network of two layers, and three kinds of sets: one that is not convex, one that is, and one
# whose bounds are those at init.


# float32, also with JAX_ENABLE_X64.
def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


X, Y = normal(0, 32, 5), normal(1, 32, 2)
RULES: dict[str, Any] = {
    "sphere": {"kernel": oc.unit_norm(), "bias": oc.non_neg()},
    "ball": {"kernel": oc.max_norm(0.5), "bias": oc.non_neg()},
    "init": {"kernel": oc.fixed_norm("init", axis=0), "bias": oc.non_neg()},
}
WEIGHTS = {
    "first": {"kernel": normal(2, 5, 8), "bias": jnp.zeros(8, jnp.float32)},
    "second": {"kernel": normal(3, 8, 2), "bias": jnp.zeros(2, jnp.float32)},
}
SGD, ADAM = optax.sgd(0.3), optax.adam(0.1)
SEARCH = optax.chain(contrib.normalize(), optax.sgd(0.05))

each_kind = pytest.mark.parametrize("kind", RULES)
fewer_kinds = pytest.mark.parametrize("kind", ["ball", "init"])


def loss(params):
    first, second = params["first"], params["second"]
    hidden = jnp.tanh(X @ first["kernel"] + first["bias"])
    return jnp.mean((hidden @ second["kernel"] + second["bias"] - Y) ** 2)


gradient = jax.jit(jax.grad(loss))


def outside_of(kind: str, kernels, biases, kernels_at_init=None) -> float:
    """The largest excess over a bound, relative to it, by NumPy in float64."""
    worst = max((float(np.max(-float64(b), initial=0)) for b in biases), default=0.0)
    for i, kernel in enumerate(kernels):
        n = norms(float64(kernel), 0)
        if kind == "init":
            n = n / norms(float64((kernels_at_init or [])[i]), 0)
        excess = n / 0.5 - 1 if kind == "ball" else np.abs(n - 1)
        worst = max(worst, float(np.max(excess)))
    return worst


def outside(kind: str, params) -> float:
    layers = params["first"], params["second"]
    before = [WEIGHTS[name]["kernel"] for name in ("first", "second")]
    return outside_of(kind, [p["kernel"] for p in layers], [p["bias"] for p in layers], before)


def start(kind: str):
    return oc.constrain(WEIGHTS, RULES[kind])


def train(
    tx, kind: str, steps: int = 6, look=lambda params, state: params, jit=False, **extra
) -> list[float]:
    """How far outside the weights are after each step."""
    params = start(kind)
    assert outside(kind, params) < 1e-6
    state, seen = tx.init(params), []
    before = params
    update = jax.jit(tx.update) if jit else tx.update
    for _ in range(steps):
        updates, state = update(gradient(params), state, params, **extra)
        params = optax.apply_updates(params, updates)
        seen.append(outside(kind, look(params, state)))
    moved = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), params, before)
    assert max(jax.tree.leaves(moved)) > 0.01
    return seen


def holds(seen: list[float]) -> bool:
    return max(seen) < 1e-6


def leaves(seen: list[float]) -> bool:
    """Whether weights are far outside, and not by rounding."""
    return max(seen) > 1e-4


# In a chain.


@each_kind
def test_last(kind):
    assert holds(train(optax.chain(ADAM, oc.project(RULES[kind])), kind))
    # The constraint was needed.
    assert leaves(train(ADAM, kind))


@each_kind
def test_first(kind):
    assert leaves(train(optax.chain(oc.project(RULES[kind]), SGD), kind))


def test_first_shows_in_violations():
    params, tx = start("ball"), optax.chain(oc.project(RULES["ball"]), SGD)
    updates, _ = tx.update(gradient(params), tx.init(params), params)
    params = optax.apply_updates(params, updates)
    assert max(map(float, oc.violations(params, RULES["ball"]).values())) > 1e-3


def test_followed():
    # Half of the way between two points of a convex set is in it; further or elsewhere is not.
    for kind, factor in (("sphere", 0.5), ("init", 0.5), ("ball", 1.5)):
        tx = optax.chain(SGD, oc.project(RULES[kind]), optax.scale(factor))
        assert leaves(train(tx, kind))


@each_kind
def test_decay_before(kind):
    project = oc.project(RULES[kind])
    assert holds(train(optax.chain(optax.add_decayed_weights(0.1), SGD, project), kind))
    assert holds(train(optax.chain(optax.adamw(0.1, weight_decay=1.0), project), kind))


@each_kind
def test_decay_after(kind):
    # As a gradient without its sign, which the optimizer would have turned.
    for rate in (0.1, -0.1):
        tx = optax.chain(SGD, oc.project(RULES[kind]), optax.add_decayed_weights(rate))
        # What only shrinks stays in a ball.
        assert leaves(train(tx, kind)) or (kind == "ball" and rate < 0)


@each_kind
def test_ema_of_updates_before(kind):
    assert holds(train(optax.chain(SGD, optax.ema(0.9), oc.project(RULES[kind])), kind))


@each_kind
def test_ema_of_updates_after(kind):
    assert leaves(train(optax.chain(SGD, oc.project(RULES[kind]), optax.ema(0.9)), kind))


# Steps that wait, skip or differ by leaf.


@each_kind
def test_masked(kind):
    mask = {"first": True, "second": False}
    tx = optax.chain(SGD, optax.masked(oc.project(RULES[kind]), mask))
    second = {"second": start(kind)["second"]}
    assert holds(train(tx, kind, look=lambda params, _: {**params, **second}))
    assert leaves(train(tx, kind))
    none = {"/second/**": None, **RULES[kind]}
    free = train(optax.chain(SGD, oc.project(none)), kind)
    assert free == pytest.approx(train(tx, kind), rel=1e-5)
    hidden = optax.masked(oc.project({"second/kernel": oc.unit_norm()}), mask)
    with pytest.raises(ValueError, match="'second/kernel' matches no leaf"):
        hidden.init(start(kind))


@each_kind
def test_partition(kind):
    labels = {"first": "under", "second": "free"}
    under = optax.chain(SGD, oc.project(RULES[kind]))
    tx = optax.partition({"under": under, "free": SGD}, labels)
    second = {"second": start(kind)["second"]}
    assert holds(train(tx, kind, look=lambda params, _: {**params, **second}))
    assert leaves(train(tx, kind))
    elsewhere = oc.project({"second/kernel": oc.unit_norm()})
    with pytest.raises(ValueError, match="'second/kernel' matches no leaf"):
        optax.partition({"under": elsewhere, "free": SGD}, labels).init(start(kind))


def every_second(step: Any):
    return step % 2 == 1


@each_kind
def test_frozen_leaves(kind):
    labels = {"first": "trained", "second": "frozen"}
    partition: Any = getattr(optax, "partition", None) or optax.multi_transform

    def step(params, inside=(), around=()) -> Any:
        branches = {"trained": optax.chain(SGD, *inside), "frozen": optax.set_to_zero()}
        tx = optax.chain(partition(branches, labels), *around)
        updates, _ = tx.update(gradient(params), tx.init(params), params)
        return optax.apply_updates(params, updates)

    def same(new, old):
        pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
        return all(np.array_equal(a, b) for a, b in pairs)

    rules, inside = RULES[kind], start(kind)
    # Bit for bit, as long as they are in their sets.
    assert same(step(inside, around=[oc.project(rules)])["second"], inside["second"])
    far = {**inside, "second": jax.tree.map(lambda w: w - 3.0, inside["second"])}
    if kind != "init":  # there, the norms at init are those of the frozen weights
        moved = step(far, around=[oc.project(rules)])
        assert not same(moved["second"], far["second"])
        assert outside(kind, moved) < 1e-6
    only_first = {f"first/{name}": constraint for name, constraint in rules.items()}
    for new in (
        step(far, around=[oc.project({"second/**": None, **rules})]),
        step(far, inside=[oc.project(only_first)]),
    ):
        assert same(new["second"], far["second"])
        assert not same(new["first"], far["first"])
        assert outside(kind, dict(new, second=inside["second"])) < 1e-6


@each_kind
def test_conditionally_mask(kind):
    tx = optax.chain(SGD, oc.project(RULES[kind]))
    assert holds(train(optax.conditionally_mask(tx, every_second), kind, jit=True))


@each_kind
def test_conditionally_transform(kind):
    conditional = optax.conditionally_transform(oc.project(RULES[kind]), every_second)
    seen = train(optax.chain(SGD, conditional), kind, jit=True)
    assert holds(seen[1::2])
    assert leaves(seen[::2])
    every = train(optax.chain(SGD, oc.project(RULES[kind], every=2)), kind, jit=True)
    assert seen == pytest.approx(every, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("constraint", [oc.max_norm(2.0), oc.non_neg(), oc.monotone()], ids=str)
def test_inject_hyperparams_of_a_constraint(constraint):
    tx = optax.inject_hyperparams(oc.project)(constraint)
    refused = "takes floating-point weights|Could not interpret constraint identifier"
    with pytest.raises((TypeError, ValueError), match=refused):
        tx.init(WEIGHTS)


# Averages and searches.


def train_lookahead(tx, kind: str) -> list[float]:
    params = optax.LookaheadParams.init_synced(start(kind))
    state, seen = tx.init(params), []
    for _ in range(6):
        updates, state = tx.update(gradient(params.fast), state, params)
        params = optax.apply_updates(params, updates)
        seen.append(max(outside(kind, params.fast), outside(kind, params.slow)))
    return seen


@each_kind
def test_lookahead_around(kind):
    inside = optax.chain(ADAM, oc.project(RULES[kind]))
    seen = train_lookahead(optax.lookahead(inside, 2, 0.5), kind)
    assert holds(seen) if kind == "ball" else leaves(seen)


@each_kind
def test_around_lookahead(kind):
    tx = optax.chain(optax.lookahead(ADAM, 2, 0.5), oc.project(RULES[kind]))
    assert holds(train_lookahead(tx, kind))
    anchored = {"/fast/**/kernel": oc.unit_norm(), "/slow/**/kernel": oc.unit_norm()}
    oc.project(anchored).init(optax.LookaheadParams.init_synced(WEIGHTS))


@each_kind
def test_averages_of_weights(kind):
    rules = RULES[kind]
    tx = optax.chain(ADAM, oc.project(rules))
    params = average = start(kind)
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        average = optax.incremental_update(params, average, 0.5)
    assert holds([outside(kind, average)]) if kind == "ball" else leaves([outside(kind, average)])
    assert holds([outside(kind, oc.constrain(average, rules, state=state))])
    if kind == "init":
        # Without the state they would count as the first weights.
        assert leaves([outside(kind, oc.constrain(average, rules))])


@each_kind
def test_schedule_free_around(kind):
    rules = RULES[kind]
    tx = contrib.schedule_free(optax.chain(SGD, oc.project(rules)), 0.3)
    assert leaves(train(tx, kind, 12))


@each_kind
def test_around_schedule_free(kind):
    rules = RULES[kind]
    tx = optax.chain(contrib.schedule_free(SGD, 0.3), oc.project(rules))

    def evaluated(params, state):
        return contrib.schedule_free_eval_params(state[0], params)

    def constrained(params, state):
        return oc.constrain(evaluated(params, state), rules, state=state)

    assert holds(train(tx, kind))
    assert leaves(train(tx, kind, 12, evaluated)) or kind == "ball"
    assert holds(train(tx, kind, look=constrained))


@each_kind
def test_sam_around(kind):
    inside = optax.chain(SGD, oc.project(RULES[kind]))
    seen = train(contrib.sam(inside, SEARCH), kind)
    assert leaves(seen[::2])
    assert holds(seen[1::2])
    opaque = contrib.sam(inside, SEARCH, opaque_mode=True)
    assert holds(train(opaque, kind, grad_fn=lambda params, _: gradient(params)))


@each_kind
def test_around_sam(kind):
    project = oc.project(RULES[kind])
    assert holds(train(optax.chain(contrib.sam(SGD, SEARCH), project), kind))
    opaque = optax.chain(contrib.sam(SGD, SEARCH, opaque_mode=True), project)
    assert holds(train(opaque, kind, grad_fn=lambda params, _: gradient(params)))


@each_kind
def test_mechanize_around(kind):
    inside = optax.chain(ADAM, oc.project(RULES[kind]))
    assert leaves(train(contrib.mechanize(inside, s_init=0.1), kind))


@each_kind
def test_around_mechanize(kind):
    tx = optax.chain(contrib.mechanize(ADAM, s_init=0.1), oc.project(RULES[kind]))
    assert holds(train(tx, kind))


@each_kind
def test_flatten_around(kind):
    tx = optax.flatten(optax.chain(ADAM, oc.project(RULES[kind])))
    bare = optax.flatten(oc.project(RULES[kind]["kernel"]))
    message = r"Put project outside it: chain\(flatten\(optimizer\), project\(rules\)\)"
    for refused in (tx, bare):
        with pytest.raises(ValueError, match=message):
            refused.init(WEIGHTS)


@each_kind
def test_around_flatten(kind):
    assert holds(train(optax.chain(optax.flatten(ADAM), oc.project(RULES[kind])), kind))


# Line searches.


class Problem(NamedTuple):
    """A quadratic to minimise over a set."""

    rules: Any
    loss: Callable[[jax.Array], jax.Array]
    start: jax.Array
    best: float
    outside: Callable[[np.ndarray], float]


@functools.cache
def quadratic(kind: str, size: int = 20) -> Problem:
    axes, _ = np.linalg.qr(float64(normal(4, size, size)))
    # No set is aligned with the axes, and curvatures differ, or any search would arrive.
    a = (axes * np.geomspace(1, 30, size)) @ axes.T
    center = float64(normal(5, size)) if kind != "sphere" else np.zeros(size)
    w = cp.Variable(size)
    rules, allowed, outside = {
        "box": (
            oc.box(-0.3, 0.5),
            [w >= -0.3, w <= 0.5],
            lambda w: np.max(np.maximum(np.float32(-0.3) - w, w - 0.5)),
        ),
        "ball": (oc.max_norm(1.0), [cp.norm(w) <= 1], lambda w: np.linalg.norm(w) - 1),
        "simplex": (
            oc.simplex(1.0),
            [w >= 0, cp.sum(w) == 1],
            lambda w: max(np.max(-w), abs(w.sum() - 1)),
        ),
        "plane": (
            oc.sum_to(1.0),
            [cp.sum(w) == 1],
            lambda w: abs(w.sum() - 1) / np.abs(w).sum(),
        ),
        "sphere": (oc.unit_norm(), [], lambda w: abs(np.linalg.norm(w) - 1)),
    }[kind]
    if kind == "sphere":
        start, best = normal(6, size), 0.5
    else:
        form = cp.quad_form(w - center, cp.psd_wrap(a)) / 2
        problem: Any = cp.Problem(cp.Minimize(form), allowed)
        start, best = jnp.zeros(size, jnp.float32), problem.solve(solver=cp.CLARABEL)
    a32, center32 = jnp.asarray(a, jnp.float32), jnp.asarray(center, jnp.float32)

    def loss(w):
        return (w - center32) @ a32 @ (w - center32) / 2

    return Problem(rules, loss, oc.constrain(start, rules), best, outside)


class Found(NamedTuple):
    """What a search led to. Losses are relative to the decrease that was possible."""

    outside: float
    value_error: float
    """Of the value that was stored after a step, at its worst."""
    gradient_error: float
    """Of the gradient that was stored, relative to its norm, at its worst."""
    gap: float
    """From the last loss to the best one."""
    rises: int
    """How many steps made the loss larger."""


def search(problem: Problem, tx: Any, *, projected: bool, stored: bool, steps: int = 80) -> Found:
    """Trains with the loss of projected weights or not, and with the stored gradient or not."""
    rules, loss = problem.rules, problem.loss
    fresh, from_state = jax.value_and_grad(loss), optax.value_and_grad_from_state(loss)

    def of_projected(w):
        return loss(oc.constrain(w, rules))

    value_fn = of_projected if projected else loss

    def step(carry, _):
        w, state = carry
        value, grad = from_state(w, state=state) if stored else fresh(w)
        updates, state = tx.update(grad, state, w, value=value, grad=grad, value_fn=value_fn)
        w = optax.apply_updates(w, updates)
        kept = optax.tree.get(state, "value"), optax.tree.get(state, "grad")
        return (w, state), (w, kept, fresh(w))

    run = jax.jit(lambda *carry: jax.lax.scan(step, carry, length=steps)[1])
    seen, kept, true = jax.tree.map(float64, run(problem.start, tx.init(problem.start)))
    possible = float(loss(problem.start)) - problem.best
    norms_of_errors = np.linalg.norm(kept[1] - true[1], axis=1)
    return Found(
        max(map(problem.outside, seen)),
        np.max(np.abs(kept[0] - true[0])) / possible,
        np.max(norms_of_errors / np.linalg.norm(true[1], axis=1)),
        (true[0][-1] - problem.best) / possible,
        int(np.sum(np.diff(true[0]) > 1e-5 * possible)),
    )


def backtracking(max_learning_rate: float = 1.0):
    return optax.scale_by_backtracking_linesearch(
        30, max_learning_rate=max_learning_rate, store_grad=True
    )


def zoom(max_learning_rate: float | None = 1.0):
    return optax.scale_by_zoom_linesearch(30, max_learning_rate=max_learning_rate)


convex = pytest.mark.parametrize("kind", ["box", "ball", "simplex"])


@convex
def test_after_a_search(kind):
    problem = quadratic(kind)
    tx = optax.chain(optax.sgd(1.0), backtracking(), oc.project(problem.rules))
    naive = search(problem, tx, projected=False, stored=True)
    assert naive.outside < 1e-6
    assert naive.value_error > 0.1
    assert naive.gradient_error > 0.1
    assert naive.rises > 5
    # The value becomes that of the weights, the gradient does not.
    found = search(problem, tx, projected=True, stored=False)
    assert found.outside < 1e-6
    assert found.value_error < 1e-6
    assert found.gradient_error > 0.1
    assert found.rises == 0
    assert found.gap < 1e-3


@convex
@pytest.mark.parametrize("linesearch", [backtracking, zoom])
def test_around_a_search(kind, linesearch):
    problem = quadratic(kind)
    project = oc.project(problem.rules)
    tx = optax.chain(optax.sgd(0.1), project, linesearch(), project)
    found = search(problem, tx, projected=False, stored=True)
    assert found.outside < 1e-6
    assert found.value_error < 1e-6
    assert found.gradient_error < 1e-6
    assert found.rises == 0
    assert found.gap < 1e-5


@convex
def test_around_a_search_needs_short_steps_and_gradients(kind):
    problem = quadratic(kind)
    project = oc.project(problem.rules)
    long = optax.chain(optax.sgd(0.01), project, backtracking(100.0), project)
    assert search(problem, long, projected=False, stored=True).gradient_error > 1e-2
    # Without the second one, a long step ends outside.
    once = optax.chain(optax.sgd(0.01), project, backtracking(100.0))
    assert search(problem, once, projected=False, stored=True).outside > 1e-3
    adam = optax.chain(optax.adam(0.1), project, backtracking(), project)
    found = search(problem, adam, projected=False, stored=True)
    # Its steps are not along the gradient, and on their way back they may lead uphill.
    assert found.gradient_error < 1e-6
    assert found.gap > 1e-2 or kind == "box"


def test_around_a_search_over_a_set_that_is_not_convex():
    problem = quadratic("sphere")
    project = oc.project(problem.rules)
    tx = optax.chain(optax.sgd(0.1), project, backtracking(), project)
    naive = search(problem, tx, projected=False, stored=True)
    assert naive.outside < 1e-6
    assert naive.gradient_error > 0.05
    found = search(problem, tx, projected=True, stored=False)
    assert found.outside < 1e-6
    assert found.value_error < 1e-6
    assert found.rises == 0
    assert found.gap < 1e-3


@each_kind
def test_around_a_search_in_a_network(kind):
    rules, params = RULES[kind], start(kind)
    project = oc.project(rules)
    tx = optax.chain(SGD, project, backtracking(), project)
    state, value_before = tx.init(params), loss(params)

    @jax.jit
    def step(params, state):
        def of_projected(params):
            return loss(oc.constrain(params, rules, state=state[-1]))

        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=of_projected
        )
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
        value = loss(params)
        assert outside(kind, params) < 1e-6
        assert float(optax.tree.get(state, "value")) == pytest.approx(float(value), rel=1e-5)
        assert value < value_before
        value_before = value


@convex
def test_lbfgs(kind):
    problem = quadratic(kind)
    tx = optax.chain(optax.lbfgs(), oc.project(problem.rules))
    naive = search(problem, tx, projected=False, stored=True)
    assert naive.outside < 1e-6
    assert naive.gradient_error > 0.1
    assert naive.rises > 5
    # With true gradients it goes up and down for ever.
    fresh = search(problem, tx, projected=False, stored=False)
    assert fresh.outside < 1e-6
    assert fresh.rises > 5
    # With the loss of projected weights it only goes down, and stops near the best.
    found = search(problem, tx, projected=True, stored=False)
    assert found.outside < 1e-6
    assert found.value_error < 1e-6
    assert found.gradient_error > 0.1
    assert found.rises == 0
    assert 1e-5 < found.gap < 1e-2


@pytest.mark.parametrize("kind", ["plane", "sphere"])
def test_tangent_before_lbfgs(kind):
    problem = quadratic(kind)
    rules = problem.rules
    tx = optax.chain(oc.tangent(rules), optax.lbfgs(), oc.project(rules))
    found = search(problem, tx, projected=True, stored=False, steps=40)
    assert found.outside < 2e-6
    assert found.value_error < 1e-6
    assert found.gradient_error > 0.1
    assert found.rises == 0
    assert found.gap < 1e-5
    plain = optax.chain(optax.lbfgs(), oc.project(rules))
    assert search(problem, plain, projected=True, stored=False, steps=40).gap > 3e-5


# Frameworks, dtypes, devices.


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(8)(x)))


class NNXNet(nnx.Module):
    def __init__(self, layer, **keywords):
        self.first = layer(5, 8, rngs=nnx.Rngs(0), **keywords)
        self.second = layer(8, 2, rngs=nnx.Rngs(1), **keywords)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def squares(y):
    return jnp.mean((y - Y) ** 2)


@fewer_kinds
def test_nnx_optimizer(kind):
    rules = RULES[kind]
    declared: Any = {f"{name}_constraint": rule for name, rule in rules.items()}
    for model, optimizer in (
        (
            NNXNet(nnx.Linear),
            lambda model: nnx.Optimizer(model, optax.chain(SGD, oc.project(rules)), wrt=nnx.Param),
        ),
        (
            NNXNet(ocf.nnx.Linear, **declared),
            lambda model: ocf.nnx.Optimizer(model, SGD, wrt=nnx.Param),
        ),
    ):
        nnx.update(model, oc.constrain(nnx.state(model, nnx.Param), rules))
        kernels = [layer.kernel[...] for layer in (model.first, model.second)]
        made = optimizer(model)
        for _ in range(3):
            made.update(model, nnx.grad(lambda model: squares(model(X)))(model))
            layers = model.first, model.second
            found = outside_of(
                kind,
                [layer.kernel[...] for layer in layers],
                [layer.bias[...] for layer in layers],
                kernels,
            )
            assert found < 1e-6
        assert not np.allclose(model.first.kernel[...], kernels[0], atol=1e-3)


@fewer_kinds
def test_train_state(kind):
    rules, model = RULES[kind], LinenNet()
    params = oc.constrain(model.init(jax.random.key(0), X)["params"], rules)
    for state in (
        TrainState.create(
            apply_fn=model.apply, params=params, tx=optax.chain(SGD, oc.project(rules))
        ),
        ocf.linen.TrainState.create(apply_fn=model.apply, params=params, tx=SGD, rules=rules),
    ):
        for _ in range(3):
            grads = jax.grad(lambda p, state=state: squares(state.apply_fn({"params": p}, X)))(
                state.params
            )
            state = state.apply_gradients(grads=grads)
            layers = state.params.values()
            found = outside_of(
                kind,
                [layer["kernel"] for layer in layers],
                [layer["bias"] for layer in layers],
                [layer["kernel"] for layer in params.values()],
            )
            assert found < 1e-6
        assert not np.allclose(
            state.params["Dense_0"]["kernel"], params["Dense_0"]["kernel"], atol=1e-3
        )


@fewer_kinds
def test_equinox(kind):
    net = eqx.nn.MLP(5, 2, 8, 1, activation=jnp.tanh, dtype=jnp.float32, key=jax.random.key(0))
    kernel = {
        "sphere": oc.unit_norm(axis="fan_in"),
        "ball": oc.max_norm(0.5, axis="fan_in"),
        "init": oc.fixed_norm("init", axis="fan_in"),
    }[kind]
    rules = {"weight": kernel, "bias": oc.non_neg()}
    net = oc.constrain(net, rules)
    kernels = [layer.weight.T for layer in net.layers]
    tx = optax.chain(SGD, oc.project(rules))
    state = tx.init(eqx.filter(net, eqx.is_inexact_array))
    for _ in range(3):
        grads = eqx.filter_grad(lambda net: squares(jax.vmap(net)(X)))(net)
        updates, state = tx.update(grads, state, eqx.filter(net, eqx.is_inexact_array))
        net = eqx.apply_updates(net, updates)
        found = outside_of(
            kind,
            [layer.weight.T for layer in net.layers],
            [layer.bias for layer in net.layers],
            kernels,
        )
        assert found < 1e-6
    assert not np.allclose(net.layers[0].weight.T, kernels[0], atol=1e-3)


@fewer_kinds
def test_haiku(kind):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))
    rules = {"w": RULES[kind]["kernel"], "b": oc.non_neg()}
    params: Any = oc.constrain(net.init(jax.random.key(0), X), rules)
    kernels = [layer["w"] for layer in params.values()]
    tx = optax.chain(SGD, oc.project(rules))
    state = tx.init(params)
    for _ in range(3):
        grads = jax.grad(lambda params: squares(net.apply(params, X)))(params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        layers = params.values()
        found = outside_of(
            kind, [layer["w"] for layer in layers], [layer["b"] for layer in layers], kernels
        )
        assert found < 1e-6
    assert not np.allclose(params["mlp/~/linear_0"]["w"], kernels[0], atol=1e-3)


@fewer_kinds
def test_mixed_precision(kind):
    params = start(kind)
    tx = optax.chain(SGD, oc.project(RULES[kind]))
    state = tx.init(params)
    for _ in range(6):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), gradient(half))
        updates, state = tx.update(grads, state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(jnp.float32)}
        params = optax.apply_updates(params, updates)
        assert outside(kind, params) < 1e-6


def complex_step(tx, params):
    grads = {"kernel": jnp.conj(params["kernel"] - 3)}
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)["kernel"]


def test_split_real_and_imaginary():
    rules = {"kernel/*": oc.max_norm(0.5)}
    tx = contrib.split_real_and_imaginary(optax.chain(SGD, oc.project(rules)))
    params = {"kernel": jax.lax.complex(normal(0, 4, 3), normal(1, 4, 3))}
    new = complex_step(tx, params)
    assert new.dtype == jnp.complex64
    for part in (new.real, new.imag):
        assert np.max(norms(float64(part), 0)) == pytest.approx(0.5, rel=1e-6)
    # Not the norm of the complex numbers.
    assert np.max(np.linalg.norm(np.asarray(new), axis=0)) > 0.6


def test_complex_weights_in_a_rule():
    params = {"kernel": jax.lax.complex(normal(0, 4, 3), normal(1, 4, 3))}
    with pytest.raises(TypeError, match=r"complex64\), and only floating-point arrays can be"):
        oc.project({"kernel": oc.max_norm(0.5)}).init(params)
    # A bare constraint is for every floating-point leaf, and this is none.
    new = complex_step(optax.chain(SGD, oc.project(oc.max_norm(0.5))), params)
    assert np.max(np.linalg.norm(np.asarray(new), axis=0)) > 0.6
