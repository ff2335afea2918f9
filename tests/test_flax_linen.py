"""Constraints declared on Linen layers: the same layers, the right leaves, and they hold."""

import copy
import dataclasses
import functools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import serialization
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.linen.transforms import add_metadata_axis
from flax.training import train_state

import optax_constraints as oc
from optax_constraints.flax import linen as ocl

KEY = jax.random.key(0)
STACK = 3
STEPS = 20


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X = numbers(2, 4)


# Every layer, with the axes of each parameter written out by hand.


class Case(NamedTuple):
    build: Callable[..., nn.Module]  # from a library, Flax's or ours, and keywords
    args: tuple[Any, ...]
    fan_in: dict[str, tuple[int, ...]]  # parameter -> axes, as the layer sees it
    layer: str = ""  # type of the layer that owns them, where it is not the case's own


SEQ = numbers(2, 3, 4)
IMAGE = numbers(2, 4, 4, 2)
HIDDEN = np.full((2, 3), 0.5, np.float32)
ATTENTION = {f"{n}/kernel": (0,) for n in ("query", "key", "value")} | {"out/kernel": (0, 1)}
ATTENTION |= {f"{n}/bias": (0, 1) for n in ("query", "key", "value")} | {"out/bias": (0,)}
LSTM = {f"{a}{b}/kernel": (0,) for a in "ih" for b in "ifgo"} | {f"h{b}/bias": (0,) for b in "ifgo"}
GRU = {f"{a}{b}/kernel": (0,) for a in "ih" for b in "rzn"}
GRU |= {f"{a}/bias": (0,) for a in ("ir", "iz", "in", "hn")}
AFFINE = {"scale": (0,), "bias": (0,)}

CASES: dict[str, Case] = {
    "Dense": Case(lambda lib, **k: lib.Dense(3, **k), (X,), {"kernel": (0,), "bias": (0,)}),
    "DenseGeneral": Case(
        lambda lib, **k: lib.DenseGeneral((2, 3), axis=(-2, -1), batch_dims=(0,), **k),
        (SEQ,),
        {"kernel": (1, 2), "bias": (1, 2)},
    ),
    "Einsum": Case(
        lambda lib, **k: lib.Einsum((5, 4), "abc,dc->abd", **k),
        (SEQ,),
        {"kernel": (1,), "bias": (0,)},
    ),
    "Conv": Case(
        lambda lib, **k: lib.Conv(3, (2, 2), **k), (IMAGE,), {"kernel": (0, 1, 2), "bias": (0,)}
    ),
    "Conv in 1D": Case(
        lambda lib, **k: lib.Conv(3, (2,), **k), (SEQ,), {"kernel": (0, 1), "bias": (0,)}, "Conv"
    ),
    "Conv in 3D": Case(
        lambda lib, **k: lib.Conv(3, (2, 2, 2), **k),
        (numbers(1, 3, 3, 3, 2),),
        {"kernel": (0, 1, 2, 3), "bias": (0,)},
        "Conv",
    ),
    "Conv in depth": Case(
        lambda lib, **k: lib.Conv(4, (2, 2), feature_group_count=2, **k),
        (IMAGE,),
        {"kernel": (0, 1, 2), "bias": (0,)},
        "Conv",
    ),
    "ConvTranspose": Case(
        lambda lib, **k: lib.ConvTranspose(3, (2, 2), transpose_kernel=True, **k),
        (IMAGE,),
        {"kernel": (0, 1, 3), "bias": (0,)},
    ),
    "ConvLocal": Case(
        lambda lib, **k: lib.ConvLocal(3, (2,), padding="VALID", **k),
        (SEQ,),
        {"kernel": (1,), "bias": (0, 1)},
    ),
    "Embed": Case(
        lambda lib, **k: lib.Embed(5, 3, **k), (np.array([0, 4, 2]),), {"embedding": (1,)}
    ),
    "LayerNorm": Case(lambda lib, **k: lib.LayerNorm(**k), (X,), AFFINE),
    "BatchNorm": Case(lambda lib, **k: lib.BatchNorm(use_running_average=False, **k), (X,), AFFINE),
    "GroupNorm": Case(lambda lib, **k: lib.GroupNorm(num_groups=2, **k), (X,), AFFINE),
    "RMSNorm": Case(lambda lib, **k: lib.RMSNorm(**k), (X,), {"scale": (0,)}),
    "MultiHeadDotProductAttention": Case(
        lambda lib, **k: lib.MultiHeadDotProductAttention(2, **k), (SEQ,), ATTENTION, "DenseGeneral"
    ),
    "MultiHeadAttention": Case(
        lambda lib, **k: lib.MultiHeadAttention(num_heads=2, **k), (SEQ,), ATTENTION, "DenseGeneral"
    ),
    "SelfAttention": Case(
        lambda lib, **k: lib.SelfAttention(2, **k), (SEQ,), ATTENTION, "DenseGeneral"
    ),
    "LSTMCell": Case(lambda lib, **k: lib.LSTMCell(3, **k), ((HIDDEN, HIDDEN), X), LSTM, "Dense"),
    "OptimizedLSTMCell": Case(
        lambda lib, **k: lib.OptimizedLSTMCell(3, **k), ((HIDDEN, HIDDEN), X), LSTM, "DenseParams"
    ),
    "GRUCell": Case(lambda lib, **k: lib.GRUCell(3, **k), (HIDDEN, X), GRU, "Dense"),
    "SimpleCell": Case(
        lambda lib, **k: lib.SimpleCell(3, **k),
        (HIDDEN, X),
        {"i/kernel": (0,), "h/kernel": (0,), "i/bias": (0,)},
        "Dense",
    ),
    "PReLU": Case(lambda lib, **k: lib.PReLU(**k), (X,), {"negative_slope": ()}),
}
CONSTRAINTS = {
    "kernel": oc.max_norm(0.5, axis="fan_in"),
    "recurrent_kernel": oc.unit_norm(axis="fan_in"),
    "embedding": oc.unit_norm(axis="fan_in"),
    "scale": oc.min_max_norm(0.2, 0.7, axis="fan_in"),
    "bias": oc.non_neg(),
    "negative_slope": oc.non_neg(),
}


def kind(name: str, leaf: str) -> str:
    """The keyword for a parameter: the hidden-to-hidden kernels of a cell have their own."""
    recurrent = "Cell" in name and leaf.startswith("h") and leaf.endswith("/kernel")
    return "recurrent_kernel" if recurrent else leaf.split("/")[-1]


def outside(what: str, w: np.ndarray, axes: tuple[int, ...]) -> float:
    """How far the worst unit is from what CONSTRAINTS says, in NumPy."""
    if what in ("bias", "negative_slope"):
        return float(max(0.0, -w.min()))
    norms = np.sqrt(np.square(w.astype(np.float64)).sum(axis=axes))
    low, high = {"kernel": (0.0, 0.5), "scale": (0.2, 0.7)}.get(what, (1.0, 1.0))
    return float(np.maximum(norms - high, low - norms).max())


class Zoo(nn.Module):
    """All layers at once, each on its own input; the signature is that of a scan's body."""

    library: Any
    declare: bool = False

    @nn.compact
    def __call__(self, carry, _=None):
        out = {}
        for name, case in CASES.items():
            kinds = {kind(name, leaf) for leaf in case.fan_in} if self.declare else ()
            keywords = {f"{k}_constraint": CONSTRAINTS[k] for k in sorted(kinds)}
            out[name] = case.build(self.library, name=name, **keywords)(*case.args)
        return carry, out


MODES: dict[str, Callable[..., nn.Module]] = {
    "alone": Zoo,
    "scan": lambda *args: nn.scan(
        Zoo, {"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=STACK
    )(*args),
    "vmap": lambda *args: nn.vmap(
        Zoo,
        {"params": -1, "batch_stats": -1},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=STACK,
    )(*args),
}
each_mode = pytest.mark.parametrize("mode", ["alone", "scan", "vmap"])
# All layers in a stack take a while to compile.
each_mode_slowly = pytest.mark.parametrize(
    "mode", ["alone", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("scan", "vmap"))]
)
SHIFT = {"alone": 0, "scan": 1, "vmap": 0}  # of a layer's own axes by the axis of the stack


@functools.cache
def abstract(mode: str) -> Any:
    return jax.eval_shape(lambda: MODES[mode](ocl, True).init(KEY, 0.0))["params"]


@functools.cache
def outside_weights(mode: str) -> Any:
    leaves, treedef = jax.tree.flatten(abstract(mode))
    params = [numbers(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)]
    return treedef.unflatten([np.where(w == w.min(), np.float32(-1.0), w) for w in params])


@functools.cache
def trained(mode: str) -> Any:
    """The parameters after each of 20 steps, from weights that are outside."""
    model = MODES[mode](ocl, True)
    rules, layout = ocl.declared(model, 0.0), ocl.layout(model, 0.0)
    tx = optax.chain(optax.adam(0.1), oc.project(rules, layout=layout))
    params = jax.tree.map(jnp.asarray, outside_weights(mode))

    def loss(params):
        out, _ = model.apply({"params": params}, 0.0, mutable=["batch_stats"])
        return sum(jnp.mean((leaf + 2.0) ** 2) for leaf in jax.tree.leaves(out))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[1])
    return jax.tree.map(np.asarray, run(params))


def flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(k, simple=True, separator="/"): leaf for k, leaf in leaves}


def same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def program(model: nn.Module, *args: Any) -> str:
    """What initialising and calling a model compiles to: equal text, equal bits."""
    return jax.jit(model.init_with_output).lower(KEY, *args).as_text()


@pytest.mark.parametrize("name", CASES)
def test_without_a_declaration_it_is_the_plain_layer(name):
    case = CASES[name]
    plain, ours = case.build(nn), case.build(ocl)
    assert type(ours).__name__ == type(plain).__name__
    shapes, own_shapes = (jax.eval_shape(m.init, KEY, *case.args) for m in (plain, ours))
    assert set(flat(shapes["params"])) == set(case.fan_in)
    assert shapes == own_shapes
    assert program(ours, *case.args) == program(plain, *case.args)
    assert ocl.declared(ours, *case.args) == {}


@each_mode_slowly
def test_declared_or_not_weights_and_outputs_are_those_of_flax(mode):
    plain, ours, declaring = (MODES[mode](*args) for args in ((nn,), (ocl,), (ocl, True)))
    wanted = jax.eval_shape(plain.init, KEY, 0.0)
    assert jax.eval_shape(ours.init, KEY, 0.0) == wanted
    assert jax.eval_shape(declaring.init, KEY, 0.0) == wanted
    assert program(ours, 0.0) == program(declaring, 0.0) == program(plain, 0.0)


def test_weights_and_outputs_to_the_bit():
    plain, ours = (
        nn.Sequential([lib.Conv(3, (2, 2)), lib.GroupNorm(3), lib.Dense(4), lib.PReLU()])
        for lib in (nn, ocl)
    )
    same(plain.init_with_output(KEY, IMAGE), ours.init_with_output(KEY, IMAGE))


@each_mode
def test_each_keyword_reaches_its_parameters(mode):
    expected = {}
    for name, case in CASES.items():
        for leaf in case.fan_in:
            constraint = CONSTRAINTS[kind(name, leaf)]
            if mode != "alone":
                rank = flat(abstract(mode))[f"{name}/{leaf}"].ndim
                constraint = oc.Stacked(constraint, 0 if mode == "scan" else rank - 1)
            expected[f"/{name}/{leaf}"] = constraint
    assert ocl.declared(MODES[mode](ocl, True), 0.0) == expected


@pytest.mark.parametrize("library", [nn, ocl], ids=["plain", "ours"])
@each_mode
def test_layout_is_that_of_each_layer(mode, library):
    expected = {}
    for name, case in CASES.items():
        for leaf, axes in case.fan_in.items():
            rank = flat(abstract(mode))[f"{name}/{leaf}"].ndim
            stacked = {"alone": (), "scan": (0,), "vmap": (rank - 1,)}[mode]
            fan_in = tuple(a + SHIFT[mode] for a in axes)
            layer = case.layer or name
            expected[f"{name}/{leaf}"] = (layer, fan_in, stacked)
    assert ocl.layout(MODES[mode](library), 0.0) == expected


@pytest.mark.parametrize("name", CASES)
@each_mode_slowly
def test_constraints_hold_after_every_step(mode, name):
    start, kept = flat(outside_weights(mode)), flat(trained(mode))
    moved = []
    for leaf, axes in CASES[name].fan_in.items():
        what, path = kind(name, leaf), f"{name}/{leaf}"
        axes = tuple(a + SHIFT[mode] for a in axes)
        assert outside(what, start[path], axes) > 0.05
        for step in range(STEPS):
            assert outside(what, kept[path][step], axes) <= 1e-6
        moved.append(not np.array_equal(kept[path][0], kept[path][-1]))
    assert any(moved)


# Stacks, and other ways to hold layers.


class Block(nn.Module):
    """The body of a scan. All its sizes are equal: no axis can be told by its size."""

    @nn.compact
    def __call__(self, carry, _=None):
        layer = ocl.Dense(4, kernel_constraint=oc.max_norm(1.0), bias_constraint="non_neg")
        return layer(carry), None


X44 = np.ones((2, 4), np.float32)


def scanned(axis: int, body: Any = Block) -> Any:
    return nn.scan(body, {"params": axis}, split_rngs={"params": True}, length=4)


def mapped(axis: int | None, body: Any = Block) -> Any:
    return nn.vmap(
        body, {"params": axis}, split_rngs={"params": axis is not None}, in_axes=None, axis_size=4
    )


@pytest.mark.parametrize("stack", [scanned, mapped])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_the_stacked_axis_is_known_where_sizes_do_not_tell(stack, axis):
    model = stack(axis)()
    at = {"kernel": axis % 3, "bias": axis % 2}
    own = {"kernel": oc.max_norm(1.0), "bias": oc.non_neg()}
    paths = {name: f"Dense_0/{name}" for name in at}
    rules, layout = ocl.declared(model, X44), ocl.layout(model, X44)
    assert rules == {"/" + paths[n]: oc.Stacked(own[n], at[n]) for n in at}
    assert layout[paths["kernel"]].stacked == (at["kernel"],)
    assert layout[paths["kernel"]].fan_in == (1 if axis == 0 else 0,)
    assert layout[paths["bias"]] == ("Dense", (1 - at["bias"],), (at["bias"],))

    params = {"Dense_0": {"kernel": numbers(4, 4, 4), "bias": numbers(4, 4)}}
    kernel = oc.constrain(params, rules, layout=layout)["Dense_0"]["kernel"]
    for i in range(4):
        given = np.take(params["Dense_0"]["kernel"], i, axis=axis)
        wanted = given / np.maximum(1.0, np.linalg.norm(given, axis=0))
        np.testing.assert_allclose(np.take(np.asarray(kernel), i, axis), wanted, rtol=1e-6)


def test_stacks_of_stacks():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mapped(1, scanned(0, nn.remat(Block)))(name="tower")(x)[0]

    constraint = ocl.declared(Model(), X44)["/tower/Dense_0/kernel"]
    assert constraint == oc.Stacked(oc.max_norm(1.0), (0, 1))
    # The outer stack is inserted as axis 1 of (inner stack, in, out) and (inner stack, out).
    assert ocl.layout(Model(), X44)["tower/Dense_0/kernel"] == ("Dense", (2,), (0, 1))
    assert ocl.layout(Model(), X44)["tower/Dense_0/bias"] == ("Dense", (2,), (0, 1))


def test_shared_in_every_layer_of_a_stack():
    shared = nn.scan(Block, variable_broadcast="params", split_rngs={"params": False}, length=4)
    for model in (shared(), mapped(None)()):
        assert ocl.declared(model, X44)["/Dense_0/kernel"] == oc.max_norm(1.0)
        assert ocl.layout(model, X44)["Dense_0/kernel"] == ("Dense", (0,), ())


def test_a_stack_that_runs_twice_is_stacked_once():
    class Model(nn.Module):
        def setup(self):
            self.tower = scanned(1)()

        def __call__(self, x):
            return self.tower(self.tower(x)[0])[0]

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, carry, _=None):
            return Model(name="inner")(carry), None

    assert ocl.layout(Model(), X44)["tower/Dense_0/kernel"] == ("Dense", (0,), (1,))
    assert ocl.layout(scanned(0, Outer)(), X44)["inner/tower/Dense_0/kernel"] == (
        "Dense",
        (1,),
        (0, 2),
    )


@pytest.mark.parametrize("lift", [nn.remat, nn.checkpoint, nn.jit])
def test_lifts_that_do_not_stack(lift):
    model = lift(Block)()
    variables = model.init(KEY, X44)  # also fills nn.jit's cache, which must not hide a layer
    rules = {"/Dense_0/kernel": oc.max_norm(1.0), "/Dense_0/bias": oc.non_neg()}
    assert ocl.declared(model, X44) == ocl.declared(model, X44) == rules
    assert ocl.layout(model, X44)["Dense_0/kernel"] == ("Dense", (0,), ())
    oc.constrain(variables["params"], rules)


def test_lifted_layers_take_keywords():
    dense = mapped(0, ocl.Dense)(4, kernel_constraint="max_norm")
    assert ocl.declared(dense, X44) == {"/kernel": oc.Stacked(oc.max_norm())}
    assert ocl.declared(nn.remat(ocl.Dense)(4, kernel_constraint="max_norm"), X44) == {
        "/kernel": oc.max_norm()
    }


class Nested(nn.Module):
    """Lists, dicts, attributes and shared layers."""

    head: nn.Module

    def setup(self):
        self.steps = [ocl.Dense(4, kernel_constraint=oc.max_norm(i + 1.0)) for i in range(2)]
        self.named = {"a": ocl.Dense(4, bias_constraint="non_neg"), "b": nn.Dense(4)}
        self.again = self.steps[0]

    def __call__(self, x, *, train):
        assert train is True
        for step in self.steps:
            x = step(x)
        x = self.again(self.named["a"](x) + self.named["b"](x))
        return self.head(self.head(x))


def test_modules_in_lists_dicts_and_attributes():
    model = Nested(ocl.Dense(4, kernel_constraint="unit_norm"))
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert ocl.declared(model, x, train=True) == {
        "/steps_0/kernel": oc.max_norm(1.0),
        "/steps_1/kernel": oc.max_norm(2.0),
        "/named_a/bias": oc.non_neg(),
        "/head/kernel": oc.unit_norm(),
    }
    params = model.init(KEY, X, train=True)["params"]
    assert set(ocl.layout(model, x, train=True)) == set(flat(params))


def test_dropout_methods_and_static_arguments():
    class Model(nn.Module):
        @nn.compact
        def encode(self, x, train):
            x = nn.Dropout(0.5, deterministic=not train)(x)
            return ocl.Dense(2, kernel_constraint="max_norm")(x)

    for method in ("encode", Model.encode):
        assert set(ocl.declared(Model(), X, True, method=method)) == {"/Dense_0/kernel"}


def test_recurrent_wrappers():
    cell = functools.partial(ocl.GRUCell, 3)
    model = nn.Bidirectional(
        nn.RNN(cell(recurrent_kernel_constraint="unit_norm")),
        nn.RNN(cell(bias_constraint="non_neg")),
    )
    rules = ocl.declared(model, SEQ)
    recurrent = {f"/forward_rnn/cell/h{g}/kernel": oc.unit_norm() for g in "rzn"}
    biases = {f"/backward_rnn/cell/{n}/bias": oc.non_neg() for n in ("ir", "iz", "in", "hn")}
    assert rules == recurrent | biases


def test_partitioned_parameters():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry, _=None):
            return ocl.Dense(4, kernel_init=init, kernel_constraint=oc.max_norm(1.0))(carry), None

    stack = nn.vmap(
        Model,
        {"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )

    class Twice(nn.Module):
        def setup(self):
            self.layer = stack()

        def once(self, x):
            return self.layer(x)[0].mean(0)

        def __call__(self, x):
            return self.once(self.once(x))

    assert ocl.declared(Twice(), X44) == {"/layer/Dense_0/kernel": oc.Stacked(oc.max_norm(1.0))}
    for model in (Model(), stack()):
        params = model.init(KEY, X44)["params"]
        assert isinstance(params["Dense_0"]["kernel"], nn.Partitioned)
        rules, layout = ocl.declared(model, X44), ocl.layout(model, X44)
        assert set(layout) == {"Dense_0/kernel", "Dense_0/bias"}
        kernel = oc.constrain(params, rules, layout=layout)["Dense_0"]["kernel"]
        assert kernel.names == params["Dense_0"]["kernel"].names
        np.testing.assert_allclose(kernel.value, 0.5, rtol=1e-6)


def test_a_tied_layer_may_read_variables():
    class Tied(nn.Module):
        def setup(self):
            self.embed = ocl.Embed(5, 4, embedding_constraint="unit_norm")

        def __call__(self, x):
            table = self.embed(jnp.arange(5)).sum() + self.embed.variables["params"]["embedding"].T
            return x @ table + (x @ jnp.asarray(self.embed.variables["params"]["embedding"]).T)

    for model in (Tied(), nn.remat(Tied)()):
        assert ocl.declared(model, X44) == {"/embed/embedding": oc.unit_norm()}


def test_names_that_look_like_patterns():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ocl.Dense(4, name="layer[0]", kernel_constraint=oc.max_norm(0.1))(x)
            return nn.Dense(4, name="layer0")(x)

    params = Model().init(KEY, X44)["params"]
    kept = oc.constrain(params, ocl.declared(Model(), X44))
    assert np.linalg.norm(kept["layer[0]"]["kernel"], axis=0).max() < 0.11
    same(kept["layer0"], params["layer0"])


def test_a_parameter_that_is_not_its_layers_own_is_an_error():
    transpose = functools.partial(jax.tree.map, jnp.transpose)
    model = nn.map_variables(
        ocl.Dense, "params", trans_in_fn=transpose, trans_out_fn=transpose, init=True
    )(3, kernel_constraint="max_norm")
    for read in (ocl.declared, ocl.layout):
        with pytest.raises(
            ValueError, match=r"axes of 'kernel' cannot be told.*\(4, 3\).*\(3, 4\)"
        ):
            read(model, X)


NORMS = {
    "WeightNorm": (nn.WeightNorm, {}),
    "WeightNorm of all": (functools.partial(nn.WeightNorm, variable_filter=None), {}),
    "SpectralNorm": (nn.SpectralNorm, {"update_stats": True}),
}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("inner", [ocl.Dense, nn.remat(ocl.Dense)])
@pytest.mark.parametrize("norm", NORMS)
def test_wrappers_that_rewrite_the_parameters_of_a_layer(norm, inner, stacked):
    wrap, kwargs = NORMS[norm]
    own = oc.max_norm(1.0, axis="fan_in")

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry, _=None):
            layer = inner(4, kernel_constraint=own, name="inner")
            return nn.Dense(4)(wrap(layer)(nn.Dense(4)(carry), **kwargs)), None

    stack = nn.vmap(
        Model,
        {"params": 1, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=4,
    )
    model = stack() if stacked else Model()
    params = model.init(KEY, X44)["params"]
    rules, layout = ocl.declared(model, X44), ocl.layout(model, X44)
    assert set(layout) == set(flat(params))
    assert rules == {"/inner/kernel": oc.Stacked(own, 1) if stacked else own}
    assert layout["inner/kernel"] == ("Dense", (0,), (1,) if stacked else ())
    oc.constrain(params, rules, layout=layout)


@pytest.mark.parametrize("norm", NORMS)
def test_a_stack_inside_such_a_wrapper(norm):
    wrap, kwargs = NORMS[norm]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            tower = mapped(1, ocl.Dense)(4, kernel_constraint=oc.max_norm(1.0), name="tower")
            return wrap(tower)(x, **kwargs)

    model = Model()
    assert set(ocl.layout(model, X44)) == set(flat(model.init(KEY, X44)["params"]))
    assert ocl.layout(model, X44)["tower/kernel"] == ("Dense", (0,), (1,))
    assert ocl.declared(model, X44) == {"/tower/kernel": oc.Stacked(oc.max_norm(1.0), 1)}


def test_a_weight_norm_of_boxed_parameters_has_flaxs_own_names():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry, _=None):
            init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
            return nn.WeightNorm(nn.Dense(4, kernel_init=init))(carry), None

    stack = nn.vmap(
        Model,
        {"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    for model in (Model(), stack()):
        try:
            params = model.init(KEY, X44)["params"]
        except AttributeError:
            pytest.skip("nn.WeightNorm of Flax 0.11 takes no boxes")
        assert set(ocl.layout(model, X44)) == set(flat(nn.unbox(params)))


@pytest.mark.parametrize("boxed", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_an_axis_in_the_metadata_alone_is_no_stack(boxed, stacked):
    init = nn.initializers.ones

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry, _=None):
            layer = add_metadata_axis(
                ocl.Dense, variable_axes={"params": 0}, metadata_params={nn.PARTITION_NAME: "more"}
            )
            kernel_init = nn.with_partitioning(init, ("in", "out")) if boxed else init
            keywords = {"kernel_constraint": oc.max_norm(1.0, axis="fan_in"), "name": "layer"}
            return layer(4, kernel_init=kernel_init, **keywords)(carry), None

    stack = nn.vmap(
        Model,
        {"params": 0},
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    model = stack() if stacked else Model()
    params = model.init(KEY, X44)["params"]
    rules, layout = ocl.declared(model, X44), ocl.layout(model, X44)
    assert set(layout) == set(flat(nn.unbox(params)))
    own = oc.max_norm(1.0, axis="fan_in")
    assert rules == {"/layer/kernel": oc.Stacked(own, 0) if stacked else own}
    at = (0,) if stacked else ()
    assert layout["layer/kernel"] == ("Dense", (len(at),), at)
    kernel = nn.unbox(oc.constrain(params, rules, layout=layout))["layer"]["kernel"]
    np.testing.assert_allclose(kernel, 0.5, rtol=1e-6)


# A layer of one's own.


@ocl.constrained
class Bilinear(nn.Module):
    features: int
    min_constraint: int = 7  # a field of its own, whose name ends like a keyword

    @nn.compact
    def __call__(self, x):
        left = self.param("left", nn.initializers.normal(), (x.shape[-1], self.features))
        inner = nn.Dense(self.features, name="inner")
        return (x @ left) * inner(x)


def test_a_layer_of_ones_own():
    first = Bilinear(3, 5, left_constraint=oc.max_norm(1.0), kernel_constraint="non_neg")
    assert first.min_constraint == 5
    model = nn.Sequential([first, Bilinear(2)])
    assert ocl.declared(model, X) == {
        "/layers_0/left": oc.max_norm(1.0),
        "/layers_0/inner/kernel": oc.non_neg(),
    }
    assert ocl.layout(model, X)["layers_0/left"] == ("Bilinear", None, ())
    assert ocl.layout(model, X)["layers_0/inner/kernel"] == ("Dense", (0,), ())


def test_the_inner_declaration_wins():
    @ocl.constrained
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = ocl.Dense(3, kernel_constraint=oc.max_norm(1.0))(x)
            return nn.Dense(2)(x)

    assert ocl.declared(Pair(kernel_constraint=oc.max_norm(9.0)), X) == {
        "/Dense_0/kernel": oc.max_norm(1.0),
        "/Dense_1/kernel": oc.max_norm(9.0),
    }


def test_subclasses_take_keywords_too():
    class Wide(ocl.Dense):
        width: int = 2

    model = Wide(3, width=4, kernel_constraint="max_norm")
    assert ocl.declared(model, X) == {"/kernel": oc.max_norm()}
    assert ocl.layout(model, X)["kernel"] == ("Dense", (0,), ())


def test_constrained_is_the_same_class_each_time():
    assert ocl.constrained(nn.Dense) is ocl.Dense
    assert ocl.constrained(ocl.Dense) is ocl.Dense
    assert issubclass(ocl.Dense, nn.Dense)
    with pytest.raises(TypeError, match=r"Linen module class, not 3"):
        ocl.constrained(3)


def test_declarations_survive_copies():
    layer = ocl.Dense(3, False, kernel_constraint=oc.max_norm(1.0))
    assert (layer.features, layer.use_bias) == (3, False)
    expected = {"/kernel": oc.max_norm(1.0)}
    partial = functools.partial(ocl.Dense, kernel_constraint=oc.max_norm(1.0))
    for other in (layer.clone(), layer.copy(), partial(3)):
        assert ocl.declared(other, X) == expected
    assert ocl.declared(layer.clone(kernel_constraint="non_neg"), X) == {"/kernel": oc.non_neg()}
    assert ocl.declared(layer.copy(kernel_constraint=None), X) == {}
    assert "MaxNorm(max_value=1.0" in repr(layer)
    norm = ocl.LayerNorm(scale_constraint="non_neg")
    assert ocl.declared(pickle.loads(pickle.dumps(norm)), X) == {"/scale": oc.non_neg()}


def test_layers_hash_and_compare_by_what_they_declare():
    def make(**keywords):
        return ocl.Dense(3, **keywords)

    bound = jnp.float32(1.0)
    a, b = (make(kernel_constraint=oc.max_norm(bound), bias_constraint="non_neg") for _ in "ab")
    assert a == b
    assert hash(a) == hash(b)
    assert a == make(bias_constraint="non_neg", kernel_constraint=oc.max_norm(bound))
    assert a != make(kernel_constraint=oc.max_norm(2.0), bias_constraint="non_neg")
    assert a != make()
    # nn.jit looks into what hashes by its parts, and an array does not.
    assert "/kernel" in ocl.declared(nn.jit(ocl.Dense)(3, kernel_constraint=oc.max_norm(bound)), X)


# Errors.


def test_a_keyword_for_a_parameter_that_is_not_there():
    model = nn.Sequential([nn.Dense(3), ocl.Dense(3, use_bias=False, bias_constraint="non_neg")])
    with pytest.raises(
        ValueError,
        match=r"'layers_1' \(Dense\) was given bias_constraint=NonNeg\(\), and has no parameter "
        r"'bias'. Its parameters take kernel_constraint=; .*use_bias=True",
    ):
        ocl.declared(model, X)
    with pytest.raises(
        ValueError, match=r"model itself \(Dense\) was given kernal_constraint=.*bias"
    ):
        ocl.declared(ocl.Dense(3, kernal_constraint="non_neg"), X)
    with pytest.raises(ValueError, match=r"recurrent_kernel_constraint=.* has no parameter"):
        ocl.declared(ocl.Dense(3, recurrent_kernel_constraint="non_neg"), X)


def test_a_value_that_is_no_constraint():
    with pytest.raises(ValueError, match=r"Dense: bias_constraint='nonneg': .*non_neg"):
        ocl.Dense(3, bias_constraint="nonneg")
    with pytest.raises(ValueError, match=r"Dense: kernel_constraint=3: .*Write a constraint"):
        ocl.Dense(3, kernel_constraint=3)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"not a Linen module; write declared\(model, x\)"):
        ocl.declared({}, X)


# Layers that are made inside a trace.


class Clipped(oc.Constraint):
    def __init__(self, bounds):
        self.bounds = bounds

    def __call__(self, w):
        return jnp.minimum(w, self.bounds["upper"][0])


AROUND = {
    "an array": lambda x: oc.box(upper=x),
    "a number": lambda x: oc.max_norm(x.max()),
    "nested": lambda x: oc.stacked(oc.compose(oc.non_neg(), oc.box(upper=x))),
    "a mapping": lambda x: Clipped({"upper": [x]}),
    "a partial function": lambda x: functools.partial(jnp.minimum, x),
    "a function": lambda x: lambda w: jnp.minimum(w, x),
    "a schedule": lambda x: oc.max_norm(lambda step: x.max()),
}


@pytest.mark.parametrize("form", AROUND)
def test_a_traced_array_is_an_error_when_the_layer_is_made(form):
    def train(constraint):
        return ocl.Dense(3, kernel_constraint=constraint).init(KEY, X)

    message = (
        r"(?s)^Dense: kernel_constraint=.*an array that JAX is tracing.*with NumPy, as in "
        r"np\.ones\(3\), or outside of the function"
    )
    for lift in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(TypeError, match=message):
            lift(lambda x: train(AROUND[form](x)))(jnp.ones((2, 3)))
    for bound in (np.full(3, 0.5), jnp.full(3, 0.5)):
        constraint = AROUND[form](bound)
        jax.jit(lambda constraint=constraint: train(constraint))()


def test_arrays_of_numpy_are_declared_inside_a_trace():
    class Model(nn.Module):
        lib: Any

        @nn.compact
        def __call__(self, x):
            return ocl.Dense(3, kernel_constraint=oc.box(upper=self.lib.full(3, 0.5)))(x)

    rules = ocl.declared(Model(np), X)
    params = {"kernel": jnp.ones((4, 3))}
    np.testing.assert_array_equal(
        oc.constrain({"Dense_0": params}, rules)["Dense_0"]["kernel"], 0.5
    )
    with pytest.raises(TypeError, match=r"Dense: kernel_constraint=.*JAX is tracing"):
        ocl.declared(Model(jnp), X)


# TrainState.


def make_state(dtype: Any = jnp.float32, tx: Any = None, **keywords: Any) -> Any:
    keywords.setdefault("rules", {"kernel": oc.max_norm(0.5), "bias": oc.non_neg()})
    params = {
        "kernel": jnp.asarray(numbers(5, 7), dtype),
        "bias": jnp.asarray(numbers(7, seed=1), dtype),
    }
    return ocl.TrainState.create(
        apply_fn=lambda variables, x: (
            x @ variables["params"]["kernel"] + variables["params"]["bias"]
        ),
        params=params,
        tx=tx or optax.adam(0.1),
        **keywords,
    )


def gradients(state: Any) -> Any:
    x = jnp.asarray(numbers(3, 5, seed=2), state.params["kernel"].dtype)
    return jax.grad(lambda p: ((state.apply_fn({"params": p}, x) + 1.0) ** 2).sum())(state.params)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_train_state_projects_to_the_bit(dtype, jit):
    state = make_state(dtype)
    rules = state.rules.value

    def ours(state):
        return state.apply_gradients(grads=gradients(state))

    def by_hand(params, opt_state):
        updates, opt_state = state.tx.update(
            gradients(state.replace(params=params)), opt_state, params
        )
        return oc.constrain(optax.apply_updates(params, updates), rules), opt_state

    if jit:
        ours, by_hand = jax.jit(ours), jax.jit(by_hand)
    params, opt_state = state.params, state.opt_state
    for _ in range(5):
        state = ours(state)
        params, opt_state = by_hand(params, opt_state)
        same(state.params, params)
        assert state.params["kernel"].dtype == dtype
        assert np.asarray(state.params["bias"]).min() >= 0
    assert int(state.step) == 5


def test_train_state_keeps_what_is_allowed_and_is_flaxs_otherwise():
    theirs = train_state.TrainState.create(
        apply_fn=(ours := make_state(rules={})).apply_fn, params=ours.params, tx=ours.tx
    )
    grads = gradients(ours)
    same(ours.apply_gradients(grads=grads).params, theirs.apply_gradients(grads=grads).params)
    assert isinstance(ours, train_state.TrainState)
    more = set(serialization.to_state_dict(ours)) - set(serialization.to_state_dict(theirs))
    assert more == {"memory"}
    assert ours.memory == ()


def test_schedules_see_the_step_before_it_is_counted():
    state = make_state(rules={"kernel": oc.unit_norm(), "bias": oc.max_norm(lambda s: 1 / (1 + s))})
    for bound in (1.0, 1 / 2, 1 / 3):
        grads = {"kernel": jnp.ones((5, 7)), "bias": jnp.full(7, -9.0)}
        state = state.replace(params={**state.params, "bias": jnp.full(7, 5.0)})
        state = state.apply_gradients(grads=grads)
        np.testing.assert_allclose(np.linalg.norm(state.params["bias"]), bound, rtol=1e-6)


def test_train_state_compiles_once_and_runs_under_scan():
    state = make_state()
    traced = []

    def step(state):
        traced.append(None)
        return state.apply_gradients(grads=gradients(state))

    compiled = jax.jit(step, donate_argnums=0)
    looped = jax.jit(lambda s: jax.lax.scan(lambda s, _: (step(s), None), s, length=4)[0])(state)
    traced.clear()
    stepped = jax.tree.map(jnp.copy, state)
    for _ in range(4):
        stepped = compiled(stepped)
    assert len(traced) == 1
    assert int(looped.step) == int(stepped.step) == 4
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5), looped.params, stepped.params
    )
    assert np.linalg.norm(looped.params["kernel"], axis=0).max() <= 0.5 * (1 + 1e-6)


def test_train_state_with_a_layout():
    model = mapped(1)()
    params = {"Dense_0": {"kernel": jnp.asarray(numbers(4, 4, 4)), "bias": jnp.ones((4, 4))}}
    state = ocl.TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.sgd(0.0),
        rules={"kernel": oc.unit_norm(axis="fan_in")},
        layout=ocl.layout(model, X44),
    )
    new = state.apply_gradients(grads=params)
    kernel = new.params["Dense_0"]["kernel"]
    np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1.0, rtol=1e-6)
    same(new.replace(layout=None).params, new.params)


def test_train_state_restores():
    state = make_state()
    after = state.apply_gradients(grads=gradients(state))
    restored = serialization.from_bytes(state, serialization.to_bytes(after))
    same(restored.params, after.params)
    assert restored.rules is state.rules
    loosened = restored.replace(rules={"bias": None})
    assert loosened.rules.value == {"bias": None}


def test_scales_of_float8_are_left_alone():
    params = {"params": {"kernel": -jnp.ones((2, 2))}, OVERWRITE_WITH_GRADIENT: {"s": jnp.ones(1)}}
    state = ocl.TrainState.create(
        apply_fn=lambda: None, params=params, tx=optax.sgd(1.0), rules={"/kernel": oc.non_neg()}
    )
    grads = {"params": {"kernel": jnp.ones((2, 2))}, OVERWRITE_WITH_GRADIENT: {"s": -jnp.ones(1)}}
    new = state.apply_gradients(grads=grads).params
    np.testing.assert_array_equal(new["params"]["kernel"], 0.0)
    np.testing.assert_array_equal(new[OVERWRITE_WITH_GRADIENT]["s"], -1.0)


def test_train_state_says_what_is_wrong_when_it_is_made():
    with pytest.raises(
        ValueError, match=r"needs the constraints; write rules=declared\(model, x\)"
    ):
        make_state(rules=None)
    with pytest.raises(ValueError, match=r"matches no leaf"):
        make_state(rules={"kernal": oc.non_neg()})


def test_eager_steps_do_not_bind_again():
    seen = []

    def is_bias(path, leaf):
        seen.append(path)
        return path == "bias"

    params = {"kernel": jnp.ones((2, 2)), "bias": -jnp.ones(2)}
    state = ocl.TrainState.create(
        apply_fn=lambda: None, params=params, tx=optax.sgd(0.1), rules=((is_bias, oc.non_neg()),)
    )
    asked = len(seen)
    for _ in range(3):
        state = state.apply_gradients(grads=params)
    assert np.all(np.asarray(state.params["bias"]) >= 0)
    assert len(seen) == asked == 2


def sgd_init(params):
    return optax.EmptyState()


def sgd_update(updates, state, params=None):
    return jax.tree.map(lambda u: -0.1 * u, updates), state


def nothing(*args):
    """A module's method would be a new one in each copy."""


MODEL = ocl.Dense(7, kernel_constraint=oc.max_norm(0.5, axis="fan_in"), bias_constraint="non_neg")
SGD = optax.GradientTransformation(sgd_init, sgd_update)


def equal_states() -> dict[str, Any]:
    """States that were made apart, of one model, optimizer and equal rules."""

    def make() -> Any:
        x = numbers(3, 5)
        return ocl.TrainState.create(
            apply_fn=nothing,
            params=jax.tree.map(jnp.asarray, make_state().params),
            tx=SGD,
            rules=ocl.declared(MODEL, x),
            layout=dict(reversed(ocl.layout(MODEL, x).items())),
        )

    first, second = make(), make()
    return {
        "first": first,
        "second": second,
        "deep copy": copy.deepcopy(first),
        "pickled": pickle.loads(pickle.dumps(first)),
        "restored": serialization.from_bytes(second, serialization.to_bytes(first)),
    }


def test_states_of_equal_rules_are_traced_once():
    traced = []

    @jax.jit
    def step(state):
        traced.append(None)
        return state.apply_gradients(grads=state.params)

    states = equal_states()
    stepped = {name: step(state) for name, state in states.items()}
    assert len(traced) == 1
    for name, state in states.items():
        assert hash(jax.tree.structure(state)) == hash(jax.tree.structure(states["first"]))
        assert jax.tree.structure(state) == jax.tree.structure(states["first"])
        same(stepped[name], stepped["first"])


def test_states_of_equal_rules_go_through_maps_and_branches():
    states = equal_states()
    first = states.pop("first")
    for state in states.values():
        mean = jax.tree.map(lambda a, b: (a + b) / 2, first, state)
        same(mean.params, first.params)
        chosen = jax.lax.cond(True, lambda a, b: a, lambda a, b: b, first, state)
        same(chosen.params, first.params)


def test_states_of_other_rules_are_other_states():
    rules = {"kernel": oc.max_norm(0.5), "bias": None}
    layout = ocl.layout(MODEL, numbers(3, 5))
    state = make_state(rules=rules, layout=layout)
    for other in (
        {"rules": {"kernel": oc.max_norm(0.6), "bias": None}},
        {"rules": dict(reversed(rules.items()))},  # the first that matches wins
        {"rules": {"kernel": oc.max_norm(0.5)}},
        {"layout": None},
        {"layout": {**layout, "kernel": layout["kernel"]._replace(fan_in=(1,))}},
    ):
        assert jax.tree.structure(state.replace(**other)) != jax.tree.structure(state)


def test_rules_that_do_not_hash_are_equal_to_themselves_alone():
    @dataclasses.dataclass
    class Unhashable(oc.Constraint):
        bounds: list[float]

        def __call__(self, w):
            return jnp.clip(w, *self.bounds)

    rules = {"kernel": Unhashable([-0.1, 0.1])}
    state = make_state(rules=rules)
    assert jax.tree.structure(state) != jax.tree.structure(make_state(rules=rules))
    new = jax.jit(lambda s: s.apply_gradients(grads=gradients(s)))(state)
    assert np.abs(np.asarray(new.params["kernel"])).max() <= np.float32(0.1)


def test_copies_share_what_compares_by_identity():
    is_bias = functools.partial(lambda path, leaf: path == "bias")
    state = make_state(rules=[(is_bias, oc.non_neg())])
    copied = copy.deepcopy(state).replace(apply_fn=state.apply_fn, tx=state.tx)
    assert jax.tree.structure(copied) == jax.tree.structure(state)


def test_copies_of_a_state_do_not_bind_again():
    seen = []

    def is_bias(path, leaf):
        seen.append(path)
        return path == "bias"

    def state():
        return make_state(rules=[(is_bias, oc.non_neg())])

    first = state()
    asked = len(seen)
    for other in (copy.deepcopy(first), state()):
        other.apply_gradients(grads=first.params)
    assert len(seen) == asked == 2
