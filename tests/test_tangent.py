"""`tangent`: gradients within smooth sets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case, bits, float64

import optax_constraints as oc

SMOOTH = [case for case in CASES if case.constraint.smooth]
WIDE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


def array(shape, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), WIDE)


@pytest.mark.parametrize("case", SMOOTH, ids=str)
def test_the_tangent_part_is_an_orthogonal_projection(case: Case):
    w = case.constraint(array(case.shape, 0))
    u, v = array(case.shape, 1), array(case.shape, 2) + w
    part = jax.jit(case.constraint.tangent)
    tu, tv = part(w, u), part(w, v)
    np.testing.assert_allclose(part(w, tv), tv, atol=1e-5)
    np.testing.assert_allclose(jnp.vdot(u, tv), jnp.vdot(tu, v), rtol=1e-4, atol=1e-4)
    # To first order, the set is its tangent space: the one part stays in it, and the other is
    # projected away.
    h = 1e-3
    along, across = w + h * tv, w + h * (v - tv)
    np.testing.assert_allclose(case.constraint(along), along, atol=50 * h**2)
    np.testing.assert_allclose(case.constraint(across), w, atol=50 * h**2)
    assert np.max(np.abs(tv)) > 0.02
    assert np.max(np.abs(v - tv)) > 0.02


def test_every_kind_of_smooth_set_is_among_them():
    kinds = {type(case.constraint).__name__ for case in SMOOTH}
    wanted = "UnitNorm FixedNorm Mask ZeroDiagonal Stacked Orthogonal LowRank Symmetric"
    wanted += " SkewSymmetric SumTo Hyperplane CenterAround Radial"
    assert kinds >= set(wanted.split())


def test_none_leaves_a_gradient_as_it_is():
    params = {"kernel": oc.unit_norm()(array((4, 3), 0)), "bias": jnp.ones(3)}
    grads = {"kernel": array((4, 3), 1), "bias": jnp.ones(3)}
    tx = oc.tangent({"bias": None, "*": oc.unit_norm()})
    updates, state = tx.update(grads, tx.init(params), params)
    assert bits(updates["bias"]) == bits(grads["bias"])
    radial = jnp.sum(jnp.asarray(updates["kernel"]) * params["kernel"], axis=0)
    np.testing.assert_allclose(radial, 0, atol=1e-6)
    assert state.updates_seen == 1


def test_a_set_of_ones_own():
    class Circle(oc.Constraint):
        """The circle of radius 2 around (1, 0), in each row."""

        smooth = True

        def __call__(self, w):
            away = jnp.asarray(w) - jnp.array([1.0, 0.0])
            return 2 * away / jnp.linalg.norm(away, axis=-1, keepdims=True) + jnp.array([1.0, 0.0])

    w = Circle()(array((5, 2), 0).astype(jnp.float32))
    tx = oc.tangent(Circle())
    updates, _ = tx.update(jnp.ones((5, 2)), tx.init(w), w)
    normal = (w - jnp.array([1.0, 0.0])) / 2
    want = 1 - normal * jnp.sum(normal, axis=-1, keepdims=True)
    np.testing.assert_allclose(updates, want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradients_keep_their_dtype(dtype):
    w = oc.unit_norm()(array((4, 3), 0)).astype(dtype)
    tx = oc.tangent(oc.unit_norm())
    updates, _ = tx.update(w, tx.init(w), w)
    assert updates.dtype == dtype
    np.testing.assert_allclose(float64(updates), 0, atol=4 * float(jnp.finfo(dtype).eps))


def test_a_schedule_is_that_of_the_last_projection():
    constraint = oc.fixed_norm(lambda step: 1.0 + step, axis=None)
    w = jnp.array([0.6, 0.8])
    tx = optax.chain(oc.tangent(constraint), optax.sgd(0.1), oc.project(constraint))
    state = tx.init(w)
    for norm in (1.0, 2.0, 3.0):
        updates, state = tx.update(jnp.array([0.8, -0.6]), state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(jnp.linalg.norm(jnp.asarray(w)), norm, rtol=1e-6)
    only = oc.tangent(constraint)
    part, _ = only.update(
        jnp.array([0.8, -0.6]), only.init(w)._replace(updates_seen=state[0].updates_seen), w
    )
    np.testing.assert_allclose(jnp.vdot(part, w), 0, atol=1e-6)


def test_without_params_it_says_so():
    tx = oc.tangent(oc.unit_norm())
    with pytest.raises(ValueError, match=r"tangent needs the parameters; write tx\.update"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def test_momentum_stays_tangent():
    # Without it, heavy-ball momentum collects what points out of the sphere.
    matrix = jnp.diag(jnp.array([5.0, 1.0, 0.5])) + 20 * jnp.eye(3)
    start = oc.unit_norm()(jnp.array([0.1, 1.0, 1.0]))

    def run(*front):
        tx = optax.chain(*front, optax.sgd(0.01, momentum=0.9), oc.project(oc.unit_norm()))

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(-2 * matrix @ w, state, w)
            return (optax.apply_updates(w, updates), state), None

        (w, _), _ = jax.lax.scan(step, (start, tx.init(start)), length=60)
        return abs(w[0])

    assert run(oc.tangent(oc.unit_norm())) > run()


def test_absent_leaves_pass():
    params = {"a": oc.unit_norm()(array((4, 3), 0)), "b": oc.unit_norm()(array((4, 3), 1))}
    tx = optax.masked(oc.tangent(oc.unit_norm()), {"a": True, "b": False})
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_allclose(updates["a"], 0, atol=1e-6)
    assert bits(updates["b"]) == bits(params["b"])


def test_a_rule_without_a_leaf_is_an_error():
    rules, params = {"w": oc.unit_norm(), "gamma": oc.unit_norm()}, {"w": jnp.ones((4, 2))}
    with pytest.raises(ValueError, match="The rule 'gamma' matches no leaf"):
        oc.tangent(rules).init(params)
    oc.tangent(rules, strict=False).init(params)
