"""What somebody tries in the first hour with the library, and what it says then."""

import ast
import re
import warnings
from typing import Any

import equinox as eqx
import flax.core
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_constraints as oc
from optax_constraints import _axes, _trees
from optax_constraints import flax as ocf
from optax_constraints._axes import LeafLayout

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


# Errors that say what to write instead.

PARAMS = {
    "Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.ones((2, 3))},
    "block": {"inner": {"bias": jnp.zeros(3), "kernel": jnp.ones((3, 3))}, "gain": jnp.ones(3)},
    "head": {"kernel": jnp.ones((3, 1))},
}


@pytest.mark.parametrize("verb", [oc.report, oc.assert_feasible])
@pytest.mark.parametrize("how", ["arguments", "closed over", "step", "vmap"])
def test_under_jit_what_reads_weights_leads_to_violations(verb, how):
    rules = {"kernel": oc.max_norm(lambda step: 1.0 - 0.1 * step, axis=0)}
    called = {
        "arguments": lambda: jax.jit(lambda p: verb(p, rules) and None)(PARAMS),
        "closed over": lambda: jax.jit(lambda: verb(PARAMS, rules) and None)(),
        "step": lambda: jax.jit(lambda step: verb(PARAMS, rules, step=step) and None)(1),
        "vmap": lambda: jax.vmap(lambda p: verb(p, {"kernel": oc.non_neg()}) and None)(
            jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS)
        ),
    }[how]
    message = (
        rf"{verb.__name__} reads the weights, and those of 'Dense_0/kernel' are traced here.* call "
        rf"{verb.__name__} outside.* write violations\(params, rules\)"
    )
    with pytest.raises(TypeError, match=message):
        called()


SEVERAL = r"compose\(NonNeg\(\), MaxNorm\(.*\)\), for .* intersection\(NonNeg\(\), MaxNorm\("


@pytest.mark.parametrize("make", [list, tuple])
def test_several_constraints_lead_to_compose_and_intersection(make):
    both = make([oc.non_neg(), oc.max_norm(1.0)])
    with pytest.raises(
        TypeError, match=rf"pairs \(pattern, constraint\), .* is none\. .*{SEVERAL}"
    ):
        oc.project(both)
    with pytest.raises(ValueError, match=rf"In the rule 'kernel': .*{SEVERAL}"):
        oc.project({"kernel": both})
    with pytest.raises(ValueError, match=SEVERAL):
        oc.get(both)
    with pytest.raises(ValueError, match=r"compose\('non_neg', max_norm_of_mine\), for"):
        oc.project({"kernel": make(["non_neg", max_norm_of_mine])})
    with pytest.raises(ValueError, match=r"compose\(NonNeg, MaxNorm\), for"):
        oc.project({"kernel": make([oc.non_neg, oc.MaxNorm])})
    with pytest.raises(ValueError, match=r"Write NonNeg\(\) without the brackets"):
        oc.project({"kernel": make([oc.non_neg()])})


def max_norm_of_mine(w):
    return w / jnp.maximum(1.0, jnp.linalg.norm(w))


@pytest.mark.parametrize("rules", [["kernel"], ("kernel", oc.non_neg()), [3.0], ["a", "b"]])
def test_what_is_no_list_of_constraints_does_not_lead_there(rules):
    with pytest.raises(TypeError, match=r"is none\.$"):
        oc.project(rules)


def test_a_rule_whose_leaf_was_masked_says_so():
    mask = jax.tree.map(lambda _: False, PARAMS) | {"head": {"kernel": True}}
    tx = optax.masked(oc.project({"Dense_0/kernel": oc.max_norm(1.0)}), mask)
    message = r"'Dense_0/kernel' matches no leaf that is here: .* has masked 'Dense_0/kernel'\."
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)
    labels = jax.tree.map(lambda _: "rest", PARAMS) | {"head": {"kernel": "head"}}
    tx = optax.multi_transform(
        {
            "head": oc.project({"head/*": oc.non_neg(), "k*": oc.unit_norm()}),
            "rest": optax.sgd(1.0),
        },
        labels,
    )
    with pytest.warns(UserWarning, match="'k\\*' does nothing"):
        tx.init(PARAMS)
    tx = optax.multi_transform(
        {"head": oc.project({"head/*": oc.non_neg(), "bias": None}), "rest": optax.sgd(1.0)}, labels
    )
    with pytest.raises(ValueError, match=r"has masked 'Dense_0/bias', 'block/inner/bias'\."):
        tx.init(PARAMS)
    # Masks go inside the variables of NNX.
    params = nnx.state(_Tied(nnx.Rngs(0)), nnx.Param)
    tx = optax.masked(
        oc.project({"first/bias": oc.non_neg()}),
        jax.tree.map_with_path(lambda keys, _: "kernel" in jax.tree_util.keystr(keys), params),
    )
    with pytest.raises(ValueError, match="has masked 'first/bias'"):
        tx.init(params)


def test_a_rule_for_nothing_at_all_does_not_speak_of_masks():
    mask = jax.tree.map(lambda _: False, PARAMS) | {"head": {"kernel": True}}
    for pattern in ("kernal", lambda path, leaf: leaf.ndim == 7):
        tx = optax.masked(oc.project([(pattern, oc.max_norm(1.0))]), mask)
        with pytest.raises(ValueError, match="closest paths are 'head/kernel'"):
            tx.init(PARAMS)


@pytest.mark.parametrize(
    ("rule", "advice", "first"),
    [
        ("Dense_0", "Dense_0/*", ["Dense_0/bias", "Dense_0/kernel"]),
        ("/Dense_0", "/Dense_0/*", ["Dense_0/bias", "Dense_0/kernel"]),
        ("Dense_0/", "Dense_0/*", ["Dense_0/bias", "Dense_0/kernel"]),
        ("block", "block/**", ["block/gain", "block/inner/bias", "block/inner/kernel"]),
        ("inner", "inner/*", ["block/inner/bias", "block/inner/kernel"]),
        ("block/inner", "block/inner/*", ["block/inner/bias", "block/inner/kernel"]),
        ("inn?r", "inn?r/*", ["block/inner/bias", "block/inner/kernel"]),
    ],
)
def test_the_name_of_a_module_leads_to_its_leaves(rule, advice, first):
    with pytest.raises(ValueError, match="matches no leaf") as error:
        oc.project({rule: oc.non_neg()}).init(PARAMS)
    text = str(error.value)
    assert f"for all leaves in it write '{advice}'." in text
    assert f"closest paths are {', '.join(map(repr, first))}" in text
    leaves = oc.violations(PARAMS, {advice: oc.non_neg()})
    assert list(leaves) == first


@pytest.mark.parametrize(
    ("rule", "first"),
    [
        ("Dens_0", "Dense_0/bias"),
        ("iner", "block/inner/bias"),
        ("Dense_0/kernl", "Dense_0/kernel"),
        ("hed/kernel", "head/kernel"),
    ],
)
def test_the_closest_paths_are_those_that_have_such_a_name(rule, first):
    with pytest.raises(ValueError, match=f"closest paths are '{first}'.*Write the end of a path"):
        oc.project({rule: oc.non_neg()}).init(PARAMS)


# Axes that are not those of a unit's incoming weights.


@pytest.fixture
def warn_again():
    _axes._warn_once.cache_clear()
    yield
    _axes._warn_once.cache_clear()


class _Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.Conv(4, (3, 3))(x).reshape(1, -1))


def _linen_conv() -> Any:
    return _Conv().init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))["params"]


CONTRADICTED = {
    "Linen convolution": (_linen_conv, "Conv_0/kernel", (3, 3, 2, 4), (0, 1, 2)),
    "Equinox linear": (
        lambda: {"linear": eqx.nn.Linear(3, 4, key=jax.random.key(0))},
        *("linear/weight", (4, 3), (1,)),
    ),
    "Equinox convolution": (
        lambda: {"conv": eqx.nn.Conv2d(3, 4, 2, key=jax.random.key(0))},
        *("conv/weight", (4, 3, 2, 2), (1, 2, 3)),
    ),
    "embedding": (
        lambda: {"Embed_0": {"embedding": jnp.ones((7, 3))}},
        *("Embed_0/embedding", (7, 3), (1,)),
    ),
    "attention": (
        lambda: {"out": {"kernel": jnp.ones((2, 3, 4))}},
        *("out/kernel", (2, 3, 4), (0, 1)),
    ),
}


@pytest.mark.parametrize("make", [oc.max_norm, oc.unit_norm, oc.min_max_norm, oc.simplex])
@pytest.mark.parametrize("name", CONTRADICTED)
def test_the_default_axis_warns_where_names_and_ranks_contradict_it(name, make, warn_again):
    tree, path, shape, fan_in = CONTRADICTED[name]
    rules = {path: make()}
    message = (
        rf"^{make.__name__} on '{path}' of shape {re.escape(str(shape))}: axis=0 is not where the "
        rf"incoming weights of a unit run, which is axis={re.escape(str(fan_in))}, by the name "
        r"and rank of this leaf\. If you mean those, write axis='fan_in'\. If not, axis=0 is taken"
    )
    with pytest.warns(UserWarning, match=message) as warned:
        oc.project(rules).init(tree())
    assert [w.filename for w in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.report(tree(), rules)  # once is enough
        oc.constrain(tree(), {path: make(axis="fan_in")})
        oc.constrain(tree(), {path: make(axis=fan_in)})


def test_the_warning_says_how_to_turn_it_off(warn_again):
    params = {"proj": {"weight": jnp.ones((4, 3))}}
    with pytest.warns(UserWarning, match="turns this warning off") as warned:
        oc.constrain(params, oc.unit_norm())
    call = re.search(r"warnings\.filterwarnings\((.*?)\) turns", str(warned[0].message))
    assert call
    _axes._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(*ast.literal_eval(f"({call[1]})"))
        new = oc.constrain(params, oc.unit_norm())
    # It was taken as it is written.
    np.testing.assert_allclose(np.linalg.norm(new["proj"]["weight"], axis=0), 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ({"Dense_0/kernel": oc.max_norm(1.0), "bias": oc.max_norm(1.0)}, {}),
        ({"Conv_0/kernel": oc.max_norm(1.0, axis=None)}, {}),
        ({"Conv_0/kernel": oc.max_norm(1.0, axis=(0, 1, 2, 3))}, {}),
        ({"Conv_0/kernel": oc.max_norm(1.0, axis=())}, {}),
        ({"Conv_0/kernel": oc.max_norm(1.0, axis=(-2, 0, 1))}, {}),
        ({"mixer/gate": oc.max_norm(1.0), "stem/kernel": oc.max_norm(1.0)}, {}),
        ({"layers/kernel": oc.stacked(oc.max_norm(1.0))}, {}),
        ({"layers/kernel": oc.stacked(oc.orthogonal(axis=0))}, {}),
        ({"weight": oc.stacked(oc.max_norm(1.0))}, {}),
        ({"kernel": oc.non_neg()}, {}),
        (
            # What a layout says counts, and not the name.
            {"Conv_0/kernel": oc.orthogonal(axis=0)},
            {"layout": {"Conv_0/kernel": LeafLayout("Mine", (0,))}},
        ),
    ],
)
def test_no_warning_where_an_axis_fits_or_nobody_knows(rules, options, warn_again):
    params = {
        **_linen_conv(),
        "mixer": {"gate": jnp.ones((3, 4))},
        "stem": {"kernel": jnp.ones((3, 3, 2, 4))},
        "layers": {"kernel": jnp.ones((5, 3, 4))},
        "weight": jnp.ones((4, 3)),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.constrain(params, rules, **options)


def test_a_layer_that_declares_an_axis_is_held_to_its_layout(warn_again):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return ocf.linen.Conv(4, (3, 3), kernel_constraint=oc.max_norm(1.0))(x)

    model, x = Model(), jnp.ones((1, 5, 5, 2))
    rules, layout = ocf.declared(model, x), ocf.layout(model, x)
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.warns(
        UserWarning, match=r"of a unit of this Conv run, which is axis=\(0, 1, 2\)\."
    ):
        oc.constrain(params, rules, layout=layout)


# Checkpoints of NNX that come back without a target.


class _Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.value = nnx.Linear(3, 3, rngs=rngs)


def saved(state: Any, folder: Any) -> Any:
    """What a checkpoint of a state is, once it has lost its types."""
    path = folder / f"checkpoint{len(list(folder.iterdir()))}"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, state)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def test_a_restored_nnx_state_has_the_paths_of_its_module(tmp_path):
    model = _Net(nnx.Rngs(0))
    restored = saved(nnx.state(model), tmp_path)
    assert set(restored["value"]["kernel"]) == {"value"}  # or this test is about nothing
    rules = {"value/kernel": oc.max_norm(0.1), "/first/bias": oc.box(lower=0.5)}
    assert oc.violations(restored, rules) == oc.violations(model, rules)
    paths = [row.path for row in oc.report(model, None).rows]
    assert [row.path for row in oc.report(restored, None).rows] == paths
    new = oc.constrain(restored, rules)
    assert jax.tree.structure(new) == jax.tree.structure(restored)
    kernel = oc.constrain(model, rules).value.kernel[...]
    np.testing.assert_array_equal(new["value"]["kernel"]["value"], kernel)
    oc.constrain(restored, {"kernel": oc.max_norm(axis="fan_in")})


def test_a_restored_state_remembers_what_the_module_does(tmp_path):
    model = _Net(nnx.Rngs(0))
    rules = {"kernel": oc.compose(oc.fixed_norm("init", axis=0), oc.max_norm("2x init"))}
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), oc.project(rules)), wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    longer = jax.tree.map(lambda w: 1.5 * w, params)
    state = optimizer.opt_state
    expected = oc.violations(longer, rules, state=oc.project(rules).init(params))
    assert min(map(float, expected.values())) > 0.1
    restored = saved(nnx.state(optimizer), tmp_path)["opt_state"]
    for tree in (longer, saved(longer, tmp_path)):
        for own in (state, restored, oc.project(rules).init(saved(params, tmp_path))):
            found = oc.violations(tree, rules, state=own)
            assert found == expected


@pytest.mark.parametrize(
    ("params", "paths"),
    [
        ({"value": jnp.ones(2)}, ["value"]),
        ({"a": {"value": jnp.ones(2)}, "b": jnp.ones(2)}, ["a/value", "b"]),
        ({"a": {"value": jnp.ones(2), "key": jnp.ones(2)}}, ["a/key", "a/value"]),
        ({"a": {"value": jnp.ones(2), "key": optax.MaskedNode()}}, ["a/value"]),
        ({"a": {"value": jnp.ones(2)}, "b": optax.MaskedNode()}, ["a/value"]),
        ({"a": {"value": {"kernel": jnp.ones(2)}}}, ["a/value/kernel"]),
        ({"a": {"value": [jnp.ones(2)]}}, ["a/value/0"]),
        # A state of NNX, also where a part of it is masked.
        ({"a": {"value": jnp.ones(2)}, "value": {"value": jnp.ones(2)}}, ["a", "value"]),
        ({"a": {"value": jnp.ones(2)}, "b": {"value": optax.MaskedNode()}}, ["a"]),
        ({"a": {"value": {"value": jnp.ones(2)}}}, ["a/value"]),
    ],
)
def test_a_key_called_value_is_left_out_only_if_all_arrays_have_it(params, paths):
    assert sorted(oc.violations(params, oc.non_neg())) == paths


class _Remembers(oc.Constraint):
    """What it remembers looks like a saved variable."""

    remembers = True

    def __call__(self, w, /):
        return jnp.asarray(w)

    def remember(self, w):
        return {"value": w.sum()}

    def advance(self, w, memory):
        return w * memory["value"], memory


def test_where_it_is_not_certain_a_rule_may_name_the_key_called_value():
    params = {"attention": {"value": -jnp.ones(2)}}
    for pattern in ("value", "attention/value", "attention", "/attention", "/attention/value"):
        assert oc.constrain(params, {pattern: oc.non_neg()})["attention"]["value"].min() == 0


def test_what_a_constraint_of_ones_own_remembers_may_be_called_value():
    state = oc.project({"w": _Remembers()}).init({"w": jnp.full(2, 1.5)})
    new = oc.constrain({"w": jnp.ones(2)}, {"w": _Remembers()}, state=state)
    np.testing.assert_array_equal(new["w"], [3, 3])


# A bare constraint is for parameters.


class _Weight(nnx.Variable):
    """A user's own kind of variable."""


class _Lora(nnx.Param):
    """A user's own kind of parameter."""


def test_a_bare_constraint_leaves_variables_that_are_no_parameters_alone():
    model = _Net(nnx.Rngs(0))
    model.lora, model.average = _Lora(jnp.full(2, -1.0)), _Weight(jnp.full(2, -1.0))
    parameters = {"first", "value", "norm/scale", "norm/bias", "lora"}
    for tree in (model, nnx.state(model), nnx.split(model)[1]):
        new = oc.constrain(tree, oc.box(upper=-2.0))
        before, after = (dict(_trees.leaves_by_path(t)) for t in (tree, new))
        assert {"norm/mean", "norm/var", "average"} <= set(before)
        for path in before:
            taken = path in parameters or path.split("/")[0] in parameters
            assert (before[path] is not after[path]) == taken, path
        free = {row.path for row in oc.report(tree, oc.non_neg()).rows if row.constraint is None}
        assert free >= {"norm/mean", "norm/var", "average"}
        # Who names them gets them.
        assert set(oc.violations(tree, {"mean": oc.non_neg(), "average": oc.non_neg()})) == {
            *("average", "norm/mean")
        }


@pytest.mark.parametrize("kind", [_Weight, nnx.BatchStat])
def test_without_params_a_bare_constraint_takes_all_variables(kind):
    model = _Net(nnx.Rngs(0))
    model.average = _Weight(jnp.full(2, -1.0))
    paths = {_Weight: ["average"], nnx.BatchStat: ["norm/mean", "norm/var"]}[kind]
    assert sorted(oc.violations(nnx.state(model, kind), oc.non_neg())) == paths


class _LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))


@pytest.mark.parametrize("freeze", [dict, flax.core.freeze])
def test_a_bare_constraint_on_linen_variables_is_for_its_params(freeze):
    variables = freeze(_LinenNorm().init(jax.random.key(0), jnp.ones((2, 4))))
    assert set(variables) == {"params", "batch_stats"}
    new = oc.constrain(variables, oc.box(upper=-2.0))
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    assert all(np.all(leaf == -2) for leaf in jax.tree.leaves(new["params"]))
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
    named = oc.violations(variables, {"batch_stats/**": oc.non_neg()})
    assert sorted(path.split("/")[-1] for path in named) == ["mean", "var"]


def test_other_trees_with_a_key_params_are_taken_whole():
    w = jnp.ones(2)
    for tree in ({"params": w, "log_alpha": w}, {"a": {"params": w, "cache": w}}, {"cache": w}):
        assert len(oc.violations(tree, oc.non_neg())) == len(jax.tree.leaves(tree))


# What is for Flax only.

NO_FLAX = {
    "Linear": lambda: eqx.nn.Linear(2, 3, key=jax.random.key(0)),
    "Transformed": lambda: hk.transform(lambda x: hk.Linear(3)(x)),
    "dict": lambda: {"linear": {"w": jnp.ones((2, 3))}},
    "class Linear": lambda: eqx.nn.Linear,
    "NoneType": lambda: None,
}


@pytest.mark.parametrize("verb", [ocf.declared, ocf.layout])
@pytest.mark.parametrize("kind", NO_FLAX)
def test_declared_and_layout_of_other_models_lead_to_rules_by_path(kind, verb):
    message = (
        rf"{verb.__name__} takes a Linen or NNX module, and this {kind} is none\. .* write rules "
        r"by path, such as \{'linear/weight': max_norm\(2\.0, axis='fan_in'\)\}, and no layout"
    )
    with pytest.raises(TypeError, match=message):
        verb(NO_FLAX[kind](), jnp.ones((1, 2)))


@pytest.mark.parametrize("verb", [ocf.declared, ocf.layout])
@pytest.mark.parametrize("cls", [nn.Dense, nnx.Linear])
def test_declared_and_layout_of_a_class_of_flax(cls, verb):
    name = cls.__name__
    with pytest.raises(TypeError, match=rf"{name} is a class; write {verb.__name__}\({name}\("):
        verb(cls, jnp.ones((1, 2)))


def test_what_that_error_advises_works():
    model = {"linear": eqx.nn.Linear(2, 3, key=jax.random.key(0))}
    new = oc.constrain(model, {"linear/weight": oc.unit_norm(axis="fan_in"), "bias": None})
    np.testing.assert_allclose(np.linalg.norm(new["linear"].weight, axis=1), 1, rtol=1e-6)
    assert oc.report(model, {"w*": oc.max_norm(2.0, axis=1)}).rows[0].axis == (1,)
    weights = {"linear": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
    assert oc.report(weights, oc.max_norm(axis="fan_in")).rows[1].axis == (0,)
