"""Boxes, masks and grids: arrays as bounds, errors, and what `project` makes of them."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import DTYPES, bits, float64

import optax_constraints as oc


def sweep(constraint, params, steps: int = 30):
    """Values after each step of training with random gradients."""
    tx = optax.chain(optax.sgd(1.0), oc.project(constraint))

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    # From NumPy: JAX's generator would be compiled into each program.
    grads = 0.3 * np.random.default_rng(0).normal(size=(steps, *params.shape))
    grads = grads.astype(np.float32).astype(params.dtype)
    run = jax.jit(lambda params, grads: jax.lax.scan(step, (params, tx.init(params)), grads)[1])
    return run(params, grads)


# Box.


def test_bounds_may_be_arrays_that_broadcast():
    w = 3 * jax.random.normal(jax.random.key(0), (4, 3))
    for lower, upper in (
        ([-1.0, 0.0, 1.0], [0.0, 0.5, 2.0]),
        (np.zeros((4, 1)), None),
        (None, jnp.ones((4, 3))),
    ):
        want = np.clip(np.asarray(w), lower, upper)
        np.testing.assert_array_equal(oc.box(lower, upper)(w), want.astype(w.dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_a_pattern_of_signs_is_never_broken(dtype):
    signs = np.where(np.random.default_rng(0).random((20, 30)) < 0.5, -1.0, 1.0)
    constraint = oc.box(np.where(signs > 0, 0, -np.inf), np.where(signs > 0, np.inf, 0))
    values = float64(sweep(constraint, jnp.zeros((20, 30), dtype)))
    assert np.all(values * signs >= 0)
    assert np.any(values != 0)


def test_a_bound_may_be_a_schedule_or_traced():
    tx = oc.project(oc.box(upper=lambda step: 1.0 / (1 + step)))
    params, state = jnp.array([5.0]), tx.init(jnp.array([5.0]))
    for want in (1.0, 0.5, 1 / 3):
        updates, state = tx.update(jnp.array([9.0]), state, params)
        np.testing.assert_allclose(optax.apply_updates(params, updates), want, rtol=1e-6)
    clip = jax.jit(lambda w, bound: oc.box(-bound, bound)(w))
    np.testing.assert_array_equal(clip(jnp.array([3.0, -3.0]), 2.0), [2.0, -2.0])


def test_box_at_its_bounds():
    on = oc.box(-1.0, [1.0, 2.0]).on_bound(jnp.array([[-1.0, 1.5], [1.0, 2.0]]))
    np.testing.assert_array_equal(on, [[True, False], [True, True]])


def test_a_box_may_be_a_point():
    np.testing.assert_array_equal(oc.box(1.0, 1.0)(jnp.array([0.0, 2.0])), [1, 1])


def test_entries_that_are_held_at_zero_are_at_their_bound():
    w = jnp.array([[1.0, 0.0], [2.0, 3.0]])
    np.testing.assert_array_equal(oc.non_neg().on_bound(w), [[False, True], [False, False]])
    np.testing.assert_array_equal(oc.mask([1, 0]).on_bound(w), [[False, True], [False, True]])
    np.testing.assert_array_equal(
        oc.zero_diagonal().on_bound(w[None, None]), [[[[True, False], [False, True]]]]
    )


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, None), ValueError, "with neither lower nor upper it allows everything"),
        ((2, 1), ValueError, "lower=2 is above upper=1; swap them or widen the interval"),
        (([0, 3], 1.0), ValueError, "is above upper=1.0; swap them"),
        (([1, 2], [3, 4, 5]), ValueError, "lower has shape (2,) and upper (3,), which do not"),
        (([0, np.nan], None), ValueError, "lower=[0, nan] has a NaN"),
        ((float("nan"), None), ValueError, "lower=nan is not allowed"),
        (("zero", None), ValueError, "lower='zero' is not a number"),
        ((["a"], None), TypeError, "lower=['a'] is not an array of real numbers"),
        (([[0], [0, 1]], None), TypeError, "is not an array of real numbers"),
    ],
)
def test_bad_boxes(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        oc.box(*arguments)


def test_a_bound_that_does_not_broadcast_names_the_path():
    message = (
        "Box on 'a/kernel' of shape (4, 3): lower has shape (4,), which does not broadcast to the "
        "weights; write a number, or an array of shape (4, 3)."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        oc.project({"kernel": oc.box(lower=np.zeros(4))}).init({"a": {"kernel": jnp.ones((4, 3))}})
    # Nor may the weights be broadcast to the bound.
    with pytest.raises(ValueError, match="does not broadcast"):
        oc.box(lower=np.zeros((4, 3)))(jnp.ones(3))


def test_boxes_have_a_json_form():
    for constraint in (oc.box(-1.0, 2.0), oc.box(upper=[1.0, 2.0]), oc.box(lower=0)):
        config = json.loads(json.dumps(oc.serialize(constraint)))
        w = jnp.array([[-5.0, 5.0]])
        assert bits(oc.deserialize(config)(w)) == bits(constraint(w))


# Mask and ZeroDiagonal.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_masked_weights_are_zero_after_every_step(dtype):
    start = jax.random.normal(jax.random.key(1), (3, 8, 8)).astype(dtype)
    for constraint, zero in (
        (oc.mask(lambda shape: np.tri(*shape[-2:])), np.tri(8) == 0),
        (oc.zero_diagonal(), np.eye(8) == 1),
    ):
        values = float64(sweep(constraint, start))
        assert np.all(values[..., zero] == 0)
        assert np.mean(values[..., ~zero] != 0) > 0.9


def test_a_mask_of_numbers_keeps_what_is_not_zero():
    np.testing.assert_array_equal(oc.mask([2.0, 0.0, -1])(jnp.full(3, 5.0)), [5.0, 0.0, 5.0])


def test_infinities_are_masked_and_nans_stay():
    w = jnp.array([jnp.inf, jnp.nan, -jnp.inf])
    np.testing.assert_array_equal(oc.mask([0, 0, 1])(w), [0, np.nan, -np.inf])


def test_the_gradient_through_a_mask_is_masked():
    grad = jax.grad(lambda w: jnp.sum(oc.mask([1, 0])(w)))(jnp.ones(2))
    np.testing.assert_array_equal(grad, [1.0, 0.0])


def test_stacked_masks_see_one_slice():
    stacked = oc.Stacked(oc.mask(lambda shape: np.tri(*shape)))
    np.testing.assert_array_equal(stacked(jnp.ones((2, 3, 3))), np.stack([np.tri(3)] * 2))


def test_masks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"Mask on 'w' of shape \(3,\): mask has shape \(2,\)"):
        oc.project({"w": oc.mask([1, 0])}).init({"w": jnp.ones(3)})
    with pytest.raises(TypeError, match="mask='tri' is not an array of real numbers"):
        oc.mask("tri")
    with pytest.raises(TypeError, match="is a function, which has no JSON form; write the array"):
        oc.serialize(oc.mask(np.ones))
    config = json.loads(json.dumps(oc.serialize(oc.mask(np.eye(2, dtype=bool)))))
    np.testing.assert_array_equal(oc.deserialize(config)(jnp.ones((2, 2))), np.eye(2))


def test_masks_show_their_shape():
    table = str(oc.report(jnp.ones((2, 2)), oc.mask(np.eye(2))))
    assert "Mask(2x2)" in table
    assert str(oc.mask(np.tri)) == "Mask(tri)"


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 3, 2), (2, 2, 3)], ids=str)
def test_zero_diagonal_needs_squares(shape):
    message = f"ZeroDiagonal on 'w' of shape {shape}: the last two axes are not a square matrix"
    with pytest.raises(ValueError, match=re.escape(message)):
        oc.constrain({"w": jnp.ones(shape)}, {"w": oc.zero_diagonal()})


def test_zero_diagonal_of_one_matrix_and_of_several():
    for shape in ((2, 2), (3, 2, 2), (3, 1, 2, 2)):
        out = oc.constrain({"w": jnp.ones(shape)}, {"w": oc.zero_diagonal()})["w"]
        np.testing.assert_array_equal(out, np.broadcast_to([[0, 1], [1, 0]], shape))


# Grid.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    "values", [[-1, 1], [-0.7, 0.0, 0.3, 1.0], list(np.arange(-128, 128) / 64)]
)
def test_weights_are_on_the_grid_after_every_step(dtype, values):
    constraint = oc.grid(values)
    start = constraint(jax.random.normal(jax.random.key(1), (20, 30)).astype(dtype))
    after = float64(sweep(constraint, start))
    seen = np.unique(after)
    assert set(seen) <= set(np.unique(float64(constraint(jnp.asarray(values, dtype)))))
    # In the dtype each value is what was asked for, up to rounding at the largest.
    error = np.min(np.abs(seen[:, None] - np.asarray(values, np.float64)), axis=1)
    assert np.max(error) <= 2 * float(jnp.finfo(dtype).eps) * np.max(np.abs(values))
    assert len(seen) > len(values) / 2


def test_ties_go_to_the_smaller_magnitude():
    out = oc.grid([-1, 0, 1])(jnp.array([-0.5, 0.5, -1.5, 1.5]))
    np.testing.assert_array_equal(out, [0, 0, -1, 1])
    many = oc.grid(np.arange(-40, 41))
    np.testing.assert_array_equal(many(jnp.array([-2.5, 2.5, -0.5, 7.5])), [-2, 2, 0, 7])
    np.testing.assert_array_equal(oc.grid([-1, 1])(jnp.zeros(1)), [1])


def test_the_derivative_of_a_grid_is_zero():
    grad = jax.grad(lambda w: jnp.sum(oc.grid([-1, 1])(w) * w))(jnp.array([0.3, -2.0]))
    np.testing.assert_array_equal(grad, [1.0, -1.0])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([], ValueError, "values=[] is not allowed; write a list of finite numbers"),
        ([[1, 2]], ValueError, "is not allowed; write a list"),
        (3.0, ValueError, "is not allowed; write a list"),
        ([1, np.inf], ValueError, "is not allowed; write a list of finite numbers"),
        ("abc", TypeError, "is not an array of real numbers"),
        ([1j], TypeError, "is not an array of real numbers"),
    ],
)
def test_bad_grids(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        oc.grid(values)


def test_grids_take_no_integers_and_have_a_json_form():
    with pytest.raises(TypeError, match="Grid takes floating-point weights, and these are int32"):
        oc.grid([0, 1])(jnp.arange(3, dtype=jnp.int32))
    config = json.loads(json.dumps(oc.serialize(oc.grid([1, 0]))))
    assert oc.deserialize(config) == oc.grid([0, 1])


@pytest.mark.parametrize("values", [[0.0], [1e30, -1e30], [1e-30, 2e-30]])
def test_grids_of_one_value_and_of_extreme_ones(values):
    out = float64(oc.grid(values)(jnp.array([-3e38, -1.0, 0.0, 1.0, 3e38], jnp.float32)))
    want = np.sort(values)
    assert np.all(np.isfinite(out))
    np.testing.assert_allclose(out[[0, -1]], want[[0, -1]], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_grids_at_the_ends_of_the_range_of_a_dtype(dtype):
    most, tiny = float(jnp.finfo(dtype).max), float(jnp.finfo(dtype).tiny)
    w = jnp.array([most, 1.0, 0.0, -most], dtype)
    near = oc.grid([most, most * 0.9, 0])(w)
    np.testing.assert_allclose(float64(near), [most, 0, 0, 0], rtol=2 * float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(float64(oc.grid([2 * tiny, 0])(w)), [2 * tiny, 2 * tiny, 0, 0])
    np.testing.assert_array_equal(float64(oc.grid([tiny / 4])(w)), 0)
    if dtype != jnp.float64:
        message = f"Grid: {3 * most:g} is beyond the range of {jnp.dtype(dtype)}, which ends at"
        with pytest.raises(ValueError, match=re.escape(message)):
            oc.grid([-3 * most, 1])(w)


def test_a_grid_of_many_values_is_searched():
    def size(n):
        return len(jax.make_jaxpr(oc.grid(np.arange(n)))(jnp.ones(3)).eqns)

    assert size(20) > size(10)
    assert size(1000) == size(100) < size(33)


# Bit for bit, and the one convention for derivatives.


ZEROS = [
    oc.non_neg(),
    oc.box(-1.0, 1.0),
    oc.box(0.0, 1.0),
    oc.box(upper=np.zeros(2)),
    oc.soft(oc.non_neg(), 0.5),
    oc.soft(oc.box(-1.0, 1.0), 0.25),
    oc.compose(oc.non_neg(), oc.box(0.0, 1.0)),
    oc.stacked(oc.non_neg()),
    oc.sign([-1, 1]),
    oc.sign([1, -1]),
    oc.tied([0, 0]),
    oc.around(oc.box(-1.0, 1.0), [0.5, 0.5]),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize("constraint", ZEROS, ids=str)
def test_zeros_keep_their_sign(constraint, dtype):
    w = jnp.array([-0.0, 0.0], dtype)
    assert bits(constraint(w)) == bits(w)
    assert bits(jax.jit(constraint)(w)) == bits(w)


def test_at_a_bound_the_derivative_is_that_of_the_inside():
    w = jnp.array([-1.0, 0.0, 0.5, 1.0, 2.0])
    for constraint, want in (
        (oc.box(0.0, 1.0), [0, 1, 1, 1, 0]),
        (oc.box(upper=1.0), [1, 1, 1, 1, 0]),
        (oc.non_neg(), [0, 1, 1, 1, 1]),
    ):
        np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(constraint(w)))(w), want)  # noqa: B023  # called here
    ball, l1 = oc.max_norm(1.0), oc.l1_ball(1.0)
    for constraint, edge in ((ball, jnp.array([0.6, 0.8])), (l1, jnp.array([0.25, 0.75]))):
        np.testing.assert_array_equal(jax.jacfwd(constraint)(edge), np.eye(2))


def test_an_infinity_is_a_number_beyond_the_bound():
    w = jnp.array([-jnp.inf, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(oc.box(-1.0, 2.0)(w), [-1, 2, np.nan])
    np.testing.assert_array_equal(oc.non_neg()(w), [0, np.inf, np.nan])
    tx = oc.project(oc.box(-1.0, 2.0))
    zeros = jnp.zeros(3)
    np.testing.assert_array_equal(tx.update(w, tx.init(zeros), zeros)[0], [-1, 2, np.nan])
