"""Masks, signs and ties: patterns of the weights at init, arrays as patterns, and errors."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import DTYPES, bits, float64

import optax_constraints as oc
from optax_constraints._axes import LeafLayout

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


def pruned(dtype=DTYPES[0], shape=(6, 5)) -> jax.Array:
    """Weights of both signs, of which some are zeros of either sign."""
    rng = np.random.default_rng(0)
    w = np.where(rng.random(shape) < 0.4, rng.choice([0.0, -0.0], shape), rng.normal(size=shape))
    return jnp.asarray(w, DTYPES[0]).astype(dtype)


def trained(constraint, params, steps: int = 20):
    """The weights after each step of training with random gradients, and the last state."""
    tx = optax.chain(optax.sgd(0.5), oc.project(constraint))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    # From NumPy: JAX's generator would be compiled into each program.
    grads = np.random.default_rng(0).normal(size=(steps, *params.shape)).astype(np.float32)
    (_, state), after = jax.jit(lambda *carry: jax.lax.scan(step, *carry))(
        (params, tx.init(params)), grads.astype(params.dtype)
    )
    return after, state


# What the weights were at init.


@each_dtype
def test_what_was_zero_stays_zero(dtype):
    start = pruned(dtype)
    after, state = trained(oc.mask("init"), start)
    zero = float64(start) == 0
    assert np.all(float64(after)[:, zero] == 0)
    assert np.mean(float64(after)[:, ~zero] != 0) > 0.99
    (memory,) = jax.tree.leaves(state[-1].memory)
    assert (memory.dtype, memory.shape) == (jnp.bool_, start.shape)
    assert np.array_equal(memory, ~zero)


@each_dtype
def test_signs_stay_what_they_were(dtype):
    start = pruned(dtype)
    after, state = trained(oc.sign(), start)
    signs = np.sign(float64(start))
    assert np.all(float64(after) * signs >= 0)
    # Some ran into zero, and what had no sign is free.
    assert np.any(float64(after)[:, signs != 0] == 0)
    free = float64(after)[:, signs == 0]
    assert np.any(free > 0)
    assert np.any(free < 0)
    (memory,) = jax.tree.leaves(state[-1].memory)
    assert (memory.dtype, memory.shape) == (jnp.int8, start.shape)
    assert np.array_equal(memory, signs)


def test_by_hand_weights_are_those_at_init():
    w = pruned()
    for constraint in (oc.mask("init"), oc.sign(), oc.sign("init")):
        for known in (constraint(w), oc.constrain(w, constraint), jax.jit(constraint)(w)):
            assert bits(known) == bits(w)
        assert np.array_equal(constraint.tangent(w, w), w)
    # Even in NumPy's float64.
    assert np.array_equal(oc.mask("init")(np.array([0.0, 2.0])), [0, 2])


@pytest.mark.parametrize(
    "constraint",
    [oc.mask("init"), oc.sign(), oc.around(oc.box(-0.1, 0.1)), oc.around(oc.max_norm("init"))],
    ids=str,
)
def test_verbs_that_only_look_need_the_state(constraint):
    params = {"w": pruned()}
    state = oc.project({"w": constraint}).init(params)
    far = {"w": -3 * params["w"] + 1}
    for verb in (oc.violations, oc.report, oc.assert_feasible):
        with pytest.raises(ValueError, match="is relative to what the weights were at init"):
            verb(far, {"w": constraint})
    want = constraint.advance(far["w"], constraint.remember(params["w"]))[0]
    assert bits(oc.constrain(far, {"w": constraint}, state=state)["w"]) == bits(want)
    assert bits(oc.straight_through(far, {"w": constraint}, state=state)["w"]) == bits(want)
    away = oc.violations(far, {"w": constraint}, state=state)["w"]
    np.testing.assert_allclose(away, np.linalg.norm(far["w"] - want), rtol=1e-5)
    assert away > 0.5
    (row,) = oc.report(far, {"w": constraint}, state=state).rows
    assert (row.units, row.outside) == (None, away)


def test_tangent_parts_are_those_of_the_pattern_at_init():
    start, v = pruned(), jnp.ones((6, 5))
    signs = np.sign(start)
    for constraint, at, want in (
        (oc.mask("init"), start, signs != 0),
        (oc.mask("init"), 0 * start, signs != 0),
        (oc.sign(), 0 * start, signs >= 0),
        (oc.sign(), start, np.ones_like(signs)),
        (oc.stacked(oc.mask("init")), start, signs != 0),
    ):
        memory = constraint.remember(start)
        assert np.array_equal(constraint.tangent(at, v, memory), want)


def test_patterns_at_init_inside_of_others():
    start = pruned(shape=(3, 4, 5))
    zero = np.asarray(start == 0)
    for constraint in (
        oc.stacked(oc.mask("init")),
        oc.stacked(oc.mask("init"), axis=-1),
        oc.part(oc.mask("init"), "..."),
        oc.compose(oc.mask("init"), oc.max_norm(1.0)),
        oc.compose(oc.mask("init"), oc.sign()),
        oc.intersection(oc.mask("init"), oc.sign()),
        oc.soft(oc.mask("init"), 1.0),
    ):
        after, _ = trained(constraint, start, 3)
        assert np.all(after[:, zero] == 0), constraint
        assert np.mean(after[:, ~zero] != 0) > 0.5, constraint


def test_groups_remember_patterns():
    params = {"kernel": pruned(), "bias": jnp.array([0.0, 1.0, 0.0, -1.0, 2.0])}
    for pattern in (oc.joint("kernel", "bias"), oc.across("*")):
        tx = optax.chain(optax.sgd(1.0), oc.project({pattern: oc.mask("init")}))
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.map(lambda u: (u == 0).tolist(), updates) == jax.tree.map(
            lambda p: (p == 0).tolist(), params
        )


# Signs as arrays.


def test_dales_law():
    rows = np.array([[1], [-1], [0]])
    w = jnp.array([[1.0, -2.0], [1.0, -2.0], [1.0, -2.0]])
    want = [[1, 0], [0, -2], [1, -2]]
    for pattern in (rows, rows.astype(float), jnp.asarray(rows, jnp.bfloat16), rows.tolist()):
        constraint = oc.sign(pattern)
        assert np.array_equal(constraint(w), want)
        assert np.array_equal(jax.jit(lambda c, w: c(w))(constraint, w), want)
        assert constraint == oc.sign(rows) or isinstance(pattern, jax.Array)
    assert np.array_equal(jax.jit(lambda p, w: oc.sign(p)(w))(rows, w), want)
    assert np.array_equal(oc.constrain(w, oc.sign(oc.arg("p")), extra={"p": rows}), want)
    assert np.array_equal(oc.sign(-1)(w), np.minimum(w, 0))
    assert np.array_equal(
        oc.sign(rows).on_bound(jnp.array([[0.0, 1.0]] * 3)), [[1, 0], [1, 0], [0, 0]]
    )
    # The tangent cone, at zero.
    d = oc.sign(rows).tangent(jnp.zeros((3, 2)), w)
    assert np.array_equal(d, want)


def test_the_derivative_of_signs_is_that_of_the_inside():
    w = jnp.array([-1.0, 0.0, 1.0])
    gradient = jax.grad(lambda w: jnp.sum(oc.sign([1, 1, 1])(w)))(w)
    assert np.array_equal(gradient, [0, 1, 1])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oc.sign([1, 2]), ValueError, "pattern=[1, 2] has other numbers than -1, 0 and 1"),
        (lambda: oc.sign([np.nan]), ValueError, "write np.sign(pattern)"),
        (lambda: oc.sign("start"), TypeError, "Sign: pattern='start' is not an array of real"),
        (lambda: oc.sign(None), TypeError, "Sign: pattern=None is not an array of real numbers"),
        (lambda: oc.mask("start"), TypeError, "or 'init' for the pattern of the weights at init"),
        (lambda: oc.tied([0.5]), TypeError, "labels=[0.5] are not an array of concrete integers"),
        (lambda: oc.tied("init"), TypeError, "Tied: labels='init' is not an array of real"),
        (lambda: oc.tied([[0], [0, 1]]), TypeError, "is not an array of real numbers"),
        (lambda: oc.sign(oc.arg("p"))(jnp.ones(2)), TypeError, "write constraint.read(extra"),
        (lambda: oc.tied([0, 0])(jnp.arange(2)), TypeError, "Tied takes floating-point weights"),
    ],
)
def test_bad_patterns(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("constraint", "what"), [(oc.sign([1, 0]), "Sign"), (oc.tied([1, 0]), "Tied")]
)
def test_patterns_that_do_not_fit_name_the_path(constraint, what):
    name = {"Sign": "pattern", "Tied": "labels"}[what]
    message = f"{what} on 'a/w' of shape (2, 3): {name} has shape (2,), which does not broadcast"
    with pytest.raises(ValueError, match=re.escape(message)):
        oc.project({"w": constraint}).init({"a": {"w": jnp.ones((2, 3))}})
    with pytest.raises(ValueError, match="does not broadcast"):
        constraint(jnp.ones(3))


def test_patterns_have_a_json_form():
    for constraint in (oc.mask("init"), oc.sign(), oc.sign([[1], [-1]]), oc.tied([5, 5, -2])):
        again = oc.deserialize(json.loads(json.dumps(oc.serialize(constraint))))
        assert again == constraint
        assert hash(again) == hash(constraint)
    with pytest.raises(TypeError, match="is a function, which has no JSON form; write the array"):
        oc.serialize(oc.tied(lambda shape: np.zeros(shape, int)))
    assert str(oc.mask("init")) == "Mask('init')"
    assert (str(oc.tied([[0], [1]])), str(oc.tied(np.ones))) == ("Tied(2x1)", "Tied(ones)")


# Ties.


def toeplitz(shape):
    return np.subtract.outer(*map(np.arange, shape))


@each_dtype
def test_toeplitz_matrices_stay_toeplitz(dtype):
    after, _ = trained(oc.tied(toeplitz), jnp.zeros((6, 5), dtype))
    for w in float64(after):
        for k in range(-4, 6):
            assert len(np.unique(np.diagonal(w, -k))) == 1
    assert len(np.unique(float64(after)[-1])) > 6


def test_labels_tie_along_axes_that_they_lack():
    w = jnp.arange(24.0).reshape(2, 3, 4)
    labels = np.array([[7], [-1], [7]])
    want = np.asarray(w).copy()
    want[:, [0, 2]] = np.mean(want[:, [0, 2]])
    want[:, 1] = np.mean(want[:, 1])
    for constraint in (oc.tied(labels), oc.tied(lambda shape: labels)):
        assert np.array_equal(constraint(w), want)
    compiled = jax.jit(lambda c, w: c(w))
    assert np.array_equal(compiled(oc.tied(labels), w), want)
    # Other labels compile nothing.
    each = compiled(oc.tied([[0], [1], [2]]), w)
    assert np.array_equal(each[0, :, 0], np.mean(w, axis=(0, 2)))
    assert compiled._cache_size() == 1


def test_layers_of_a_stack_have_ties_of_their_own():
    w = jnp.square(jnp.arange(12.0)).reshape(3, 2, 2)
    labels = [[0, 1], [1, 0]]
    layout = {"w": LeafLayout("Dense", (1,), (0,))}
    for got in (
        oc.constrain({"w": w}, {"w": oc.tied(labels)}, layout=layout)["w"],
        oc.constrain({"w": w}, {"w": oc.tied(lambda shape: labels)}, layout=layout)["w"],
        oc.stacked(oc.tied(labels))(w),
    ):
        assert np.array_equal(got, np.stack([oc.tied(labels)(layer) for layer in w]))
    whole = np.broadcast_to(labels, (3, 2, 2))
    tied = oc.constrain({"w": w}, {"w": oc.tied(whole)}, layout=layout)["w"]
    assert len(np.unique(tied)) == 2


def test_means_of_many_are_right_up_to_rounding():
    w = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    w[::2] += 1e4
    labels = np.arange(200_000) % 2
    got = np.asarray(oc.tied(labels)(jnp.asarray(w)))
    for label in (0, 1):
        own = labels == label
        want = np.mean(w[own].astype(np.float64))
        assert len(np.unique(got[own])) == 1
        assert abs(float(got[own][0]) - want) <= 1e-7 * max(abs(want), 1)


def test_equal_entries_come_back_bit_for_bit_whatever_they_are():
    w = jnp.asarray(np.array([0.1, -0.0, 0.0, 3e38, 1e-30, 1 / 3], np.float32))
    labels = np.array([0, 1, 1, 2, 3, 4])
    many = jnp.tile(w, 7)
    assert bits(oc.tied(np.tile(labels, 7))(many)) == bits(many)


def test_what_is_not_finite_stays_with_its_label():
    w = jnp.array([1.0, 2.0, jnp.nan, 3.0, jnp.inf, 5.0])
    got = oc.tied([0, 0, 1, 1, 2, 2])(w)
    np.testing.assert_array_equal(got, [1.5, 1.5, *[np.nan] * 4])


def test_ties_of_an_array_without_entries():
    assert oc.tied(np.zeros((0, 3), int))(jnp.zeros((0, 3))).shape == (0, 3)
