"""`straight_through`, and the warnings that lead to it."""

import contextlib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, DTYPES, Case, bits, float64
from flax import nnx

import optax_constraints as oc
from optax_constraints.flax import linen
from optax_constraints.flax import nnx as oc_nnx

WIDEST = DTYPES[0]
TERNARY = oc.grid([-1, 0, 1])


def normal(shape, seed: int, dtype=WIDEST) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# What it gives, and its derivatives.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_to_the_bit_what_constrain_gives_and_gradients_as_they_come(case: Case, dtype):
    # Outside of every set, so that there is something to compare.
    params = {"w": 4 * normal(case.shape, 0, dtype), "free": jnp.array([1.5, -2.0], dtype)}
    dual = {"w": normal(case.shape, 1, dtype), "free": jnp.array([3.0, 4.0], dtype)}

    @jax.jit
    def both(params, dual):
        want = oc.constrain(params, {"w": case.constraint})
        got, back = jax.vjp(lambda p: oc.straight_through(p, {"w": case.constraint}), params)
        return want, got, back(dual)[0]

    want, got, gradient = both(params, dual)
    for name in params:
        assert got[name].dtype == dtype
        assert bits(got[name]) == bits(want[name])
        assert bits(gradient[name]) == bits(dual[name])
    assert bits(got["free"]) == bits(params["free"])
    assert bits(got["w"]) != bits(params["w"])


@pytest.mark.parametrize("constraint", [TERNARY, oc.nm(1, 2), oc.max_norm(1.0)], ids=str)
def test_forward_and_second_derivatives_are_those_of_the_identity(constraint):
    w, v = normal((4,), 0), normal((4,), 1)
    target = constraint(w)
    out, tangent = jax.jvp(lambda w: oc.straight_through(w, constraint), (w,), (v,))
    assert bits(out) == bits(target)
    assert bits(tangent) == bits(v)

    def loss(w):
        return jnp.sum(oc.straight_through(w, constraint) ** 3)

    np.testing.assert_allclose(jax.grad(loss)(w), 3 * target**2, rtol=1e-6)
    curved = jax.grad(lambda w: jnp.vdot(jax.grad(loss)(w), v))(w)
    np.testing.assert_allclose(curved, 6 * target * v, rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(loss)(w), jnp.diag(6 * target), rtol=1e-6)


def test_outside_of_jit_and_of_numpy_and_python_numbers():
    params = {"a": np.array([0.7, -0.2], np.float32), "b": 0.8, "c": jnp.int32(3)}
    out = oc.straight_through(params, {"[ab]": TERNARY})
    np.testing.assert_array_equal(out["a"], [1, 0])
    assert out["b"] == 1
    assert out["c"] is params["c"]
    assert jax.grad(lambda w: oc.straight_through(w, TERNARY))(0.7) == 1


def test_under_vmap_each_model_by_itself():
    w = normal((3, 4, 2), 0)
    constraint = oc.top_k(2)
    out = jax.vmap(lambda w: oc.straight_through(w, constraint))(w)
    assert bits(out) == bits(jnp.stack([constraint(one) for one in w]))
    pull = jnp.array([0.0, 0.5, 2.0])

    def loss(w, pull):
        return jnp.sum(oc.straight_through(w, constraint, decay=pull))

    gradient = jax.vmap(jax.grad(loss))(w, pull)
    np.testing.assert_allclose(gradient, 1 + pull[:, None, None] * (w - out), rtol=1e-6)


def test_in_a_scan_with_a_schedule_of_the_step():
    constraint = oc.top_k(lambda step: 4 - step)
    start = jnp.asarray([1.0, 2.0, 3.0, 4.0], WIDEST)

    def body(w, step):
        def loss(w):
            return jnp.sum(oc.straight_through(w, constraint, step=step))

        gradient = jax.grad(loss)(w)
        return w + gradient, oc.straight_through(w, constraint, step=step)

    last, seen = jax.lax.scan(body, start, jnp.arange(3))
    np.testing.assert_array_equal(seen, [[1, 2, 3, 4], [0, 3, 4, 5], [0, 0, 5, 6]])
    np.testing.assert_array_equal(last, start + 3)


def test_numbers_of_constraints_get_no_gradient():
    w = normal((4,), 0)

    def loss(numbers, decay):
        # One is closed over, and no leaf of the constraint.
        rules = oc.compose(
            oc.max_norm(numbers[0]), oc.scale(oc.arg("factor")), lambda w: w * numbers[2]
        )
        extra = {"factor": numbers[1]}
        return jnp.sum(oc.straight_through(w, rules, extra=extra, decay=decay))

    for decay in (0.0, 0.5):
        np.testing.assert_array_equal(jax.grad(loss)((1.0, 1.0, 1.0), decay), 0)
    np.testing.assert_array_equal(jax.grad(loss, argnums=1)((1.0, 1.0, 1.0), 0.5), 0)


def test_what_cannot_be_differentiated_need_not_be():
    def rounded(w):
        return jax.pure_callback(lambda w: np.round(w), jax.ShapeDtypeStruct(w.shape, w.dtype), w)

    w = jnp.asarray([0.7, -0.2], WIDEST)
    out, gradient = jax.value_and_grad(lambda w: jnp.sum(oc.straight_through(w, rounded)))(w)
    assert out == 1
    np.testing.assert_array_equal(gradient, 1)


# Groups and memory.


@pytest.mark.parametrize(
    "rules",
    [
        {oc.joint("kernel", "bias"): oc.max_norm(0.5)},
        {oc.joint("kernel", "bias"): TERNARY},
        {oc.across("kernel", "bias"): oc.top_k(3)},
        {oc.across("kernel", "bias"): TERNARY},
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.0, 0.25])
def test_groups(rules, decay):
    params = {"bias": normal((2,), 0), "free": normal((3,), 1), "kernel": normal((3, 2), 2)}
    dual = jax.tree.map(lambda w: w + 1, params)
    want = oc.constrain(params, rules)
    got, back = jax.vjp(lambda p: oc.straight_through(p, rules, decay=decay), params)
    pulled = jax.tree.map(lambda g, w, t: g + decay * (w - t), dual, params, want)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), got, want)
    jax.tree.map(np.testing.assert_array_equal, back(dual)[0], pulled)
    assert bits(got["kernel"]) != bits(params["kernel"])


def test_memory_is_that_of_the_state():
    rules = oc.fixed_norm("init")
    start, later = {"w": jnp.asarray([3.0, 4.0], WIDEST)}, {"w": jnp.asarray([6.0, 8.0], WIDEST)}
    state = oc.project(rules).init(start)

    @jax.jit
    def both(params, state):
        def given(p):
            return oc.straight_through(p, rules, state=state)["w"]

        out, back = jax.vjp(given, params)
        return out, back(jnp.ones_like(out))[0]["w"]

    out, gradient = both(later, state)
    assert bits(out) == bits(oc.constrain(later, rules, state=state)["w"])
    np.testing.assert_allclose(out, [3, 4], rtol=1e-6)
    np.testing.assert_array_equal(gradient, 1)
    # Without a state, the weights given are those at init.
    assert bits(oc.straight_through(later, rules)["w"]) == bits(later["w"])


# The pull.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("traced", [False, True])
def test_decay_pulls_towards_the_set(dtype, traced):
    params = {"w": jnp.array([-0.75, 0.25, 2.0], dtype), "free": jnp.array([1.0], dtype)}

    def gradients(decay):
        def loss(p):
            new = oc.straight_through(p, {"w": TERNARY}, decay=decay)
            return jnp.sum(new["w"] * jnp.array([1, 2, 3], dtype)) + jnp.sum(new["free"])

        return jax.grad(loss)(params)

    for decay in (0.5, 0):
        found = (jax.jit(gradients) if traced else gradients)(decay)
        assert found["w"].dtype == dtype
        away = np.array([0.25, 0.25, 1.0])
        np.testing.assert_array_equal(float64(found["w"]), [1, 2, 3] + decay * away)
        np.testing.assert_array_equal(float64(found["free"]), 1)


def test_with_decay_the_value_is_the_same():
    w = normal((4, 2), 0)
    for decay in (0.5, jnp.float32(0.5), np.float32(0.5), np.array(0.5), 1):
        assert bits(oc.straight_through(w, oc.nm(1, 2), decay=decay)) == bits(oc.nm(1, 2)(w))


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.zeros(()), jnp.zeros(())], ids=repr)
def test_a_decay_that_is_known_to_be_0_leaves_forward_mode(zero):
    w = jnp.array([0.7, 0.2])
    forward = jax.jvp(lambda w: oc.straight_through(w, TERNARY, decay=zero), (w,), (w,))[1]
    assert bits(forward) == bits(w)


def test_with_decay_there_is_no_forward_mode():
    w = jnp.ones(2)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda w: oc.straight_through(w, TERNARY, decay=0.5), (w,), (w,))


@pytest.mark.parametrize(
    ("decay", "error", "message"),
    [
        (True, TypeError, r"decay=True is not a number; write a float or a JAX scalar\."),
        ("0.1", TypeError, r"decay='0\.1' is not a number; write a float"),
        (None, TypeError, r"decay=None is not a number"),
        (lambda step: 0.1, TypeError, r"decay=<function .* is not a number"),
        (oc.arg("decay"), TypeError, r"decay=arg\('decay'\) is not a number"),
        (jnp.array(True), TypeError, r"has dtype bool; write a real number\."),
        (jnp.ones(2), ValueError, r"has shape \(2,\); write one number\."),
        (-0.1, ValueError, r"decay=-0\.1 is not allowed; write a finite number of at least 0\."),
        (np.float32(-1), ValueError, r"is not allowed; write a finite number"),
        (jnp.float32(-1), ValueError, r"is not allowed; write a finite number"),
        (float("nan"), ValueError, r"decay=nan is not allowed"),
        (float("inf"), ValueError, r"decay=inf is not allowed"),
        (10**400, ValueError, r"is not allowed; write a finite number"),
    ],
)
def test_a_decay_that_is_none(decay, error, message):
    with pytest.raises(error, match=f"straight_through: .*{message}"):
        oc.straight_through(jnp.ones(2), TERNARY, decay=decay)


def test_other_mistakes_are_those_of_constrain():
    params = {"w": jnp.ones(2), "n": jnp.arange(2)}
    with pytest.raises(ValueError, match="kernel"):
        oc.straight_through(params, {"kernel": TERNARY})
    assert oc.straight_through(params, {"kernel": TERNARY}, strict=False)["w"] is params["w"]
    with pytest.raises(TypeError, match="floating-point"):
        oc.straight_through(params, {"n": TERNARY})


# What it is for.


def test_ternary_weights_are_found_and_projected_updates_stay_where_they_were():
    rng = np.random.default_rng(0)
    true = rng.integers(-1, 2, 20).astype(np.float32)
    x = jnp.asarray(rng.normal(size=(100, 20)), jnp.float32)
    y = x @ true
    rules = {"w": TERNARY}
    free = optax.adam(0.01)
    with lost():
        projected = optax.chain(free, oc.project(rules))
        projected.init({"w": y[:20]})
    start = {"w": jnp.asarray(rng.normal(size=20) / 10, jnp.float32)}

    def train(tx, at, params):
        def loss(params):
            return jnp.mean((x @ at(params)["w"] - y) ** 2)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = tx.init(params)
        (params, _), _ = jax.lax.scan(step, (params, state), length=500)
        return params

    found = oc.constrain(train(free, lambda p: oc.straight_through(p, rules), start), rules)
    assert float(jnp.mean((x @ found["w"] - y) ** 2)) < 1e-6
    np.testing.assert_array_equal(found["w"], true)
    # The same optimizer, at the same rate, from where those weights would be deployed.
    allowed = {"w": jnp.zeros(20)}
    stayed = train(projected, lambda p: p, allowed)
    np.testing.assert_array_equal(stayed["w"], allowed["w"])


# Warnings.


def lost(text: str = ""):
    return pytest.warns(UserWarning, match=rf"{text}.*straight_through\(params, rules\)")


@contextlib.contextmanager
def silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


PARAMS = {"a": {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}, "b": jnp.ones((3, 2))}


def test_project_says_at_init_that_steps_are_lost():
    tx = oc.project({"a/kernel": TERNARY})
    with lost() as caught:
        tx.init(PARAMS)
    (warning,) = caught
    assert str(warning.message) == (
        "Grid(-1, 0, 1) on 'a/kernel': updates shorter than half a gap between values are lost, "
        "since the projection leads back to where the weights were. Let the optimizer train these "
        "leaves free, take the loss at straight_through(params, rules), and write "
        "constrain(params, rules) for the weights to deploy."
    )
    assert warning.filename == __file__  # where the user wrote it, also in a chain
    with lost() as caught:
        optax.chain(optax.adam(0.1), oc.project({"a/kernel": TERNARY})).init(PARAMS)
    assert caught[0].filename == __file__
    with lost():  # it is the rules that are known, not the numbers
        jax.jit(tx.init)(PARAMS)


def test_what_flax_projects_after_applying_is_warned_of_too():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with lost("'kernel': updates shorter") as caught:
        oc_nnx.Optimizer(model, optax.sgd(0.1), rules={"kernel": TERNARY})
    with lost("'b': updates shorter") as others:
        linen.TrainState.create(
            apply_fn=abs, params=PARAMS, tx=optax.sgd(0.1), rules={"b": TERNARY}
        )
    assert {w.filename for w in (*caught, *others)} == {__file__}


def test_one_warning_names_the_first_leaf_and_counts_the_others():
    with pytest.warns(UserWarning, match=r"on 'a/bias' and 2 more: updates shorter") as caught:
        oc.project(TERNARY).init(PARAMS)
    assert len(caught) == 1
    with lost(r"Grid\(0, 1, 2, 3, .{40}\.\.\. on 'b': updates shorter"):
        oc.project({"b": oc.grid(range(100))}).init(PARAMS)
    with lost(r"'a/bias': updates of 3 steps together that are shorter"):
        oc.project({"bias": TERNARY}, every=3).init(PARAMS)


@pytest.mark.parametrize(
    ("rules", "path"),
    [
        ({"a/kernel": oc.stacked(TERNARY)}, "a/kernel"),
        ({"a/kernel": oc.part(TERNARY, "0")}, "a/kernel"),
        ({"a/kernel": oc.compose(oc.max_norm(1.0), TERNARY)}, "a/kernel"),
        ({"a/kernel": oc.compose(TERNARY, oc.max_norm(1.0))}, "a/kernel"),
        ({"a/kernel": oc.soft(TERNARY, rate=1.0)}, "a/kernel"),
        ({oc.joint("kernel", "bias"): TERNARY}, "bias"),
        ({oc.across("**/kernel", "b"): TERNARY}, "kernel"),
    ],
    ids=str,
)
def test_a_grid_inside_of_something_else_loses_steps_too(rules, path):
    with lost(f"on .*{path}.*: updates shorter"):
        oc.project(rules).init(PARAMS)


@pytest.mark.parametrize(
    "constraint",
    [
        oc.soft(TERNARY, rate=0.5),
        oc.soft(TERNARY, rate=lambda step: 1.0),
        oc.compose(oc.soft(TERNARY, 0.5), oc.max_norm(1.0)),
        oc.grid([0.5]),
    ],
    ids=str,
)
def test_where_weights_move_there_is_no_warning(constraint):
    with silent():
        oc.project({"a/kernel": constraint}).init(PARAMS)
        oc.constrain(PARAMS, {"a/kernel": constraint})


# One case of each set, and both grids.
KINDS = {(type(c.constraint), c.constraint.loses_steps and str(c)): c for c in CASES}


@pytest.mark.parametrize("case", KINDS.values(), ids=str)
def test_just_the_sets_that_undo_whole_updates_say_so(case: Case):
    constraint = case.constraint
    again = jax.jit(constraint)
    w = again(normal(case.shape, 0))
    undone = bits(again(w + 1e-3 * normal(case.shape, 1))) == bits(w)
    assert constraint.loses_steps == undone
    if not undone:
        with silent():
            oc.project(constraint).init(w)


def test_constrain_says_that_all_weights_became_one():
    params = {"a": {"kernel": jnp.array([[-0.25, 0.125]], jnp.bfloat16), "bias": jnp.ones(2)}}
    with pytest.warns(UserWarning, match="constrain") as caught:
        oc.constrain(params, {"kernel": TERNARY})
    (warning,) = caught
    assert str(warning.message) == (
        "constrain: Grid(-1, 0, 1) makes every entry of 'a/kernel' 0, and they were from -0.25 to "
        "0.125. Scale the values to the weights, such as grid([-s, 0, s]) with s of the size of "
        "most of them."
    )
    assert warning.filename == __file__
    wrapped = {oc.across("kernel", "bias"): oc.grid([-9, 1])}
    with pytest.warns(UserWarning, match="makes every entry of .*bias.* 1, and they were from"):
        oc.constrain(params, wrapped)
    with pytest.warns(UserWarning, match="makes every entry of 'w' -1, and"):
        oc.constrain({"w": np.array([-5.0, -3.0])}, {"w": TERNARY})


@pytest.mark.parametrize(
    ("w", "constraint"),
    [
        ([0.1, 0.9], TERNARY),  # several values
        ([0.2], TERNARY),
        ([], TERNARY),
        ([0.2, 0.2], TERNARY),  # they were equal before
        ([0.2, float("nan")], TERNARY),
        ([0.2, 0.3], oc.grid([1.0])),
        ([-0.2, -0.3], oc.non_neg()),
        ([0.2, 0.3], oc.top_k(0)),
    ],
    ids=str,
)
def test_of_other_weights_constrain_says_nothing(w, constraint):
    with silent():
        oc.constrain({"w": jnp.array(w)}, {"w": constraint})


def test_where_numbers_cannot_be_read_constrain_says_nothing():
    w = jnp.array([0.1, 0.2])
    with silent():
        jax.jit(lambda w: oc.constrain(w, TERNARY))(w)
        jax.vmap(lambda w: oc.constrain(w, TERNARY))(w[None])
        jax.grad(lambda w: jnp.sum(oc.constrain(w, TERNARY)))(w)
        jax.eval_shape(lambda w: oc.constrain(w, TERNARY), w)
        oc.straight_through(w, TERNARY)
