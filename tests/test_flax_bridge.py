"""NNX modules in Linen models and Linen modules in NNX ones, by flax.nnx.bridge."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import optax_constraints as oc
import optax_constraints.flax.linen as ocl
import optax_constraints.flax.nnx as onnx
from optax_constraints._trees import leaves_by_path
from optax_constraints.flax import declared, layout

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4)), jnp.float32)
OWN = oc.unit_norm(axis="fan_in")


def flat(tree: Any) -> dict[str, Any]:
    return dict(leaves_by_path(tree))


def assert_units(params: Any, model: Any, *inputs: Any, axes: dict[str, int]) -> None:
    """What is declared makes units of norm 1 along these axes, and leaves the rest alone."""
    new = flat(oc.constrain(params, declared(model, *inputs), layout=layout(model, *inputs)))
    for path, leaf in flat(params).items():
        if path in axes:
            norms = np.linalg.norm(new[path], axis=axes[path])
            np.testing.assert_allclose(norms, 1.0, rtol=1e-6, err_msg=path)
        else:
            np.testing.assert_array_equal(new[path], leaf, err_msg=path)


# NNX in Linen.


class Pair(nnx.Module):
    """Layers by themselves and in a stack. All sizes of the stack are equal."""

    def __init__(self, rngs):
        self.one = onnx.Linear(4, 4, kernel_constraint=OWN, rngs=rngs)
        self.free = nnx.Linear(4, 4, rngs=rngs)

        @nnx.vmap
        def stack(key):
            return onnx.Linear(4, 3, kernel_constraint=OWN, rngs=nnx.Rngs(key))

        self.stack = stack(jax.random.split(rngs.params(), 5))

    def __call__(self, x):
        return self.free(self.one(x)) + self.stack.kernel[...].sum()


def test_a_linen_layer_made_of_an_nnx_one():
    model = bridge.to_linen(onnx.Linear, 4, 3, kernel_constraint=OWN, bias_constraint="non_neg")
    assert declared(model, X) == {"/bias": oc.non_neg(), "/kernel": OWN}
    assert layout(model, X) == {
        "bias": ("Linear", (0,), ()),
        "kernel": ("Linear", (0,), ()),
    }
    assert_units(model.init(KEY, X)["params"], model, X, axes={"kernel": 0})


class Wrapper(nn.Module):
    @nn.compact
    def __call__(self, carry, _=None):
        carry = ocl.Dense(4, kernel_constraint=OWN)(carry)
        return bridge.ToLinen(Pair, name="pair")(carry), None


def test_an_nnx_model_in_a_linen_one():
    params = Wrapper().init(KEY, X)["params"]
    assert set(layout(Wrapper(), X)) == set(flat(params))
    assert layout(Wrapper(), X)["pair/stack/kernel"] == ("Linear", (1,), (0,))
    axes = {"Dense_0/kernel": 0, "pair/one/kernel": 0, "pair/stack/kernel": 1}
    assert set(declared(Wrapper(), X)) == {f"/{path}" for path in axes}
    assert_units(params, Wrapper(), X, axes=axes)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_linen_stack_of_nnx_models(axis):
    model = nn.scan(Wrapper, {"params": axis}, split_rngs={"params": True}, length=4)()
    params = model.init(KEY, X)["params"]
    assert set(layout(model, X)) == set(flat(params))
    assert layout(model, X)["pair/stack/kernel"] == ("Linear", (2,), (0, 1))
    assert declared(model, X)["/pair/stack/kernel"] == oc.Stacked(OWN, (0, 1))
    assert declared(model, X)["/pair/one/kernel"] == oc.Stacked(OWN, axis)
    own = 1 - axis
    axes = {"Dense_0/kernel": own, "pair/one/kernel": own, "pair/stack/kernel": 2}
    assert_units(params, model, X, axes=axes)


def test_a_keyword_of_the_linen_model_reaches_what_declares_nothing():
    model = ocl.constrained(Wrapper)(kernel_constraint="non_neg", bias_constraint="max_norm")
    rules = declared(model, X)
    assert rules["/pair/one/kernel"] == rules["/Dense_0/kernel"] == OWN
    assert rules["/pair/free/kernel"] == oc.non_neg()
    assert rules["/pair/stack/bias"] == oc.Stacked(oc.max_norm())
    assert set(rules) == {f"/{path}" for path in layout(model, X)}


def test_other_options_of_the_wrapper():
    class Scale(nnx.Module):
        def __init__(self, size, note):
            self.gain = nnx.Param(jnp.ones(size), note=note)  # Linen has a box for the note

        def double(self, x):
            return 2 * x * self.gain[...]

    scale = onnx.constrained(Scale)
    model = bridge.ToLinen(
        scale, args=(4,), kwargs={"gain_constraint": "non_neg", "note": "here"}, skip_rng=True
    )
    assert declared(model, X, nnx_method=scale.double) == {"/gain": oc.non_neg()}
    assert layout(model, X, nnx_method=scale.double) == {"gain": ("Scale", None, ())}


def test_a_parameter_that_does_not_fit_its_declaration_is_an_error():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layer = onnx.constrained(Gain)(gain_constraint="non_neg")
            self.layer.gain = nnx.Param(jnp.ones((3, 4)))

        def __call__(self, x):
            return x

    class Gain(nnx.Module):
        def __init__(self):
            self.gain = nnx.Param(jnp.ones(5))

    with pytest.raises(ValueError, match=r"'layer/gain' of shape \(3, 4\) had the shape \(5,\)"):
        declared(bridge.ToLinen(Model), X)


# Linen in NNX.


class Net(nn.Module):
    """Its layers are made when it is called."""

    features: int = 4

    @nn.compact
    def __call__(self, x, *, train):
        assert train is True
        return self.shift(ocl.Dense(self.features, kernel_constraint=OWN)(x) + nn.Dense(1)(x))

    def shift(self, y):  # By itself it finds no parameters.
        return y + self.variables["params"]["Dense_0"]["bias"]

    @nn.compact
    def other(self, x):
        return self(x, train=True)


class Holder(nnx.Module):
    def __init__(self, rngs):
        self.first = bridge.ToNNX(Net(), rngs=rngs).lazy_init(X, train=True)
        self.between = onnx.Linear(4, 3, kernel_constraint=OWN, rngs=rngs)
        # An equal module, called with another number of features.
        self.second: Any = bridge.ToNNX(Net(), rngs=rngs).lazy_init(X[:, :3], train=True)

    def __call__(self, x, train):
        assert train is True
        return self.second.other(self.between(self.first(x, train=train)))


KERNELS = ("between/kernel", "first/Dense_0/kernel", "second/Dense_0/kernel")


def test_a_linen_model_in_an_nnx_one():
    model = Holder(nnx.Rngs(0))
    graph, counts = nnx.graphdef(model), jax.tree.leaves(nnx.state(model, nnx.RngCount))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for x in (X, jax.ShapeDtypeStruct(X.shape, X.dtype)):
        assert declared(model, x, train=True) == {f"/{path}": OWN for path in KERNELS}
        assert declared(model, x, True) == declared(model, x, train=True)
        known = layout(model, x, True)
    assert set(known) == set(flat(params))
    assert known["first/Dense_0/kernel"] == ("Dense", (0,), ())
    new = oc.constrain(params, declared(model, X, True), layout=known)
    for path in KERNELS:
        np.testing.assert_allclose(np.linalg.norm(flat(new)[path], axis=0), 1.0, rtol=1e-6)
    # Nothing of it has changed, such as counts of random keys.
    assert graph == nnx.graphdef(model)
    assert counts == jax.tree.leaves(nnx.state(model, nnx.RngCount)) != []


def test_a_wrapper_may_be_the_model():
    model = bridge.ToNNX(
        nn.Sequential([ocl.Dense(3, kernel_constraint=OWN), nn.relu]), rngs=nnx.Rngs(0)
    ).lazy_init(X)
    assert declared(model, X) == {"/layers_0/kernel": OWN}
    assert layout(model, X)["layers_0/kernel"] == ("Dense", (0,), ())


@pytest.mark.parametrize("axis", [0, 1])
def test_stacks_around_and_inside_of_a_linen_model(axis):
    tower = nn.vmap(
        ocl.Dense, {"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=3
    )(4, kernel_constraint=OWN)

    class Model(nnx.Module):
        def __init__(self, rngs):
            @nnx.vmap(out_axes=nnx.StateAxes({nnx.Param: axis, ...: 0}))
            def stack(key):
                return bridge.ToNNX(tower, rngs=nnx.Rngs(key)).lazy_init(X)

            self.stack = stack(jax.random.split(rngs.params(), 5))

        def __call__(self, x):
            @nnx.vmap(in_axes=(nnx.StateAxes({nnx.Param: axis, ...: 0}), None))
            def run(layer, x):
                return layer(x)

            return run(self.stack, x)

    model: Any = Model(nnx.Rngs(0))
    assert model.stack.kernel.shape == ((5, 3, 4, 4) if axis == 0 else (3, 5, 4, 4))
    assert layout(model, X)["stack/kernel"] == ("Dense", (2,), (0, 1))
    assert declared(model, X)["/stack/kernel"] == oc.Stacked(OWN, (0, 1))


def test_what_is_declared_around_a_linen_model_is_for_the_rest_of_it():
    model = onnx.constrained(Holder)(kernel_constraint="non_neg", rngs=nnx.Rngs(0))
    rules = declared(model, X, True)
    assert rules == {
        f"/{path}": OWN if path in KERNELS else oc.non_neg()
        for path in layout(model, X, True)
        if path.endswith("kernel")
    }


@pytest.mark.parametrize("module", [Net(), ocl.Dense(3, kernel_constraint=OWN)])
def test_a_linen_model_that_nobody_calls_is_an_error(module):
    class Model(nnx.Module):
        def __init__(self):
            self.inner = bridge.ToNNX(module, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return x

    message = (
        rf"^'inner' is a Linen {type(module).__name__} in a ToNNX, .*from a call that reaches it. "
        r"Write declared\(model, x\) and layout\(model, x\)"
    )
    for args in ((), (X,)):
        with pytest.raises(ValueError, match=message):
            declared(Model(), *args)
    with pytest.raises(ValueError, match=message):
        onnx.Optimizer(Model(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"^This model is a Linen"):
        declared(bridge.ToNNX(module, rngs=nnx.Rngs(0)))


def test_a_linen_model_that_cannot_declare_needs_no_call():
    class Model(nnx.Module):
        def __init__(self, rngs):
            plain = nn.Sequential([nn.Dense(4), ocl.Dense(4), nn.relu])
            self.inner = bridge.ToNNX(plain, rngs=rngs).lazy_init(X)
            self.head = onnx.Linear(4, 1, kernel_constraint=OWN, rngs=rngs)

    assert declared(Model(nnx.Rngs(0))) == {"/head/kernel": OWN}
    assert layout(Model(nnx.Rngs(0)))["inner/layers_0/kernel"] == ("ToNNX", None, ())


def test_an_optimizer_of_a_model_with_linen_inside():
    model = Holder(nnx.Rngs(0))
    rules, known = declared(model, X, True), layout(model, X, True)
    optimizer = onnx.Optimizer(model, optax.sgd(0.1), rules=rules, layout=known)
    optimizer.update(model, nnx.grad(lambda model: model(X, True).sum())(model))
    params = flat(nnx.state(model, nnx.Param))
    for path in KERNELS:
        np.testing.assert_allclose(np.linalg.norm(params[path], axis=0), 1.0, rtol=1e-6)
