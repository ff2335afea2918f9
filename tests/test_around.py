"""Sets around other weights: where rounding goes, what is remembered, and what is inside."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import DTYPES, bits, float64, norms

import optax_constraints as oc

WIDEST = DTYPES[0]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)


def normal(seed: int, dtype=WIDEST, shape=(20, 10), scale: float = 0.3) -> jax.Array:
    w = np.random.default_rng(seed).normal(size=shape) * scale
    return jnp.asarray(w.astype(WIDEST).astype(dtype))


def trained(tx, params, steps: int = 20, grads=None):
    """The weights after each step, and the last state."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    # From NumPy: JAX's generator would be compiled into each program.
    gradients = 0.1 * np.random.default_rng(0).normal(size=(steps, *params.shape))
    gradients = gradients.astype(np.float32).astype(grads or params.dtype)
    (_, state), after = jax.jit(lambda *carry: jax.lax.scan(step, *carry))(
        (params, tx.init(params)), gradients
    )
    return after, state


# Entry by entry: never outside.


@each_dtype
@pytest.mark.parametrize("bound", [1e-4, 0.01, 0.3])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_elementwise_set_is_never_left(dtype, bound, wrapped):
    start, constraint = normal(0, dtype), oc.around(oc.box(-bound, 0.5 * bound))
    tx = optax.chain(optax.sgd(1.0), oc.project(constraint))
    if wrapped:  # which keeps updates in the dtype that they came in
        tx = optax.apply_if_finite(tx, 3)
    after, state = trained(tx, start, grads=jnp.bfloat16 if wrapped else None)
    away = float64(after) - float64(start)
    low, high = (float(jnp.asarray(b, WIDEST)) for b in (-bound, 0.5 * bound))
    assert low <= np.min(away)
    assert np.max(away) <= high
    assert np.mean(away != 0) > 0.02  # 1e-4 is little in bfloat16
    # Allowed weights come back bit for bit.
    own = state.inner_state if wrapped else state
    assert bits(oc.constrain(after[-1], constraint, state=own)) == bits(after[-1])
    assert oc.violations(after[-1], constraint, state=own)[""] == 0


@each_dtype
def test_what_no_number_reaches_stays_at_the_nearest(dtype):
    center = normal(1, dtype)
    little = 1e-18 if dtype == jnp.float64 else 1e-9
    constraint = oc.around(oc.box(little, 2 * little), center)
    once = constraint(normal(2, dtype))
    assert bits(constraint(once)) == bits(once)
    assert np.max(np.abs(float64(once) - float64(center))) <= float(jnp.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=lambda d: jnp.dtype(d).name)
def test_the_tangent_part_of_an_entry_at_its_bound(dtype):
    center = normal(0, dtype)
    constraint = oc.around(oc.box(-0.01, 0.01), center)
    v = jnp.ones((20, 10), dtype)
    at = constraint(center + 1)
    assert np.all(float64(constraint.tangent(at, v)) == 0)
    assert np.all(float64(constraint.tangent(at, -v)) == -1)
    assert np.all(float64(constraint.tangent(center, v)) == 1)
    assert np.all(constraint.on_bound(at))
    assert not np.any(constraint.on_bound(center))


# Others.


@each_dtype
def test_units_stay_near_what_they_were(dtype):
    start = normal(0, dtype)
    constraint = oc.around(oc.max_norm("0.1x init"))
    after, _ = trained(optax.chain(optax.sgd(1.0), oc.project(constraint)), start)
    bound = 0.1 * norms(float64(start), 0)
    size = norms(float64(after) - float64(start), 1)
    rounding = float(jnp.finfo(dtype).eps) * norms(float64(after), 1)
    assert np.all(size <= bound + rounding)
    assert np.mean(size > 0.9 * bound) > 0.9


def test_against_numpy_whatever_the_set():
    start, w = normal(0), normal(1)
    for inside in (
        oc.max_norm(0.5),
        oc.l1_ball(0.5),
        oc.top_k(3, axis=0),
        oc.max_spectral_norm(0.3),
        oc.low_rank(2),
        oc.monotone(),
        oc.grid([-0.125, 0, 0.125]),
        oc.mask(np.tri(20, 10)),
        oc.stacked(oc.box(-0.1, 0.1)),
        oc.part(oc.simplex(0.1), ":, :3"),
    ):
        want = start + inside(w - start)
        for got in (
            oc.around(inside, start)(w),
            oc.around(inside, np.asarray(start))(w),
            oc.around(inside).advance(w, (start, ()))[0],
            oc.constrain(w, oc.around(inside, oc.arg("c")), extra={"c": start}),
        ):
            np.testing.assert_allclose(got, want, atol=2e-7, err_msg=str(inside))
        same = oc.around(inside)
        assert [getattr(same, name) for name in ("convex", "smooth", "elementwise")] == [
            getattr(inside, name) for name in ("convex", "smooth", "elementwise")
        ]
        assert same.has_tangent == inside.has_tangent


def test_what_is_inside_remembers_the_weights_and_not_the_difference():
    start = jnp.array([0.0, 3.0, 4.0])
    for inside, memory, want in (
        (oc.max_norm("0.2x init"), 5.0, [0, 3, 5]),
        (oc.mask("init"), [False, True, True], [0, 3, 9]),
        (oc.stacked(oc.mask("init")), [False, True, True], [0, 3, 9]),
    ):
        constraint = oc.around(inside)
        known = constraint.remember(start)
        assert bits(known[0]) == bits(start)
        np.testing.assert_allclose(jnp.ravel(known[1]), np.ravel(memory))
        got, again = constraint.advance(start + jnp.array([0, 0, 5.0]), known)
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert jax.tree.structure(again) == jax.tree.structure(known)
    # With an array for the center, too.
    fixed = oc.around(oc.max_norm("0.2x init"), jnp.ones(3))
    assert fixed.remembers
    got = fixed.advance(jnp.array([1.0, 1.0, 9.0]), fixed.remember(start))[0]
    np.testing.assert_allclose(got, [1, 1, 2], rtol=1e-6)


def test_derivatives_are_those_inside():
    w, center, dw = normal(0), normal(1), normal(2)
    for inside in (oc.max_norm(0.5), oc.unit_norm(), oc.box(-0.1, 0.1)):
        constraint = oc.around(inside, center)
        _, want = jax.jvp(inside, (w - center,), (dw,))
        np.testing.assert_allclose(jax.jvp(constraint, (w,), (dw,))[1], want, atol=1e-6)
        (back,) = jax.vjp(constraint, w)[1](dw)
        np.testing.assert_allclose(
            jnp.vdot(back, w), jnp.vdot(dw, jax.jvp(constraint, (w,), (w,))[1]), rtol=1e-4
        )
    # At a point of the set the value is that point, and the derivative is none the less.
    at = oc.around(oc.unit_norm(), center)(w)
    radial = jax.jvp(oc.around(oc.unit_norm(), center), (at,), (at - center,))[1]
    np.testing.assert_allclose(radial, 0, atol=1e-6)
    # Of the center: all of it moves along.
    ball = jax.grad(lambda c: jnp.sum(oc.around(oc.max_norm(1e3), c)(w)))(center)
    np.testing.assert_allclose(ball, 0, atol=1e-6)


def test_a_center_of_more_precision_than_the_weights():
    center = jnp.full((4,), 1.001, jnp.float32)
    got = oc.around(oc.box(-0.01, 0.01), center)(jnp.full((4,), 3.0, jnp.bfloat16))
    assert got.dtype == jnp.bfloat16
    assert np.all(float64(got) == 1.0078125)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oc.around(None), ValueError, "Around: constraint=None constrains nothing"),
        (lambda: oc.around("non_neg", "first"), TypeError, "center='first' is not an array of"),
        (lambda: oc.around("non_neg", None), TypeError, "center=None is not an array of real"),
        (lambda: oc.around("non_neg", [1, np.inf]), ValueError, "is not finite; write finite"),
        (lambda: oc.around("non_neg")(jnp.arange(3)), TypeError, "Around takes floating-point"),
        (
            lambda: oc.around("non_neg", oc.arg("c"))(jnp.ones(3)),
            TypeError,
            "write constraint.read(extra, path)(w)",
        ),
        (
            lambda: oc.project({"w": oc.around("non_neg", [1, 2])}).init({"w": jnp.ones((2, 3))}),
            ValueError,
            "Around on 'w' of shape (2, 3): center has shape (2,), which does not broadcast",
        ),
    ],
)
def test_bad_centers(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_around_has_a_json_form():
    for constraint in (oc.around("max_norm"), oc.around(oc.box(-1, 1), [1.0, 2.0])):
        again = oc.deserialize(json.loads(json.dumps(oc.serialize(constraint))))
        assert again == constraint
    assert str(oc.around(oc.max_norm(1.0))) == "Around(MaxNorm(1), 'init')"


def test_schedules_and_axes_inside():
    params = {"dense": {"kernel": normal(0)}}
    rule = oc.around(oc.max_norm(optax.linear_schedule(0.0, 1.0, 10), axis="fan_in"))
    tx = oc.project({"kernel": rule})
    updates, _ = tx.update(params, tx.init(params), params)
    assert np.all(updates["dense"]["kernel"] == 0)
    state = tx.init(params)._replace(updates_seen=jnp.int32(5))
    updates, _ = tx.update({"dense": {"kernel": normal(3)}}, state, params)
    np.testing.assert_allclose(norms(float64(updates["dense"]["kernel"]), 0), 0.5, rtol=1e-5)


def test_an_epoch_of_units_that_moves_no_further_than_a_bound_over_the_whole_model():
    params = {"a": normal(0), "b": normal(1, shape=(7,))}
    tx = optax.chain(optax.sgd(1.0), oc.project({oc.across("*"): oc.around(oc.max_norm(0.5))}))
    updates, _ = tx.update(params, tx.init(params), params)
    moved = jnp.concatenate([updates["a"].ravel(), updates["b"]])
    np.testing.assert_allclose(jnp.linalg.norm(moved), 0.5, rtol=1e-5)
