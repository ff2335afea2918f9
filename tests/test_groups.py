"""Groups of leaves under one constraint: `joint`, `across`, `of_layer`, and rules from trees."""

import functools
import json
import pickle
import re
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import bits, float64
from flax import linen as nn
from flax import nnx, serialization

import optax_constraints as oc
from optax_constraints import across, joint, of_layer, rules_from_tree
from optax_constraints._axes import LeafLayout
from optax_constraints._rules import Binder
from optax_constraints._trees import leaves_by_path
from optax_constraints.flax import layout, linen

RNG = np.random.default_rng(0)
F32 = float(np.finfo(np.float32).eps)


def leaf(*shape: int, dtype: Any = jnp.float32, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * RNG.normal(size=shape), dtype)


def flat(tree: Any) -> dict[str, Any]:
    return dict(leaves_by_path(tree))


def random_like(tree: Any, seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), tree)


def close(got: Any, want: Any, ulps: float = 16) -> None:
    """Trees of one structure, with leaves that differ by the rounding of sums in them."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (g.shape, g.dtype) == (w.shape, w.dtype)
        most = max(1, np.max(np.abs(float64(w)), initial=0))
        eps = float(jnp.finfo(w.dtype).eps)
        np.testing.assert_allclose(float64(g), float64(w), rtol=0, atol=ulps * eps * most)


def moved(tx: Any, params: Any, grads: Any) -> Any:
    """The parameters after one update."""
    updates, _ = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates)


# Joint: against arrays that are put together by hand.

SHAPES = {
    "dense": ("Dense_0/", {"kernel": (4, 3), "bias": (3,)}, {"kernel": (4, 3), "bias": (1, 3)}),
    "root": ("", {"kernel": (4, 3), "bias": (3,)}, {"kernel": (4, 3), "bias": (1, 3)}),
    "conv": ("Conv_0/", {"kernel": (3, 2, 2, 5), "bias": (5,)}, {"kernel": (12, 5)}),
    "query": ("attention/query/", {"kernel": (6, 2, 4), "bias": (2, 4)}, {"kernel": (6, 8)}),
    "out": ("attention/out/", {"kernel": (2, 4, 6), "bias": (6,)}, {"kernel": (8, 6)}),
    "three": ("norm/", {"kernel": (4, 3), "scale": (3,), "bias": (3,)}, {"kernel": (4, 3)}),
    "haiku": ("linear/", {"w": (4, 3), "b": (3,)}, {"w": (4, 3)}),
    "no rows": ("Dense_0/", {"kernel": (0, 3), "bias": (3,)}, {"kernel": (0, 3)}),
    "no units": ("Dense_0/", {"kernel": (3, 0), "bias": (0,)}, {"kernel": (3, 0)}),
}


def nested(prefix: str, leaves: dict[str, Any]) -> Any:
    for segment in reversed(prefix.strip("/").split("/") if prefix else []):
        leaves = {segment: leaves}
    return leaves


def by_hand(constraint: Any, leaves: dict[str, Any], rows: dict[str, tuple[int, ...]]) -> Any:
    """Rows of kernels and one row for each vector, projected as one array."""
    blocks = {k: w.reshape(rows.get(k, (1, w.size))) for k, w in leaves.items()}
    whole = constraint(jnp.concatenate(list(blocks.values())))
    parts, start = {}, 0
    for name, block in blocks.items():
        parts[name] = whole[start : start + len(block)].reshape(leaves[name].shape)
        start += len(block)
    return parts


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("axis", [0, None])
def test_leaves_of_a_layer_are_the_rows_of_one_array(case, axis):
    prefix, shapes, rows = SHAPES[case]
    leaves = {name: leaf(*shape) for name, shape in shapes.items()}
    params = nested(prefix, leaves)
    constraint = oc.max_norm(0.5, axis=axis)
    got = oc.constrain(params, {joint(*shapes): constraint})
    close(got, nested(prefix, by_hand(constraint, leaves, rows)))


def test_weights_as_torch_and_equinox_keep_them_have_their_units_first():
    model = eqx.nn.Sequential([eqx.nn.Linear(4, 3, key=jax.random.key(0))])
    got = oc.constrain(model, {joint("weight", "bias"): oc.max_norm(0.25)})
    before, after = model.layers[0], got.layers[0]
    whole = oc.max_norm(0.25)(jnp.concatenate([before.weight.T, before.bias[None]]))
    close((after.weight, after.bias), (whole[:-1].T, whole[-1]))


SETS = {
    "max_norm": oc.max_norm(0.5),
    "fan_in": oc.unit_norm(axis="fan_in"),
    "min_max_norm": oc.min_max_norm(2.0, 3.0, rate=0.5),
    "max_rms": oc.max_rms(0.1),
    "simplex": oc.simplex(),
    "l1_ball": oc.l1_ball(0.5),
    "top_k": oc.top_k(2, axis=0),
    "share": oc.top_k(0.3),
    "monotone": oc.monotone(),
    "sum_to": oc.sum_to(1.0),
    "hyperplane": oc.hyperplane(np.arange(1.0, 6.0)),
    "spectral": oc.max_spectral_norm(0.5),
    "orthogonal": oc.orthogonal(),
    "low_rank": oc.low_rank(1),
    "soft": oc.soft(oc.max_norm(0.5), 0.5),
    "compose": oc.compose(oc.non_neg(), oc.max_norm(0.5)),
    "intersection": oc.intersection(oc.non_neg(), oc.max_norm(0.5)),
    "part": oc.part(oc.non_neg(), "2:"),
    "non_neg": oc.non_neg(),
    "box": oc.box(-0.5, jnp.linspace(0.0, 1.0, 5)[:, None]),
    "function": jnp.abs,
    "config": {"class_name": "MaxNorm", "config": {"max_value": 0.5}},
}
LAYER = {"kernel": leaf(4, 3), "bias": leaf(3)}


@pytest.mark.parametrize("name", SETS)
def test_every_kind_of_set_holds_for_the_joint_array(name):
    rules = {joint("kernel", "bias"): SETS[name]}
    alone = oc.get(SETS[name])
    alone = oc.unit_norm() if name == "fan_in" else alone
    want = by_hand(alone, LAYER, {"kernel": (4, 3)})
    close(oc.constrain(LAYER, rules), want)
    # An update that moves nothing ends at the same place; so does one under jit.
    tx = oc.project(rules)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    updates = update(jax.tree.map(jnp.zeros_like, LAYER), LAYER)
    close(optax.apply_updates(LAYER, updates), want, 32)


def test_each_leaf_keeps_its_dtype_and_sums_are_taken_in_the_wider():
    params = {"kernel": leaf(64, 3, dtype=jnp.bfloat16), "bias": leaf(3)}
    rules = {joint("kernel", "bias"): oc.unit_norm()}
    got = oc.constrain(params, rules)
    wide = {k: w.astype(jnp.float32) for k, w in params.items()}
    want = by_hand(oc.unit_norm(), wide, {"kernel": (64, 3)})
    assert (got["kernel"].dtype, got["bias"].dtype) == (jnp.bfloat16, jnp.float32)
    # To the bit what float32 gives: bfloat16 is rounded once, at the end.
    assert bits(got["kernel"]) == bits(want["kernel"].astype(jnp.bfloat16))
    assert bits(got["bias"]) == bits(want["bias"])
    assert oc.assert_feasible(got, rules) is None


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (2, 2), name="conv")(x)
        x = x.reshape(x.shape[0], -1, 3)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attention")(x)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="norm")(x))


class NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 3, (2, 2), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 3, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)


IMAGE = jnp.ones((1, 2, 2, 2))


def models() -> Any:
    params = Net().init(jax.random.key(0), IMAGE)["params"]
    model = NNXNet(nnx.Rngs(0))
    return {
        "linen": (random_like(params), layout(Net(), IMAGE)),
        "nnx": (random_like(nnx.state(model, nnx.Param)), layout(model)),
    }


FAN_IN = {"conv": 8, "head": 3, **{f"attention/{n}": 3 for n in ("query", "key", "value")}}
FAN_IN["attention/out"] = 4


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_layers_of_flax_with_a_layout_and_without(library):
    params, known = models()[library]
    rules = {"norm/*": None, joint("kernel", "bias"): oc.max_norm(0.5)}
    got = oc.constrain(params, rules, layout=known)
    before, after = flat(params), flat(got)
    for path, n in FAN_IN.items():
        own = {k: before[f"{path}/{k}"] for k in ("kernel", "bias")}
        want = by_hand(oc.max_norm(0.5), own, {"kernel": (n, own["kernel"].size // n)})
        close({k: after[f"{path}/{k}"] for k in own}, want)
    for name in ("scale", "bias"):
        assert bits(after[f"norm/{name}"]) == bits(before[f"norm/{name}"])
    rules = {"norm/*": None, "conv/*": None, joint("kernel", "bias"): oc.max_norm(0.5)}
    guessed = flat(oc.constrain(params, rules))
    for path in ("head/kernel", "attention/query/kernel", "attention/out/bias"):
        close(guessed[path], after[path])


class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return nn.Dense(4, name="dense")(x), None


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("set_", ["max_norm", "spectral", "top_k"])
def test_stacked_layers_stay_apart(axis, set_):
    stack = nn.scan(Body, {"params": axis}, split_rngs={"params": True}, length=3)()
    params = random_like(stack.init(jax.random.key(0), jnp.ones((1, 4)))["params"])
    alone = {
        "max_norm": oc.max_norm(0.5),
        "spectral": oc.max_spectral_norm(0.5),
        "top_k": oc.top_k(3),
    }[set_]
    known = layout(stack, jnp.ones((1, 4)))
    got = oc.constrain(params, {joint("kernel", "bias"): alone}, layout=known)["dense"]
    for i in range(3):
        own = {k: jnp.take(w, i, axis) for k, w in params["dense"].items()}
        want = by_hand(alone, own, {"kernel": (4, 4)})
        close({k: jnp.take(w, i, axis) for k, w in got.items()}, want)
    if axis == 0:  # also by hand, with a layout and without
        rules = {joint("kernel", "bias"): oc.stacked(alone)}
        close(oc.constrain(params, rules)["dense"], got)
        close(oc.constrain(params, rules, layout=known)["dense"], got)


def test_a_stack_of_nnx_stays_apart():
    model = nnx.vmap(lambda key: nnx.Linear(2, 4, rngs=nnx.Rngs(key)))(
        jax.random.split(jax.random.key(0), 3)
    )
    params = random_like(nnx.state(model, nnx.Param))
    rules = {joint("kernel", "bias"): oc.fixed_norm(2.0, axis=0)}
    got = flat(oc.constrain(params, rules, layout=layout(model)))
    squares = np.square(float64(got["kernel"])).sum(1) + np.square(float64(got["bias"]))
    np.testing.assert_allclose(squares, 4, rtol=8 * F32)


def test_the_order_of_the_patterns_is_that_of_the_rows():
    rules = {joint("bias", "kernel"): oc.monotone()}
    got = oc.constrain(LAYER, rules)
    whole = oc.monotone()(jnp.concatenate([LAYER["bias"][None], LAYER["kernel"]]))
    close(got, {"kernel": whole[1:], "bias": whole[0]})


def test_formulas_see_the_fan_in_of_the_joint_array():
    rules = {joint("kernel", "bias"): oc.max_norm("fan_in / 10")}
    want = by_hand(oc.max_norm(0.5), LAYER, {"kernel": (4, 3)})
    close(oc.constrain(LAYER, rules), want)


def test_several_layers_are_several_groups():
    params = {"a": LAYER, "b": {"kernel": leaf(2, 2), "bias": leaf(2)}}
    got = oc.constrain(params, {joint("kernel", "bias"): oc.unit_norm()})
    for layer in got.values():
        squares = np.square(float64(layer["kernel"])).sum(0) + np.square(float64(layer["bias"]))
        np.testing.assert_allclose(squares, 1, rtol=8 * F32)


# Memory.

INIT = {joint("kernel", "bias"): oc.fixed_norm("init", axis=0)}


def joint_norms(layer: Any) -> np.ndarray:
    return np.sqrt(np.square(float64(layer["kernel"])).sum(0) + np.square(float64(layer["bias"])))


def test_joint_norms_stay_what_they_were_at_init():
    params = {"a": LAYER, "b": {"kernel": leaf(2, 2), "bias": leaf(2)}}
    tx = optax.MultiSteps(optax.chain(optax.adam(0.1), oc.project(INIT)), 2)

    @jax.jit
    def train(params, state):
        def step(carry, i):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.sin(p + i), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jnp.arange(40))[0]

    got, state = train(params, tx.init(params))
    for name, layer in params.items():
        assert np.max(np.abs(float64(got[name]["kernel"] - layer["kernel"]))) > 0.1
        np.testing.assert_allclose(joint_norms(got[name]), joint_norms(layer), rtol=16 * F32)
    # The verbs find it, under the name of the group.
    memory = state.inner_opt_state[1].memory
    assert set(memory) == {"a/kernel+bias", "b/kernel+bias"}
    twice = jax.tree.map(lambda p: 2 * p, got)
    close(oc.constrain(twice, INIT, state=state), got, 32)
    away = oc.violations(twice, INIT, state=state)
    np.testing.assert_allclose(
        np.hypot(away["a/kernel"], away["a/bias"]),
        np.linalg.norm(joint_norms(params["a"])),
        rtol=1e-5,
    )
    oc.assert_feasible(got, INIT, state=state)
    with pytest.raises(ValueError, match=r"'a/kernel\+bias' is relative to what the weights were"):
        oc.violations(got, INIT)


@pytest.mark.parametrize("rules", [INIT, {across("kernel", "b*"): oc.fixed_norm("init")}])
def test_memory_of_groups_survives_saves(rules, tmp_path):
    tx = optax.chain(optax.sgd(0.1), oc.project(rules))
    state = tx.init(LAYER)
    want, _ = tx.update(LAYER, state, LAYER)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "state", state)
    dicts = [{}, {"updates_seen": state[1].updates_seen, "memory": dict(state[1].memory)}]
    for back in (restored, pickle.loads(pickle.dumps(state)), (state[0], dicts[1])):
        close(tx.update(LAYER, back, LAYER)[0], want, 0)


def test_the_memory_of_a_group_is_found_by_another_process():
    """A key with the address of a function in it would be another one there."""
    rules = {across(lambda path, leaf: True): oc.fixed_norm("init")}
    (key,) = oc.project(rules).init(LAYER).memory
    assert " at 0x" not in key
    assert key == "across(test_the_memory_of_a_group_is_found_by_another_process.<locals>.<lambda>)"


def test_the_state_of_other_groups_is_an_error():
    state = oc.project(INIT).init(LAYER)
    rules = {across("*"): oc.fixed_norm("init")}
    with pytest.raises(ValueError, match=r"remembers nothing of \"across\('\*'\)\""):
        oc.project(rules).update(LAYER, state, LAYER)


def test_unit_norms_of_kernel_and_bias_for_several_seeds_in_a_loop_that_skips_steps():
    """As XQC does: the weights of each unit, its bias with them, have norm 1 after each update."""
    rules = {joint("kernel", "bias"): oc.unit_norm()}
    tx = optax.conditionally_mask(
        optax.chain(optax.adam(0.1), oc.project(rules)), lambda step: jnp.asarray(step) % 2 == 0
    )

    @jax.jit
    @jax.vmap
    def train(key):
        params = {
            "a": {"kernel": jax.random.normal(key, (4, 3)), "bias": jnp.zeros(3)},
            "b": {"kernel": jax.random.normal(key, (3, 2)), "bias": jnp.zeros(2)},
        }
        params = oc.constrain(params, rules)

        def step(i, carry):
            params, state = carry
            grads = jax.tree.map(lambda p: jnp.cos(3 * p + i), params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return params, jax.lax.fori_loop(0, 9, step, (params, tx.init(params)))[0]

    before, after = train(jax.random.split(jax.random.key(0), 4))
    for name in after:
        squares = np.square(float64(after[name]["kernel"])).sum(1)
        squares += np.square(float64(after[name]["bias"]))
        np.testing.assert_allclose(squares, 1, rtol=16 * F32)
        assert np.all(np.abs(float64(after[name]["bias"] - before[name]["bias"])) > 1e-3)


# Across: against one vector.


def vector(tree: Any, dtype: Any = np.float32) -> np.ndarray:
    return np.concatenate([np.asarray(w, dtype).ravel() for w in jax.tree.leaves(tree)])


def parted(flat_: Any, like: Any) -> Any:
    leaves, start = [], 0
    for w in jax.tree.leaves(like):
        leaves.append(jnp.asarray(flat_[start : start + w.size]).reshape(w.shape).astype(w.dtype))
        start += w.size
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


TREES = {
    "ranks": {"a": leaf(5, 3), "b": leaf(7), "c": leaf(), "d": leaf(2, 1, 3)},
    "empty": {"a": leaf(5, 3), "b": leaf(0, 3), "c": leaf(3)},
    "all empty": {"a": leaf(0), "b": leaf(0, 3)},
    "one": {"a": leaf(5, 3)},
    "dtypes": {"a": leaf(5, 3), "b": leaf(7, dtype=jnp.bfloat16), "c": leaf(4, dtype=jnp.float16)},
}
IN_PARTS = {
    "max_norm": oc.max_norm(1.0),
    "max_norm of 0": oc.max_norm(0.0),
    "inside": oc.max_norm(100.0),
    "max_rms": oc.max_rms(0.1),
    "min_max_norm": oc.min_max_norm(9.0, 10.0),
    "rate": oc.min_max_norm(0.0, 1.0, rate=0.5),
    "unit_norm": oc.unit_norm(),
    "fixed_norm": oc.fixed_norm(3.0),
    "init": oc.fixed_norm("0.5x init"),
    "top_k": oc.top_k(4),
    "none": oc.top_k(0),
    "all": oc.top_k(100),
    "share": oc.top_k(0.3),
    "simplex": oc.simplex(),
    "simplex of 3": oc.simplex(3.0),
    "l1_ball": oc.l1_ball(),
    "l1 inside": oc.l1_ball(100.0),
}
AS_ONE = {
    "box": oc.box(-0.5, 0.5),
    "non_neg": oc.non_neg(),
    "sum_to": oc.sum_to(1.0),
    "center_around": oc.center_around(0.5),
    "monotone": oc.monotone(),
    "soft": oc.soft(oc.max_norm(1.0), 0.5),
    "compose": oc.compose(oc.non_neg(), oc.max_norm(1.0)),
    "intersection": oc.intersection(oc.non_neg(), oc.max_norm(1.0)),
    "function": jnp.abs,
}
ACROSS = IN_PARTS | AS_ONE


# Each set on one tree, and one of each way to reduce on all of them.
SOME = ("max_norm", "init", "share", "simplex", "l1_ball", "sum_to")


@pytest.mark.parametrize(
    ("name", "tree"),
    [(name, tree) for name in ACROSS for tree in TREES if tree == "ranks" or name in SOME],
)
def test_leaves_across_a_model_are_one_vector(name, tree):
    params, rules = TREES[tree], {across("*"): ACROSS[name]}
    want = parted(oc.get(ACROSS[name])(jnp.asarray(vector(params))), params)
    close(oc.constrain(params, rules), want)
    tx = oc.project(rules)
    close(moved(tx, params, jax.tree.map(jnp.zeros_like, params)), want, 32)


@pytest.mark.parametrize("name", [*SOME, "min_max_norm", "box"])
def test_an_update_ends_where_the_sum_is_projected(name):
    params, rules = TREES["ranks"], {across("*"): ACROSS[name]}
    for optimizer in (optax.sgd(0.5), optax.adam(0.5)):
        tx = optax.chain(optimizer, oc.project(rules))
        got = moved(tx, params, random_like(params))
        plain = moved(optimizer, params, random_like(params))
        state = tx.init(params)
        close(got, oc.constrain(plain, rules, state=state), 32)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 7, 11])
def test_of_equal_magnitudes_across_leaves_the_first_are_kept(k):
    params = {
        "a": jnp.array([[1.0, -1.0], [2.0, 1.0]]),
        "b": jnp.array([-0.0, 1.0, jnp.nan]),
        "c": jnp.array(-1.0),
        "d": jnp.array([jnp.inf, 0.0, -2.0]),
    }
    x = vector(params)
    order = np.argsort(-np.abs(np.nan_to_num(x, nan=np.inf)), kind="stable")
    order = [*np.flatnonzero(np.isnan(x)), *(i for i in order if not np.isnan(x[i]))]
    # A zero is allowed, and keeps its sign; a NaN counts, and stays.
    stays = (x == 0) | np.isnan(x)
    stays[order[:k]] = True
    want = np.where(stays, x, np.float32(0))
    for rules in ({across("*"): oc.top_k(k)}, {across("*"): oc.top_k(jnp.int32(k))}):
        got = vector(oc.constrain(params, rules))
        assert bits(jnp.asarray(got)) == bits(jnp.asarray(want))


@pytest.mark.parametrize("name", ["max_norm", "unit_norm", "simplex", "l1_ball"])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_takes_the_whole_vector(name, value):
    params = TREES["ranks"] | {"b": TREES["ranks"]["b"].at[2].set(value)}
    got = vector(oc.constrain(params, {across("*"): IN_PARTS[name]}))
    want = IN_PARTS[name](jnp.asarray(vector(params)))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert np.isnan(got).any()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_norms_across_leaves_neither_overflow_nor_underflow(size):
    params = jax.tree.map(lambda w: w * size, TREES["ranks"])
    got = vector(oc.constrain(params, {across("*"): oc.unit_norm()}), np.float64)
    np.testing.assert_allclose(np.linalg.norm(got), 1, rtol=8 * F32)


def test_what_is_allowed_comes_back_bit_for_bit():
    for name in ("max_norm", "top_k", "simplex", "l1_ball"):
        rules = {across("*"): IN_PARTS[name]}
        once = oc.constrain(TREES["ranks"], rules)
        again = oc.constrain(once, rules)
        assert [*map(bits, jax.tree.leaves(again))] == [*map(bits, jax.tree.leaves(once))], name


@pytest.mark.slow
@pytest.mark.parametrize("k", [7, 0.1])
def test_there_are_never_more_than_k_nonzeros_in_training(k):
    params = {"a": leaf(9, 5), "b": leaf(31), "c": {"d": leaf(2, 3, 4)}}
    most = k if isinstance(k, int) else 10
    tx = optax.chain(optax.sgd(0.37), oc.project({across("**"): oc.top_k(k)}))

    @jax.jit
    def train(params, state):
        def step(carry, key):
            params, state = carry
            keys = iter(jax.random.split(key, 3))
            grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            count = sum(jnp.sum(p != 0) for p in jax.tree.leaves(params))
            return (params, state), count

        return jax.lax.scan(step, (params, state), jax.random.split(jax.random.key(0), 3000))[1]

    counts = np.asarray(train(params, tx.init(params)))
    assert counts.max() <= most
    assert counts.min() >= most - 1  # and none is lost, but where a sum is zero


@pytest.mark.parametrize("name", ["max_norm", "unit_norm", "share", "simplex", "l1_ball", "soft"])
def test_derivatives_are_those_of_the_vector(name):
    params, constraint = TREES["ranks"], ACROSS[name]
    rules, weights = {across("*"): constraint}, random_like(TREES["ranks"], 2)

    def loss(params):
        out = oc.constrain(params, rules)
        pairs = zip(jax.tree.leaves(out), jax.tree.leaves(weights), strict=True)
        return sum(jnp.vdot(a, b) for a, b in pairs)

    def of_vector(x):
        return jnp.vdot(constraint(x), vector(weights))

    want = jax.jit(jax.grad(of_vector))(jnp.asarray(vector(params)))
    close(jax.jit(jax.grad(loss))(params), parted(want, params), 32)

    tx, grads = oc.project(rules), random_like(params, 3)

    def update(u):
        return tx.update(u, tx.init(params), params)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def along(function, at, direction):
        return jax.jvp(function, (at,), (direction,))[1]

    got = along(update, grads, weights)
    x, u, v = (jnp.asarray(vector(t)) for t in (params, grads, weights))
    want = along(lambda u: constraint(x + u) - x, u, v)
    close(got, parted(want, params), 64)


def test_joint_derivatives_are_those_of_the_joint_array():
    def loss(layer):
        out = oc.constrain(layer, {joint("kernel", "bias"): oc.unit_norm()})
        return jnp.sum(jnp.sin(out["kernel"])) + jnp.sum(jnp.cos(out["bias"]))

    def whole(layer):
        out = by_hand(oc.unit_norm(), layer, {"kernel": (4, 3)})
        return jnp.sum(jnp.sin(out["kernel"])) + jnp.sum(jnp.cos(out["bias"]))

    close(jax.grad(loss)(LAYER), jax.grad(whole)(LAYER))


# Temporaries and collectives, from the compiled program.

EIGHT = {name: jnp.ones((128, 128)) for name in "abcdefgh"}


def temporaries(program: Any) -> float:
    """How many leaves the temporaries of a program would fill."""
    return program.compile().memory_analysis().temp_size_in_bytes / EIGHT["a"].nbytes


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="XLA of JAX 0.6 keeps sums of all leaves for two passes"
)
@pytest.mark.parametrize("name", ["max_norm", "init", "share", "simplex", "l1_ball"])
def test_no_copy_is_made_of_what_stays_in_its_parts(name):
    rules = {across("*"): IN_PARTS[name]}
    tx = oc.project(rules)
    state = tx.init(EIGHT)

    def constrain(params, state):
        return oc.constrain(params, rules, state=state if name == "init" else None)

    def step(params, state, updates):
        updates, state = tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    for program in (
        jax.jit(constrain).lower(EIGHT, state),
        jax.jit(step).lower(EIGHT, state, EIGHT),
    ):
        assert temporaries(program) <= 2


def test_other_sets_make_one_array():
    """So that the test above can fail."""
    rules = {across("*"): oc.soft(oc.max_norm(1.0), 0.5)}
    program = jax.jit(lambda params: oc.constrain(params, rules)).lower(EIGHT)
    assert temporaries(program) > 2


# The other verbs.


@pytest.mark.parametrize("pattern", [joint("kernel", "bias"), across("*")])
@pytest.mark.parametrize("name", ["max_norm", "simplex", "top_k", "non_neg"])
def test_distances_by_path_are_those_of_the_parts(pattern, name):
    rules = {pattern: ACROSS[name]}
    params = LAYER
    away = jax.jit(lambda params: oc.violations(params, rules))(params)
    assert list(away) in (["kernel", "bias"], ["bias", "kernel"])
    after = oc.constrain(params, rules)
    for path, own in away.items():
        want = np.linalg.norm(float64(params[path]) - float64(after[path]))
        np.testing.assert_allclose(own, want, rtol=1e-5)
    assert all(v <= 16 * F32 for v in oc.violations(after, rules).values())


def test_in_the_report_a_group_is_one_block_of_rows():
    params = {"a": {"bias": jnp.ones(3), "kernel": 2 * jnp.ones((4, 3))}, "b": jnp.ones(2)}
    rules = {joint("kernel", "bias"): oc.max_norm(2.0)}
    found = oc.report(params, rules)
    assert str(found).splitlines() == [
        "path      shape  dtype    constraint  axis  units  at bound  outside",
        "--------------------------------------------------------------------",
        "a/kernel  4x3    float32  MaxNorm(2)  0         3         3     3.57",
        "a/bias    3      float32  as above    -         -         -    0.892",
        "b         2      float32  free        -         -         -        -",
        "2 of 3 leaves constrained; 3 of 3 units at their bound",
        "furthest outside: 3.57 in a/kernel",
    ]
    assert [row.group for row in found.rows] == ["a/kernel+bias", "a/kernel+bias", None]
    rules = {across("*"): oc.top_k(4)}
    found = oc.report(params, rules)
    assert [(r.path, r.constraint, r.units, r.at_bound, r.axis) for r in found.rows] == [
        ("a/bias", "TopK(4)", 1, 1, (0,)),
        ("a/kernel", "TopK(4)", None, None, None),
        ("b", "TopK(4)", None, None, None),
    ]


def test_what_is_outside_of_a_group_is_named_by_its_leaves():
    rules = {joint("kernel", "bias"): oc.max_norm(2.0)}
    params = {"kernel": 2 * jnp.ones((4, 3)), "bias": jnp.ones(3)}
    oc.assert_feasible(oc.constrain(params, rules), rules)
    message = r"2 of 2 .* outside their sets:\n  kernel \(4x3, float32\) is 3\.57 from MaxNorm\(2\)"
    with pytest.raises(AssertionError, match=message):
        oc.assert_feasible(params, rules)
    rules = {across("*"): oc.top_k(14)}
    with pytest.raises(AssertionError, match=r"1 of 2 .*\n  bias .* is 1 from TopK\(14\)"):
        oc.assert_feasible(params, rules)


@pytest.mark.parametrize(
    "rules",
    [
        {joint("kernel", "bias"): oc.unit_norm()},
        {joint("kernel", "bias"): oc.fixed_norm("init", axis=0)},
        {across("*"): oc.unit_norm()},
        {across("*"): oc.fixed_norm("init")},
    ],
)
def test_tangent_parts_of_groups_are_orthogonal_to_their_normals(rules):
    params = oc.constrain(LAYER, rules)
    grads = random_like(params)
    tx = oc.tangent(rules)
    got, _ = tx.update(grads, tx.init(params), params)
    products = [np.vstack([float64(params[k] * got[k])]).reshape(-1, 3) for k in ("kernel", "bias")]
    by_unit = np.concatenate(products).sum(0)
    np.testing.assert_allclose(
        by_unit.sum() if isinstance(next(iter(rules)), type(across("*"))) else by_unit,
        0,
        atol=16 * F32 * 10,
    )
    again, _ = tx.update(got, tx.init(params), params)
    close(again, got, 32)


@pytest.mark.parametrize("group", [joint("kernel", "bias"), across("*")])
def test_gradients_of_groups_inside_their_set_pass(group):
    params = {"kernel": jnp.full((4, 3), 0.5), "bias": jnp.full(3, 0.25)}
    grads = jax.tree.map(jnp.ones_like, params)
    tx = oc.tangent({group: oc.non_neg()})
    got, _ = tx.update(grads, tx.init(params), params)
    assert bits(got["kernel"]) == bits(grads["kernel"])
    assert bits(got["bias"]) == bits(grads["bias"])


# Which leaves are whose.


def test_the_first_rule_wins_and_may_take_all_of_a_layer():
    params = {"a": LAYER, "b": LAYER}
    rules = {"a/*": None, joint("kernel", "bias"): oc.unit_norm()}
    got = oc.constrain(params, rules)
    assert bits(got["a"]["kernel"]) == bits(LAYER["kernel"])
    close(got["b"], by_hand(oc.unit_norm(), LAYER, {"kernel": (4, 3)}))


def test_groups_stand_among_other_rules():
    params = {"a": LAYER, "b": {"kernel": leaf(4)}, "extra": leaf(2)}
    rules = [
        ("extra", oc.non_neg()),
        ("a", {joint("kernel", "bias"): oc.unit_norm()}),
        (across("b/*"), oc.max_norm(1.0)),
    ]
    got = oc.constrain(params, rules)
    close(got["a"], by_hand(oc.unit_norm(), LAYER, {"kernel": (4, 3)}))
    close(got["b"]["kernel"], oc.max_norm(1.0)(params["b"]["kernel"]))
    close(got["extra"], jnp.maximum(params["extra"], 0))


def test_nested_rules_hold_joint_keys():
    params = {"encoder": {"a": LAYER}, "head": LAYER}
    rules = {"encoder": {joint("kernel", "bias"): oc.unit_norm()}}
    # A glob inside `encoder` takes one segment; `**` any number of them.
    with pytest.raises(ValueError, match="matches no leaf"):
        oc.constrain(params, rules)
    rules = {"encoder": {joint("**/kernel", "**/bias"): oc.unit_norm()}}
    got = oc.constrain(params, rules)
    close(got["encoder"]["a"], by_hand(oc.unit_norm(), LAYER, {"kernel": (4, 3)}))
    assert bits(got["head"]["kernel"]) == bits(LAYER["kernel"])


def test_without_strict_a_group_may_match_nothing():
    rules = {joint("kernel", "bias"): oc.unit_norm(), across("**/w"): oc.max_norm(1.0)}
    got = oc.constrain({"scale": leaf(3)}, rules, strict=False)
    assert list(got) == ["scale"]


def test_leaves_of_one_path_are_one_group():
    params = {"a": {"b": leaf(3), "c": leaf(2)}, "a/b": leaf(4)}
    got = oc.constrain(params, {across("a/*"): oc.unit_norm()})
    np.testing.assert_allclose(np.linalg.norm(vector(got, np.float64)), 1, rtol=8 * F32)


def test_frozen_groups_are_left_alone():
    rules = {joint("kernel", "bias"): oc.unit_norm(), "x": oc.non_neg()}
    params = LAYER | {"x": leaf(2)}
    tx = oc.project(rules)
    for absent in (None, optax.MaskedNode()):
        grads = {"kernel": absent, "bias": absent, "x": -10 * jnp.ones(2)}
        updates: Any = tx.update(grads, tx.init(params), params)[0]
        assert updates["kernel"] is absent
        close(params["x"] + updates["x"], jnp.zeros(2))
    message = r"'kernel\+bias' is constrained as one, .* none for 'bias'\. Update all of them or"
    with pytest.raises(ValueError, match=message):
        tx.update(params | {"bias": None}, tx.init(params), params)


def test_a_mask_that_takes_a_part_of_a_group_is_an_error():
    tx = optax.masked(
        oc.project({joint("kernel", "bias"): oc.unit_norm()}), {"kernel": True, "bias": False}
    )
    with pytest.raises(ValueError, match=r"beside 'kernel' there is none that matches 'bias'"):
        tx.init(LAYER)


def test_a_group_inside_of_masked_and_partition():
    params = {"a": LAYER, "b": LAYER}
    rules = {joint("kernel", "bias"): oc.unit_norm()}
    mask = {"a": True, "b": False}
    want = by_hand(oc.unit_norm(), LAYER, {"kernel": (4, 3)})
    zeros = jax.tree.map(jnp.zeros_like, params)
    for tx in (
        optax.masked(oc.project(rules), mask),
        optax.partition(
            {"own": oc.project(rules), "other": optax.sgd(0.1)}, {"a": "own", "b": "other"}
        ),
    ):
        got = moved(tx, params, zeros)
        close(got["a"], want)
        close(got["b"], LAYER, 0)


# By type of layer.


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_rules_go_by_types_of_layers(library):
    params, known = models()[library]
    dense = {"linen": "Dense", "nnx": nnx.Linear}[library]
    conv = {"linen": nn.Conv, "nnx": "Conv"}[library]
    rules = [
        (of_layer(conv, "kernel"), oc.non_neg()),
        (joint(of_layer(dense, "kernel"), of_layer(dense, "bias")), oc.unit_norm()),
        (of_layer("LayerNorm"), oc.box(-0.5, 0.5)),
    ]
    before = flat(params)
    got = flat(oc.constrain(params, rules, layout=known))
    close(got["conv/kernel"], jnp.maximum(before["conv/kernel"], 0))
    assert bits(got["conv/bias"]) == bits(before["conv/bias"])
    assert bits(got["attention/query/kernel"]) == bits(before["attention/query/kernel"])
    own = {k: before[f"head/{k}"] for k in ("kernel", "bias")}
    close({k: got[f"head/{k}"] for k in own}, by_hand(oc.unit_norm(), own, {"kernel": (3, 5)}))
    for name in ("norm/scale", "norm/bias"):
        close(got[name], jnp.clip(before[name], -0.5, 0.5))
    with pytest.raises(ValueError, match=r"Embed.* matches no leaf \(the layout knows the layers "):
        oc.constrain(params, {of_layer("Embed"): oc.non_neg()}, layout=known)


@pytest.mark.parametrize("strict", [True, False])
def test_types_of_layers_need_a_layout(strict):
    for pattern in (of_layer("Dense"), across(of_layer("Dense", "kernel"))):
        with pytest.raises(ValueError, match="only the model knows; write layout=layout"):
            oc.constrain(LAYER, {pattern: oc.non_neg()}, strict=strict)


def test_the_layers_that_there_are_stand_in_the_error():
    known = {"kernel": LeafLayout("Dense", (0,)), "bias": LeafLayout("Mine", None)}
    with pytest.raises(ValueError, match=r"knows the layers Dense, Mine\) of the 2 in this tree"):
        oc.constrain(LAYER, {of_layer("Conv", "kernel"): oc.non_neg()}, layout=known)


def test_declared_rules_and_groups():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = linen.Dense(3, kernel_constraint="non_neg", name="a")(x)
            return linen.Dense(3, name="b")(x)

    x = jnp.ones((1, 4))
    params = random_like(Model().init(jax.random.key(0), x)["params"])
    rules = [
        *linen.declared(Model(), x).items(),
        ("a/bias", None),
        (joint("kernel", "bias"), oc.unit_norm()),
    ]
    got = oc.constrain(params, rules, layout=layout(Model(), x))
    close(got["a"]["kernel"], jnp.maximum(params["a"]["kernel"], 0))
    close(got["b"], by_hand(oc.unit_norm(), params["b"], {"kernel": (3, 3)}))


# Rules from trees.


def test_a_tree_of_constraints_makes_anchored_rules():
    tree = {"a": {"kernel": oc.max_norm(1.0)}, "kernel": "non_neg", "b": [None, jnp.abs]}
    assert rules_from_tree(tree) == {
        "/a/kernel": oc.max_norm(1.0),
        "/kernel": "non_neg",
        "/b/1": jnp.abs,
    }


def test_bounds_that_come_as_trees():
    params = {"rate": jnp.array(3.0), "weights": jnp.array([-1.0, 2.0]), "free": jnp.ones(2)}
    lower, upper = {"rate": 0.0, "weights": -0.5}, {"rate": 1.0, "weights": 1.5}
    tree = jax.tree.map(oc.box, lower, upper) | {"free": None}
    got = oc.constrain(params, rules_from_tree(tree))
    close(got, {"rate": jnp.array(1.0), "weights": jnp.array([-0.5, 1.5]), "free": jnp.ones(2)})


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_tree_made_from_parameters_of_flax(library):
    params, _ = models()[library]
    tree = jax.tree.map(lambda p: oc.non_neg() if p.ndim > 1 else None, params)
    got, before = flat(oc.constrain(params, rules_from_tree(tree))), flat(params)
    for path, w in before.items():
        close(got[path], jnp.maximum(w, 0) if w.ndim > 1 else w, 0)


def test_a_tree_made_from_a_model_of_equinox_that_has_parts_missing():
    mlp = eqx.nn.MLP(2, 2, 3, 1, use_final_bias=False, key=jax.random.key(0))
    params = eqx.filter(mlp, eqx.is_inexact_array)  # None for what is no array
    got = oc.constrain(params, rules_from_tree(jax.tree.map(lambda p: oc.non_neg(), params)))
    assert all(np.all(w >= 0) for w in jax.tree.leaves(got))
    assert len(jax.tree.leaves(got)) == 3


@pytest.mark.parametrize("key", ["a*", "[ab]", "a?", "**", "x[!a]", "a.b c", "é"])
def test_keys_that_look_like_patterns_name_one_leaf(key):
    params = {key: jnp.array(-1.0), "ab": jnp.array(-1.0), "a": jnp.array(-1.0)}
    rules = rules_from_tree({key: oc.non_neg(), "ab": None, "a": None})
    assert oc.constrain(params, rules) == params | {key: 0.0}


@pytest.mark.parametrize("tree", [oc.non_neg(), "non_neg", {"class_name": "NonNeg"}, jnp.abs])
def test_a_tree_of_one_constraint_is_a_bare_constraint(tree):
    assert oc.constrain(jnp.array([-1.0]), rules_from_tree(tree)) in (0.0, 1.0)


def test_a_tree_of_none_frees_all():
    assert rules_from_tree(None) is None
    assert oc.constrain(LAYER, rules_from_tree({"kernel": None, "bias": None})) == LAYER


def test_two_constraints_for_one_path_are_an_error():
    tree = {"a": {"b": oc.non_neg()}, "a/b": oc.max_norm(1.0)}
    with pytest.raises(ValueError, match=r"two leaves have the path 'a/b', .*NonNeg.*MaxNorm"):
        rules_from_tree(tree)
    tree["a/b"] = oc.non_neg()
    assert rules_from_tree(tree) == {"/a/b": oc.non_neg()}


# Configs.

PATTERNS = [
    joint("kernel", "bias"),
    across("**/kernel"),
    across(re.compile("a.*", re.IGNORECASE), "b"),
    of_layer("Conv", "kernel"),
    of_layer("Conv"),
    joint(of_layer("Dense", "kernel"), re.compile(".*bias")),
]


def test_rules_with_groups_go_through_json():
    rules = {pattern: oc.max_norm(float(i)) for i, pattern in enumerate(PATTERNS)}
    back = oc.deserialize(json.loads(json.dumps(oc.serialize(rules))))
    assert back == list(rules.items())
    assert [repr(pattern) for pattern, _ in back] == [repr(pattern) for pattern in PATTERNS]
    nested = {"a": {joint("kernel", "bias"): oc.unit_norm()}}
    back = oc.deserialize(json.loads(json.dumps(oc.serialize(nested))))
    close(oc.constrain({"a": LAYER}, back), oc.constrain({"a": LAYER}, nested), 0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"joint": ["kernel"]}, "1 pattern is given"),
        ({"joint": ["kernel", 3]}, "3 is not a pattern"),
        ({"joint": ["a", {"joint": ["b", "c"]}]}, "names groups"),
        ({"across": []}, "no pattern is given"),
        ({"across": "kernel"}, "is not a pattern"),
        ({"across": ["a"], "joint": ["a", "b"]}, "is not a pattern"),
        ({"of_layer": []}, "is not a pattern"),
        ({"of_layer": [{"regex": "a"}]}, "is no type of layer"),
        ({"of_layer": ["Conv", "a", "b"]}, "is not a pattern"),
        ({"across": ["a" * 501]}, "at most 500 characters"),
    ],
)
def test_configs_of_patterns_that_are_none(pattern, message):
    with pytest.raises((TypeError, ValueError), match=message):
        oc.deserialize([[pattern, None]])


def test_patterns_are_values():
    assert joint("a", "b") == joint("a", "b") != joint("b", "a")
    assert len({across("a"), across("a"), across("b"), joint("a", "b")}) == 3
    assert repr(across(re.compile("a"), "b")) == "across(re.compile('a'), 'b')"
    assert pickle.loads(pickle.dumps(PATTERNS)) == PATTERNS


# Errors.

TWO = {"a": LAYER, "b": {"kernel": leaf(4, 3), "bias": leaf(3)}}


@pytest.mark.parametrize(
    ("params", "rules", "error", "message"),
    [
        (
            LAYER,
            [("bias", None), (joint("kernel", "bias"), oc.non_neg())],
            ValueError,
            r"joint\('kernel', 'bias'\) takes the leaves of 'kernel\+bias' as one, and an earlier "
            r"rule has taken 'bias'\. Put this rule first",
        ),
        (
            TWO,
            [("a/*", None), (across("**/kernel"), oc.non_neg())],
            ValueError,
            r"takes the leaves of \"across\('\*\*/kernel'\)\" as one, and .* has taken 'a/kernel'",
        ),
        (
            {"a": LAYER, "b": {"kernel": leaf(4, 3)}},
            {joint("kernel", "bias"): oc.non_neg()},
            ValueError,
            r"beside 'b/kernel' there is none that matches 'bias'\. .* such as 'b/kernel': None",
        ),
        (
            {"kernel": leaf(4, 3), "bias": leaf(4)},
            {joint("kernel", "bias"): oc.non_neg()},
            ValueError,
            r"joint on 'kernel\+bias': .* one number of units, and here 'kernel' of shape \(4, 3\) "
            r"has 3, 'bias' of shape \(4,\) has 4\. If the layers are stacked",
        ),
        (
            {"kernel": leaf(5, 4, 3), "bias": leaf(4, 3)},
            {joint("kernel", "bias"): oc.stacked(oc.non_neg())},
            ValueError,
            r"'kernel' of shape \(5, 4, 3\) has 5 x 3, 'bias' of shape \(4, 3\) has 4 x 3",
        ),
        (
            {"kernel": leaf(5, 4, 3), "bias": leaf(3)},
            {joint("kernel", "bias"): oc.non_neg()},
            ValueError,
            r"joint on 'kernel' of shape \(5, 4, 3\): axis='fan_in' cannot be told",
        ),
        (
            {"kernel": leaf(4, 3), "bias": jnp.arange(3)},
            {joint("kernel", "bias"): oc.non_neg()},
            TypeError,
            r"names 'bias' \('bias' of shape \(3,\), int32\), and only floating-point",
        ),
        (
            {"kernel": leaf(4, 3), "name": "text"},
            {across("*"): oc.non_neg()},
            TypeError,
            r"names 'name' \(str\), and only floating-point arrays",
        ),
        (LAYER, {across("*"): None}, ValueError, r"None leaves a group free; write that for its"),
        (LAYER, {joint("kernel", "b"): oc.non_neg()}, ValueError, "there is none that matches 'b'"),
        (LAYER, {across("w"): oc.non_neg()}, ValueError, r"across\('w'\) matches no leaf"),
        (
            LAYER,
            {across("*"): oc.max_norm(1.0, axis=1)},
            ValueError,
            r"MaxNorm on \"across\('\*'\)\" of shape \(15,\): axis 1 is out of range",
        ),
        (
            LAYER,
            {joint("kernel", "bias"): oc.max_norm(1.0, axis=2)},
            ValueError,
            r"MaxNorm on 'kernel\+bias' of shape \(5, 3\): axis 2 is out of range",
        ),
        (LAYER, {across("*"): oc.orthogonal()}, ValueError, r"a matrix has two axes"),
        (LAYER, {across("*"): lambda w: w[1:]}, ValueError, r"returned shape \(14,\)"),
        (LAYER, {across("*"): {"kernel": oc.non_neg()}}, TypeError, "need a string as their key"),
        (
            LAYER,
            {"a": {across("/kernel"): oc.non_neg()}},
            ValueError,
            "the key '/kernel' is anchored at the root",
        ),
    ],
)
def test_what_no_group_can_be_is_an_error(params, rules, error, message):
    for verb in (oc.constrain, oc.violations, lambda p, r: oc.project(r).init(p)):
        with pytest.raises(error, match=message):
            verb(params, rules)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: joint(), TypeError, r"joint: 0 pattern"),
        (lambda: joint("kernel"), TypeError, r"write two or more, as in joint\('kernel', 'bias'\)"),
        (lambda: across(), TypeError, r"write one, as in across\('\*\*/kernel'\)"),
        (lambda: across(3), TypeError, "across: The pattern 3 is not a string"),
        (lambda: across(""), ValueError, "across: The pattern '' is empty"),
        (lambda: joint("a", across("b")), TypeError, r"across\('b'\) names groups"),
        (lambda: joint("a", re.compile(b"b")), TypeError, "matches bytes"),
        (lambda: of_layer(""), TypeError, "layer='' is no type of layer"),
        (lambda: of_layer(3), TypeError, "layer=3 is no type of layer"),
        (lambda: of_layer("Conv", None), TypeError, "of_layer: The pattern None is not a string"),
        (lambda: of_layer("Conv", joint("a", "b")), TypeError, "names groups"),
    ],
)
def test_patterns_that_are_none(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_group_that_does_nothing_warns():
    with pytest.warns(UserWarning, match=r"across\('\*'\) does nothing: an earlier rule matches"):
        oc.constrain(LAYER, [("*", oc.non_neg()), (across("*"), oc.max_norm(1.0))])


# Settings of JAX, and rules at random.


GROUPED = [
    {pattern: constraint}
    for pattern in (joint("kernel", "bias"), across("*"))
    for constraint in (oc.max_norm(0.5), oc.top_k(4), oc.l1_ball(), oc.monotone())
]


def grouped(params: Any) -> list[tuple[Any, Any]]:
    """What `constrain` makes of parameters, and `project` of an update with zeros."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    return [(oc.constrain(params, r), moved(oc.project(r), params, zeros)) for r in GROUPED]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_debug_nans", True),
        ("jax_disable_jit", True),
    ],
)
def test_groups_under_strict_settings_of_jax(option, value):
    params = {"kernel": leaf(4, 3, dtype=jnp.bfloat16), "bias": leaf(3)}
    want = jax.jit(grouped)(params)
    # While JAX traces, it complains of types and ranks; of a NaN, when an operation has one.
    run = jax.jit(grouped) if "promotion" in option else grouped
    before = getattr(jax.config, option)
    jax.config.update(option, value)
    try:
        got = run(params)
    finally:
        jax.config.update(option, before)
    for (constrained, updated), (allowed, _) in zip(got, want, strict=True):
        close(constrained, allowed, 2)
        close(updated, allowed, 2)


NAMES = ("kernel", "bias", "scale", "weight", "w", "a", "b", "kernel+bias", "x*", "")
FLOATS = (jnp.float32, jnp.float32, jnp.bfloat16)
ANY_SET = (
    *(None, "max_norm", oc.max_norm(1.0, axis="fan_in"), oc.unit_norm(), oc.fixed_norm("init")),
    *(oc.top_k(2), oc.top_k(0.3), oc.simplex(), oc.l1_ball(), oc.non_neg(), oc.monotone()),
    *(oc.stacked(oc.max_norm(1.0)), oc.stacked(oc.simplex(), axis=(0, 1)), oc.orthogonal()),
    *(oc.compose(oc.non_neg(), oc.max_norm(1.0)), oc.max_norm("fan_in"), oc.nm(1, 2)),
)


class Fuzz:
    """Trees, layouts and rules from a seed."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def one(self, *things: Any) -> Any:
        return things[self.rng.integers(len(things))]

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def leaf(self) -> Any:
        if self.chance(0.05):
            return self.one(None, 1.5, "text", jnp.arange(3))
        shape = self.rng.choice((0, 1, 2, 3), self.rng.integers(4))
        return leaf(*map(int, shape), dtype=self.one(*FLOATS))

    def layer(self) -> Any:
        i, o = self.rng.integers(1, 4, 2)
        return self.one(
            {"kernel": leaf(i, o), "bias": leaf(o, dtype=self.one(*FLOATS))},
            {"weight": leaf(o, i), "bias": leaf(o)},
            {"kernel": leaf(2, i, o), "bias": leaf(2, o)},
            {self.one(*NAMES): self.leaf() for _ in range(3)},
        )

    def tree(self, depth: int = 0) -> Any:
        if depth == 2 or (depth and self.chance(0.6)):
            return self.layer() if self.chance(0.8) else self.leaf()
        children = [self.tree(depth + 1) for _ in range(self.rng.integers(1, 4))]
        return children if self.chance(0.2) else {self.one(*NAMES): child for child in children}

    def layout(self, tree: Any) -> Any:
        found = {}
        for path, w in leaves_by_path(tree):
            axes = range(getattr(w, "ndim", 0))
            stacked = tuple(a for a in axes if self.chance(0.2))
            own = tuple(a for a in axes if a not in stacked and self.chance(0.5))
            fan_in = None if self.chance(0.1) else own
            found[path] = LeafLayout(self.one("Dense", "Conv"), fan_in, stacked)
        return found

    def single(self) -> Any:
        return self.one(
            *("kernel", "bias", "weight", "*", "**", "**/kernel", "/a/*", self.one(*NAMES)),
            *(re.compile(".*kernel"), lambda path, leaf: len(path) % 2),
            *(of_layer("Dense", "kernel"), of_layer("Conv")),
        )

    def rules(self, depth: int = 0) -> Any:
        pairs = []
        for _ in range(self.rng.integers(1, 4)):
            pattern = self.one(
                joint("kernel", "bias"),
                joint(*(self.single() or "b" for _ in range(2))),
                across(*(self.single() or "b" for _ in range(self.rng.integers(1, 3)))),
                self.single(),
            )
            deeper = depth < 2 and self.chance(0.1)
            pairs.append((pattern, self.rules(depth + 1) if deeper else self.one(*ANY_SET)))
        return pairs if self.chance(0.6) else dict(pairs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rules_at_random_bind_or_say_why_not():
    bound = refused = ran = 0
    for seed in range(2500):
        fuzz = Fuzz(seed)
        tree, rules = fuzz.tree(), fuzz.rules()
        known = fuzz.layout(tree) if fuzz.chance(0.5) else None
        try:
            if fuzz.chance(0.2):
                rules = oc.deserialize(json.loads(json.dumps(oc.serialize(rules))))
            bindings = list(Binder(rules, layout=known, strict=fuzz.chance(0.3))(tree))
        except (TypeError, ValueError) as error:
            refused += len(str(error)) > 20
            continue
        bound += 1
        places = [place for b in bindings for place in b.places]
        assert sorted(places) == list(range(len(jax.tree.leaves(tree))))
        if ran < 40 and any(b.is_group for b in bindings):
            ran += 1
            once = oc.constrain(tree, rules, layout=known, strict=False)
            tx = oc.project(rules, layout=known, strict=False)
            again = oc.constrain(once, rules, layout=known, strict=False, state=tx.init(once))
            # A leaf in bfloat16 rounds what the others are divided by, too.
            narrow = any(getattr(w, "dtype", None) == jnp.bfloat16 for w in jax.tree.leaves(tree))
            for w, x, y in zip(*map(jax.tree.leaves, (tree, once, again)), strict=True):
                if not isinstance(w, jax.Array) or w.dtype == jnp.int32:
                    continue
                assert (x.shape, x.dtype) == (y.shape, y.dtype) == (w.shape, w.dtype)
                eps = float(jnp.finfo(jnp.bfloat16 if narrow else w.dtype).eps)
                most = max(1, np.max(np.abs(float64(x)), initial=0))
                np.testing.assert_allclose(float64(y), float64(x), rtol=0, atol=16 * eps * most)
    assert bound + refused == 2500
    assert min(bound, refused) > 500
    assert ran == 40


@pytest.mark.parametrize("pattern", [joint("kernel", "bias"), across("*")], ids=str)
def test_a_train_state_with_groups_goes_on_from_numpy(pattern):
    model = nn.Dense(3)
    params = model.init(jax.random.key(0), jnp.ones((2, 4)))["params"]
    state = linen.TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.adam(0.1),
        rules={pattern: oc.fixed_norm("init", axis=0)},
    )
    state = jax.jit(lambda state: state.apply_gradients(grads=params))(state)
    saved = jax.tree.map(np.asarray, serialization.to_state_dict(state))
    back = serialization.from_state_dict(state, saved)
    new, again = (s.apply_gradients(grads=params).params for s in (state, back))
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(again)))
    norms = [np.linalg.norm(vector(p)) for p in (params, new)]
    np.testing.assert_allclose(*norms, rtol=1e-6)


def test_a_vector_that_is_no_sum_of_parts_is_remembered():
    # Soft sets take the vector as one array.
    params = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
    rules = {across("*"): oc.soft(oc.fixed_norm("init"), rate=1.0)}
    tx = oc.project(rules)
    updates, state = tx.update(params, tx.init(params), params)
    close(updates, jax.tree.map(jnp.zeros_like, params), 4)
    close(oc.constrain(jax.tree.map(lambda p: 7 * p, params), rules, state=state), params, 4)
