"""`projected`: an optimizer whose steps stay in smooth sets, and whose momentum comes along."""

import functools
import inspect
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64
from optax import contrib

import optax_constraints as oc
from optax_constraints import _projected
from optax_constraints._moments import _FIELDS_OF, map_first_moments
from optax_constraints._rules import Binder

WIDE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def array(*shape: int, seed: int = 0, dtype: Any = WIDE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def train(tx, params, grad, steps: int) -> tuple[Any, Any]:
    """Parameters and states after each step, in one scan."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad(params), state, params)
        carry = optax.apply_updates(params, updates), state
        return carry, carry

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])(params)


def last(tree):
    return jax.tree.map(lambda x: x[-1], tree)


def radial(w, m) -> float:
    """The largest part of vectors along the columns of weights, relative to their norm."""
    w, m = float64(w), float64(m)
    assert np.max(np.abs(m)) > 0.01
    return float(np.max(np.abs(np.sum(w * m, axis=0))) / np.max(np.linalg.norm(m, axis=0)))


# Against programs written by hand.


def on_sphere(w, v):
    return v - w * np.sum(w * v, axis=0) / np.sum(w * w, axis=0)


def to_sphere(w):
    return w / np.linalg.norm(w, axis=0)


def on_stiefel(w, v):
    return v - w @ (w.T @ v + v.T @ w) / 2


def to_stiefel(w):
    u, _, vt = np.linalg.svd(w, full_matrices=False)
    return u @ vt


MATRIX = np.diag([1.0, -0.5, 0.3, 0.0, -1.2]) + 0.2 * np.ones((5, 5))
SHIFT = float64(array(5, 3, seed=7))
MANIFOLDS = [
    pytest.param(oc.unit_norm(), on_sphere, to_sphere, id="sphere"),
    pytest.param(oc.orthogonal(), on_stiefel, to_stiefel, id="stiefel"),
]


def gradient(w):
    return jnp.asarray(MATRIX, w.dtype) @ w + jnp.asarray(SHIFT, w.dtype)


@pytest.mark.parametrize(("constraint", "tangent", "retract"), MANIFOLDS)
def test_riemannian_momentum(constraint, tangent, retract):
    start = retract(float64(array(5, 3, seed=1)))
    w, m, want = start, np.zeros_like(start), []
    for _ in range(200):
        m = 0.9 * m + tangent(w, MATRIX @ w + SHIFT)
        w = retract(w - 0.02 * m)
        m = tangent(w, m)
        want.append((w, m))
    tx = oc.projected(optax.sgd(0.02, momentum=0.9), constraint)
    ws, states = train(tx, jnp.asarray(start, WIDE), gradient, 200)
    got_w, got_m = float64(ws), float64(optax.tree.get(states, "trace"))
    want_w, want_m = map(np.stack, zip(*want, strict=True))
    np.testing.assert_allclose(got_w, want_w, atol=1e-5)
    np.testing.assert_allclose(got_m, want_m, atol=1e-5 * np.max(np.abs(want_m)))
    if tangent is on_sphere:  # the momentum that stays behind takes another way
        tx = oc.projected(optax.sgd(0.02, momentum=0.9), constraint, transport=False)
        others, _ = train(tx, jnp.asarray(start, WIDE), gradient, 200)
        assert np.max(np.abs(float64(others) - want_w)) > 1e-2


ADAM = optax.adam(0.1)
RULES = {"kernel": oc.unit_norm(), "bias": None}
PARAMS = {"kernel": oc.unit_norm()(array(5, 3)), "bias": array(3, seed=1)}


def pull(params):
    """A gradient that turns with the weights."""
    return jax.tree.map(lambda p: jnp.roll(p, 1, 0) + 0.3, params)


@pytest.mark.parametrize(
    ("optimizer", "every"), [(ADAM, 1), (optax.sgd(0.1, 0.9), 2)], ids=["adam", "sgd"]
)
def test_without_transport_it_is_the_chain(optimizer, every):
    ends = oc.tangent(RULES), oc.project(RULES, every=every)
    chain = optax.chain(ends[0], optimizer, ends[1])
    tx = oc.projected(optimizer, RULES, transport=False, every=every)
    want, got = (train(t, PARAMS, pull, 4) for t in (chain, tx))
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert jax.tree.map(bits, got) == jax.tree.map(bits, want)


def test_the_state_is_that_of_the_chain():
    rules = {"kernel": oc.fixed_norm("init"), "bias": None}
    tx = oc.projected(optax.adam(0.1), rules)
    chain = optax.chain(oc.tangent(rules), optax.adam(0.1), oc.project(rules))
    state = tx.init(PARAMS)
    assert jax.tree.structure(state) == jax.tree.structure(chain.init(PARAMS))
    assert isinstance(state[0], oc.TangentState)
    assert isinstance(state[2], oc.ProjectState)
    _, state = tx.update(PARAMS, state, PARAMS)
    assert isinstance(state[2], oc.ProjectState)
    assert optax.tree.get(state, "count") == 1
    doubled = jax.tree.map(lambda p: 2 * p, PARAMS)
    back = oc.constrain(doubled, rules, state=state)
    np.testing.assert_allclose(back["kernel"], PARAMS["kernel"], rtol=1e-5)


def test_second_moments_and_free_leaves_stay():
    tx, chain = (oc.projected(ADAM, RULES, transport=transport) for transport in (True, False))
    (w, got), (_, want) = (train(t, PARAMS, pull, 1) for t in (tx, chain))
    for name in ("nu", "count"):
        own, other = (optax.tree.get(state, name) for state in (got, want))
        assert jax.tree.map(bits, own) == jax.tree.map(bits, other)
    own, other = (optax.tree.get(state, "mu") for state in (got, want))
    assert bits(own["bias"]) == bits(other["bias"])
    assert radial(w["kernel"][0], own["kernel"][0]) < 1e-6
    assert radial(w["kernel"][0], other["kernel"][0]) > 1e-2


def test_moments_under_other_sets_stay():
    rules = {"kernel": oc.unit_norm(), "bias": oc.max_norm(0.1)}
    moment: Any = jax.tree.leaves(pull(PARAMS))
    new = _projected._carried(Binder(rules)(PARAMS), PARAMS, moment, jnp.asarray(0), {})
    assert bits(new[0]) == bits(moment[0])
    assert radial(PARAMS["kernel"], moment[1]) > 0.1
    assert radial(PARAMS["kernel"], new[1]) < 1e-6


# Through wrappers.

WRAPPED = {
    "chain": optax.chain(optax.clip(1.0), optax.chain(optax.identity(), ADAM)),
    "named_chain": optax.named_chain(("clip", optax.clip(1.0)), ("adam", ADAM)),
    "masked": optax.masked(ADAM, {"kernel": True, "bias": False}),
    "partition": optax.partition({"a": ADAM, "b": optax.sgd(0.1)}, {"kernel": "a", "bias": "b"}),
    "MultiSteps": optax.MultiSteps(ADAM, 2),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(0.1),
    "apply_if_finite": optax.apply_if_finite(ADAM, 3),
    "conditionally_mask": optax.conditionally_mask(ADAM, lambda step: jnp.asarray(step) % 2 == 0),
    "conditionally_transform": optax.conditionally_transform(
        ADAM, lambda step: jnp.asarray(step) < 9
    ),
    "mechanize": contrib.mechanize(ADAM, s_init=0.5),
    "nested": optax.MultiSteps(
        optax.inject_hyperparams(
            lambda rate: optax.partition(
                {"a": optax.masked(optax.adam(rate), {"kernel": True, "bias": True})},
                {"kernel": "a", "bias": "a"},
            )
        )(0.1),
        1,
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_through_wrappers(name):
    w, state = last(train(oc.projected(WRAPPED[name], RULES), PARAMS, pull, 4))
    np.testing.assert_allclose(jnp.linalg.norm(w["kernel"], axis=0), 1, rtol=1e-6)
    assert radial(w["kernel"], optax.tree.get(state, "mu")["kernel"]) < 1e-6


def test_a_mask_may_take_out_whole_subtrees():
    params = {"a": {"x": PARAMS["kernel"], "y": PARAMS["bias"]}, "b": {"x": PARAMS["kernel"]}}
    rules = {"x": oc.unit_norm(), "y": None}
    tx = oc.projected(optax.masked(ADAM, {"a": True, "b": False}), rules)
    w, state = last(train(tx, params, pull, 2))
    mu = optax.tree.get(state, "mu")
    assert isinstance(mu["b"], optax.MaskedNode)
    assert radial(w["a"]["x"], mu["a"]["x"]) < 1e-6


def test_inside_of_wrappers():
    params = {**PARAMS, "other": array(2, 2)}
    masks = {"kernel": True, "bias": True, "other": False}
    tx = optax.masked(oc.projected(ADAM, RULES), masks)
    w, state = last(train(tx, params, pull, 2))
    assert radial(w["kernel"], optax.tree.get(state, "mu")["kernel"]) < 1e-6
    tx = optax.MultiSteps(oc.projected(ADAM, RULES), 2)
    w, state = last(train(tx, PARAMS, pull, 4))
    assert radial(w["kernel"], optax.tree.get(state, "mu")["kernel"]) < 1e-6


def test_what_multi_steps_collects_is_no_moment():
    state = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), 2).init(PARAMS)
    state = jax.tree.map(jnp.ones_like, state)
    new = map_first_moments(lambda own: [2 * jnp.asarray(x) for x in own], state, PARAMS)
    assert jax.tree.map(bits, new.acc_grads) == jax.tree.map(bits, state.acc_grads)
    np.testing.assert_array_equal(optax.tree.get(new, "trace")["kernel"], 2)


def test_leaves_without_an_update():
    params = {"a": PARAMS["kernel"], "b": PARAMS["kernel"]}
    tx = oc.projected(optax.sgd(0.1, momentum=0.9), oc.unit_norm())
    grads = {"a": pull(params)["a"], "b": None}
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["b"] is None
    trace = optax.tree.get(state, "trace")
    assert trace["b"] is None
    assert radial(params["a"] + jnp.asarray(updates["a"]), trace["a"]) < 1e-6


def test_a_single_array_may_have_no_moment():
    # Muon leaves this one to Adam, and has nothing in its place.
    tx = oc.projected(optax.contrib.muon(0.1), oc.unit_norm())
    w = oc.unit_norm()(jnp.array([3.0, 4.0]))
    updates, state = tx.update(jnp.array([1.0, 0.0]), tx.init(w), w)
    w = optax.apply_updates(w, updates)
    moments = [m for m in jax.tree.leaves(state) if m.shape == w.shape]
    assert min(abs(float(jnp.vdot(m, w))) for m in moments) < 1e-6


def test_it_is_compiled_once():
    tx = oc.projected(ADAM, RULES)
    calls = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        calls.append(1)
        updates, state = tx.update(pull(params), state, params)
        return optax.apply_updates(params, updates), state

    carry = jax.tree.map(jnp.array, (PARAMS, tx.init(PARAMS)))
    for _ in range(3):
        carry = step(*carry)
    assert len(calls) == 1
    want = last(train(tx, PARAMS, pull, 3))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), carry, want)


def test_moments_keep_their_dtype():
    tx = oc.projected(optax.adam(0.1, mu_dtype=jnp.bfloat16), RULES)
    w, state = last(train(tx, PARAMS, pull, 3))
    mu = optax.tree.get(state, "mu")
    assert mu["kernel"].dtype == jnp.bfloat16
    assert radial(w["kernel"], mu["kernel"]) < 1e-2
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    w, state = last(train(oc.projected(optax.sgd(0.1, 0.9), RULES), narrow, pull, 3))
    trace = optax.tree.get(state, "trace")
    assert trace["kernel"].dtype == w["kernel"].dtype == jnp.bfloat16
    assert radial(w["kernel"], trace["kernel"]) < 1e-2


# Sets.


def test_groups():
    params = {"kernel": array(5, 3), "bias": array(3, seed=1)}
    together = {oc.joint("kernel", "bias"): oc.unit_norm()}
    for rules in (together, {oc.across("*"): oc.unit_norm(axis=None)}):
        start = oc.constrain(params, rules)
        w, state = last(train(oc.projected(optax.adam(0.1), rules), start, pull, 2))
        mu = optax.tree.get(state, "mu")
        inner = float64(w["kernel"] * mu["kernel"]).sum(0) + float64(w["bias"] * mu["bias"])
        inner = inner if rules is together else inner.sum()
        np.testing.assert_allclose(inner, 0, atol=1e-6)
        assert np.max(np.abs(np.sum(float64(w["bias"] * mu["bias"])))) > 1e-3
    # A group in parts, with an optimizer each: neither part has a tangent part by itself.
    both = optax.partition(
        {"a": optax.sgd(0.1, 0.9), "b": optax.sgd(0.1, 0.5)}, {"kernel": "a", "bias": "b"}
    )
    start = oc.constrain(params, together)
    tx, chain = (oc.projected(both, together, transport=t) for t in (True, False))
    got, want = (train(t, start, pull, 2) for t in (tx, chain))
    assert jax.tree.map(bits, got) == jax.tree.map(bits, want)


def test_stacked_sets():
    rules = oc.stacked(oc.orthogonal())
    start = oc.constrain(array(2, 4, 3), rules)
    w, state = last(train(oc.projected(optax.adam(0.1), rules), start, pull, 2))
    mu = float64(optax.tree.get(state, "mu"))
    inner = np.swapaxes(float64(w), 1, 2) @ mu
    np.testing.assert_allclose(inner + np.swapaxes(inner, 1, 2), 0, atol=2e-6)
    assert np.max(np.abs(inner)) > 1e-2


def test_a_schedule_is_that_of_this_projection():
    # By the norm of another step, the tangent part would be as many times longer or shorter.
    rules = oc.fixed_norm(lambda step: 10.0**step, axis=0)
    optimizer = optax.sgd(0.1, momentum=0.9)
    tx, chain = (oc.projected(optimizer, rules, transport=t) for t in (True, False))
    w, state = PARAMS["kernel"], tx.init(PARAMS["kernel"])
    for step in range(3):
        _, without = chain.update(pull(w), state, w)
        updates, state = tx.update(pull(w), state, w)
        w = w + jnp.asarray(updates)
        np.testing.assert_allclose(jnp.linalg.norm(w, axis=0), 10.0**step, rtol=1e-5)
        want = on_sphere(float64(w), float64(optax.tree.get(without, "trace")))
        np.testing.assert_allclose(optax.tree.get(state, "trace"), want, atol=1e-5)


def test_extra_arguments_reach_the_optimizer_and_the_set():
    rules = oc.fixed_norm(oc.arg("size"), axis=0)

    def init(params):
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None, *, value, **extra):
        del params, extra
        updates = jax.tree.map(lambda u, t: 0.9 * t - value * u, updates, state.trace)
        return updates, optax.TraceState(updates)

    for wrap in (lambda t: t, lambda t: optax.MultiSteps(t, 1)):
        tx = oc.projected(wrap(optax.GradientTransformationExtraArgs(init, update)), rules)
        w = PARAMS["kernel"]
        updates, state = tx.update(pull(w), tx.init(w), w, value=0.1, size=3.0)
        w = w + jnp.asarray(updates)
        np.testing.assert_allclose(jnp.linalg.norm(w, axis=0), 3.0, rtol=1e-5)
        assert radial(w, optax.tree.get(state, "trace")) < 1e-6


@pytest.mark.parametrize("compiled", [True, False])
def test_between_projections_moments_stay(compiled):
    optimizer = optax.sgd(0.1, momentum=0.9)
    tx, chain = (
        oc.projected(optimizer, RULES, every=2, transport=transport) for transport in (True, False)
    )
    step, other = (jax.jit(t.update) if compiled else t.update for t in (tx, chain))
    state, w = tx.init(PARAMS), PARAMS
    for due in (False, True, False, True):
        _, want = other(pull(w), state, w)
        updates, state = step(pull(w), state, w)
        w = optax.apply_updates(w, updates)
        own, without = (optax.tree.get(s, "trace")["kernel"] for s in (state, want))
        if due:
            assert radial(w["kernel"], own) < 1e-6
            assert radial(w["kernel"], without) > 1e-3
        else:
            assert bits(own) == bits(without)


# Which buffers are first moments.


class Velocity(NamedTuple):
    velocity: Any
    squares: Any


def heavy_ball(rate: float) -> optax.GradientTransformation:
    """An optimizer of one's own."""

    def init(params):
        return Velocity(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(updates, state, params=None):
        velocity = jax.tree.map(lambda v, g: 0.9 * v - rate * g, state.velocity, updates)
        return velocity, Velocity(velocity, jax.tree.map(jnp.square, updates))

    return optax.GradientTransformation(init, update)


def test_fields_of_an_optimizer_of_ones_own():
    for transport, tangent in ((True, False), (("velocity",), True), ({"velocity", "mu"}, None)):
        tx = oc.projected(optax.chain(heavy_ball(0.1), optax.clip(9.0)), RULES, transport=transport)
        if tangent is None:
            with pytest.raises(ValueError, match=r"the field 'mu', and .* only 'squares', 'velo"):
                tx.init(PARAMS)
            continue
        w, state = last(train(tx, PARAMS, pull, 2))
        own = radial(w["kernel"], optax.tree.get(state, "velocity")["kernel"])
        assert own < 1e-6 if tangent else own > 1e-2
    # Names take the place of those of Optax.
    tx = oc.projected(optax.chain(heavy_ball(0.1), ADAM), RULES, transport=["velocity"])
    w, state = last(train(tx, PARAMS, pull, 2))
    assert radial(w["kernel"], optax.tree.get(state, "mu")["kernel"]) > 1e-2


def test_what_has_another_shape_or_dtype_stays():
    state = Velocity(jnp.ones((5, 1)), None), optax.TraceState(jnp.ones((5, 1)))
    state += (optax.TraceState(jnp.ones((5, 3), int)), optax.TraceState(jnp.ones((5, 3))))
    new = map_first_moments(lambda own: [x and 0 for x in own], state[:-1], jnp.ones((5, 3)))
    assert jax.tree.map(bits, new) == jax.tree.map(bits, state[:-1])
    (new,) = map_first_moments(lambda own: [0 * jnp.asarray(own[0])], state[-1:], jnp.ones((5, 3)))
    np.testing.assert_array_equal(new.trace, 0)


class Pair(NamedTuple):
    mu: Any
    trace: Any


def test_parameters_may_have_such_fields():
    params = Pair(Pair(PARAMS["kernel"], PARAMS["kernel"]), PARAMS["kernel"])
    rules = oc.unit_norm()
    tx, chain = (oc.projected(ADAM, rules, transport=transport) for transport in (True, False))
    (w, got), (_, want) = (train(t, params, pull, 1) for t in (tx, chain))
    nu, other = got[1][0].nu, want[1][0].nu
    assert jax.tree.map(bits, nu) == jax.tree.map(bits, other)
    for p, m in zip(jax.tree.leaves(last(w)), jax.tree.leaves(last(got[1][0].mu)), strict=True):
        assert radial(p, m) < 1e-6


def test_a_centered_variance_stays_positive():
    # With the mean of the gradients projected, nu - mu ** 2 would be negative, and its root NaN.
    optimizer = optax.rmsprop(0.1, centered=True, decay=0.5, eps=1e-12, momentum=0.9)
    w, state = train(oc.projected(optimizer, RULES), PARAMS, pull, 20)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves((w, state)))
    assert radial(last(w)["kernel"], last(optax.tree.get(state, "trace"))["kernel"]) < 1e-6


# Those that change sign with the gradient and stay where they are.
SIGNED_BUT_NO_MOMENTS = {
    "COCOBState.cumulative_gradients",
    "DAdaptAdamWState.grad_sum",
    "MadgradState.s",
    "ProdigyState.grad_sum",
    "ScaleByLBFGSState.updates",
    "ScaleByRStdDevState.mu",
    "ScaleByRStdDevWithCountState.mu",
    "ScaleByRpropState.prev_updates",
    "ScaleByZoomLinesearchState.grad",
}
NEED_MORE = {
    *("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch", "scale_by_schedule"),
    *("dpsgd", "schedule_free"),
}


def optimizers():
    """Each optimizer of Optax that needs no more than a learning rate."""
    yield optax.with_extra_args_support(optax.scale_by_stddev(bias_correction=True))
    for module in (optax, contrib):
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function) or name in NEED_MORE:
                continue
            parameters = inspect.signature(function).parameters
            if "learning_rate" in parameters or name.startswith("scale_by_"):
                known = {"learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0}
                given = {k: v for k, v in known.items() if k in parameters}
                yield optax.with_extra_args_support(function(**given))


def buffers(state, params) -> dict[str, Any]:
    """What in a state is shaped like the parameters, by class and field."""
    found, shapes = {}, jax.tree.map(jnp.shape, params)
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        for name, child in state._asdict().items():
            if jax.tree.map(jnp.shape, child) == shapes:
                found[f"{type(state).__name__}.{name}"] = child
            else:
                found |= buffers(child, params)
    elif isinstance(state, (tuple, list, dict)):
        for child in state.values() if isinstance(state, dict) else state:
            found |= buffers(child, params)
    return found


@pytest.mark.filterwarnings("ignore")
def test_first_moments_of_all_optimizers_of_optax():
    params = {"w": array(4, 3)}
    grads = [array(4, 3, seed=seed) for seed in (1, 2)]

    def after(tx, sign):
        state = tx.init(params)
        for grad in grads:
            g = {"w": sign * grad}

            def loss(p, g=g):
                return jnp.vdot(g["w"], p["w"])

            given = {"value": jnp.ones(()), "grad": g, "value_fn": loss}
            if "SophiaState.mu" in buffers(state, params):
                given = {"obj_fn": loss}
            _, state = tx.update(g, state, params, **given)
        return state

    seen, signed, carried = set(), set(), set()
    for tx in optimizers():
        new = set(buffers(jax.eval_shape(tx.init, params), params)) - seen
        if not new:
            continue
        seen |= new
        plus, minus = (after(tx, sign) for sign in (1, -1))
        other = buffers(minus, params)
        for name, own in buffers(plus, params).items():
            a, b = float64(own["w"]), float64(other[name]["w"])
            if np.any(a) and np.allclose(a, -b, rtol=1e-5, atol=0):
                signed.add(name)
        moved = map_first_moments(
            lambda own: [x if x is None else x * jnp.nan for x in own], plus, params
        )
        there = buffers(moved, params).items()
        carried |= {name for name, own in there if np.all(np.isnan(float64(own["w"])))}
    assert len(seen) > 40
    assert carried == signed - SIGNED_BUT_NO_MOMENTS
    newer = {"MadgradState.s"} if not hasattr(contrib, "madgrad") else set()
    assert signed >= SIGNED_BUT_NO_MOMENTS - newer
    table = {f"{cls}.{name}" for cls, own in _FIELDS_OF.items() for name in own or ()}
    assert carried >= table | {"ScaleByAdamState.mu", "TraceState.trace", "ScaleByLionState.mu"}


@pytest.mark.parametrize("wrapper", ["lookahead", "flatten", "galore"])
def test_moments_of_other_parameters_stay(wrapper):
    # They have a basis of their own, in which nothing is tangent to a set.
    params: Any = {"w": array(3, 3), "b": array(9, seed=1)}
    if wrapper == "lookahead":
        tx, params = optax.lookahead(ADAM, 2, 0.5), optax.LookaheadParams(params, params)
    elif wrapper == "flatten":
        tx = optax.flatten(ADAM)
    elif hasattr(contrib, "galore"):
        tx = contrib.galore(0.1, rank=3)
    else:
        pytest.skip("this Optax has no GaLore")
    state = jax.tree.map(jnp.ones_like, tx.init(params))
    same = map_first_moments(lambda own: [x if x is None else 2 * x for x in own], state, params)
    assert jax.tree.map(bits, same) == jax.tree.map(bits, state)


# Errors.


@pytest.mark.parametrize("given", [optax.sgd, RULES, optax.MultiSteps, 0.1, oc.unit_norm(), None])
def test_what_is_no_optimizer(given):
    with pytest.raises(TypeError, match=r"projected: .* is no optimizer; the optimizer comes"):
        oc.projected(given, RULES)


@pytest.mark.parametrize("given", ["mu", 1, None, [1], b"mu"])
def test_what_is_no_collection_of_names(given):
    with pytest.raises(TypeError, match=r"transport=.* is neither a bool nor a collection of"):
        oc.projected(ADAM, RULES, transport=given)


def test_errors_of_the_ends():
    tx = oc.projected(ADAM, RULES)
    with pytest.raises(ValueError, match=r"tangent needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"every=0\.5 is not an int"):
        oc.projected(ADAM, RULES, every=0.5)
    with pytest.raises(ValueError, match=r"matches no leaf|does not match|matches none"):
        oc.projected(ADAM, {"nowhere": oc.unit_norm()}).init(PARAMS)
    oc.projected(ADAM, {"nowhere": oc.unit_norm()}, strict=False).init(PARAMS)


def test_a_rule_that_does_nothing_warns_as_in_the_chain():
    rules = {"kernel": oc.unit_norm(), "ker*": oc.unit_norm(), "bias": None}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        tx = oc.projected(ADAM, rules)
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert len(found) == 2  # of tangent, and of project
