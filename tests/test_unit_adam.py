"""`scale_by_unit_adam`: Adam with one second moment a unit."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_constraints as oc
from optax_constraints._axes import LeafLayout

WIDE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
RATE, B1, B2, EPS = 0.05, 0.9, 0.99, 1e-8
MATRIX = np.diag([1.0, -0.5, 0.3, 0.0, -1.2, 0.4]) + 0.2
SHIFT = np.random.default_rng(7).normal(size=6)


def array(*shape: int, seed: int = 0, dtype: Any = WIDE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def quadratic(matrix, shift):
    matrix, shift = jnp.asarray(matrix, WIDE), jnp.asarray(shift, WIDE)
    return lambda w: matrix @ w + shift


def train(tx, params, grad, steps: int) -> Any:
    """The parameters after each step."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps)[1])(params)


def unit_adam(**kwargs) -> optax.GradientTransformation:
    return optax.chain(
        oc.scale_by_unit_adam(B1, B2, EPS, **kwargs), optax.scale_by_learning_rate(RATE)
    )


def tangent(w, v):
    return v - w * (w @ v)


def test_riemannian_adam():
    start = float64(array(6))
    start /= np.linalg.norm(start)
    w, m, v, want = start, np.zeros(6), 0.0, []
    for t in range(1, 101):
        g = tangent(w, MATRIX @ w + SHIFT)
        m = B1 * m + (1 - B1) * g
        v = B2 * v + (1 - B2) * (g @ g)
        w = w - RATE * (m / (1 - B1**t)) / (np.sqrt(v / (1 - B2**t)) + EPS)
        w = w / np.linalg.norm(w)
        m = tangent(w, m)
        want.append(w)
    tx = oc.projected(unit_adam(axis=None), oc.unit_norm(axis=None))
    got = train(tx, jnp.asarray(start, WIDE), quadratic(MATRIX, SHIFT), 100)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_rotated_problem_takes_the_same_way_rotated():
    turn, _ = np.linalg.qr(float64(array(6, 6, seed=3)))
    start = float64(array(6))
    start /= np.linalg.norm(start)

    def difference(optimizer) -> float:
        tx = oc.projected(optimizer, oc.unit_norm(axis=None))
        way = train(tx, jnp.asarray(start, WIDE), quadratic(MATRIX, SHIFT), 40)
        problem = quadratic(turn @ MATRIX @ turn.T, turn @ SHIFT)
        other = train(tx, jnp.asarray(turn @ start, WIDE), problem, 40)
        return float(np.max(np.abs(float64(other) - float64(way) @ turn.T)))

    assert difference(unit_adam(axis=None)) < 1e-5
    assert difference(optax.adam(RATE, B1, B2, EPS)) > 0.05


def test_steps_of_units():
    tx = oc.scale_by_unit_adam(B1, B2)
    grads, state = array(3, 5, 4), None
    state = tx.init(grads)
    for scale in (1.0, -3.0, 0.5):
        updates, state = tx.update(scale * grads**2, state)
        u, mu = float64(updates), float64(state.mu)
        ratio = u / mu
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:1], ratio.shape), rtol=1e-5)
        assert np.all(ratio > 0)
        assert np.ptp(ratio[0]) > 1e-3
    assert state.nu.shape == (1, 5, 4)
    # The first step of a unit has length 1, whatever its gradient.
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(np.linalg.norm(updates, axis=0), 1, rtol=1e-5)


def test_with_entries_as_units_it_is_adam():
    ours, adam = oc.scale_by_unit_adam(B1, B2, 1e-3, axis=()), optax.scale_by_adam(B1, B2, 1e-3)
    w = array(4, 3)
    own, other = ours.init(w), adam.init(w)
    for seed in range(3):
        updates, own = ours.update(array(4, 3, seed=seed), own)
        want, other = adam.update(array(4, 3, seed=seed), other)
        np.testing.assert_allclose(updates, want, rtol=1e-6)
    assert own.count == optax.tree.get(own, "count") == 3
    np.testing.assert_allclose(own.nu, other.nu, rtol=1e-6)


@pytest.mark.parametrize(
    ("axis", "shape", "want"),
    [
        (0, (4, 3), (1, 3)),
        (-1, (4, 3), (4, 1)),
        ((0, 1), (4, 3, 2), (1, 1, 2)),
        ([0, -1], (4, 3, 2), (1, 3, 1)),
        (None, (4, 3), (1, 1)),
        ((), (4, 3), (4, 3)),
        (0, (3,), (1,)),
        (0, (), ()),
        ("fan_in", (), ()),
        (1, (3,), (1,)),
        ((0, 1, 2), (4, 3), (1, 1)),
        ((0, -1), (3,), (1,)),
        (-2, (3,), (1,)),
        ((), (), ()),
    ],
)
def test_axes(axis, shape, want):
    tx = oc.scale_by_unit_adam(axis=axis)
    params = {"leaf": array(*shape)}
    state = tx.init(params)
    assert state.nu["leaf"].shape == want
    updates, state = tx.update(params, state)
    assert state.nu["leaf"].shape == want
    assert updates["leaf"].shape == state.mu["leaf"].shape == shape
    expected = np.sum(float64(params["leaf"]) ** 2) * 1e-3
    np.testing.assert_allclose(np.sum(state.nu["leaf"]), expected, rtol=1e-4)
    abstract = tx.init({"leaf": jax.ShapeDtypeStruct(shape, WIDE)})
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, state)


def test_axes_from_names_and_layouts():
    params = {"conv": {"kernel": array(3, 3, 2, 4), "bias": array(4)}}
    nu = oc.scale_by_unit_adam(axis="fan_in").init(params).nu["conv"]
    assert (nu["kernel"].shape, nu["bias"].shape) == ((1, 1, 1, 4), (1,))
    layout = {"conv/kernel": LeafLayout("Conv", (3,)), "conv/bias": LeafLayout("Conv", (0,))}
    for tree in (params, {"params": params}):
        nu = oc.scale_by_unit_adam(axis="fan_in", layout=layout).init(tree).nu
        assert nu.get("params", nu)["conv"]["kernel"].shape == (3, 3, 2, 1)
    with pytest.warns(UserWarning, match=r"scale_by_unit_adam on 'a/kernel' .* axis=1 is not wh"):
        oc.scale_by_unit_adam(axis=1).init({"a": {"kernel": array(5, 7)}})


def test_errors():
    with pytest.raises(ValueError, match=r"scale_by_unit_adam on 'own' .* cannot be told") as error:
        oc.scale_by_unit_adam(axis="fan_in").init({"own": array(3, 2, 2)})
    assert any("optax.partition" in note for note in error.value.__notes__)
    with pytest.raises(ValueError, match=r"scale_by_unit_adam: axis=\(0, 0\) names an axis twice"):
        oc.scale_by_unit_adam(axis=(0, 0))
    with pytest.raises(ValueError, match=r"names an axis twice") as error:
        oc.scale_by_unit_adam(axis=(0, -3)).init({"own": array(3, 2, 2)})
    assert not hasattr(error.value, "__notes__")
    with pytest.raises(TypeError, match=r"scale_by_unit_adam: axis=0\.5 is not an axis"):
        oc.scale_by_unit_adam(axis=0.5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    # The squares leave the range of float16.
    g = jnp.full((64, 3), 2000.0, dtype)
    tx = oc.scale_by_unit_adam()
    updates, state = tx.update(g, tx.init(g))
    assert updates.dtype == state.mu.dtype == dtype
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(float64(updates), 1 / 8, rtol=1e-2)
    small = jnp.full((64, 3), 1e-4, dtype)
    updates, _ = tx.update(small, tx.init(small))
    np.testing.assert_allclose(float64(updates), 1 / 8, rtol=1e-2)


def test_moments_have_their_own_dtype():
    tx = oc.scale_by_unit_adam(mu_dtype=jnp.bfloat16)
    w = array(4, 3)
    updates, state = tx.update(w, tx.init(w))
    assert state.mu.dtype == jnp.bfloat16
    assert updates.dtype == w.dtype
    # The step is that of the moment before it is rounded.
    np.testing.assert_allclose(np.linalg.norm(updates, axis=0), 1, rtol=2e-5)
    # Gradients wider than the weights change no dtype of the state, as a scan needs it.
    tx = oc.scale_by_unit_adam()
    narrow = tx.init(w.astype(jnp.bfloat16))
    _, state = tx.update(w, narrow)
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, narrow)


def test_absent_leaves_keep_their_moments():
    params = {"a": array(4, 3), "b": array(4, 3, seed=1)}
    tx = oc.scale_by_unit_adam()
    _, state = tx.update(params, tx.init(params))
    for absent in (None, optax.MaskedNode()):
        updates, new = tx.update({"a": params["a"], "b": absent}, state)
        assert updates["b"] is absent
        assert bits(new.mu["b"]) == bits(state.mu["b"])
        assert bits(new.nu["b"]) == bits(state.nu["b"])
        assert bits(new.nu["a"]) != bits(state.nu["a"])
    masked = optax.masked(tx, {"a": True, "b": False})
    updates, _ = masked.update(params, masked.init(params))
    assert bits(updates["b"]) == bits(params["b"])
    np.testing.assert_allclose(np.linalg.norm(updates["a"], axis=0), 1, rtol=1e-5)


def test_zero_gradients_and_complex_ones():
    tx = oc.scale_by_unit_adam()
    updates, _ = tx.update(jnp.zeros((4, 3)), tx.init(jnp.zeros((4, 3))))
    np.testing.assert_array_equal(updates, 0)
    g = jnp.array([[3.0 + 4.0j], [0.0 + 12.0j]])
    updates, state = tx.update(g, tx.init(g))
    assert not jnp.iscomplexobj(state.nu)
    np.testing.assert_allclose(updates, g / 13, rtol=1e-5)


def test_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(array(4, 3), NamedSharding(mesh, PartitionSpec(None, "x")))
    tx = oc.scale_by_unit_adam()
    start = tx.init(w)
    updates, state = jax.jit(tx.update)(w, start)
    np.testing.assert_allclose(np.linalg.norm(updates, axis=0), 1, rtol=1e-5)
    want: Any = jax.typeof(w).sharding
    for own in (updates, start.nu, state.nu):
        found: Any = jax.typeof(own).sharding
        assert found.spec == want.spec


def test_hyperparameters_may_be_injected():
    make = optax.inject_hyperparams(oc.scale_by_unit_adam, static_args=("axis", "layout"))
    tx, plain = make(b1=0.5, axis=0), oc.scale_by_unit_adam(0.5)
    w = array(4, 3)
    updates, _ = tx.update(w, tx.init(w))
    np.testing.assert_allclose(updates, plain.update(w, plain.init(w))[0], rtol=2e-5)


def test_no_warning_where_the_axis_is_right():
    params = {"dense": {"kernel": array(4, 3), "bias": array(3)}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.scale_by_unit_adam().init(params)
