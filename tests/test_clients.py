"""Rules do what real programs do by hand, step by step, and catch what some of them get wrong."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import bits
from client_programs import (
    CLIENTS,
    ICNN,
    ICNN_RULES,
    NGPT,
    NOPE,
    XQC_NET,
    adamh,
    arrays,
    bounds_by_hand,
    by_rules,
    noise,
    ott_penalty,
    our_penalty,
    qk_clip,
    qk_clip_by_hand,
    qk_rules,
    simba,
    trained,
    xqc_by_hand,
    xqc_rules,
)
from flax import nnx

import optax_constraints as oc
from optax_constraints import recipes
from optax_constraints._trees import leaves_by_path

STEPS = 100
EPS = float(np.finfo(np.float32).eps)
# In a step either program rounds a handful of times, each by half an eps of the largest weight at
# most, and nothing takes that back: 100 steps add up to 100 eps and more, if all go one way.
ROUNDING = STEPS * EPS

run = functools.cache(lambda make: trained(make(), STEPS))


@pytest.mark.parametrize("make", CLIENTS.values(), ids=CLIENTS)
def test_the_same_way_as(make):
    client = make()
    theirs, ours = run(make)
    tolerance = client.tolerance or ROUNDING
    for a, b in zip(jax.tree.leaves(theirs), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


# What the programs' authors may want to know.


def test_a_moving_average_leaves_the_sphere():
    _, (params, _) = run(simba)
    critic, target = (params[name]["block"]["hyper_dense"] for name in ("critic", "target"))
    np.testing.assert_allclose(np.linalg.norm(critic["kernel"], axis=1), 1, rtol=2 * EPS)
    assert np.all(np.linalg.norm(target["kernel"], axis=1) < 1 - 1e-4)
    assert oc.violations(target, {"kernel": oc.stacked(oc.unit_norm())})["kernel"] > 1e-3


def test_norms_do_not_drift():
    start, _ = adamh().given(1)
    _, (params, way) = run(adamh)
    for name, axes in (("kernel", None), ("layers", (1, 2))):
        want = np.linalg.norm(np.float64(start[name]), axis=axes)
        got = np.linalg.norm(np.float64(params[name]), axis=axes)
        np.testing.assert_allclose(got, want, rtol=2 * EPS)
        assert np.abs(way[name][-1] - start[name]).max() > 0.1


def test_scales_that_are_called_weight_are_not_taken_in_silence():
    model = jax.eval_shape(NGPT, jax.random.key(0))
    with pytest.raises(ValueError, match=r"UnitNorm on 'attn/0/s_qk/weight' of shape \(8,\): axis"):
        oc.project({"weight": oc.unit_norm(axis=1)}).init(model)
    with pytest.warns(UserWarning, match=r"UnitNorm on 'attn/0/proj/weight' .* axis=0 is not whe"):
        oc.project({"attn/0/proj/weight": oc.unit_norm(axis=0)}).init(model)


def test_a_penalty_has_a_gradient_inside_too():
    rng = np.random.default_rng(0)
    outside = noise(rng, arrays(**ICNN))
    inside = oc.constrain(outside, ICNN_RULES)
    slope = jax.jit(jax.grad(our_penalty))
    want, got = jax.jit(jax.grad(ott_penalty))(outside), slope(outside)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=4 * EPS), want, got)
    assert np.abs(got["w_zs_0"]["kernel"]).max() > 0
    # There it is the norm of nothing.
    assert not any(np.any(g) for g in jax.tree.leaves(slope(inside)))


# QK-clip in models that measure their logits.


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        def heads(name):
            return nn.DenseGeneral((2, 3), use_bias=False, name=name)(x)

        logits = jnp.einsum("bqhd,bkhd->bhqk", heads("query"), heads("key"))
        self.sow("intermediates", "max_logits", logits.max((0, 2, 3)))
        self.sow("intermediates", "entropy", logits.mean())
        return x + jnp.tanh(logits.sum(1)) @ x, None


class LinenLayers(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, x):
        if self.scanned:
            axes = {"params": 0, "intermediates": 0}
            layers = nn.scan(LinenAttention, axes, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]
        for i in range(2):
            x, _ = LinenAttention(name=f"layer_{i}")(x)
        return x


def linen(scanned):
    model, x = LinenLayers(scanned), jax.random.normal(jax.random.key(1), (2, 5, 4))
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params):
        y, seen = model.apply({"params": params}, x, mutable="intermediates")
        return jnp.sum(y**2), seen["intermediates"]

    return params, loss


class NNXAttention(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.query = nnx.LinearGeneral(4, (2, 3), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(4, (2, 3), use_bias=False, rngs=rngs)

    def __call__(self, x):
        logits = jnp.einsum("bqhd,bkhd->bhqk", self.query(x), self.key(x))
        self.max_logits = nnx.Intermediate(logits.max((0, 2, 3)))
        return x + jnp.tanh(logits.sum(1)) @ x


class NNXLayers(nnx.Module):
    def __init__(self, scanned: bool):
        self.scanned = scanned
        if scanned:
            made = nnx.split_rngs(splits=2)(nnx.vmap(NNXAttention))
            self.layers = made(nnx.Rngs(0))
        else:
            self.layer_0, self.layer_1 = (NNXAttention(nnx.Rngs(i)) for i in range(2))

    def __call__(self, x):
        if not self.scanned:
            return self.layer_1(self.layer_0(x))
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
            x, self.layers
        )


def in_nnx(scanned):
    x = jax.random.normal(jax.random.key(1), (2, 5, 4))
    graph, params, rest = nnx.split(NNXLayers(scanned), nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graph, params, rest)
        return jnp.sum(model(x) ** 2), nnx.pop(model, nnx.Intermediate)

    return params, loss


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize("make", [linen, in_nnx])
def test_qk_clip_in(make, scanned):
    params, loss = make(scanned)
    limit, adam = 0.5, optax.adam(0.3)
    tx = optax.chain(adam, oc.project(recipes.qk_clip(limit)))

    @jax.jit
    def step(params, state, theirs, own):
        grads, seen = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=seen)
        changes, own = adam.update(grads, own)
        theirs = optax.apply_updates(theirs, changes)
        return optax.apply_updates(params, updates), state, theirs, own, seen

    theirs, state, own = params, tx.init(params), adam.init(params)
    layers = {"layers"} if scanned else {"layer_0", "layer_1"}
    clipped = dict.fromkeys(layers, 0)
    for _ in range(5):
        params, state, theirs, own, seen = step(params, state, theirs, own)
        kernels = dict(leaves_by_path(theirs))
        for path, logits in leaves_by_path(seen):
            layer, name, *_ = path.split("/")
            if name == "max_logits":
                gamma = np.minimum(1, limit / (np.asarray(logits) + 1e-6))
                clipped[layer] += np.sum(gamma < 1)
                for kind in ("query", "key"):
                    kernels[f"{layer}/{kind}/kernel"] *= np.sqrt(gamma)[..., None, :, None]
        theirs = jax.tree.unflatten(jax.tree.structure(theirs), list(kernels.values()))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=20 * EPS * np.abs(b).max()),
            *(params, theirs),
        )
    assert set(clipped) == layers
    assert all(count > 1 for count in clipped.values())


# Four defects of such programs, and what says so here.


def test_xqc_a_switch_that_is_not_passed_on():
    start = noise(np.random.default_rng(0), arrays(**XQC_NET))

    def agent(params, normalize_last):  # which is where it gets lost
        return xqc_by_hand(params)

    rules = {**xqc_rules(oc.unit_norm()), "predictor*/kernel": None}
    theirs, ours = agent(start, normalize_last=False), oc.constrain(start, rules)
    kernels = [tree["predictor_0"]["kernel"] for tree in (start, ours, theirs)]
    assert bits(kernels[1]) == bits(kernels[0]) != bits(kernels[2])
    # Which layers are free is part of the rules, and shown.
    (row,) = (
        line for line in str(oc.report(ours, rules)).splitlines() if "predictor_0/kernel" in line
    )
    assert "UnitNorm" not in row
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=4 * EPS), ours["MLP_0"], theirs["MLP_0"]
    )


def test_ott_starts_outside():
    start = noise(np.random.default_rng(0), arrays(**ICNN))
    with pytest.raises(AssertionError, match=r"w_zs_0/kernel"):
        oc.assert_feasible(start, ICNN_RULES)
    assert all(away > 0.1 for away in oc.violations(start, ICNN_RULES).values())
    oc.assert_feasible(oc.constrain(start, ICNN_RULES), ICNN_RULES)


def test_maxtext_skips_layers_in_silence():
    client = qk_clip()
    params, (_, logits) = client.given(1)
    largest = jax.tree.map(lambda own: own[0].max(axis=0) + 100.0, logits)
    # The statistics are under another name than the parameters.
    renamed = {name.replace("layer", "decoder"): own for name, own in largest.items()}
    skipped = qk_clip_by_hand(params, renamed)
    jax.tree.map(np.testing.assert_array_equal, skipped, params)
    with pytest.raises(ValueError, match=r"qk_clip on 'layer_0/self_attention/wkv_b/kernel': max_"):
        oc.constrain(params, {"dense/**": None, **qk_rules()}, extra={"max_logits": renamed})
    # The kernels are under another name than the rules.
    rules = recipes.qk_clip(100.0, query="q_up/kernel", key="wkv_b/kernel", nope=NOPE)
    with pytest.raises(ValueError, match=r"'q_up/kernel' matches no leaf"):
        oc.constrain(params, rules, extra={"max_logits": largest})


def test_jax_ent_returns_the_weights_from_before_it_projected():
    adam, rules = optax.adam(0.1), oc.box(0.0, 1.0)

    def theirs(carry, grads):
        params, state = carry
        updates, state = adam.update(grads, state)
        params = optax.apply_updates(params, updates)
        bounds_by_hand(params, *({"weights": x} for x in (0.0, 1.0)))
        return params, state

    params = {"weights": jnp.array([0.02, 0.5, 0.98])}
    grads = {"weights": jnp.array([1.0, 1.0, -1.0])}
    outside, _ = theirs((params, adam.init(params)), grads)
    with pytest.raises(AssertionError, match=r"weights"):
        oc.assert_feasible(outside, rules)
    program = by_rules(adam, rules)
    inside, _ = program.step(program.init(params), grads)
    oc.assert_feasible(inside, rules)
