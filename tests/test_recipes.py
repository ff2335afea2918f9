"""What recipes refuse, and what no client program does with them; see test_clients.py."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_constraints as oc
from optax_constraints import recipes
from optax_constraints.flax import layout


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_relative_steps_of_units():
    params = {"kernel": normal(4, 3), "free": normal(2)}
    params["kernel"][:, 1] = 0
    updates = {"kernel": jnp.asarray(normal(4, 3, seed=1), jnp.bfloat16), "free": None}
    tx = recipes.relative_step(axis=0)
    with jax.numpy_dtype_promotion("strict"):
        new, _ = tx.update(updates, tx.init(params), params)
    assert new["free"] is None
    assert new["kernel"].dtype == jnp.bfloat16
    got, came = (np.float64(x["kernel"]) for x in (new, updates))
    # bfloat16 rounds each entry by 2**-9 at most.
    want = np.linalg.norm(params["kernel"], axis=0)
    np.testing.assert_allclose(np.linalg.norm(got, axis=0), want, rtol=2**-8)
    np.testing.assert_array_equal(got[:, 1], 0)
    assert np.all(np.sign(got[:, [0, 2]]) == np.sign(came[:, [0, 2]]))
    # No update, and one that leaves the range of its squares; weights that do.
    for p, u in ((1, 0), (1, 1e30), (1e30, 0), (1e30, 1e-9)):
        p, u = (np.full(2, x, np.float32) for x in (p, u))
        new, _ = recipes.relative_step().update(jnp.asarray(u), (), jnp.asarray(p))
        np.testing.assert_allclose(new, p * (u > 0), rtol=1e-6)


def test_relative_step_passes_over_integers():
    params = {"count": jnp.array([3, 4]), "w": jnp.array([3.0, 4.0])}
    for zero in (jnp.zeros(2, jnp.int32), np.zeros(2, jax.dtypes.float0)):
        updates = {"count": zero, "w": jnp.array([0.0, 1.0])}
        new, _ = recipes.relative_step().update(updates, (), params)
        assert new["count"] is zero
        np.testing.assert_allclose(new["w"], [0, 5], rtol=1e-6)


def test_relative_step_refuses():
    with pytest.raises(TypeError, match=r"relative_step: axis=0\.5 is not an axis"):
        recipes.relative_step(0.5)
    tx = recipes.relative_step(axis=1)
    params = {"a": {"bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"relative_step needs the parameters; write tx\.update"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"relative_step on 'a/bias' of shape \(3,\): axis 1 is"):
        tx.update(params, tx.init(params), params)


def test_hyperball_takes_a_schedule_and_leaves_others_to_partition():
    params = {"kernel": jnp.asarray(normal(5, 4)), "bias": jnp.ones(4)}
    grads = {"kernel": jnp.asarray(normal(5, 4, seed=1)), "bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"FixedNorm on 'bias' of shape \(4,\): axis -2 is out of"):
        recipes.hyperball(optax.adam(1.0), 0.1, axis=(-2, -1)).init(params)
    schedule = optax.linear_schedule(0.1, 0.0, 2)
    ball = recipes.hyperball(optax.sgd(1.0), schedule, axis=(-2, -1))
    tx = optax.partition(
        {"matrix": ball, "other": optax.sgd(0.5)}, {"kernel": "matrix", "bias": "other"}
    )
    state, norm = tx.init(params), np.linalg.norm(params["kernel"])
    params = jax.tree.map(np.asarray, params)
    for rate in (0.1, 0.05, 0.0):
        updates, state = tx.update(grads, state, params)
        np.testing.assert_array_equal(updates["bias"], -0.5)
        moved = optax.apply_updates(params, updates)
        np.testing.assert_allclose(np.linalg.norm(moved["kernel"]), norm, rtol=1e-6)
        # Before the norm is set back, the step is of this length.
        g = grads["kernel"]
        want = params["kernel"] - rate * norm * g / np.linalg.norm(g)
        want *= norm / np.linalg.norm(want)
        np.testing.assert_allclose(moved["kernel"], want, atol=1e-6)
        params = jax.tree.map(np.asarray, moved)


KERNEL = {"kernel": jnp.ones((4, 2, 3))}
ATTENTION = {"query": KERNEL, "key": KERNEL}
LOGITS = jnp.array([400.0, 50.0])


@pytest.mark.parametrize(
    ("params", "given"),
    [
        ({"a": ATTENTION}, {"a": {"max_logits": (LOGITS,)}}),
        ({"a": ATTENTION}, {"a": LOGITS}),
        (ATTENTION, LOGITS),
        ({"a": {"self": ATTENTION}}, {"a": {"max_logits": LOGITS, "self": {"entropy": jnp.nan}}}),
        ({"params": {"a": ATTENTION}}, {"a": {"max_logits": LOGITS}, "b": jnp.ones(7)}),
        # Called twice, with the larger logits of one head in each call.
        ({"a": ATTENTION}, {"a": {"max_logits": (LOGITS, jnp.array([90.0, -5.0]))}}),
        # Of a sharded or a scanned layer.
        (
            {"a": {"query": {"kernel": jnp.ones((2, 4, 2, 3))}, "key": KERNEL}},
            {"a": {"max_logits": LOGITS, "query": {"max_logits": jnp.stack([LOGITS, LOGITS])}}},
        ),
    ],
)
def test_qk_clip_finds_the_logits_of_the_module(params, given):
    new = oc.constrain(params, recipes.qk_clip(100.0), extra={"max_logits": given})
    for kernel in jax.tree.leaves(new):
        want = np.broadcast_to(np.array([[0.5], [1.0]]), kernel.shape)
        np.testing.assert_allclose(kernel, want, rtol=1e-6)


def test_qk_clip_with_negative_logits_leaves_heads_as_they_are():
    given = {"max_logits": jnp.array([-3.0, -1e-6])}
    new = oc.constrain(ATTENTION, recipes.qk_clip(100.0), extra=given)
    np.testing.assert_array_equal(new["query"]["kernel"], 1)


def test_qk_clip_refuses():
    for bad in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"qk_clip: threshold=.* is not positive and finite"):
            recipes.qk_clip(bad)
    for bad in ("100", None):
        with pytest.raises(TypeError, match=r"qk_clip: threshold=.* is no number; write the large"):
            recipes.qk_clip(bad)
    rules, params = recipes.qk_clip(100.0), {"layer_0": {"attention": ATTENTION}}
    with pytest.raises(ValueError, match=r"needs the argument 'max_logits', and those given are n"):
        oc.constrain(params, rules)
    message = (
        r"qk_clip on 'layer_0/attention/key/kernel': max_logits has no array of a module around it"
        r", and those it has are of 'layer_1/attention'. .* a rule \{'layer_0/attention/\*\*': None"
    )
    given = {"layer_1": {"attention": {"max_logits": LOGITS}}}
    with pytest.raises(ValueError, match=message):
        oc.constrain(params, rules, extra={"max_logits": given})
    with pytest.raises(ValueError, match=r"factor has shape \(3,\), and the.* \(2,\)|broadcast"):
        oc.constrain(params, rules, extra={"max_logits": jnp.ones(3)})


def test_ngpt_rules_of_scanned_layers():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            scale = self.param("scale", nn.initializers.ones, (4,))
            hidden = nn.relu(nn.DenseGeneral((2, 6), use_bias=False, name="fc")(x))
            y = nn.DenseGeneral(4, axis=(-2, -1), use_bias=False, name="proj")(hidden)
            return x + scale * y, None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            scan = nn.scan(MLP, {"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = scan(name="layers")(nn.Embed(7, 4)(tokens), None)
            return x

    tokens = jnp.zeros((1, 5), jnp.int32)
    own = layout(Net(), tokens)
    params = jax.eval_shape(Net().init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda x: normal(*x.shape), params)
    rules = recipes.ngpt_rules(params, "proj/kernel", layout=own)
    assert len(rules) == 3  # the scales are free
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = oc.constrain(params, rules, layout=own)
    layers = new["layers"]
    for w, axes, units in (
        (new["Embed_0"]["embedding"], 1, (7,)),
        (layers["fc"]["kernel"], 1, (3, 2, 6)),
        (layers["proj"]["kernel"], 3, (3, 2, 6)),
    ):
        norms = np.linalg.norm(w, axis=axes)
        assert norms.shape == units
        np.testing.assert_allclose(norms, 1, rtol=1e-6)


def test_ngpt_rules_know_the_usual_names():
    params = {
        "embed": {"embedding": np.ones((9, 4))},
        "attention": {name: {"kernel": np.ones((4, 4))} for name in ("query", "out")},
        "mlp": {"up": {"kernel": np.ones((4, 8))}, "down": {"kernel": np.ones((8, 4))}},
    }
    named = recipes.ngpt_rules(params, ["out/kernel", "down/kernel"])
    assert recipes.ngpt_rules(params) == named
    message = r"none of the usual names .*out, proj.*'mlp/a/kernel'\. Name in writes= .*writes=\["
    with pytest.raises(ValueError, match=message):
        recipes.ngpt_rules({"mlp": {"a": {"kernel": np.ones((4, 8))}}})


def test_ngpt_rules_of_integers_and_of_names_that_look_like_patterns():
    params = {
        "w[0]": {"kernel": np.full((4, 8), 0.9)},
        "proj": {"kernel": np.full((8, 4), 0.9)},
        "mask": {"kernel": np.ones((5, 5), bool)},
    }
    new = oc.constrain(params, recipes.ngpt_rules(params))
    np.testing.assert_allclose(np.linalg.norm(new["w[0]"]["kernel"], axis=0), 1, rtol=1e-6)
    assert new["mask"]["kernel"] is params["mask"]["kernel"]


def test_ngpt_rules_refuses():
    params = {
        "embed": {"embedding": jnp.ones((7, 4))},
        "fc": {"kernel": jnp.ones((4, 16))},
        "proj": {"kernel": jnp.ones((16, 4)), "bias": jnp.ones(4)},
    }
    with pytest.raises(ValueError, match=r"ngpt_rules: The rule 'project' matches no leaf.*proj"):
        recipes.ngpt_rules(params, ["proj/kernel", "project"])
    message = r"ngpt_rules: units differ in length.*16 of 'proj/kernel' of shape \(16, 4\)\. Name"
    with pytest.raises(ValueError, match=message):
        recipes.ngpt_rules(params, "fc/kernel")
    with pytest.raises(ValueError, match=r"ngpt_rules on 'own' .*axis='fan_in' cannot be told"):
        recipes.ngpt_rules(
            {"own": jnp.ones((4, 2, 2)), "proj": {"kernel": jnp.ones((4, 4))}}, "own"
        )
