"""Flax NNX: layers that declare constraints, and what their models say."""

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64, norms
from flax import nnx

import optax_constraints as oc
import optax_constraints.flax.nnx as onnx
from optax_constraints._axes import LeafLayout
from optax_constraints._trees import leaves_by_path

# Flax 0.11 takes plain lists and dicts for these.
List = getattr(nnx, "List", list)
Dict = getattr(nnx, "Dict", dict)
UNIT = oc.unit_norm("fan_in")
SMALL = oc.max_norm(0.005, axis="fan_in")


def flat(tree: Any) -> dict[str, Any]:
    """The arrays of any tree by path."""
    return dict(leaves_by_path(tree))


def params_of(model: Any) -> dict[str, Any]:
    return flat(nnx.state(model, nnx.Param))


def assert_same_params(model: Any, other: Any) -> None:
    found, wanted = params_of(model), params_of(other)
    assert list(found) == list(wanted)
    for path in wanted:
        assert found[path].shape == wanted[path].shape
        assert found[path].dtype == wanted[path].dtype
        assert bits(found[path]) == bits(wanted[path]), path


def keys(n: int) -> jax.Array:
    return jax.random.split(jax.random.key(0), n)


def inputs(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


# Every layer.


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, its constraints, and the axes of each leaf that they are for, written out."""

    name: str
    make: Callable[..., Any]
    """(class, rngs, constraints) -> layer"""
    call: Callable[[Any], Any]
    keywords: dict[str, Any]
    units: dict[str, tuple[int, ...]]
    """Path -> axes of the leaf along which a unit runs."""
    capped: tuple[str, ...] = ()
    """Where the norm is at most 0.005; elsewhere it is 1."""

    def __str__(self) -> str:
        return self.name


def make(*args: Any, **options: Any) -> Callable[..., Any]:
    return lambda cls, rngs, kw: cls(*args, **options, rngs=rngs, **kw)


def on(*shape: int) -> Callable[[Any], Any]:
    return lambda layer: layer(inputs(*shape))


KERNEL_BIAS = {"kernel_constraint": UNIT, "bias_constraint": SMALL}
SCALE_BIAS = {"scale_constraint": SMALL, "bias_constraint": SMALL}
CELL = {"kernel_constraint": UNIT, "recurrent_kernel_constraint": SMALL}
VECTOR = (0,)


def kernel_bias(*axes: int, bias: tuple[int, ...] = VECTOR) -> Any:
    return KERNEL_BIAS, {"kernel": axes, "bias": bias}, ("bias",)


def norm(*names: str) -> Any:
    return {f"{n}_constraint": SMALL for n in names}, dict.fromkeys(names, VECTOR), names


CASES = [
    Case("Linear", make(3, 4), on(2, 3), *kernel_bias(0)),
    Case(
        "LinearGeneral",
        make((2, 3), (4, 5), axis=(1, 2)),
        on(6, 2, 3),
        *kernel_bias(0, 1, bias=(0, 1)),
    ),
    Case(
        "LinearGeneral",
        make(3, (4, 5), axis=-1, batch_axis={0: 2}),
        on(2, 6, 3),
        *kernel_bias(1, bias=(1, 2)),
    ),
    Case(
        "Einsum",
        make("nta,hab->nthb", (5, 2, 4), (5, 4)),
        on(3, 6, 2),
        *kernel_bias(1, bias=(0, 1)),
    ),
    Case("Conv", make(2, 4, kernel_size=(3, 5)), on(1, 6, 6, 2), *kernel_bias(0, 1, 2)),
    Case(
        "Conv", make(2, 4, kernel_size=(3,), feature_group_count=2), on(1, 6, 2), *kernel_bias(0, 1)
    ),
    Case("Conv", make(2, 3, kernel_size=(2, 2, 2)), on(1, 3, 3, 3, 2), *kernel_bias(0, 1, 2, 3)),
    Case(
        "Conv",
        make(2, 4, kernel_size=(3, 3), feature_group_count=2),
        on(1, 5, 5, 2),
        *kernel_bias(0, 1, 2),
    ),
    Case("ConvTranspose", make(2, 4, kernel_size=(3, 5)), on(1, 6, 6, 2), *kernel_bias(0, 1, 2)),
    Case(
        "ConvTranspose",
        make(2, 4, kernel_size=(3,), transpose_kernel=True),
        on(1, 6, 2),
        *kernel_bias(0, 2),
    ),
    Case(
        "Embed",
        make(5, 3),
        lambda layer: layer(jnp.array([0, 1, 4])),
        {"embedding_constraint": UNIT},
        {"embedding": (1,)},
    ),
    Case("LayerNorm", make(4), on(3, 4), *norm("scale", "bias")),
    Case("BatchNorm", make(4), on(3, 4), *norm("scale", "bias")),
    Case("GroupNorm", make(4, num_groups=2), on(3, 4), *norm("scale", "bias")),
    Case("RMSNorm", make(4), on(3, 4), *norm("scale")),
    Case(
        "MultiHeadAttention",
        make(2, 3, 8, 5, decode=False, normalize_qk=True),
        on(1, 4, 3),
        KERNEL_BIAS | {"scale_constraint": SMALL},
        {f"{n}/kernel": (0,) for n in ("query", "key", "value")}
        | {"out/kernel": (0, 1), "out/bias": (0,), "query_ln/scale": (0,), "key_ln/scale": (0,)}
        | {f"{n}/bias": (0, 1) for n in ("query", "key", "value")},
        (
            *(f"{n}/bias" for n in ("query", "key", "value", "out")),
            *("query_ln/scale", "key_ln/scale"),
        ),
    ),
    Case(
        "LSTMCell",
        make(3, 4),
        lambda cell: cell((jnp.ones((2, 4)), jnp.ones((2, 4))), inputs(2, 3))[1],
        CELL | {"bias_constraint": SMALL},
        {f"{n}/kernel": (0,) for n in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")}
        | {f"{n}/bias": (0,) for n in ("hi", "hf", "hg", "ho")},
        tuple(f"{n}/{p}" for n in ("hi", "hf", "hg", "ho") for p in ("kernel", "bias")),
    ),
    Case(
        "OptimizedLSTMCell",
        make(3, 4),
        lambda cell: cell((jnp.ones((2, 4)), jnp.ones((2, 4))), inputs(2, 3))[1],
        CELL | {"bias_constraint": SMALL},
        {"dense_i/kernel": (0,), "dense_h/kernel": (0,), "dense_h/bias": (0,)},
        ("dense_h/kernel", "dense_h/bias"),
    ),
    *(
        Case(
            name,
            make(3, 4),
            lambda cell: cell(jnp.ones((2, 4)), inputs(2, 3))[1],
            CELL | {"bias_constraint": SMALL},
            {"dense_i/kernel": (0,), "dense_h/kernel": (0,), "dense_i/bias": (0,)},
            ("dense_h/kernel", "dense_i/bias"),
        )
        for name in ("GRUCell", "SimpleCell")
    ),
    Case(
        "PReLU",
        lambda cls, rngs, kw: cls(**kw),
        on(3, 4),
        {"negative_slope_constraint": SMALL},
        {"negative_slope": ()},
        ("negative_slope",),
    ),
]


def flax_layer(case: Case) -> Any:
    if not hasattr(nnx, case.name):
        pytest.skip(f"this Flax has no nnx.{case.name}")
    return getattr(nnx, case.name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_is_the_one_that_flax_makes(case: Case):
    original = flax_layer(case)
    plain = case.make(original, nnx.Rngs(3), {})
    for keywords in ({}, case.keywords):
        layer = case.make(getattr(onnx, case.name), nnx.Rngs(3), keywords)
        assert type(layer).__name__ == case.name
        assert isinstance(layer, original)
        assert_same_params(layer, plain)
        assert bits(case.call(layer)) == bits(case.call(plain))
    assert onnx.declared(plain) == {}
    assert onnx.declared(case.make(getattr(onnx, case.name), nnx.Rngs(3), {})) == {}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_declared_constraint_holds_in_training(case: Case):
    flax_layer(case)
    model = case.make(getattr(onnx, case.name), nnx.Rngs(3), case.keywords)
    rules, layout = onnx.declared(model), onnx.layout(model)
    assert rules == {f"/{path}": SMALL if path in case.capped else UNIT for path in case.units}
    assert {path: layout[path].fan_in for path in case.units} == case.units
    assert set(layout) == set(params_of(model))
    assert not any(leaf.stacked for leaf in layout.values())

    tx = optax.chain(optax.adam(0.1), oc.project(rules, layout=layout))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda model: jnp.sum((case.call(model) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    before = {path: bits(leaf) for path, leaf in params_of(model).items()}
    for _ in range(20):
        step(model, optimizer)
        params = params_of(model)
        for path, axes in case.units.items():
            found = norms(float64(params[path]), axes)
            if path in case.capped:
                assert np.all(found <= 0.005 * (1 + 1e-5)), path
            else:
                np.testing.assert_allclose(found, 1, rtol=1e-5, err_msg=path)
    assert all(before[path] != bits(leaf) for path, leaf in params_of(model).items())


def test_every_layer_has_a_case():
    here = {name for name, thing in vars(onnx).items() if hasattr(thing, "_takes_constraints")}
    assert here == {case.name for case in CASES if hasattr(nnx, case.name)}


# Keywords.


@pytest.mark.parametrize(
    ("cls", "keyword", "has"),
    [
        ("Linear", "embedding_constraint", "bias, kernel"),
        ("LSTMCell", "scale_constraint", "bias, kernel, recurrent_kernel"),
        ("MultiHeadAttention", "scale_constraint", "bias, kernel"),
        ("Linear", "recurrent_kernel_constraint", "bias, kernel"),
    ],
)
def test_a_keyword_for_no_parameter_is_an_error(cls: str, keyword: str, has: str):
    with pytest.raises(ValueError, match=rf"{cls}\({keyword}=NonNeg\(\)\).*; it has {has}\. "):
        getattr(onnx, cls)(2, 4, **{keyword: oc.non_neg()}, rngs=nnx.Rngs(0))


def test_a_keyword_for_a_parameter_that_is_switched_off_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter 'bias'; it has kernel\. .*use_bias=True"):
        onnx.Linear(2, 3, use_bias=False, bias_constraint=oc.non_neg(), rngs=nnx.Rngs(0))
    layer = onnx.Linear(2, 3, use_bias=False, bias_constraint=None, rngs=nnx.Rngs(0))
    assert onnx.declared(layer) == {}


def test_values_are_those_that_get_accepts_and_checked_when_the_layer_is_made():
    def make(value: Any) -> dict[str, Any]:
        return onnx.declared(onnx.Linear(2, 3, kernel_constraint=value, rngs=nnx.Rngs(0)))

    assert make("non_neg") == make(oc.NonNeg) == make(oc.serialize(oc.non_neg()))
    assert make("non_neg") == {"/kernel": oc.non_neg()}
    assert make(jnp.tanh)["/kernel"](jnp.ones(())) == jnp.tanh(1.0)
    with pytest.raises(ValueError, match=r"Linear\(kernel_constraint='non_negg'\).*Did you mean"):
        make("non_negg")
    with pytest.raises(ValueError, match=r"Linear\(kernel_constraint=3\)"):
        make(3)

    class Unhashable:
        __hash__ = None  # pyright: ignore[reportAssignmentType]  # as __eq__ alone would do

        def __call__(self, w: jax.Array) -> jax.Array:
            return w

    with pytest.raises(TypeError, match=r"Linear\(kernel_constraint=.*unhashable"):
        make(Unhashable())


def test_a_traced_array_is_an_error_when_the_layer_is_made():
    def make(lib: Any) -> Any:
        bound = oc.stacked(oc.compose("non_neg", oc.box(upper=lib.full(3, 0.5))))
        return onnx.Linear(4, 3, kernel_constraint=bound, rngs=nnx.Rngs(0))

    with pytest.raises(
        TypeError,
        match=r"^Linear\(kernel_constraint=.*an array that JAX is tracing.*as in np\.ones\(3\), or "
        "outside of the function",
    ):
        nnx.jit(lambda: make(jnp))()
    model = nnx.jit(lambda: make(np))()
    kernel = oc.constrain({"kernel": jnp.ones((5, 3))}, onnx.declared(model))["kernel"]
    np.testing.assert_array_equal(kernel, 0.5)


def test_other_keywords_are_still_those_of_the_layer():
    with pytest.raises(TypeError, match="nonsense"):
        onnx.Linear(2, 3, nonsense=1, rngs=nnx.Rngs(0))


def test_constrained_is_cached_and_takes_classes_only():
    assert onnx.constrained(nnx.Linear) is onnx.Linear
    assert onnx.constrained(onnx.Linear) is onnx.Linear
    with pytest.raises(TypeError, match=r"constrained takes a subclass of nnx\.Module, not .*3"):
        onnx.constrained(3)
    with pytest.raises(TypeError, match=r"subclass of nnx\.Module"):
        onnx.constrained(dict)


def test_layer_classes_and_what_they_declare_pickle():
    layer = onnx.Linear(2, 3, kernel_constraint=oc.max_norm(1.0), rngs=nnx.Rngs(0))
    assert pickle.loads(pickle.dumps(type(layer))) is onnx.Linear
    assert pickle.loads(pickle.dumps(layer._optax_constraints)) == layer._optax_constraints


# Layers of one's own.


@onnx.constrained
class Gain(nnx.Module):
    """A user's own layer, with a parameter of each shape that lists and dicts allow."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jax.random.normal(rngs.params(), (features, 3)))
        self.taps = List([nnx.Param(jnp.ones(2)), nnx.Param(-jnp.ones(2))])


def test_a_layer_of_ones_own():
    layer = Gain(2, gain_constraint=oc.unit_norm(), taps_constraint="non_neg", rngs=nnx.Rngs(0))
    assert onnx.declared(layer) == {
        "/gain": oc.unit_norm(),
        "/taps/0": oc.non_neg(),
        "/taps/1": oc.non_neg(),
    }
    assert onnx.layout(layer)["gain"] == LeafLayout("Gain", None)
    assert onnx.layout(layer)["taps/1"] == LeafLayout("Gain", None)
    after = oc.constrain(nnx.state(layer, nnx.Param), onnx.declared(layer))
    np.testing.assert_allclose(norms(float64(flat(after)["gain"]), 0), 1, rtol=1e-6)
    assert np.all(float64(flat(after)["taps/1"]) == 0)


class Doubled(onnx.Linear):
    """A subclass that sets its own default and owns one more parameter."""

    def __init__(self, n: int, *, rngs: nnx.Rngs):
        super().__init__(n, n + 1, kernel_constraint=oc.max_norm(1.0), rngs=rngs)
        self.extra = nnx.Param(jnp.ones(n))


def test_a_subclass_keeps_what_it_declares_and_takes_more():
    assert onnx.declared(Doubled(2, rngs=nnx.Rngs(0))) == {"/kernel": oc.max_norm(1.0)}
    wrapped = onnx.constrained(Doubled)
    assert wrapped is not Doubled
    layer = wrapped(2, extra_constraint="non_neg", rngs=nnx.Rngs(0))
    assert onnx.declared(layer) == {"/extra": oc.non_neg(), "/kernel": oc.max_norm(1.0)}
    layer = wrapped(2, kernel_constraint="non_neg", rngs=nnx.Rngs(0))
    assert onnx.declared(layer) == {"/kernel": oc.non_neg()}
    assert onnx.layout(layer)["kernel"] == LeafLayout("Linear", (0,))
    assert onnx.layout(layer)["extra"] == LeafLayout("Linear", None)


def test_a_keyword_of_the_layers_own_is_left_to_it():
    class Own(nnx.Module):
        def __init__(self, kernel_constraint: str):
            self.kernel = nnx.Param(jnp.ones(2))
            self.said = kernel_constraint

    layer = onnx.constrained(Own)(kernel_constraint="mine")
    assert layer.said == "mine"
    assert onnx.declared(layer) == {}


# Models.


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.inner = onnx.Linear(3, 3, kernel_constraint=oc.max_norm(0.5), rngs=rngs)
        self.plain = nnx.Linear(3, 3, rngs=rngs)


class Model(nnx.Module):
    """Modules in a list, a dict, a Sequential and nested; one of them twice."""

    def __init__(self, rngs: nnx.Rngs):
        shared = Block(rngs)
        self.first = shared
        self.again = shared
        self.blocks = List([Block(rngs), onnx.Linear(3, 2, bias_constraint="non_neg", rngs=rngs)])
        self.named = Dict({"a[b]": Block(rngs)}) if Dict is dict else Dict(**{"a[b]": Block(rngs)})
        self.steps = nnx.Sequential(
            Block(rngs), nnx.relu, onnx.Conv(1, 2, 3, kernel_constraint=UNIT, rngs=rngs)
        )


MODEL_RULES = {
    "/again/inner/kernel": oc.max_norm(0.5),
    "/blocks/0/inner/kernel": oc.max_norm(0.5),
    "/blocks/1/bias": oc.non_neg(),
    "/named/a[[]b]/inner/kernel": oc.max_norm(0.5),
    "/steps/layers/0/inner/kernel": oc.max_norm(0.5),
    "/steps/layers/2/kernel": UNIT,
}


def test_a_model_of_models():
    model = Model(nnx.Rngs(0))
    assert onnx.declared(model) == MODEL_RULES
    assert onnx.declared(model, jnp.ones((1, 3))) == MODEL_RULES
    layout = onnx.layout(model)
    assert set(layout) == set(params_of(model))
    assert layout["steps/layers/2/kernel"] == LeafLayout("Conv", (0, 1))
    assert layout["again/plain/kernel"] == LeafLayout("Linear", (0,))


def test_rules_and_layout_bind_to_each_tree_that_flax_makes():
    model = Model(nnx.Rngs(0))
    rules, layout = onnx.declared(model), onnx.layout(model)
    state = nnx.state(model, nnx.Param)
    pure = nnx.to_pure_dict(state)
    wanted = bits(flat(oc.constrain(pure, rules, layout=layout))["again/inner/kernel"])
    assert wanted != bits(params_of(model)["again/inner/kernel"])
    for tree in (state, pure, model):
        after = flat(oc.constrain(tree, rules, layout=layout))
        assert bits(after["again/inner/kernel"]) == wanted
        np.testing.assert_allclose(
            norms(float64(after["steps/layers/2/kernel"]), (0, 1)), 1, rtol=1e-6
        )


def test_a_container_may_be_the_model():
    model = List(
        [onnx.Linear(2, 3, kernel_constraint=UNIT, rngs=nnx.Rngs(0)), nnx.Param(jnp.ones(2))]
    )
    assert onnx.declared(model) == {"/0/kernel": UNIT}
    assert set(onnx.layout(model)) == {"0/kernel", "0/bias", "1"}


def test_an_abstract_model_says_the_same():
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    model = Model(nnx.Rngs(0))
    assert onnx.declared(abstract) == onnx.declared(model)
    assert onnx.layout(abstract) == onnx.layout(model)


def test_the_innermost_declaration_wins():
    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a = onnx.Linear(2, 2, kernel_constraint="non_neg", rngs=rngs)
            self.b = nnx.Linear(2, 2, rngs=rngs)

    model = onnx.constrained(Outer)(nnx.Rngs(0), kernel_constraint="unit_norm")
    assert onnx.declared(model) == {"/a/kernel": oc.non_neg(), "/b/kernel": oc.unit_norm()}


class Tied(nnx.Module):
    """An embedding that is the kernel of the last layer, too."""

    def __init__(self, rngs: nnx.Rngs, embedding: Any = None, kernel: Any = None):
        self.embed = onnx.Embed(3, 4, embedding_constraint=embedding, rngs=rngs)
        self.head = onnx.Linear(3, 4, kernel_constraint=kernel, rngs=rngs)
        self.head.kernel = self.embed.embedding


def test_a_shared_parameter_appears_once():
    model = Tied(nnx.Rngs(0), embedding="non_neg")
    assert "head/kernel" not in params_of(model)
    assert onnx.declared(model) == {"/embed/embedding": oc.non_neg()}
    assert set(onnx.layout(model)) == {"embed/embedding", "head/bias"}
    assert onnx.declared(Tied(nnx.Rngs(0), kernel="non_neg")) == {"/embed/embedding": oc.non_neg()}
    assert onnx.declared(Tied(nnx.Rngs(0), "non_neg", "non_neg")) == {
        "/embed/embedding": oc.non_neg()
    }


def test_layers_that_share_a_parameter_and_differ_are_an_error():
    with pytest.raises(ValueError, match=r"'embed/embedding' declare different .* on one of them"):
        onnx.declared(Tied(nnx.Rngs(0), "non_neg", "unit_norm"))
    # An Embed and a Linear do not agree where a unit's weights are.
    assert onnx.layout(Tied(nnx.Rngs(0)))["embed/embedding"].fan_in is None


def test_a_second_name_of_a_parameter_does_not_hide_its_layer():
    class Alias(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.z = onnx.Embed(3, 4, embedding_constraint=UNIT, rngs=rngs)
            self.a = self.z.embedding

    model = Alias(nnx.Rngs(0))
    assert list(params_of(model)) == ["a"]
    assert onnx.declared(model) == {"/a": UNIT}
    assert onnx.layout(model) == {"a": LeafLayout("Embed", (1,))}


def test_a_parameter_that_is_gone_is_an_error():
    layer = onnx.Linear(2, 3, bias_constraint="non_neg", rngs=nnx.Rngs(0))
    layer.bias = None
    with pytest.raises(
        ValueError, match=r"'bias' .* NonNeg\(\) from the bias_constraint of a Linear"
    ):
        onnx.declared(layer)


def test_a_parameter_of_another_rank_is_an_error():
    layer = onnx.Linear(2, 3, kernel_constraint="non_neg", rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((5, 5, 5)))
    with pytest.raises(ValueError, match=r"'kernel' of shape \(5, 5, 5\) had the shape \(2, 3\)"):
        onnx.declared(layer)
    assert onnx.layout(layer)["kernel"] == LeafLayout("Linear", None)


def test_lora_is_not_known():
    model = nnx.LoRA(3, 2, 4, base_module=onnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    layout = onnx.layout(model)
    assert layout["lora_a"] == LeafLayout("LoRA", None)
    assert layout["base_module/kernel"] == LeafLayout("Linear", (0,))
    assert onnx.declared(
        onnx.constrained(nnx.LoRA)(3, 2, 4, lora_a_constraint="non_neg", rngs=nnx.Rngs(0))
    ) == {"/lora_a": oc.non_neg()}


# Static attributes.


def test_split_merge_clone_and_jit_keep_constraints_without_retracing():
    def make() -> Any:
        return onnx.Linear(2, 3, kernel_constraint=oc.max_norm(1.0), rngs=nnx.Rngs(0))

    layer = make()
    rules = {"/kernel": oc.max_norm(1.0)}
    graphdef, state = nnx.split(layer)
    assert graphdef == nnx.split(make())[0]
    assert hash(graphdef) == hash(nnx.split(make())[0])
    other = onnx.Linear(2, 3, kernel_constraint=oc.max_norm(2.0), rngs=nnx.Rngs(0))
    assert graphdef != nnx.split(other)[0]
    traces = []

    @nnx.jit
    def run(layer: Any, x: jax.Array) -> jax.Array:
        traces.append(onnx.declared(layer))
        return layer(x)

    for same in (layer, nnx.clone(layer), nnx.merge(graphdef, state), make()):
        assert onnx.declared(same) == rules
        run(same, inputs(4, 2))
    assert traces == [rules]


# Stacks.


class Layer(nnx.Module):
    """What is stacked: sizes that occur once, and a parameter of one's own."""

    def __init__(self, key: jax.Array, features: int = 5):
        rngs = nnx.Rngs(key)
        self.up = onnx.Linear(features, 7, kernel_constraint=UNIT, bias_constraint=SMALL, rngs=rngs)
        self.down = onnx.LinearGeneral(7, features, kernel_constraint=oc.unit_norm(), rngs=rngs)
        self.own = onnx.constrained(nnx.LoRA)(
            features, 2, features, lora_a_constraint=oc.unit_norm(), rngs=rngs
        )
        self.attention = onnx.MultiHeadAttention(
            2, features, 6, kernel_constraint=UNIT, decode=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(nnx.tanh(self.up(x))) + self.own(x) + self.attention(x)


def stack(n: int, axis: int, make: Callable[[jax.Array], Any] = Layer) -> Any:
    """A stack as `nnx.vmap` makes it, without arrays: those take long to compile."""
    # Keys of dropout, which attention keeps, are stacked along their only axis.
    stacked = nnx.vmap(make, in_axes=0, out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
    return nnx.eval_shape(lambda: stacked(keys(n)))


def filled(abstract: Any) -> Any:
    """The same model with arrays of random numbers."""
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.split(jax.random.key(0), leaf.shape)
        return jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)

    graphdef, state = nnx.split(abstract)
    return nnx.merge(graphdef, jax.tree.map(fill, state))


def place(axes: tuple[int, ...], axis: int, rank: int) -> tuple[int, ...]:
    """Axes of one layer, as axes of the stack of it."""
    left = [a for a in range(rank) if a != axis % rank]
    return tuple(left[a] for a in axes)


OWN = {
    "up/kernel": (0,),
    "up/bias": (0,),
    "down/kernel": (0,),
    "own/lora_a": (0,),
    "attention/query/kernel": (0,),
    "attention/key/kernel": (0,),
    "attention/value/kernel": (0,),
    "attention/out/kernel": (0, 1),
}


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_stack_is_told_from_one_layer(axis: int):
    model = filled(stack(3, axis))
    one = onnx.declared(nnx.eval_shape(lambda: Layer(jax.random.key(0))))
    rules, layout = onnx.declared(model), onnx.layout(model)
    assert {path.strip("/") for path in rules} == set(OWN)
    params = params_of(model)
    for path, own in OWN.items():
        rank = params[path].ndim
        assert rules[f"/{path}"] == oc.Stacked(one[f"/{path}"], axis=axis % rank)
        if path != "own/lora_a":
            assert layout[path].stacked == (axis % rank,)
            assert layout[path].fan_in == place(own, axis, rank)
    after = flat(oc.constrain(nnx.state(model, nnx.Param), rules, layout=layout))
    for path, own in OWN.items():
        found = norms(float64(after[path]), place(own, axis, after[path].ndim))
        if path == "up/bias":
            assert np.all(found <= 0.005 * (1 + 1e-6))
        else:
            np.testing.assert_allclose(found, 1, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_scanned_stack_trains_inside_its_sets(axis: int):
    model = filled(stack(3, axis))
    rules, layout = onnx.declared(model), onnx.layout(model)
    tx = optax.chain(optax.adam(0.01), oc.project(rules, layout=layout))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = inputs(2, 4, 5)

    @nnx.scan(in_axes=(nnx.StateAxes({nnx.Param: axis, ...: 0}), nnx.Carry), out_axes=nnx.Carry)
    def forward(layer: Any, x: jax.Array) -> jax.Array:
        return layer(x)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda model: jnp.mean(forward(model, x) ** 2))(model)
        optimizer.update(model, grads)

    before = bits(params_of(model)["up/kernel"])
    for _ in range(5):
        step(model, optimizer)
        params = params_of(model)
        for path, own in OWN.items():
            if path != "up/bias":
                found = norms(float64(params[path]), place(own, axis, params[path].ndim))
                np.testing.assert_allclose(found, 1, rtol=1e-5, err_msg=path)
    assert before != bits(params_of(model)["up/kernel"])


def test_a_stack_of_stacks():
    def make(key: jax.Array) -> Any:
        return onnx.Linear(3, 4, kernel_constraint=UNIT, rngs=nnx.Rngs(key))

    inner = nnx.vmap(make, in_axes=0, out_axes=0)
    model = nnx.vmap(inner, in_axes=0, out_axes=0)(jax.random.split(jax.random.key(0), (5, 2)))
    assert onnx.declared(model) == {"/kernel": oc.Stacked(UNIT, axis=(0, 1))}
    assert onnx.layout(model)["kernel"] == LeafLayout("Linear", (2,), (0, 1))


def test_layers_of_a_model_that_holds_a_stack_see_their_own_axes():
    class Holder(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.body = nnx.vmap(lambda key: nnx.Linear(3, 4, rngs=nnx.Rngs(key)))(keys(5))
            self.head = nnx.Linear(4, 2, rngs=rngs)

    model = onnx.constrained(Holder)(nnx.Rngs(0), kernel_constraint=oc.unit_norm())
    assert onnx.declared(model) == {
        "/body/kernel": oc.Stacked(oc.unit_norm(), axis=0),
        "/head/kernel": oc.unit_norm(),
    }


@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_layer_in_a_stack(case: Case, axis: int):
    flax_layer(case)
    cls = getattr(onnx, case.name)

    def make(key: jax.Array) -> Any:
        return case.make(cls, nnx.Rngs(key), case.keywords)

    # 11 is a size that no layer has. Statistics of BatchNorm are no parameters.
    model = stack(11, axis, make)
    rules, layout, params = onnx.declared(model), onnx.layout(model), params_of(model)
    for path, axes in case.units.items():
        stacked = axis % params[path].ndim
        expected = place(axes, axis, params[path].ndim), (stacked,)
        assert layout[path][1:] == expected, path
        assert rules[f"/{path}"].axis == stacked


def test_sizes_that_do_not_tell_the_stack_axis_are_an_error():
    def make(key: jax.Array) -> Any:
        return onnx.Linear(4, 4, use_bias=False, kernel_constraint=UNIT, rngs=nnx.Rngs(key))

    model = nnx.vmap(make)(keys(4))
    message = (
        r"'kernel' of shape \(4, 4, 4\) holds a stack of Linear parameters of shape \(4, 4\), and "
        r"its sizes do not tell whether along axis 0 or 1 or 2\..*'/kernel': Stacked\("
    )
    with pytest.raises(ValueError, match=message):
        onnx.declared(model)
    with pytest.raises(ValueError, match=message):
        onnx.layout(model)
    # What the message says to write.
    rules = {"/kernel": oc.Stacked(oc.unit_norm(axis=0), axis=0)}
    onnx.Optimizer(model, optax.sgd(0.0), rules=rules, layout={}).update(
        model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    )
    np.testing.assert_allclose(norms(float64(params_of(model)["kernel"]), 1), 1, rtol=1e-6)


def test_a_layer_that_is_out_of_the_same_call_tells_the_stack_axis():
    # bias: (4, 4); kernel: (4, 3, 4), where only axis 0 leaves (3, 4).
    make = lambda key: onnx.Linear(3, 4, bias_constraint=SMALL, rngs=nnx.Rngs(key))  # noqa: E731
    assert onnx.declared(stack(4, 0, make)) == {"/bias": oc.Stacked(SMALL, axis=0)}
    # out: (2, 2, 3, 6), told by query: (2, 6, 2, 3), where only axis 0 leaves (6, 2, 3).
    make = lambda key: onnx.MultiHeadAttention(  # noqa: E731
        2, 6, kernel_constraint=UNIT, use_bias=False, decode=False, rngs=nnx.Rngs(key)
    )
    assert onnx.layout(stack(2, 0, make))["out/kernel"] == LeafLayout("LinearGeneral", (1, 2), (0,))
    # kernel: (4, 4, 3), along 0 or, with out_axes=-2, along 1; either leaves bias: (4, 3).
    make = lambda key: onnx.Linear(4, 3, rngs=nnx.Rngs(key))  # noqa: E731
    with pytest.raises(ValueError, match="along axis 0 or 1"):
        onnx.layout(stack(4, 0, make))


# The optimizer.


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("jit", [False, True])
def test_the_optimizer_gives_the_projection_to_the_bit(dtype: Any, jit: bool):
    model = onnx.Linear(
        5, 7, kernel_constraint=oc.max_norm(0.5), bias_constraint="non_neg", param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    rules = onnx.declared(model)
    tx = optax.adam(0.03)
    optimizer = onnx.Optimizer(model, tx)
    grads_of = nnx.grad(lambda model: jnp.sum((model(inputs(3, 5)) - 1.0) ** 2))

    def by_hand(params: Any, grads: Any, state: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return oc.constrain(optax.apply_updates(params, updates), rules), state

    def by_optimizer(model: Any, optimizer: Any, grads: Any) -> None:
        optimizer.update(model, grads)

    if jit:
        by_hand, by_optimizer = jax.jit(by_hand), nnx.jit(by_optimizer)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    for _ in range(10):
        grads = grads_of(model)
        params, state = by_hand(params, nnx.to_pure_dict(nnx.state(grads)), state)
        by_optimizer(model, optimizer, grads)
        found = params_of(model)
        assert {path: bits(leaf) for path, leaf in found.items()} == {
            path: bits(leaf) for path, leaf in flat(params).items()
        }
        again = flat(oc.constrain({"bias": found["bias"]}, {"bias": "non_neg"}))["bias"]
        assert bits(again) == bits(found["bias"])
    assert optimizer.step[...] == 10


def test_a_schedule_sees_the_step_before_the_update():
    # Of unsigned integers, 0 - 2 would be a large number, and the schedule at its end.
    schedule = optax.polynomial_schedule(1.0, 3.0, 1, transition_steps=2, transition_begin=2)
    model = onnx.Linear(2, 2, kernel_constraint=oc.max_norm(schedule, axis=None), rngs=nnx.Rngs(0))
    optimizer = onnx.Optimizer(model, optax.sgd(1.0))
    grads = jax.tree.map(lambda p: jnp.full_like(p, -10.0), nnx.state(model, nnx.Param))
    found = []
    for _ in range(6):
        optimizer.update(model, grads)
        found.append(float(norms(float64(model.kernel[...]), None).item()))
    np.testing.assert_allclose(found, [1, 1, 1, 2, 3, 3], rtol=1e-6)


def test_the_optimizer_goes_through_jit_split_and_loops():
    def fresh() -> Any:
        model = onnx.Linear(2, 3, kernel_constraint=oc.max_norm(0.3), rngs=nnx.Rngs(0))
        return model, onnx.Optimizer(model, optax.adam(0.1))

    def step(model: Any, optimizer: Any) -> None:
        grads = nnx.grad(lambda model: jnp.sum((model(inputs(3, 2)) - 1.0) ** 2))(model)
        optimizer.update(model, grads)

    traces = []

    @nnx.jit
    def jitted(model: Any, optimizer: Any) -> None:
        traces.append(1)
        step(model, optimizer)

    model, optimizer = fresh()
    for _ in range(4):
        jitted(model, optimizer)
    assert len(traces) == 1
    wanted = params_of(model)
    np.testing.assert_array_less(norms(float64(wanted["kernel"]), 0), 0.3 * (1 + 1e-6))

    model, optimizer = fresh()
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def pure(state: Any) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        step(model, optimizer)
        return nnx.state((model, optimizer))

    for _ in range(4):
        state = pure(state)
    model, optimizer = nnx.merge(graphdef, state)
    assert bits(params_of(model)["kernel"]) == bits(wanted["kernel"])
    assert optimizer.step[...] == 4

    model, optimizer = fresh()

    def body(i: Any, carry: Any) -> Any:
        step(*carry)
        return carry

    nnx.fori_loop(0, 4, body, (model, optimizer))
    np.testing.assert_allclose(
        float64(params_of(model)["kernel"]), float64(wanted["kernel"]), rtol=1e-5
    )
    model, optimizer = fresh()

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scanned(carry: Any, _: Any) -> Any:
        step(*carry)
        return carry

    scanned((model, optimizer), jnp.arange(4))
    np.testing.assert_allclose(
        float64(params_of(model)["kernel"]), float64(wanted["kernel"]), rtol=1e-5
    )


def test_rules_of_the_optimizer_replace_what_is_declared():
    model = onnx.Conv(2, 3, 3, bias_constraint="non_neg", rngs=nnx.Rngs(0))
    optimizer = onnx.Optimizer(model, optax.sgd(1.0), rules={"kernel": UNIT})
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer.update(model, grads)
    np.testing.assert_allclose(norms(float64(model.kernel[...]), (0, 1)), 1, rtol=1e-6)
    assert model.bias is not None
    assert np.all(float64(model.bias[...]) == -1)


def test_only_what_is_trained_is_projected():
    class Special(nnx.Param):
        pass

    class Two(nnx.Module):
        def __init__(self):
            self.a = nnx.Param(-jnp.ones(2))
            self.b = Special(-jnp.ones(2))

    model = onnx.constrained(Two)(a_constraint="non_neg", b_constraint="non_neg")
    optimizer = onnx.Optimizer(model, optax.sgd(0.0), wrt=Special)
    optimizer.update(model, nnx.state(model, Special))
    assert np.all(float64(model.a[...]) == -1)
    assert np.all(float64(model.b[...]) == 0)
    with pytest.raises(ValueError, match="for what is trained"):
        onnx.Optimizer(onnx.constrained(Two)(a_constraint="non_neg"), optax.sgd(0.0), wrt=Special)


def test_the_optimizer_says_what_to_write():
    model = onnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"No layer of this Linear declares.*kernel_constraint=max_n"
    ):
        onnx.Optimizer(model, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"'kernal' matches no leaf"):
        onnx.Optimizer(model, optax.sgd(0.1), rules={"kernal": "non_neg"})


def test_eager_updates_do_not_bind_again():
    seen = []

    def is_bias(path: str, leaf: Any) -> bool:
        seen.append(path)
        return path == "bias"

    model = onnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = onnx.Optimizer(model, optax.sgd(0.1), rules=[(is_bias, oc.non_neg())])
    asked = len(seen)
    for _ in range(3):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert model.bias is not None
    np.testing.assert_array_equal(model.bias[...], 0)
    assert len(seen) == asked == 2


def test_optimizers_of_equal_rules_are_traced_once():
    tx = optax.sgd(0.1)

    def make(**keywords: Any) -> Any:
        model = onnx.Linear(2, 3, kernel_constraint=oc.max_norm(0.3, "fan_in"), rngs=nnx.Rngs(0))
        return model, onnx.Optimizer(model, tx, **keywords)

    traces = []

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        traces.append(1)
        optimizer.update(model, nnx.state(model, nnx.Param))

    first, second = make(), make()
    pairs = (first, second, copy.deepcopy(first), make(rules={"/kernel": UNIT}))
    assert nnx.split(first)[0] == nnx.split(second)[0] == nnx.split(pairs[2])[0]
    assert hash(nnx.split(first)[0]) == hash(nnx.split(second)[0]) == hash(nnx.split(pairs[2])[0])
    for i, (model, optimizer) in enumerate(pairs):
        assert (nnx.split((model, optimizer))[0] == nnx.split(first)[0]) == (i < 3)
        step(model, optimizer)
        assert len(traces) == (1 if i < 3 else 2)
    assert nnx.split(make(layout={})[1])[0] != nnx.split(first[1])[0]
    assert bits(second[0].kernel[...]) == bits(first[0].kernel[...])


def test_copies_of_an_optimizer_do_not_bind_again():
    seen = []

    def is_bias(path: str, leaf: Any) -> bool:
        seen.append(path)
        return path == "bias"

    model = onnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = onnx.Optimizer(model, optax.sgd(0.1), rules=[(is_bias, oc.non_neg())])
    asked = len(seen)
    for copied in (nnx.clone(optimizer), copy.deepcopy(optimizer)):
        copied.update(model, nnx.state(model, nnx.Param))
    assert len(seen) == asked == 2
