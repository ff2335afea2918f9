"""What somebody tries in the first hour with the library, and what it says then."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_constraints as oc

VERBS = [oc.constrain, oc.violations, oc.report, oc.assert_feasible]
verbs = pytest.mark.parametrize("verb", VERBS, ids=[verb.__name__ for verb in VERBS])


# Not the parameters, but the model.


class _Tied(nnx.Module):
    """Two layers with one kernel."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = nnx.Linear(3, 3, rngs=rngs)
        self.second.kernel = self.first.kernel


class _NoPytree(nnx.Module, pytree=False):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(3, 3, rngs=rngs)


NO_ARRAYS = {
    "Linen": (lambda: nn.Dense(3), "This Dense is"),
    "Linen class": (lambda: nn.Dense, "This class Dense is"),
    "NNX without pytree": (lambda: _NoPytree(nnx.Rngs(0)), "This _NoPytree is"),
    "NNX graph": (lambda: nnx.split(_Tied(nnx.Rngs(0)))[0], "This GraphDef is"),
    "Equinox": (lambda: eqx.nn.Identity(), "This Identity is"),
    "object": (object, "This object is"),
    "function": (lambda: jnp.tanh, "no array and no tree of arrays"),
    "text": (lambda: "params.npz", "This str is"),
    "Haiku": (lambda: hk.transform(lambda x: x), "leaves of this tree, such as .* at 'init', are"),
    "list": (lambda: [nn.Dense(3)], "leaves of this tree, such as the Dense at '0', are"),
}


@verbs
@pytest.mark.parametrize("rules", [oc.max_norm(1.0), {"kernel": oc.max_norm(1.0)}])
@pytest.mark.parametrize("name", NO_ARRAYS)
def test_what_holds_no_arrays_is_an_error(name, rules, verb):
    make, message = NO_ARRAYS[name]
    with pytest.raises(TypeError, match=rf"{message}.* nothing to constrain\. .*model\.init"):
        verb(make(), rules)


def test_project_says_it_at_init():
    with pytest.raises(TypeError, match=r"such as|a Dense.*nnx\.state\(model, nnx\.Param\)"):
        oc.project(oc.max_norm(1.0)).init(nn.Dense(3))


@verbs
def test_functions_beside_arrays_are_fine_and_so_are_parts_without_any(verb):
    verb({"act": jnp.tanh, "w": jnp.zeros(3)}, oc.non_neg())
    verb({"act": jnp.tanh}, oc.non_neg(), strict=False)
    verb({"act": jnp.tanh}, None)
    for empty in ({}, [], None, optax.MaskedNode(), optax.EmptyState(), nnx.State({})):
        verb(empty, {"kernel": oc.non_neg()})
    verb(eqx.filter(eqx.nn.Linear(2, 3, key=jax.random.key(0)), lambda _: False), oc.non_neg())


def test_an_nnx_module_comes_back_as_a_new_one():
    model = _Tied(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    rules = {"kernel": oc.max_norm(0.1)}
    new = oc.constrain(model, rules)
    assert isinstance(new, _Tied)
    norms = np.linalg.norm(new.first.kernel[...], axis=0)
    np.testing.assert_allclose(norms, 0.1, rtol=1e-6)
    np.testing.assert_array_equal(new.second.kernel[...], new.first.kernel[...])
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), before)
    assert set(oc.violations(model, rules)) == {"first/kernel", "second/kernel"}
    assert [row.path for row in oc.report(model, rules).rows] == [
        *("first/bias", "first/kernel", "second/bias", "second/kernel")
    ]
    oc.assert_feasible(new, rules)
    # In place, so that what is shared stays shared.
    nnx.update(model, oc.constrain(nnx.state(model, nnx.Param), rules))
    assert model.second.kernel is model.first.kernel
    np.testing.assert_allclose(np.linalg.norm(model.first.kernel[...], axis=0), 0.1, rtol=1e-6)
