"""`project(rules, keep_params=True)`: loops that call `tx.update(grads, state)`."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits

import optax_constraints as oc

PARAMS = {
    "dense": {"kernel": jax.random.normal(jax.random.key(0), (7, 5)), "bias": jnp.ones(5) / 5},
    "scale": jnp.ones(3),
}
RULES = {"kernel": oc.max_norm(1.0), "bias": oc.simplex()}


def same(a, b) -> bool:
    return jax.tree.map(bits, a) == jax.tree.map(bits, b)


def gradients(step: int):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS)


def run(tx, steps: int, passed: bool, together: bool = False):
    """Parameters after steps whose updates are applied in the same program or in another."""
    params = oc.constrain(PARAMS, RULES)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params if passed else None)
        return optax.apply_updates(params, updates) if together else updates, state

    for t in range(steps):
        new, state = step(params, state, gradients(t))
        params = new if together else optax.apply_updates(params, new)
    return params, state


def last(**options):
    return optax.chain(optax.adam(0.05), oc.project(RULES, **options))


def whole(**options):
    return oc.projected(optax.adamw(0.05, weight_decay=0.1), RULES, **options)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("make", [last, whole])
def test_the_parameters_are_followed_to_the_bit(make, together):
    tx = make(keep_params=True)
    params, state = run(tx, 60, passed=False, together=together)
    if make is whole:
        assert same(state.params, params)
    else:
        assert same(state[1].params["dense"], params["dense"])
    oc.assert_feasible(params, RULES)
    # Another program, which may round otherwise.
    want, _ = run(make(), 60, passed=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, want)


def test_other_options_go_along():
    tx, plain = (last(every=3, stats=True, keep_params=kept) for kept in (True, False))
    params, state = run(tx, 7, passed=False)
    want, known = run(plain, 7, passed=True)
    for own, other in ((params, want), (oc.stats(state), oc.stats(known))):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), own, other
        )
    assert oc.stats(state)["dense/kernel"].update > 0


def test_only_constrained_leaves_are_kept():
    state = oc.project(RULES, keep_params=True).init(PARAMS)
    assert isinstance(state.params["scale"], optax.MaskedNode)
    assert same(state.params["dense"], PARAMS["dense"])
    assert state.params["dense"]["kernel"] is not PARAMS["dense"]["kernel"]


def test_parameters_that_are_passed_count():
    tx = oc.project(oc.non_neg(), keep_params=True)
    state = tx.init(jnp.array([5.0, 5.0]))
    moved = jnp.array([1.0, 2.0])  # by something else
    updates, state = tx.update(jnp.array([-3.0, 1.0]), state, moved)
    np.testing.assert_array_equal(updates, [-1, 1])
    np.testing.assert_array_equal(state.params, [0, 3])
    updates, _ = tx.update(jnp.array([-3.0, -4.0]), state)
    np.testing.assert_array_equal(updates, [0, -3])


def test_leaves_without_updates():
    tx = oc.project({"kernel": oc.max_norm(1.0)}, keep_params=True)
    params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((4, 2))}}
    state = tx.init(params)
    updates = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": None}}
    new, state = tx.update(updates, state)
    np.testing.assert_allclose(new["a"]["kernel"], -0.5)
    assert new["b"]["kernel"] is None
    assert same(state.params["b"], params["b"])


def test_derivatives_go_through_the_update():
    tx, w = oc.project(oc.non_neg(), keep_params=True), jnp.array([1.0, 2.0])
    state = tx.init(w)
    gradient = jax.grad(lambda u: jnp.sum(tx.update(u, state)[0]))(jnp.array([-3.0, 1.0]))
    np.testing.assert_array_equal(gradient, [0, 1])


def test_accumulated_and_restored():
    tx = optax.MultiSteps(last(keep_params=True), 2)
    plain = optax.MultiSteps(last(), 2)
    params = want = oc.constrain(PARAMS, RULES)
    state, known = tx.init(params), plain.init(params)
    for t in range(4):
        if t == 2:
            as_saved = flax.serialization.to_bytes(state)
            state = flax.serialization.from_bytes(tx.init(params), as_saved)
        updates, state = tx.update(gradients(t), state)
        params = optax.apply_updates(params, updates)
        updates, known = plain.update(gradients(t), known, want)
        want = optax.apply_updates(want, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, want)
    assert not np.array_equal(params["dense"]["bias"], PARAMS["dense"]["bias"])


def test_a_state_that_was_restored_without_its_type():
    tx = oc.project(oc.non_neg(), keep_params=True)
    state = tx.init(jnp.array([1.0, 2.0]))
    back = {"params": np.asarray(state.params), "inner": state.inner._asdict()}
    updates, after = tx.update(jnp.array([-3.0, 1.0]), back)
    np.testing.assert_array_equal(updates, [-1, 1])
    np.testing.assert_array_equal(after.params, [0, 3])


def test_without_it_the_error_names_it():
    tx = oc.project(RULES)
    with pytest.raises(ValueError, match=r"needs the parameters; .*project\(rules, keep_params=T"):
        tx.update(gradients(0), tx.init(PARAMS))
