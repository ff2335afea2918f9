"""What `axis` means for one leaf: explicit axes, and "fan_in" by the names that layers use."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_constraints as oc
from optax_constraints._rules import Binder

KEY = jax.random.key(0)


def _weights(*shape: int) -> np.ndarray:
    size = int(np.prod(shape))
    return np.random.default_rng(size).normal(size=shape).astype(np.float32)


def _scaled(w: np.ndarray, axis: Any, norm_to: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each unit along `axis` with its norm replaced: the slow reference."""
    wide = w.astype(np.float64)
    norm = np.sqrt(np.sum(wide**2, axis=axis, keepdims=True))
    return wide * norm_to(norm) / norm


_SETS = {
    "max_norm": (lambda axis: oc.max_norm(0.8, axis=axis), lambda n: np.minimum(n, 0.8)),
    "min_max_norm": (
        lambda axis: oc.min_max_norm(0.5, 0.8, axis=axis),
        lambda n: np.clip(n, 0.5, 0.8),
    ),
    "unit_norm": (lambda axis: oc.unit_norm(axis=axis), np.ones_like),
}


# Explicit axes.


@pytest.mark.parametrize("name", _SETS)
@pytest.mark.parametrize(
    ("axis", "settled"),
    [
        (0, (0,)),
        (2, (2,)),
        (-1, (2,)),
        (-3, (0,)),
        (np.int64(1), (1,)),
        ((0, 1), (0, 1)),
        ((1, 0), (0, 1)),
        ([0, 2], (0, 2)),
        ([-1, 0], (0, 2)),
        ((1,), (1,)),
        (range(2), (0, 1)),
        ((0, 1, 2), (0, 1, 2)),
        (None, (0, 1, 2)),
        ((), ()),
        ([], ()),
    ],
    ids=str,
)
def test_axis_against_numpy(name, axis, settled):
    make, norm_to = _SETS[name]
    w = _weights(3, 4, 5)
    expected = _scaled(w, settled, norm_to)
    np.testing.assert_allclose(make(axis)(w), expected, rtol=3e-6)
    new = oc.constrain({"layer": {"w": jnp.asarray(w)}}, {"w": make(axis)})
    np.testing.assert_allclose(new["layer"]["w"], expected, rtol=3e-6)
    params = {"w": jnp.asarray(w)}
    tx = oc.project({"w": make(axis)})
    updates: Any = tx.update({"w": jnp.zeros_like(params["w"])}, tx.init(params), params)[0]
    np.testing.assert_allclose(params["w"] + updates["w"], expected, rtol=1e-5, atol=1e-6)


def test_the_default_is_axis_0():
    w = _weights(3, 4)
    for make, given in [(oc.max_norm, 0.1), (oc.unit_norm, None), (oc.min_max_norm, 0.1)]:
        default = make() if given is None else make(given)
        along_0 = make(axis=0) if given is None else make(given, axis=0)
        np.testing.assert_array_equal(default(w), along_0(w))


@pytest.mark.parametrize(
    ("axis", "settled"), [(-1, (2,)), ([2, 0], (0, 2)), (None, (0, 1, 2)), ((), ()), (1, (1,))]
)
def test_the_report_shows_settled_axes(axis, settled):
    rows = oc.report({"w": jnp.asarray(_weights(2, 3, 2))}, oc.max_norm(1.0, axis=axis)).rows
    assert rows[0].axis == settled
    units = {(2,): 6, (0, 2): 3, (0, 1, 2): 1, (): 12, (1,): 4}
    assert rows[0].units == units[settled]


def test_one_constraint_settles_for_each_rank():
    params = {"k": jnp.asarray(_weights(2, 3, 4)), "b": jnp.asarray(_weights(4))}
    assert _axes(params, oc.max_norm(1.0, axis=-1)) == {"b": (0,), "k": (2,)}


@pytest.mark.parametrize("axis", [3, -4, (0, 3), [1, -4]])
def test_an_axis_that_is_out_of_range(axis):
    bad = next(a for a in np.atleast_1d(axis) if not -3 <= a < 3)
    ranks = r"is out of range; this leaf has the axes -3 to 2, and None means the whole tensor"
    with pytest.raises(
        ValueError, match=rf"MaxNorm on 'conv/w' of shape \(2, 3, 4\): axis {bad} {ranks}"
    ):
        oc.project({"w": oc.max_norm(axis=axis)}).init({"conv": {"w": _weights(2, 3, 4)}})
    with pytest.raises(ValueError, match=rf"an array of shape \(2, 3, 4\): axis {bad} {ranks}"):
        oc.max_norm(axis=axis)(_weights(2, 3, 4))


@pytest.mark.parametrize("make", [oc.max_norm, oc.min_max_norm, oc.unit_norm])
def test_an_axis_named_twice(make):
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name}: axis=\(0, 0\) names an axis twice"):
        make(axis=(0, 0))
    with pytest.raises(ValueError, match=rf"{name}: axis=\[-1, 0, -1\] names an axis twice"):
        make(axis=[-1, 0, -1])
    # Only at the leaf do 0 and -2 turn out to be the same axis.
    late = make(axis=(0, -2))
    with pytest.raises(ValueError, match=rf"{name} on 'w' of shape \(3, 4\): .*names an axis twi"):
        oc.constrain({"w": _weights(3, 4)}, {"w": late})
    assert _axes({"w": jnp.asarray(_weights(3, 4, 5))}, late) == {"w": (0, 1)}


@pytest.mark.parametrize("axis", [0, -1, (0,), [0, 1]])
def test_a_scalar_has_no_axis(axis):
    with pytest.raises(ValueError, match=r"'a/s' of shape \(\): a scalar has no axis .*axis=None"):
        oc.constrain({"a": {"s": np.float32(3)}}, {"s": oc.max_norm(axis=axis)})
    for whole in (None, ()):
        assert oc.constrain({"s": np.float32(3)}, {"s": oc.max_norm(1.0, axis=whole)})["s"] == 1


@pytest.mark.parametrize(
    ("axis", "error"),
    [
        (True, TypeError),
        ((0, False), TypeError),
        (1.0, TypeError),
        ([0, 1.0], TypeError),
        ({}, TypeError),
        ({"axis": 0}, TypeError),
        ({0, 1}, TypeError),
        (np.array([0, 1]), TypeError),
        ((0, None), TypeError),
        (((0, 1), 2), TypeError),
        (["fan_in"], TypeError),
        (b"\x00\x01", TypeError),
        ("fan_out", ValueError),
        ("0", ValueError),
        ("", ValueError),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [oc.max_norm, oc.min_max_norm, oc.unit_norm])
def test_what_is_no_axis(make, axis, error):
    with pytest.raises(
        error, match=rf"{make.__name__}: axis=.* write an int, .*None for the whole .*'fan_in'"
    ):
        make(axis=axis)


# "fan_in", on the trees of real layers.


def _axes(params: Any, rules: Any) -> dict[str, tuple[int, ...]]:
    """The axes of each constrained leaf."""
    bound = Binder(rules)(params)
    return {b.path: getattr(b.constraint, "axis", ()) for b in bound if b.constraint}


def _ones(*shape: int) -> jax.Array:
    return jnp.ones(shape, jnp.float32)


# Names and shapes are all that counts here, so the layers are not run.
_shapes: Callable[..., Any] = jax.eval_shape


class _Net(nn.Module):
    """One of each layer of Flax Linen whose fan-in can be told by name and rank."""

    @nn.compact
    def __call__(self, x):
        tokens = nn.Embed(7, 6)(jnp.zeros(4, jnp.int32))
        y = nn.MultiHeadDotProductAttention(num_heads=2)(tokens[None])
        y = nn.LayerNorm()(y) + nn.RMSNorm()(y)
        x1 = nn.Conv(3, (2,))(x[:, 0, 0])
        x2 = nn.Conv(4, (2, 3))(x[:, 0])
        x3 = nn.Conv(5, (2, 3, 1), name="stem_conv")(x)
        grouped = nn.Conv(4, (3,), feature_group_count=2)(x[:, 0, 0])
        x2 = nn.BatchNorm(use_running_average=True)(x2)
        return nn.Dense(3)(y), x1, x2, x3, grouped


def _linen() -> Any:
    return _shapes(_Net().init, KEY, _ones(1, 3, 3, 3, 2))["params"]


_LINEN = {
    "Embed_0/embedding": (1,),
    "MultiHeadDotProductAttention_0/query/kernel": (0,),
    "MultiHeadDotProductAttention_0/key/kernel": (0,),
    "MultiHeadDotProductAttention_0/value/kernel": (0,),
    "MultiHeadDotProductAttention_0/out/kernel": (0, 1),
    "MultiHeadDotProductAttention_0/out/bias": (0,),
    "LayerNorm_0/bias": (0,),
    "LayerNorm_0/scale": (0,),
    "RMSNorm_0/scale": (0,),
    "Conv_0/kernel": (0, 1),
    "Conv_0/bias": (0,),
    "Conv_1/kernel": (0, 1, 2),
    "stem_conv/kernel": (0, 1, 2, 3),
    "Conv_2/kernel": (0, 1),
    "BatchNorm_0/scale": (0,),
    "BatchNorm_0/bias": (0,),
    "Dense_0/kernel": (0,),
    "Dense_0/bias": (0,),
}


class _NNXNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.conv1 = nnx.Conv(3, 4, (2,), rngs=rngs)
        self.conv2 = nnx.Conv(3, 4, (2, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.embed = nnx.Embed(7, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)


def _nnx() -> Any:
    return nnx.state(nnx.eval_shape(lambda: _NNXNet(nnx.Rngs(0))), nnx.Param)


_NNX = {
    "dense/kernel": (0,),
    "dense/bias": (0,),
    "conv1/kernel": (0, 1),
    "conv2/kernel": (0, 1, 2),
    "attention/query/kernel": (0,),
    "attention/key/kernel": (0,),
    "attention/value/kernel": (0,),
    "attention/out/kernel": (0, 1),
    "embed/embedding": (1,),
    "norm/scale": (0,),
}


def _haiku() -> Any:
    def net(x):
        tokens = hk.Embed(5, 3)(jnp.zeros(2, jnp.int32))
        y = hk.MultiHeadAttention(2, 3, w_init=hk.initializers.Constant(1))(tokens, tokens, tokens)
        x = hk.Conv2D(4, 3)(x)
        x = hk.Conv1D(3, 2)(x[0])
        x = hk.DepthwiseConv1D(1, 2, padding="SAME")(x)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=False)(x)
        return hk.nets.MLP([4, 2])(x), y

    return _shapes(hk.transform(net).init, KEY, _ones(1, 5, 5, 3))


_HAIKU = {
    "embed/embeddings": (1,),
    "multi_head_attention/query/w": (0,),
    "multi_head_attention/query/b": (0,),
    "multi_head_attention/linear/w": (0,),
    "conv2_d/w": (0, 1, 2),
    "conv2_d/b": (0,),
    "conv1_d/w": (0, 1),
    "depthwise_conv1_d/w": (0, 1),
    "layer_norm/scale": (0,),
    "mlp/~/linear_0/w": (0,),
    "mlp/~/linear_1/b": (0,),
}


class _EqxNet(eqx.Module):
    linear: eqx.nn.Linear
    mlp: eqx.nn.MLP
    conv1: eqx.nn.Conv1d
    conv2: eqx.nn.Conv2d
    embedding: eqx.nn.Embedding
    norm: eqx.nn.LayerNorm


def _equinox() -> Any:
    def make() -> _EqxNet:
        return _EqxNet(
            eqx.nn.Linear(3, 4, key=KEY),
            eqx.nn.MLP(3, 2, 4, 1, key=KEY),
            eqx.nn.Conv1d(3, 4, 2, key=KEY),
            eqx.nn.Conv2d(3, 4, (2, 3), key=KEY),
            eqx.nn.Embedding(7, 3, key=KEY),
            eqx.nn.LayerNorm(4),
        )

    return eqx.filter(eqx.filter_eval_shape(make), lambda leaf: hasattr(leaf, "shape"))


_EQUINOX = {
    "linear/weight": (1,),
    "linear/bias": (0,),
    "mlp/layers/0/weight": (1,),
    "conv1/weight": (1, 2),
    "conv2/weight": (1, 2, 3),
    "embedding/weight": (1,),
    "norm/weight": (0,),
    "norm/bias": (0,),
}


@pytest.mark.parametrize(
    ("make", "expected"),
    [(_linen, _LINEN), (_nnx, _NNX), (_haiku, _HAIKU), (_equinox, _EQUINOX)],
    ids=["linen", "nnx", "haiku", "equinox"],
)
def test_fan_in_of_real_layers(make, expected):
    params = jax.tree.map(lambda leaf: _weights(*leaf.shape), make())
    rules = dict.fromkeys(expected, oc.max_norm(0.3, axis="fan_in"))
    assert _axes(params, rules) == expected
    # The values as well: each unit against NumPy.
    old = jax.tree.leaves(params)
    new = jax.tree.leaves(oc.constrain(params, rules))
    for leaf, before, after in zip(Binder(rules)(params), old, new, strict=True):
        if leaf.path not in expected:
            np.testing.assert_array_equal(after, before)
            continue
        norm = np.sqrt(np.sum(before.astype(np.float64) ** 2, expected[leaf.path], keepdims=True))
        wanted = before * np.minimum(1, 0.3 / np.maximum(norm, 1e-30))
        np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("kernel", (3, 4), (0,)),
        ("w", (3, 4), (0,)),
        ("weight", (3, 4), (1,)),
        ("bias", (3,), (0,)),
        ("b", (3,), (0,)),
        ("scale", (3,), (0,)),
        ("Conv_0/kernel", (2, 2, 2, 2, 2), (0, 1, 2, 3)),
        ("CONV/kernel", (2, 3, 4), (0, 1)),
    ],
)
def test_fan_in_by_name_and_rank(path, shape, axes):
    params: Any = jnp.asarray(_weights(*shape))
    for key in reversed(path.split("/")):
        params = {key: params}
    assert _axes(params, {path: oc.unit_norm(axis="fan_in")}) == {path: axes}


# Where names and ranks do not settle it.


class _Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        dense = nn.vmap(nn.Dense, **axes)(4)
        conv = nn.vmap(nn.Conv, **axes)(4, (3,))
        return dense(x), conv(x)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Conv(2, (3,))(nn.Dense(2)(x)), None


class _Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        return nn.scan(_Block, length=3, **axes)()(x, None)[0]


def _stacked(layer: str, name: str) -> Callable[[], Any]:
    def make() -> Any:
        params = _shapes(_Stacked().init, KEY, _ones(3, 1, 5, 2))["params"]
        return {layer: {name: params[layer][name]}}

    return make


def _scanned(layer: str, name: str) -> Callable[[], Any]:
    def make() -> Any:
        params = _shapes(_Scanned().init, KEY, _ones(1, 5, 2))["params"]
        ((block, layers),) = params.items()
        return {block: {layer: {name: layers[layer][name]}}}

    return make


def _linen_layer(name: str, layer: nn.Module, leaf: str, *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        params = _shapes(layer.init, KEY, _ones(*shape))["params"]
        return {name: {leaf: params[leaf]}}

    return make


def _query_bias() -> Any:
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    params = _shapes(attention.init, KEY, _ones(1, 3, 4))["params"]
    return {"attention": {"query": {"bias": params["query"]["bias"]}}}


def _haiku_layer(make_layer: Callable[[], Any], name: str, *shape: int) -> Callable[[], Any]:
    def make() -> Any:
        net = hk.transform(lambda x: make_layer()(x))
        ((module, leaves),) = _shapes(net.init, KEY, _ones(*shape)).items()
        return {module: {name: leaves[name]}}

    return make


def _equinox_leaf(module: str, name: str) -> Callable[[], Any]:
    def make() -> Any:
        layers = {
            "gru": lambda: eqx.nn.GRUCell(3, 4, key=KEY),
            "conv": lambda: eqx.nn.Conv2d(3, 4, 2, key=KEY),
            "stem": lambda: eqx.nn.Conv2d(3, 4, 2, key=KEY),
        }
        return {module: {name: getattr(layers[module](), name)}}

    return make


_AMBIGUOUS: dict[str, tuple[Callable[[], Any], str]] = {
    "stacked dense": (_stacked("VmapDense_0", "kernel"), r"\(3, 2, 4\).*axis=1 for a stack"),
    "stacked dense bias": (_stacked("VmapDense_0", "bias"), r"\(3, 4\).*axis=0"),
    "stacked conv": (_stacked("VmapConv_0", "kernel"), r"\(3, 3, 2, 4\)"),
    "stacked conv bias": (_stacked("VmapConv_0", "bias"), r"\(3, 4\)"),
    "scanned dense": (_scanned("Dense_0", "kernel"), r"\(3, 2, 2\).*axis=1 for a stack"),
    "scanned conv": (_scanned("Conv_0", "kernel"), r"\(3, 3, 2, 2\)"),
    "dense general": (
        _linen_layer("DenseGeneral_0", nn.DenseGeneral((2, 3)), "kernel", 1, 4),
        r"\(4, 2, 3\).*\(0, 1\) for a Conv1D or axis=1",
    ),
    "conv1d under a plain name": (
        _linen_layer("stem", nn.Conv(4, (3,)), "kernel", 1, 5, 2),
        r"\(3, 2, 4\).*\(0, 1\) for a Conv1D",
    ),
    "conv2d under a plain name": (
        _linen_layer("stem", nn.Conv(4, (3, 3)), "kernel", 1, 5, 5, 2),
        r"\(3, 3, 2, 4\).*\(0, 1, 2\) for a conv",
    ),
    "unshared conv": (
        _linen_layer("ConvLocal_0", nn.ConvLocal(4, (3, 3)), "kernel", 1, 5, 5, 2),
        r"\(5, 5, 18, 4\)",
    ),
    "query bias": (_query_bias, r"'attention/query/bias' of shape \(2, 2\)"),
    "offset": (
        _haiku_layer(lambda: hk.LayerNorm(-1, True, True), "offset", 1, 3),
        r"offset' of shape \(3,\).*axis=0",
    ),
    # The kernel of a transposed convolution is (*window, out, in) in Haiku.
    "haiku conv transpose": (
        _haiku_layer(lambda: hk.Conv2DTranspose(4, 3), "w", 1, 5, 5, 2),
        r"\(3, 3, 4, 2\)",
    ),
    "equinox recurrent weight": (_equinox_leaf("gru", "weight_hh"), r"weight_hh' .*\(12, 4\)"),
    "equinox conv under a plain name": (_equinox_leaf("stem", "weight"), r"\(4, 3, 2, 2\)"),
    "equinox conv bias": (_equinox_leaf("conv", "bias"), r"\(4, 1, 1\)"),
    "unknown name": (lambda: {"mixer": {"gate": _weights(3, 4)}}, r"'mixer/gate'.*axis=0"),
    "scalar": (lambda: {"scale": np.float32(1)}, r"'scale' of shape \(\).*axis=None"),
    "kernel of rank 1": (lambda: {"Dense_0": {"kernel": _weights(3)}}, r"\(3,\).*axis=0"),
    "embedding of rank 3": (lambda: {"embed": {"embedding": _weights(2, 3, 4)}}, r"\(2, 3, 4\)"),
    "stacked attention": (
        lambda: {"query": {"kernel": _weights(3, 4, 2, 2)}},
        r"'query/kernel' of shape \(3, 4, 2, 2\)",
    ),
}


@pytest.mark.parametrize("case", _AMBIGUOUS)
def test_fan_in_is_never_guessed(case):
    make, message = _AMBIGUOUS[case]
    params = make()
    with pytest.raises(ValueError, match=rf"MaxNorm on .*{message}") as caught:
        oc.project(oc.max_norm(axis="fan_in")).init(params)
    assert "'fan_in' cannot be told" in str(caught.value)
    assert "Write the axes of one unit's incoming weights, such as axis=" in str(caught.value)
    # Nothing is asked of a leaf that the rules leave free.
    oc.project({"**": None}).init(params)


@pytest.mark.parametrize("name", _SETS)
def test_fan_in_needs_a_path(name):
    make, _ = _SETS[name]
    with pytest.raises(ValueError, match=r"an array of shape \(3, 4\): axis='fan_in'.*axis=0 for"):
        make("fan_in")(_weights(3, 4))
    with pytest.raises(ValueError, match="'fan_in' cannot be told"):
        oc.constrain(jnp.asarray(_weights(3, 4)), make("fan_in"))
