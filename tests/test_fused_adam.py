"""`fused_adam`: its kernel in Pallas' interpreter, and what takes other ways.

On a mesh: see distributed_worker.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_constraints as oc
from optax_constraints import recipes

STEPS = 20
# Rows shorter and longer than a block, several axes, sizes that are no powers of two.
SHAPES = {
    "max": (37, 100),
    "between": (3, 4100),
    "unit": (3, 5, 2, 7),
    "fixed": (6, 33),
    "vector": (5,),
    "columns": (6, 5),
    "free": (4, 4),
}
RULES = {
    "max": oc.max_norm(optax.linear_schedule(9.0, 7.0, STEPS), axis=-1),
    "between": oc.min_max_norm(70.0, oc.arg("most"), rate=0.5, axis=1),
    "unit": oc.unit_norm(axis=(-2, -1)),
    "fixed": oc.fixed_norm("init", axis=1),
    "vector": oc.max_norm(1.0),
    "columns": oc.max_norm("0.9x init"),
    "free": None,
}
IN_ROWS = len(SHAPES) - 2
MOST = {"most": jnp.float32(80.0)}


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.normal(size=shape), dtype) for k, shape in SHAPES.items()}


def by_chain(learning_rate, rules, weight_decay=0.0, **extra):
    adam = optax.adamw(learning_rate, weight_decay=weight_decay) if weight_decay else None
    tx = optax.chain(adam or optax.adam(learning_rate), oc.project(rules))

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return tx, step


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_takes_the_steps_of_the_chain(dtype):
    rate = optax.linear_schedule(0.1, 0.01, STEPS)
    fused = recipes.fused_adam(rate, RULES, weight_decay=0.01, interpret=True)
    tx, chain = by_chain(rate, RULES, 0.01, **MOST)
    step = jax.jit(functools.partial(fused.step, **MOST))
    params = tree(0, dtype)
    state = start = fused.init(params)
    assert jax.tree.structure(start) == jax.tree.structure(tx.init(params))
    want = params, state
    eps = float(jnp.finfo(dtype).eps)
    for i in range(STEPS):
        grads = tree(i + 1, dtype)
        # A step of the chain in bfloat16 rounds several times: it starts from the same weights.
        want = chain(*(want if dtype == jnp.float32 else (params, state)), grads)
        params, state = got = step(params, state, grads)
        steps = i + 1 if dtype == jnp.float32 else 1
        for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert new.dtype == old.dtype
            new, old = np.float64(new), np.float64(old)
            np.testing.assert_allclose(new, old, atol=4 * steps * eps * np.max(np.abs(old)))
    assert jax.tree.structure(state) == jax.tree.structure(start)
    assert state[0][0].count == state[1].updates_seen == STEPS
    rows = np.linalg.norm(np.float64(params["fixed"]), axis=1)
    np.testing.assert_allclose(rows, np.ravel(start[1].memory["fixed"]), rtol=4 * eps)


SETS = {
    "max": oc.max_norm(2.0, axis=1),
    "max rms": oc.max_rms(0.2, axis=1),
    "between": oc.min_max_norm(2.0, 4.0, axis=1),
    "unit": oc.unit_norm(axis=1),
    "zero": oc.fixed_norm(0.0, axis=1),
}


def test_the_kernel_keeps_the_promises_of_the_sets():
    rng = np.random.default_rng(0)
    w = rng.normal(size=(12, 50)).astype(np.float32)
    w /= np.linalg.norm(w, axis=1, keepdims=True)
    # Inside, at a bound, outside, and what leaves the range of squares.
    sizes = [1, 1.5, 2, 3, 4, 5, 1e-30, 1e30, 3e38, 0, 1, 1]
    w *= np.float32(sizes)[:, None]
    w[-2, 7], w[-1, 7] = np.nan, np.inf
    params = dict.fromkeys(SETS, jnp.asarray(w))
    fused = recipes.fused_adam(0.1, SETS, interpret=True)
    step = jax.jit(fused.step)
    zeros = jax.tree.map(jnp.zeros_like, params)
    # Without a gradient, a step is the projection.
    got, _ = step(params, fused.init(params), zeros)
    for name, constraint in SETS.items():
        new, want = np.asarray(got[name]), np.asarray(constraint(w))
        np.testing.assert_allclose(new, want, rtol=4 * np.finfo(np.float32).eps, err_msg=name)
        assert np.isnan(new).any(axis=1).tolist() == [False] * 10 + [True] * 2
        same = np.all(want == w, axis=1)
        np.testing.assert_array_equal(new[same], w[same], err_msg=name)
    again, _ = step(got, fused.init(got), zeros)
    jax.tree.map(np.testing.assert_array_equal, again, got)


def test_elsewhere_it_is_adam_and_constrain_to_the_bit():
    fused, adam = recipes.fused_adam(0.1, RULES), optax.adam(0.1)

    @jax.jit
    def by_hand(params, state, grads):
        (own, last), seen = state, state[1].updates_seen
        updates, own = adam.update(grads, own, params)
        params = optax.apply_updates(params, updates)
        params = oc.constrain(params, RULES, state=state, step=seen, extra=MOST)
        return params, (own, last._replace(updates_seen=seen + 1))

    step = jax.jit(functools.partial(fused.step, **MOST))
    got = want = tree(0), fused.init(tree(0))
    for seed in (1, 2):
        got, want = step(*got, tree(seed)), by_hand(*want, tree(seed))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def kernels(fused, params, grads=None, **extra):
    """How many there are in programs for a GPU and for a CPU, of which none is compiled."""
    grads = params if grads is None else grads
    traced = jax.jit(functools.partial(fused.step, **extra)).trace(
        params, fused.init(params), grads
    )
    try:
        texts = [traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "cpu")]
    except RuntimeError as error:
        if "No supported GPU devices found" in str(error):
            pytest.skip("since JAX 0.12 kernels are lowered for GPUs only where there is one")
        raise
    return tuple(text.count("@__gpu$xla.gpu.triton(") for text in texts)


def test_which_leaves_the_kernel_takes():
    fused = recipes.fused_adam(0.1, RULES)
    assert kernels(fused, tree(0), **MOST) == (IN_ROWS, 0)
    for taken, shape, dtype, axis in (
        (1, (2, 16384), jnp.float32, 1),
        (1, (2, 3, 4), jnp.bfloat16, (1, 2)),
        (0, (2, 16385), jnp.float32, 1),
        (0, (2, 3, 4), jnp.float32, (0, 2)),
        (0, (2, 3), jnp.float32, ()),
        (0, (2, 1), jnp.float32, 1),
        (0, (2, 3), jnp.float16, 1),
        (0, (0, 3), jnp.float32, 1),
        (0, (2, 0), jnp.float32, 1),
    ):
        fused = recipes.fused_adam(0.1, oc.max_norm(1.0, axis=axis))
        assert kernels(fused, jnp.ones(shape, dtype)) == (taken, 0), (shape, dtype, axis)
    # Gradients wider than the weights would change the dtype of the moments; narrower ones do not.
    fused, w = recipes.fused_adam(0.1, oc.unit_norm(axis=1)), jnp.ones((2, 3), jnp.float32)
    assert kernels(fused, w, w.astype(jnp.bfloat16)) == (1, 0)
    assert kernels(fused, w.astype(jnp.bfloat16), w) == (0, 0)
    groups = {oc.across("w"): oc.max_norm(1.0, axis=-1)}
    assert kernels(recipes.fused_adam(0.1, groups), {"w": w[0]}) == (0, 0)


def test_errors():
    with pytest.raises(TypeError, match=r"fused_adam: mesh=8 is no jax\.sharding\.Mesh"):
        recipes.fused_adam(0.1, oc.unit_norm(axis=1), mesh=8)
    fused = recipes.fused_adam(0.1, {"bias": oc.unit_norm(axis=1)})
    with pytest.raises(ValueError, match=r"UnitNorm on 'bias' of shape \(3,\): axis 1 is out of"):
        fused.init({"bias": jnp.ones(3)})
