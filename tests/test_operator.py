"""Bounds of convolutions, against the singular values of what the layers do with images."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits, float64
from flax import nnx
from jax import lax
from sklearn.datasets import load_digits

import optax_constraints as oc
from optax_constraints import flax as ocf
from optax_constraints._axes import LeafLayout
from optax_constraints.sets.operator import Convolution

EXPLICIT: dict[str, Any] = {"strides": 1, "padding": "SAME", "dilation": 1, "groups": 1}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def norms(function: Any, kernels: list[jax.Array], shape: tuple[int, ...]) -> np.ndarray:
    """Norms of a linear function of an image and a kernel, by the singular values of its matrix."""
    images = jnp.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = [float64(jax.jit(function)(kernel, images)) for kernel in kernels]
    return np.stack(
        [np.linalg.svd(c.reshape(len(images), -1), compute_uv=False)[0] for c in columns]
    )


def convolution(rank: int, strides, padding, dilation, groups, input_dilation=1):
    """What Flax and JAX do with a kernel and images (n, *size, channels)."""
    strides, dilation, apart = (
        (n,) * rank if isinstance(n, int) else n for n in (strides, dilation, input_dilation)
    )
    letters = "DHW"[3 - rank :]

    def apply(kernel, x):
        pad = padding
        if pad == "CIRCULAR":
            sizes = [(k - 1) * d for k, d in zip(kernel.shape, dilation, strict=False)][:rank]
            x = jnp.pad(x, [(0, 0), *((k // 2, k - k // 2) for k in sizes), (0, 0)], mode="wrap")
            pad = "VALID"
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            pad,
            lhs_dilation=apart,
            rhs_dilation=dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=groups,
        )

    return apply


LAYERS = [
    # kernel, strides, padding, dilation, groups, input dilation, size of the image
    ((3, 3, 2, 3), 1, "SAME", 1, 1, 1, (8, 8)),
    ((3, 3, 2, 3), 1, "VALID", 1, 1, 1, (3, 4)),
    ((3, 3, 2, 3), 1, "CIRCULAR", 1, 1, 1, (7, 6)),
    ((3, 3, 2, 3), 2, "SAME", 1, 1, 1, (9, 8)),
    ((3, 2, 2, 4), (2, 1), ((0, 2), (1, 1)), (1, 3), 2, 1, (7, 7)),
    ((3, 3, 2, 3), 4, "SAME", 2, 1, 1, (11, 9)),
    ((2, 1, 1), 2, "CIRCULAR", 1, 1, 1, (5,)),  # a stride that does not fit around the circle
    ((5, 4, 4), 3, "CIRCULAR", 2, 1, 1, (10,)),
    ((4, 3, 2), 1, ((3, 3),), 1, 1, 2, (9,)),
    ((4, 3, 2), 3, ((6, 6),), 2, 1, 2, (9,)),
    ((2, 3, 2, 1, 2), (1, 2, 1), "SAME", 1, 1, 1, (4, 4, 3)),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_image_gets_longer_than_the_bound(layer):
    shape, strides, padding, dilation, groups, apart, size = layer
    constraint = oc.max_operator_norm(
        2.0,
        strides=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        input_dilation=apart,
    )
    function = convolution(len(size), strides, padding, dilation, groups, apart)
    kernels = [constraint(10 * normal(*shape, seed=seed)) for seed in range(3)]
    found = norms(jax.jit(function), kernels, (*size, shape[-2] * groups))
    assert np.max(found) <= 2
    assert np.min(found) > 0.8  # and the bound is of some use


@pytest.mark.parametrize("channels", [(1, 1), (3, 8)], ids=str)
def test_for_small_windows_the_bound_is_tight(channels):
    kernel = oc.max_operator_norm(1.0, **EXPLICIT)(normal(3, 3, *channels))
    for size, loose in ((8, 1.2), (14, 1.1)):
        function = convolution(2, **EXPLICIT)
        assert 1 / loose <= norms(function, [kernel], (size, size, channels[0])) <= 1


def test_strides_make_the_bound_smaller():
    kernel = normal(3, 3, 2, 3)
    sizes = []
    for strides in (1, 2, 3):
        constraint = oc.max_operator_norm(1.0, **{**EXPLICIT, "strides": strides})
        sizes.append(float(jnp.linalg.norm(constraint(kernel))))
    assert sizes[0] < sizes[1] < sizes[2]
    # Dilation counts only beside strides, and makes less of them.
    dilated = oc.max_operator_norm(1.0, **{**EXPLICIT, "strides": 2, "dilation": 2})(kernel)
    assert float(jnp.linalg.norm(dilated)) == pytest.approx(sizes[0])


# What a layout tells.


class Model(nn.Module):
    """A layer of each kind."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer(x)


conv, transposed = functools.partial(nn.Conv, use_bias=False), nn.ConvTranspose
FLAX = {
    "plain": conv(3, (3, 3)),
    "circular": conv(3, (3, 2), padding="CIRCULAR", strides=2, kernel_dilation=(2, 1)),
    "causal": conv(3, 4, padding="CAUSAL", kernel_dilation=2, strides=3),
    "groups": conv(4, (3, 3), feature_group_count=2, strides=(2, 1), padding=1),
    "apart": conv(3, (3,), input_dilation=2, padding=((2, 2),)),
    "up": transposed(3, (3, 3), strides=(2, 2), use_bias=False),
    "up around": transposed(3, (4,), strides=(3,), padding="CIRCULAR", use_bias=False),
    "adjoint": transposed(
        3, (3, 3), strides=(2, 2), padding="CIRCULAR", transpose_kernel=True, use_bias=False
    ),
}


@pytest.mark.parametrize("name", FLAX)
def test_layers_of_linen(name):
    model = Model(FLAX[name])
    window = FLAX[name].kernel_size
    size = (6, 6, 2) if isinstance(window, tuple) and len(window) == 2 else (9, 2)
    x = jnp.zeros((1, *size))
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda w: 10 * normal(*w.shape), params)
    rules, layout = {"kernel": oc.max_operator_norm(1.0)}, ocf.layout(model, x)
    params = oc.constrain(params, rules, layout=layout)
    (got,) = norms(lambda params, x: model.apply({"params": params}, x), [params], size)
    assert 0.4 < got <= 1
    if name == "groups":
        (row,) = oc.report(params, rules, layout=layout).rows
        assert (row.constraint, row.outside) == ("MaxOperatorNorm(1)", 0)
        assert (row.units, row.at_bound) == (2, 2)


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.strided = nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.apart = nnx.Conv(
            4, 6, (3,), padding=[(1, 2)], kernel_dilation=2, input_dilation=3, rngs=rngs
        )
        self.up = nnx.ConvTranspose(4, 6, (3,), strides=2, padding="CIRCULAR", rngs=rngs)
        self.adjoint = nnx.ConvTranspose(4, 6, (3,), strides=2, transpose_kernel=True, rngs=rngs)
        self.masked = nnx.Conv(1, 1, (2,), mask=jnp.ones((2, 1, 1)), rngs=rngs)
        self.dense = nnx.Linear(2, 3, rngs=rngs)


def test_layers_of_nnx_are_told_as_those_of_linen():
    layout = ocf.layout(nnx.eval_shape(lambda: Layers(nnx.Rngs(0))))
    found = {p.removesuffix("/kernel"): own.convolution for p, own in layout.items()}
    assert {name: found[name] for name in found if "/" not in name} == {
        "strided": Convolution((2, 2), "SAME", (1, 1), 2, (1, 1)),
        "apart": Convolution((1,), ((1, 2),), (2,), 1, (3,)),
        "up": Convolution((1,), "VALID", (1,), 1, (2,)),
        "adjoint": Convolution((2,), "SAME", (1,), 1, (1,)),
        "masked": None,
        "dense": None,
    }
    assert layout["strided/bias"].convolution is None
    kernel = layout["strided/kernel"]
    assert kernel == LeafLayout(*kernel, kernel.convolution)
    assert kernel != LeafLayout(*kernel, found["apart"])
    assert kernel == LeafLayout(*kernel)  # by hand, which says nothing of it


def test_layers_in_a_stack_are_bounded_one_by_one():
    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            return layers(nn.Conv(2, (3,), use_bias=False), x, None)[0]

    x = jnp.zeros((1, 8, 2))
    layout = ocf.layout(Tower(), x)
    params = Tower().init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda w: 10 * normal(*w.shape), params)
    rules = {"kernel": oc.max_operator_norm(1.0)}
    (kernels,) = jax.tree.leaves(oc.constrain(params, rules, layout=layout))
    one = oc.max_operator_norm(1.0, **EXPLICIT)
    (before,) = jax.tree.leaves(params)
    want = jnp.stack([one(kernel) for kernel in before])
    np.testing.assert_allclose(kernels, want, rtol=1e-6)


# Errors.


def bind(constraint: oc.Constraint, layout: LeafLayout | None, shape=(3, 3, 2, 4)) -> None:
    layouts = None if layout is None else {"conv/kernel": layout}
    oc.constrain({"conv": {"kernel": jnp.ones(shape)}}, {"kernel": constraint}, layout=layouts)


def told(**changes: Any) -> LeafLayout:
    known = Convolution((1, 1), "SAME", (1, 1), 1, (1, 1))._replace(**changes)
    return LeafLayout("Conv", (0, 1, 2), convolution=known)


@pytest.mark.parametrize(
    ("constraint", "layout", "message"),
    [
        (
            oc.max_operator_norm(1.0),
            None,
            r"'conv/kernel' of shape \(3, 3, 2, 4\): a kernel does not tell the strides and "
            r"padding and dilation and groups of its layer. Give layout=layout\(model\), or write",
        ),
        (
            oc.max_operator_norm(1.0, strides=1, padding="SAME", groups=1),
            None,
            "does not tell the dilation of its layer",
        ),
        (
            oc.max_operator_norm(1.0),
            LeafLayout("Dense", (0,)),
            "the layout does not know a convolution with this kernel of a Dense. For a dense "
            "kernel write max_spectral_norm",
        ),
        (
            oc.max_operator_norm(1.0, strides=2),
            told(),
            r"strides=2 is not what the layout says of this Conv, which is \(1, 1\); leave it out",
        ),
        (
            oc.max_operator_norm(1.0, padding="SAME"),
            told(padding="CIRCULAR"),
            "padding='SAME' is not what the layout says",
        ),
        (oc.max_operator_norm(1.0), told(padding="REFLECT"), "padding='REFLECT' has no bound here"),
        (
            oc.max_operator_norm(1.0, **{**EXPLICIT, "groups": 3}),
            None,
            "groups=3 does not divide the 4 outputs; write the feature_group_count",
        ),
        (
            oc.max_operator_norm(1.0, **{**EXPLICIT, "strides": (1, 1, 2)}),
            None,
            r"strides=\(1, 1, 2\) has 3 numbers, and the window 2 axes",
        ),
        (
            oc.max_operator_norm(1.0),
            told(padding="CIRCULAR", input_dilation=(2, 1)),
            r"padding='CIRCULAR' with input_dilation=\(2, 1\) has no bound here",
        ),
    ],
    ids=str,
)
def test_errors_when_bound(constraint, layout, message):
    with pytest.raises(ValueError, match=message):
        bind(constraint, layout)


def test_what_agrees_with_the_layout_may_be_said_again():
    again = oc.max_operator_norm(1.0, strides=1, padding="VALID", dilation=(1, 1), groups=1)
    bind(again, told(padding=((1, 1), (1, 1))))


def test_text_is_the_number_that_it_stands_for():
    kernel = normal(3, 3, 4, 4)  # fan_in is 36
    got, want = (
        oc.constrain({"Conv_0": {"kernel": kernel}}, oc.max_operator_norm(n, **EXPLICIT))
        for n in ("sqrt(fan_in) / 4", 1.5)
    )
    got, want = (tree["Conv_0"]["kernel"] for tree in (got, want))
    assert bits(got) == bits(want) != bits(kernel)
    with pytest.raises(ValueError, match=r"max_value='fan_in - 40'.* is -4, which is not allowed"):
        oc.max_operator_norm("fan_in - 40", **EXPLICIT).settle("Conv_0/kernel", kernel.shape)


def test_a_dense_kernel_is_no_convolution():
    with pytest.raises(ValueError, match=r"a kernel has the axes \(\*window, in, out\)"):
        oc.max_operator_norm(1.0, **EXPLICIT)(jnp.ones((3, 4)))


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ({"strides": 0}, ValueError, "strides=0 is below 1"),
        ({"strides": ()}, ValueError, r"strides=\(\) is below 1"),
        ({"dilation": 1.5}, TypeError, "dilation=1.5 is not an int, or one for each axis"),
        ({"groups": (1, 2)}, TypeError, r"groups=\(1, 2\) is not an int"),
        ({"groups": True}, TypeError, "groups=True is not an int"),
        (
            {"padding": "REFLECT"},
            ValueError,
            "padding='REFLECT' has no bound here; it is for 'SAME'",
        ),
        ({"padding": 1.5}, TypeError, "padding=1.5 is none; write 'SAME'"),
        ({"max_value": -1.0}, ValueError, "max_value=-1.0 is not allowed"),
    ],
    ids=str,
)
def test_errors_when_made(argument, error, message):
    with pytest.raises(error, match=message):
        oc.max_operator_norm(**{"max_value": 1.0, **EXPLICIT, **argument})


def test_configs_keep_pairs():
    given = oc.max_operator_norm(1.0, strides=[1, 2], padding=[[0, 1], 2], dilation=1, groups=1)
    again = oc.deserialize(oc.serialize(given))
    assert again == given
    assert (again.strides, again.padding) == ((1, 2), ((0, 1), 2))


# A network with a certificate.


class Small(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.slow  # some seconds
def test_no_attack_gets_beyond_the_lipschitz_bound_of_a_trained_network():
    images, labels = load_digits(return_X_y=True)
    x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)
    y = jnp.asarray(labels)
    model, bounds = Small(), (2.0, 2.0, 3.0)
    rules = {
        "Conv_0/kernel": oc.max_operator_norm(bounds[0]),
        "Conv_1/kernel": oc.max_operator_norm(bounds[1]),
        "Dense_0/kernel": oc.max_spectral_norm(bounds[2]),
    }
    tx = optax.chain(optax.adam(1e-2), oc.project(rules, layout=ocf.layout(model, x[:1])))

    def loss(params, i):
        logits = model.apply({"params": params}, x[i])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[i]).mean()

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            i = jax.random.randint(key, (64,), 0, 1500)
            updates, state = tx.update(jax.grad(loss)(params, i), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 300)
        return lax.scan(step, (params, tx.init(params)), keys)[0][0]

    params = train(model.init(jax.random.key(0), x[:1])["params"])

    @jax.jit
    def attacked(params, x):
        """How much longer a small step becomes that goes up the gradient of just that."""

        def stretch(step):
            before, after = (jnp.asarray(model.apply({"params": params}, y)) for y in (x, x + step))
            moved = after - before
            return jnp.linalg.norm(moved, axis=1) / jnp.linalg.norm(
                step.reshape(len(x), -1), axis=1
            )

        def ascend(step, _):
            gradient = jax.grad(lambda step: jnp.sum(stretch(step)))(step)
            size = jnp.linalg.norm(gradient.reshape(len(x), -1), axis=1)[:, None, None, None]
            return step + 0.05 * gradient / jnp.maximum(size, 1e-9), None

        start = 0.1 * jax.random.normal(jax.random.key(1), x.shape)
        return jnp.max(stretch(lax.scan(ascend, start, None, length=100)[0]))

    logits = model.apply({"params": params}, x[1500:])
    assert np.mean(np.argmax(logits, 1) == np.asarray(y[1500:])) > 0.8
    certified = float(np.prod(bounds))
    assert 0.2 * certified < attacked(params, x[1500:]) <= certified
