"""Real parameter trees: training in each framework, and what each verb makes of its paths."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_constraints as oc

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (16, 3), jnp.float32)
Y = jax.random.normal(jax.random.key(2), (16, 2), jnp.float32)
CAP = 0.4

# The cap is along axis 0 in every framework, also where units run along other axes.
pytestmark = pytest.mark.filterwarnings("ignore:MaxNorm on .(first|second)/weight")

Parts = dict[str, list[Any]]
"""Leaves by what is asked of them: "capped" (norm along axis 0), "nonneg" and "free"."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree of some framework, with rules for it and what they should come to."""

    params: Any
    loss: Callable[[Any], jax.Array]
    rules: Any
    parts: Callable[[Any], Parts]
    paths: list[str]
    """The path of each array, in the order of the leaves."""
    constrained: set[str]
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(0.05)


def _mean_square(prediction: jax.Array) -> jax.Array:
    return jnp.mean((prediction - Y) ** 2)


def check_sets(parts: Parts) -> None:
    """Asserts with NumPy that each leaf is in its set, and that the sets bind at all."""
    capped = [np.asarray(w, np.float64) for w in parts["capped"]]
    nonneg = [np.asarray(w, np.float64) for w in parts["nonneg"]]
    assert capped or nonneg
    for w in capped:
        norms = np.sqrt(np.sum(w**2, axis=0))
        assert norms.max() <= CAP * (1 + 1e-6)
        np.testing.assert_allclose(norms.max(), CAP, rtol=1e-5)
    for w in nonneg:
        assert w.min() >= 0
    if nonneg:
        assert min(w.min() for w in nonneg) == 0


def check_free(before: Parts, after: Parts) -> None:
    """Asserts that each free leaf moved, and is not in one of the sets by chance."""
    assert before["free"]
    for old, new in zip(before["free"], after["free"], strict=True):
        assert np.all(np.asarray(old) != np.asarray(new))


# Flax Linen.


class _MLP(nn.Module):
    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        init: Any = nn.initializers.lecun_normal()
        if self.boxed:
            init = nn.with_partitioning(init, (None, "model"))
        x = nn.tanh(nn.Dense(8, kernel_init=init)(x))
        return nn.Dense(2)(x)


_MLP_RULES = {"Dense_0": {"kernel": oc.max_norm(CAP)}, "bias": oc.non_neg()}
_MLP_PATHS = [f"params/Dense_{i}/{name}" for i in (0, 1) for name in ("bias", "kernel")]
_MLP_CONSTRAINED = {"params/Dense_0/kernel", "params/Dense_0/bias", "params/Dense_1/bias"}


def _mlp_parts(params: Any) -> Parts:
    params = nn.meta.unbox(params)["params"]
    return {
        "capped": [params["Dense_0"]["kernel"]],
        "nonneg": [params["Dense_0"]["bias"], params["Dense_1"]["bias"]],
        "free": [params["Dense_1"]["kernel"]],
    }


def _linen(*, freeze: bool = False, boxed: bool = False) -> Case:
    model = _MLP(boxed)
    params = model.init(KEY, X)
    if freeze:
        params = flax.core.freeze(params)
    return Case(
        params,
        lambda params: _mean_square(jnp.asarray(model.apply(params, X))),
        _MLP_RULES,
        _mlp_parts,
        _MLP_PATHS,
        _MLP_CONSTRAINED,
    )


class _Attention(nn.Module):
    """Attention, whose modules are called query, key, value and out."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4, out_features=2)(x)


def _linen_attention() -> Case:
    model = _Attention()
    prefix = "params/MultiHeadDotProductAttention_0"

    def parts(params: Any) -> Parts:
        params = params["params"]["MultiHeadDotProductAttention_0"]
        return {
            "capped": [params["value"]["kernel"]],
            "nonneg": [params["value"]["bias"]],
            "free": [params["query"]["kernel"], params["out"]["kernel"], params["out"]["bias"]],
        }

    return Case(
        model.init(KEY, X[None]),
        lambda params: _mean_square(jnp.asarray(model.apply(params, X[None]))[0]),
        {"value/kernel": oc.max_norm(CAP), "value/bias": oc.non_neg()},
        parts,
        [f"{prefix}/{m}/{n}" for m in ("key", "out", "query", "value") for n in ("bias", "kernel")],
        {f"{prefix}/value/kernel", f"{prefix}/value/bias"},
        lambda: optax.adam(0.2),
    )


# Flax NNX.


class _NNXModel(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 8, rngs=rngs)
        self.value = nnx.Linear(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.0, rngs=rngs)

    def __call__(self, x):
        return self.value(self.dropout(nnx.tanh(self.first(x))))


_NNX_RULES = {"first/kernel": oc.max_norm(CAP), "bias": oc.non_neg()}
_NNX_PATHS = ["first/bias", "first/kernel", "value/bias", "value/kernel"]
_NNX_CONSTRAINED = {"first/kernel", "first/bias", "value/bias"}


def _nnx_parts(model: Any) -> Parts:
    first, second = model["first"], model["value"]
    return {
        "capped": [first["kernel"]],
        "nonneg": [first["bias"], second["bias"]],
        "free": [second["kernel"]],
    }


def _nnx_arrays(model: nnx.Module) -> Any:
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def _nnx_state() -> Case:
    graph, params, rest = nnx.split(_NNXModel(nnx.Rngs(0)), nnx.Param, ...)
    return Case(
        params,
        lambda params: _mean_square(nnx.merge(graph, params, rest)(X)),
        _NNX_RULES,
        lambda params: _nnx_parts(nnx.to_pure_dict(params)),
        _NNX_PATHS,
        _NNX_CONSTRAINED,
    )


# Equinox.


class _EqxModel(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    activation: Callable

    def __call__(self, x):
        return self.second(self.activation(self.first(x)))


_EQX_RULES = {"first/weight": oc.max_norm(CAP), "bias": oc.non_neg()}
_EQX_PATHS = ["first/weight", "first/bias", "second/weight", "second/bias"]
_EQX_CONSTRAINED = {"first/weight", "first/bias", "second/bias"}


def _eqx_model() -> _EqxModel:
    keys = jax.random.split(KEY)
    linear = [
        eqx.nn.Linear(3, 8, dtype=jnp.float32, key=keys[0]),
        eqx.nn.Linear(8, 2, dtype=jnp.float32, key=keys[1]),
    ]
    return _EqxModel(*linear, activation=jax.nn.tanh)


def _eqx_parts(model: Any) -> Parts:
    return {
        "capped": [model.first.weight],
        "nonneg": [model.first.bias, model.second.bias],
        "free": [model.second.weight],
    }


def _equinox() -> Case:
    params, static = eqx.partition(_eqx_model(), eqx.is_inexact_array)
    assert params.activation is None
    return Case(
        params,
        lambda params: _mean_square(jax.vmap(eqx.combine(params, static))(X)),
        _EQX_RULES,
        _eqx_parts,
        _EQX_PATHS,
        _EQX_CONSTRAINED,
    )


# Haiku.


def _haiku() -> Case:
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([8, 2])(x)))

    def parts(params: Any) -> Parts:
        first, second = params["mlp/~/linear_0"], params["mlp/~/linear_1"]
        return {
            "capped": [first["w"]],
            "nonneg": [first["b"], second["b"]],
            "free": [second["w"]],
        }

    return Case(
        net.init(KEY, X),
        lambda params: _mean_square(net.apply(params, X)),
        {"linear_0/w": oc.max_norm(CAP), "b": oc.non_neg()},
        parts,
        [f"mlp/~/linear_{i}/{name}" for i in (0, 1) for name in ("b", "w")],
        {"mlp/~/linear_0/w", "mlp/~/linear_0/b", "mlp/~/linear_1/b"},
        lambda: optax.sgd(0.3, momentum=0.9),
    )


# Containers of plain Python.


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Layer:
    w: Any
    b: Any


class _Pair(NamedTuple):
    first: Any
    second: Any


def _apply(layers: Any, x: jax.Array) -> jax.Array:
    (w0, b0), (w1, b1) = layers
    return jnp.tanh(x @ w0 + b0) @ w1 + b1


def _plain(
    build: Callable[[list[tuple[jax.Array, jax.Array]]], Any],
    layers: Callable[[Any], Any],
    rules: Any,
    paths: list[str],
    constrained: set[str],
    optimizer: Callable[[], optax.GradientTransformation] = lambda: optax.adam(0.05),
) -> Case:
    keys = jax.random.split(KEY)
    shapes = [(3, 8), (8, 2)]
    params = build(
        [
            (jax.random.normal(k, s, jnp.float32) / 2, jnp.zeros(s[1], jnp.float32))
            for k, s in zip(keys, shapes, strict=True)
        ]
    )

    def parts(params: Any) -> Parts:
        (w0, b0), (w1, b1) = layers(params)
        return {"capped": [w0], "nonneg": [b0, b1], "free": [w1]}

    def loss(params: Any) -> jax.Array:
        return _mean_square(_apply(layers(params), X))

    return Case(params, loss, rules, parts, paths, constrained, optimizer)


def _dicts() -> Case:
    return _plain(
        lambda ls: {f"layer{i}": {"w": w, "b": b} for i, (w, b) in enumerate(ls)},
        lambda p: [(p[f"layer{i}"]["w"], p[f"layer{i}"]["b"]) for i in (0, 1)],
        {"layer0/w": oc.max_norm(CAP), "b": "non_neg"},
        ["layer0/b", "layer0/w", "layer1/b", "layer1/w"],
        {"layer0/b", "layer0/w", "layer1/b"},
        lambda: optax.sgd(0.5),
    )


def _lists() -> Case:
    return _plain(
        lambda ls: [[w, b] for w, b in ls],
        lambda p: p,
        {"/0/0": oc.max_norm(CAP), "*/1": oc.non_neg()},
        ["0/0", "0/1", "1/0", "1/1"],
        {"0/0", "0/1", "1/1"},
    )


def _tuples() -> Case:
    return _plain(
        lambda ls: {"net": tuple(ls)},
        lambda p: p["net"],
        {"net": {"0/0": oc.max_norm(CAP), "*/1": oc.non_neg()}},
        ["net/0/0", "net/0/1", "net/1/0", "net/1/1"],
        {"net/0/0", "net/0/1", "net/1/1"},
    )


def _dataclasses() -> Case:
    return _plain(
        lambda ls: [_Layer(w, b) for w, b in ls],
        lambda p: [(layer.w, layer.b) for layer in p],
        [("0/w", oc.max_norm(CAP)), ("b", oc.non_neg())],
        ["0/w", "0/b", "1/w", "1/b"],
        {"0/w", "0/b", "1/b"},
    )


def _named_tuples() -> Case:
    return _plain(
        lambda ls: _Pair(*(_Layer(w, b) for w, b in ls)),
        lambda p: [(layer.w, layer.b) for layer in p],
        {"first/w": oc.max_norm(CAP), "b": oc.non_neg()},
        ["first/w", "first/b", "second/w", "second/b"],
        {"first/w", "first/b", "second/b"},
    )


def _with_none() -> Case:
    return _plain(
        lambda ls: {"skip": None, "net": [{"w": w, "b": b, "extra": None} for w, b in ls]},
        lambda p: [(layer["w"], layer["b"]) for layer in p["net"]],
        {"0/w": oc.max_norm(CAP), "b": oc.non_neg()},
        ["net/0/b", "net/0/w", "net/1/b", "net/1/w"],
        {"net/0/w", "net/0/b", "net/1/b"},
    )


def _boxes() -> Case:
    return _plain(
        lambda ls: [{"w": _boxed(w), "value": {"b": b}} for w, b in ls],
        lambda p: [(layer["w"].value, layer["value"]["b"]) for layer in p],
        {"/0/w": oc.max_norm(CAP), "value/b": oc.non_neg()},
        ["0/value/b", "0/w", "1/value/b", "1/w"],
        {"0/w", "0/value/b", "1/value/b"},
    )


CASES: dict[str, Callable[[], Case]] = {
    "linen": _linen,
    "linen FrozenDict": lambda: _linen(freeze=True),
    "linen partitioned": lambda: _linen(boxed=True),
    "linen attention": _linen_attention,
    "nnx state": _nnx_state,
    "equinox": _equinox,
    "haiku": _haiku,
    "dicts": _dicts,
    "lists": _lists,
    "tuples": _tuples,
    "dataclasses": _dataclasses,
    "named tuples": _named_tuples,
    "None leaves": _with_none,
    "boxes": _boxes,
}


def train(
    case: Case, transform: optax.GradientTransformation, steps: int = 4, params: Any = None
) -> tuple[Any, Any]:
    """A few jitted steps; returns the parameters and the state."""
    params = case.params if params is None else params
    state = transform.init(params)

    @jax.jit
    def step(params, state):
        updates, state = transform.update(jax.grad(case.loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_stays_in_the_sets(name):
    case = CASES[name]()
    tx = optax.chain(case.optimizer(), oc.project(case.rules))
    params, state = train(case, tx)
    assert jax.tree.structure(params) == jax.tree.structure(case.params)
    assert int(state[-1].updates_seen) == 4
    before, after = case.parts(case.params), case.parts(params)
    check_sets(after)
    check_free(before, after)
    for w in after["free"]:
        assert np.min(w) < 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)


@pytest.mark.parametrize("name", CASES)
def test_all_verbs_agree_on_paths(name):
    case = CASES[name]()
    # Far outside of every set, so that each constraint has something to do.
    params = jax.tree.map(lambda w: w * 10 - 1, case.params)
    rows = oc.report(params, case.rules).rows
    assert [row.path for row in rows] == case.paths
    assert {row.path for row in rows if row.constraint is not None} == case.constrained
    measured = jax.jit(lambda params: oc.violations(params, case.rules))(params)
    assert set(measured) == case.constrained
    for row in rows:
        if row.outside is not None:
            assert row.outside > 0
            np.testing.assert_allclose(row.outside, measured[row.path], rtol=1e-5)
    new = jax.jit(lambda params: oc.constrain(params, case.rules))(params)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    check_sets(case.parts(new))
    jax.tree.map(np.testing.assert_array_equal, case.parts(new)["free"], case.parts(params)["free"])
    oc.project(case.rules).init(params)


class _AttentionTuple(NamedTuple):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _AttentionDataclass:
    query: Any
    key: Any
    value: Any


class _AttentionModule(eqx.Module):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _OneValue:
    """A class of a user's own that looks like a box of Flax."""

    value: Any


class _Trainable(nnx.Param):
    """A user's own kind of variable."""


def _boxed(w: Any) -> nn.Partitioned:
    return nn.Partitioned(w, (None,) * w.ndim)


@pytest.mark.parametrize("attention", [_AttentionTuple, _AttentionDataclass, _AttentionModule])
def test_a_field_called_value_is_a_leaf_like_others(attention):
    w = -jnp.ones(2, jnp.float32)
    params = {"attn": attention(w, w, w), "dict": {"value": attention(w, w, w)}}
    paths = [f"{parent}/{name}" for parent in ("attn", "dict/value") for name in ATTENTION]
    assert sorted(oc.violations(params, oc.non_neg())) == sorted(paths)
    new = oc.constrain(params, {"attn/*": oc.non_neg()})
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(new["attn"]))
    tx = oc.project({"attn/value": oc.box(upper=-2.0)})
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert np.all(moved["attn"].value == -2)
    assert np.all(moved["attn"].key == -1)


ATTENTION = ("query", "key", "value")


def test_only_what_boxes_of_flax_add_is_left_out():
    w = -jnp.ones(2, jnp.float32)
    params = {
        "box": _boxed(w),
        "box_in_variable": nnx.Param(_boxed(w)),
        "variable": _Trainable(w),
        "key": {"value": w},
        "nested": {"value": _boxed(w)},
        "own": _OneValue(w),
        "value": nn.Partitioned(_OneValue(w), (None,)),
    }
    paths = ["box", "box_in_variable", "key/value", "nested/value", "own/value"]
    paths += ["value/value/value", "variable"]
    assert sorted(oc.violations(params, oc.non_neg())) == paths
    assert list(oc.violations(_boxed(w), {"value": oc.non_neg()})) == ["value"]
    assert list(oc.violations(_OneValue(w), {"value": oc.non_neg()})) == ["value"]


# NNX, with its own optimizer and modules.


def test_nnx_optimizer():
    model = _NNXModel(nnx.Rngs(0))
    before = _nnx_parts(_nnx_arrays(model))
    tx = optax.chain(optax.adam(0.05), oc.project(_NNX_RULES))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: _mean_square(model(X)))(model)
        optimizer.update(model, grads)

    for _ in range(4):
        step(model, optimizer)
    after = _nnx_parts(_nnx_arrays(model))
    check_sets(after)
    check_free(before, after)


def test_nnx_rules_bind_alike_at_init_and_update():
    seen: list[str] = []
    given: list[list[Any]] = []

    def spy(path, leaf):
        seen.append(path)
        return path == "first/kernel"

    def note(tree: Any) -> None:
        given.append([keys for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]])

    def update(updates, state, params=None):
        note(params)
        return updates, state

    noted = optax.GradientTransformation(lambda params: note(params) or (), update)
    model = _NNXModel(nnx.Rngs(0))
    tx = optax.chain(optax.sgd(0.1), noted, oc.project([(spy, oc.max_norm(CAP))]))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    assert seen == _NNX_PATHS
    optimizer.update(model, nnx.grad(lambda model: _mean_square(model(X)))(model))
    # The optimizer shows variables at init and plain arrays at update: other keys, same paths.
    assert len(given[0][0]) == len(given[1][0]) + 1
    assert seen in (_NNX_PATHS, _NNX_PATHS * 2)
    w = np.asarray(_nnx_arrays(model)["first"]["kernel"])
    np.testing.assert_allclose(np.linalg.norm(w, axis=0).max(), CAP, rtol=1e-5)


def _nnx_outside() -> _NNXModel:
    """A model whose parameters are outside of their sets."""
    model = _NNXModel(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(lambda w: w - 1, nnx.state(model, nnx.Param)))
    return model


def test_nnx_constrain_and_update():
    model = _nnx_outside()
    nnx.update(model, oc.constrain(nnx.state(model, nnx.Param), _NNX_RULES))
    check_sets(_nnx_parts(_nnx_arrays(model)))


def test_nnx_module_itself():
    model = _nnx_outside()
    new = oc.constrain(model, _NNX_RULES)
    assert isinstance(new, _NNXModel)
    check_sets(_nnx_parts(_nnx_arrays(new)))
    np.testing.assert_array_equal(
        _nnx_arrays(new)["value"]["kernel"], _nnx_arrays(model)["value"]["kernel"]
    )
    rows = oc.report(model, _NNX_RULES).rows
    assert [row.path for row in rows if not row.path.startswith("dropout")] == _NNX_PATHS
    assert set(oc.violations(model, _NNX_RULES)) == _NNX_CONSTRAINED
    # The counter and the key of the dropout layer are no floating-point arrays.
    assert set(oc.violations(model, oc.non_neg())) == set(_NNX_PATHS)


# Equinox, with its own jit and grad.


def test_equinox_filtered_training():
    model = _eqx_model()
    tx = optax.chain(optax.adam(0.05), oc.project(_EQX_RULES))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state):
        grads = eqx.filter_grad(lambda model: _mean_square(jax.vmap(model)(X)))(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    new = model
    for _ in range(4):
        new, state = step(new, state)
    check_sets(_eqx_parts(new))
    check_free(_eqx_parts(model), _eqx_parts(new))
    assert new.activation is model.activation


def test_equinox_module_with_a_function_for_a_leaf():
    model: Any = _eqx_model()
    assert any(leaf is model.activation for leaf in jax.tree.leaves(model))
    new = oc.constrain(model, oc.max_norm(CAP))
    assert new.activation is model.activation
    assert [row.path for row in oc.report(model, oc.max_norm(CAP)).rows] == _EQX_PATHS
    assert set(oc.violations(model, _EQX_RULES)) == _EQX_CONSTRAINED
    # The gradients of a whole module have None in the place of the function.
    tx = oc.project(_EQX_RULES)
    grads = eqx.filter_grad(lambda model: _mean_square(jax.vmap(model)(X)))(model)
    updates: Any = tx.update(grads, tx.init(model), model)[0]
    assert updates.activation is None
    new = eqx.apply_updates(model, updates)
    norms = np.linalg.norm(np.asarray(new.first.weight), axis=0)
    np.testing.assert_allclose(norms.max(), CAP, rtol=1e-5)


# Trees with little or nothing in them.


@pytest.mark.parametrize(
    "empty", [{}, [], (), None, {"a": None, "b": []}, flax.core.freeze({}), optax.MaskedNode()]
)
@pytest.mark.parametrize("rules", [{"kernel": oc.max_norm(1.0)}, oc.max_norm(1.0), None])
def test_a_tree_without_leaves(empty, rules):
    tx = oc.project(rules)
    state: Any = tx.init(empty)
    if empty is not None:
        updates, state = tx.update(empty, state, empty)
        assert jax.tree.structure(updates) == jax.tree.structure(empty)
        assert state.updates_seen == 1
    assert jax.tree.leaves(oc.constrain(empty, rules)) == []
    assert oc.violations(empty, rules) == {}
    assert oc.report(empty, rules).rows == ()
    assert str(oc.report(empty, rules)) == "no leaves"


def test_an_update_of_none_leaves_its_parameter_alone():
    params = {"a": jnp.full(2, -1.0, jnp.float32), "b": jnp.full(2, -1.0, jnp.float32)}
    for every in (1, 2):
        tx = oc.project(oc.non_neg(), every=every)
        state = tx.init(params)
        updates: Any = {"a": None, "b": jnp.zeros(2, jnp.float32)}
        new: Any = None
        for _ in range(every):
            new, state = jax.jit(tx.update)(updates, state, params)
        assert new["a"] is None
        np.testing.assert_array_equal(new["b"], np.ones(2))


# Optax's own wrappers.


def test_optax_masked():
    case = _dicts()
    mask = {"layer0": {"w": True, "b": True}, "layer1": {"w": False, "b": False}}
    seen: list[str] = []

    def spy(path, leaf):
        seen.append(path)
        return path.endswith("w")

    rules = [(spy, oc.max_norm(CAP)), ("b", oc.non_neg())]
    params, _ = train(case, optax.chain(optax.sgd(0.5), optax.masked(oc.project(rules), mask)))
    assert set(seen) == {"layer0/w", "layer0/b"}
    before, after = case.parts(case.params), case.parts(params)
    check_sets({"capped": after["capped"], "nonneg": after["nonneg"][:1]})
    check_free(before, after)
    free = case.parts(train(case, optax.sgd(0.5))[0])
    assert np.min(free["nonneg"][1]) < 0
    assert np.min(after["nonneg"][1]) < 0
    # A rule for what the mask hides matches nothing.
    hidden = optax.masked(oc.project({"layer1/w": oc.non_neg()}), mask)
    with pytest.raises(ValueError, match="'layer1/w' matches no leaf"):
        hidden.init(case.params)


def test_optax_partition():
    case = _dicts()
    partition: Any = getattr(optax, "partition", None) or optax.multi_transform
    labels = {"layer0": {"w": "a", "b": "a"}, "layer1": {"w": "b", "b": "frozen"}}
    tx = partition(
        {
            "a": optax.chain(
                optax.adam(0.05), oc.project({"layer0/w": oc.max_norm(CAP), "b": oc.non_neg()})
            ),
            "b": optax.sgd(0.5),
            "frozen": optax.set_to_zero(),
        },
        labels,
    )
    params, _ = train(case, tx)
    before, after = case.parts(case.params), case.parts(params)
    check_sets({"capped": after["capped"], "nonneg": after["nonneg"][:1]})
    check_free(before, after)
    np.testing.assert_array_equal(after["nonneg"][1], before["nonneg"][1])


def test_masked_nodes_pass_through_the_verbs():
    params = {"a": optax.MaskedNode(), "w": -jnp.ones(2, jnp.float32)}
    new = oc.constrain(params, {"w": oc.non_neg()})
    assert isinstance(new["a"], optax.MaskedNode)
    np.testing.assert_array_equal(new["w"], np.zeros(2))
    assert [row.path for row in oc.report(params, oc.non_neg()).rows] == ["w"]
    tx = oc.project(oc.non_neg())
    updates: Any = tx.update(params, tx.init(params), params)[0]
    assert isinstance(updates["a"], optax.MaskedNode)


def test_tree_map_params_over_the_state():
    case = _dicts()
    tx = optax.chain(optax.adam(0.1), oc.project(case.rules))
    _, state = train(case, tx)
    counts: list[Any] = []
    marked: Any = optax.tree_map_params(
        tx,
        lambda leaf: leaf * 0 + 7,
        state,
        transform_non_params=lambda leaf: counts.append(leaf) or leaf,
    )
    assert jax.tree.structure(marked) == jax.tree.structure(state)
    np.testing.assert_array_equal(marked[0][0].mu["layer0"]["w"], np.full((3, 8), 7))
    # Nothing in the state of project belongs to a parameter.
    assert int(marked[-1].updates_seen) == int(state[-1].updates_seen) == 4
    assert any(leaf is state[-1].updates_seen for leaf in counts)
