"""Numbers and arrays that `tx.update` is given, and `scale`, which they are mostly for."""

import copy
import dataclasses
import json
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import DTYPES, bits, float64, norms
from flax import nnx

import optax_constraints as oc
from optax_constraints import _numbers
from optax_constraints._axes import LeafLayout
from optax_constraints._constraint import own_classes
from optax_constraints.flax import linen as ocl
from optax_constraints.flax import nnx as ocn

WIDEST = DTYPES[0]
FIELDS = [
    pytest.param(cls, field.name, field.metadata["number"], id=f"{cls.__name__}.{field.name}")
    for cls in own_classes
    for field in _numbers.fields_of(cls)
    if field.metadata.get("number")
]
_REST: dict[str, dict[str, Any]] = {
    "BoxSection": {
        "lower": -1e33,
        "upper": 1e33,
        "normal": np.array([1.0, -2.0, 0.5, 1.0]),
        "value": 1e33,
        "equality": False,
    },
    "HalfSpace": {"normal": np.array([1.0, -2.0, 0.5, 1.0])},
    "Hyperplane": {"normal": np.array([1.0, -2.0, 0.5, 1.0])},
    "MaxOperatorNorm": {"strides": 1, "padding": "SAME", "dilation": 1, "groups": 1},
    "Soft": {"constraint": oc.max_norm(0.5)},
}


def normal(shape: tuple[int, ...], seed: int = 0, dtype: Any = WIDEST) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def kernel(constraint: Any, w: Any, **extra: Any) -> jax.Array:
    return oc.constrain({"kernel": w}, {"kernel": constraint}, extra=extra)["kernel"]


CAP = {"kernel": oc.max_norm(oc.arg("cap"))}
PARAMS = {"kernel": normal((4, 3)), "bias": normal((3,))}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def largest(params: Any) -> float:
    return float(np.max(norms(float64(params["kernel"]), 0)))


@pytest.mark.parametrize(("cls", "name", "limits"), FIELDS)
def test_an_argument_is_the_number_that_it_gives(cls, name, limits):
    number = jnp.asarray(2, jnp.int32) if limits.whole else jnp.asarray(0.75, WIDEST)
    rest = _REST.get(cls.__name__, {})
    of_arg, of_number = (cls(**{**rest, name: n}) for n in (oc.arg("n"), number))
    w = normal((3, 4, 4) if cls is oc.MaxOperatorNorm else (4, 4), 2)
    assert bits(kernel(of_arg, w, n=number)) == bits(kernel(of_number, w))
    config = json.loads(json.dumps(oc.serialize(of_arg)))
    assert config["config"][name] == {"arg": "n"}
    assert getattr(oc.deserialize(config), name) == oc.arg("n")
    leaves = jax.tree.leaves(of_number)
    assert len(jax.tree.leaves(of_arg)) == len(leaves) - 1
    for again in (copy.deepcopy(of_arg), pickle.loads(pickle.dumps(of_arg))):
        assert getattr(again, name) == oc.arg("n")


# Optax.


def identity(tx: Any) -> Any:
    return tx


def chained(tx: Any) -> Any:
    return optax.chain(optax.clip(9.0), optax.chain(optax.sgd(1.0), tx))


def parted(tx: Any) -> Any:
    labels = {"kernel": "constrained", "bias": "free"}
    return optax.partition({"constrained": tx, "free": optax.sgd(1.0)}, labels)


def injected(tx: Any) -> Any:
    @optax.inject_hyperparams
    def make(rate):
        return optax.chain(optax.sgd(rate), tx)

    return make(rate=1.0)


WRAPPERS = {
    "alone": identity,
    "chain": chained,
    "partition": parted,
    "inject_hyperparams": injected,
    "masked": lambda tx: optax.masked(tx, {"kernel": True, "bias": False}),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "MultiSteps": lambda tx: optax.MultiSteps(chained(tx), 1),
    "everything": lambda tx: optax.MultiSteps(
        injected(optax.masked(tx, {"kernel": True, "bias": 0})), 1
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_argument_goes_through_the_wrappers_and_another_value_compiles_nothing(wrapper):
    tx = WRAPPERS[wrapper](oc.project(CAP))
    traces = []

    @jax.jit
    def step(params, state, cap):
        traces.append(None)
        updates, state = tx.update(ZEROS, state, params, cap=cap)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    for cap in (1.0, 0.5, 0.25):
        params, state = step(params, state, cap)
        assert largest(params) == pytest.approx(cap, rel=1e-6)
    assert bits(params["bias"]) == bits(PARAMS["bias"])
    assert len(traces) == 1


def test_an_argument_changes_from_step_to_step_in_a_scan():
    tx = optax.chain(optax.sgd(1.0), oc.project(CAP))

    def step(carry, cap):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.negative, PARAMS), state, params, cap=cap)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params["kernel"], axis=0)

    caps = jnp.array([0.5, 2.0, 0.25], WIDEST)
    _, found = jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), caps)
    np.testing.assert_allclose(found[0], 0.5, rtol=1e-6)
    assert np.all(found[1] > 0.5)
    np.testing.assert_allclose(found[2], 0.25, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_accumulation_projects_with_the_argument_of_the_last_micro_batch(jit):
    tx = optax.MultiSteps(optax.chain(optax.sgd(1.0), oc.project(CAP)), 2)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(ZEROS, tx.init(PARAMS), PARAMS, cap=0.1)
    assert not np.any(updates["kernel"])
    updates, state = update(ZEROS, state, PARAMS, cap=0.5)
    assert largest(optax.apply_updates(PARAMS, updates)) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_every_k_reads_it_in_the_steps_that_project(jit):
    tx = oc.project(CAP, every=2)
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(ZEROS, tx.init(PARAMS), PARAMS, cap=0.1)
    assert not np.any(updates["kernel"])
    updates, state = update(ZEROS, state, PARAMS, cap=0.5)
    assert largest(optax.apply_updates(PARAMS, updates)) == pytest.approx(0.5, rel=1e-6)


def test_one_argument_for_each_of_a_batch():
    tx = oc.project(CAP)
    state = tx.init(PARAMS)
    caps = jnp.array([0.25, 0.5, 99.0], WIDEST)
    updates, _ = jax.vmap(lambda cap: tx.update(ZEROS, state, PARAMS, cap=cap))(caps)
    found = norms(float64(PARAMS["kernel"]) + float64(updates["kernel"]), 1).max((1, 2))
    np.testing.assert_allclose(found, [0.25, 0.5, largest(PARAMS)], rtol=1e-6)


def test_the_gradient_goes_through_it():
    def norm(cap):
        return jnp.sum(jnp.square(kernel(oc.max_norm(oc.arg("cap")), PARAMS["kernel"], cap=cap)))

    # Three columns, each of norm cap.
    np.testing.assert_allclose(jax.grad(norm)(0.5), 3.0, rtol=1e-5)
    w = PARAMS["kernel"]
    gradient = jax.grad(lambda f: jnp.sum(kernel(oc.scale(oc.arg("f"), axis=0), w, f=f)))(
        jnp.ones(3)
    )
    np.testing.assert_allclose(gradient, np.sum(w, 0), rtol=1e-5)


def test_tangent_reads_it_too():
    w, v = {"kernel": jnp.array([[3.0], [4.0]])}, {"kernel": jnp.array([[1.0], [0.0]])}
    rules = {"kernel": oc.fixed_norm(oc.arg("r"), axis=0)}
    tx = optax.chain(oc.tangent(rules), optax.sgd(0.5), oc.project(rules))
    updates, _ = jax.jit(tx.update)(v, tx.init(w), w, r=5.0, other=1.0)
    new = w["kernel"] + updates["kernel"]
    np.testing.assert_allclose(np.linalg.norm(new), 5.0, rtol=1e-6)
    np.testing.assert_allclose(
        new, 5 * np.array([[2.68], [4.24]]) / np.hypot(2.68, 4.24), rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs the argument 'r'"):
        tx.update(v, tx.init(w), w)


# The other verbs, and Flax.


def test_the_other_verbs_take_extra():
    extra = {"cap": 0.5, "unused": None}
    params = oc.constrain(PARAMS, CAP, extra=extra)
    assert largest(params) == pytest.approx(0.5, rel=1e-6)
    away = oc.violations(PARAMS, CAP, extra=extra)["kernel"]
    want = np.linalg.norm(float64(PARAMS["kernel"]) - float64(params["kernel"]))
    np.testing.assert_allclose(away, want, rtol=1e-5)
    row = next(row for row in oc.report(params, CAP, extra=extra).rows if row.path == "kernel")
    assert (row.constraint, row.units, row.at_bound) == ("MaxNorm(0.5)", 3, 3)
    oc.assert_feasible(params, CAP, extra=extra)
    with pytest.raises(AssertionError, match=r"kernel .* from MaxNorm\(0.5\)"):
        oc.assert_feasible(PARAMS, CAP, extra=extra)


@pytest.mark.parametrize("verb", ["constrain", "violations", "report", "assert_feasible"])
def test_what_is_missing_is_named_by_every_verb(verb):
    for extra, given in (({"other": 1, "one": 2}, "'other', 'one'"), ({}, "none"), (None, "none")):
        with pytest.raises(
            ValueError,
            match=rf"max_value=arg\('cap'\) on 'kernel' needs the argument 'cap', and those given "
            rf"are {given}\. Write tx.update\(grads, state, params, cap=\.\.\.\)",
        ):
            getattr(oc, verb)(PARAMS, CAP, extra=extra)


def test_init_needs_no_argument_and_update_does():
    tx = optax.chain(optax.sgd(1.0), oc.project(CAP))
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="needs the argument 'cap', and those given are 'Cap'"):
        tx.update(ZEROS, state, PARAMS, Cap=1.0)
    with pytest.raises(ValueError, match="needs the argument 'cap', and those given are none"):
        jax.jit(tx.update)(ZEROS, state, PARAMS)


def test_a_linen_train_state():
    model, x = ocl.Dense(3, kernel_constraint=CAP["kernel"]), jnp.ones((1, 4))
    params = model.init(jax.random.key(0), x)["params"]
    state = ocl.TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.sgd(1.0), rules=ocl.declared(model, x)
    )
    traces = []

    @jax.jit
    def step(state, cap):
        traces.append(None)
        grads = jax.tree.map(jnp.negative, state.params)
        return state.apply_gradients(grads=grads, extra={"cap": cap})

    for cap in (0.5, 0.25):
        state = step(state, cap)
        np.testing.assert_allclose(np.linalg.norm(state.params["kernel"], axis=0), cap, rtol=1e-6)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="needs the argument 'cap', and those given are none"):
        state.apply_gradients(grads=state.params)


@pytest.mark.parametrize("tx", [optax.adam(0.0), optax.scale(0.0)], ids=["adam", "no extras"])
def test_an_nnx_optimizer(tx):
    model = ocn.Linear(4, 3, kernel_constraint=CAP["kernel"], rngs=nnx.Rngs(0))
    optimizer = ocn.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.state(model, nnx.Param)
    for cap in (0.5, 0.25):
        optimizer.update(model, grads, cap=cap)
        np.testing.assert_allclose(np.linalg.norm(model.kernel[...], axis=0), cap, rtol=1e-6)
    with pytest.raises(ValueError, match="needs the argument 'cap', and those given are none"):
        optimizer.update(model, grads)


def test_an_nnx_optimizer_without_arguments_keeps_its_transformation():
    model = ocn.Linear(4, 3, kernel_constraint=oc.max_norm(1.0), rngs=nnx.Rngs(0))
    tx = optax.scale(0.0)
    assert ocn.Optimizer(model, tx, wrt=nnx.Param).tx is tx


# Inside of others.

LAYER = {"d": {"kernel": normal((4, 3), 3), "bias": normal((3,), 4)}}
GROUP = oc.joint("kernel", "bias")
ALL = oc.across("kernel", "bias")


@pytest.mark.parametrize(
    "rules",
    [
        lambda a: {GROUP: oc.max_norm(a("cap")), "d/*": None},
        lambda a: {ALL: oc.max_norm(a("cap"), axis=None)},
        lambda a: {ALL: oc.top_k(a("k"))},
        lambda a: {ALL: oc.scale(a("cap"))},
        lambda a: {"kernel": oc.stacked(oc.l1_ball(a("cap")), axis=1)},
        lambda a: {"kernel": oc.stacked(oc.soft(oc.max_rms(a("cap")), a("rate")))},
        lambda a: {"kernel": oc.part(oc.max_norm(a("cap")), ":, 1:")},
        lambda a: {"kernel": oc.compose(oc.box(a("low")), oc.scale(a("cap")), oc.max_norm(0.3))},
        lambda a: {"kernel": oc.intersection(oc.max_norm(a("cap")), oc.box(a("low"), a("row")))},
        lambda a: {"kernel": oc.min_max_norm("0.5x init", a("cap"))},
        lambda a: {"kernel": oc.max_spectral_norm(a("cap"), axis="fan_in")},
    ],
)
def test_an_argument_inside_of_others(rules):
    extra = {"cap": 0.5, "k": 5, "rate": 0.25, "low": -0.25, "row": np.array([0.1, 0.2, 0.3])}
    strict = {"strict": False}
    got = oc.constrain(LAYER, rules(oc.arg), extra=extra, **strict)
    want = oc.constrain(LAYER, rules(extra.__getitem__), **strict)
    # Numbers from arguments are arrays, and in another program.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-6, atol=1e-7), got, want)
    assert bits(got["d"]["kernel"]) != bits(LAYER["d"]["kernel"])
    tx = oc.project(rules(oc.arg), **strict)
    updates, _ = jax.jit(tx.update)(
        jax.tree.map(jnp.zeros_like, LAYER), tx.init(LAYER), LAYER, **extra
    )
    moved = optax.apply_updates(LAYER, updates)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6), moved, want)


def test_of_equal_entries_across_leaves_the_first_are_kept_beside_zeros():
    params = {"a": jnp.array([0.0, 3.0, -3.0]), "b": jnp.array([3.0, 0.0, 1.0])}
    for k, want in [(1, [0, 3, 0, 0, 0, 0]), (2, [0, 3, -3, 0, 0, 0]), (4, [0, 3, -3, 3, 0, 1])]:
        got = oc.constrain(params, {oc.across("*"): oc.top_k(oc.arg("k"))}, extra={"k": k})
        np.testing.assert_array_equal(jnp.concatenate([got["a"], got["b"]]), want)


def test_a_stack_takes_one_argument_for_all_layers():
    w = normal((2, 4, 3))
    got = kernel(oc.stacked(oc.scale(oc.arg("f"), axis=0)), w, f=np.array([1.0, 2.0, 4.0]))
    np.testing.assert_array_equal(got, w * np.array([1.0, 2.0, 4.0], w.dtype))


# Arrays, functions and mistakes.


def test_arrays_where_a_set_takes_them():
    w = normal((4, 3))
    upper, keep = np.array([0.1, 0.2, 0.3]), np.tri(4, 3)
    got = kernel(oc.box(oc.arg("low"), oc.arg("up")), w, low=-1, up=upper)
    np.testing.assert_array_equal(got, np.clip(w, -1, upper.astype(w.dtype)))
    np.testing.assert_array_equal(kernel(oc.mask(oc.arg("m")), w, m=keep), w * keep)
    np.testing.assert_array_equal(kernel(oc.mask(oc.arg("m")), w, m=keep > 0), w * keep)
    np.testing.assert_array_equal(
        kernel(oc.mask(oc.arg("m")), w, m=[1, 0, 1]), w * np.array([1, 0, 1])
    )


def test_a_mask_from_an_argument():
    mask = oc.mask(oc.arg("kept"))
    assert oc.deserialize(json.loads(json.dumps(oc.serialize(mask)))) == mask
    assert str(mask) == "Mask(arg('kept'))"
    assert jax.tree.leaves(mask) == []
    tx, traces = oc.project({"kernel": mask}), []

    @jax.jit
    def update(kept):
        traces.append(None)
        return tx.update(ZEROS, tx.init(PARAMS), PARAMS, kept=kept)[0]["kernel"]

    for kept in (np.eye(4, 3), 1 - np.eye(4, 3)):
        want = float64(PARAMS["kernel"]) * kept
        np.testing.assert_array_equal(float64(PARAMS["kernel"] + update(kept)), want)
    assert len(traces) == 1
    with pytest.raises(ValueError, match=r"mask has shape \(5,\), which does not broadcast"):
        kernel(mask, PARAMS["kernel"], kept=np.ones(5))
    with pytest.raises(TypeError, match=r"Mask: mask=arg\('kept'\) on 'kernel' gave None"):
        kernel(mask, PARAMS["kernel"], kept=None)


def test_a_function_is_given_all_arguments_and_the_path():
    seen = []

    def source(extra, path):
        seen.append((dict(extra), path))
        return extra["caps"][path.split("/")[0]]

    params = {"a": {"kernel": 9 * jnp.ones(4)}, "b": {"kernel": 9 * jnp.ones(4)}}
    extra = {"caps": {"a": 2.0, "b": 4.0}, "other": 1}
    got = oc.constrain(params, {"kernel": oc.max_norm(oc.arg(source))}, extra=extra)
    np.testing.assert_allclose(got["a"]["kernel"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(got["b"]["kernel"], 2.0, rtol=1e-6)
    assert seen == [(extra, "a/kernel"), (extra, "b/kernel")]
    with pytest.raises(TypeError, match=r"is arg\(source\), a function, which has no JSON form"):
        oc.serialize(oc.max_norm(oc.arg(source)))
    assert str(oc.max_norm(oc.arg(source))) == "MaxNorm(arg(source))"


def test_an_argument_that_a_function_misses_is_named_and_another_key_is_its_own_affair():
    rules = {"kernel": oc.max_norm(oc.arg(lambda extra, path: extra["caps"][path]))}
    with pytest.raises(ValueError, match="needs the argument 'caps', and those given are 'cap'"):
        oc.constrain(PARAMS, rules, extra={"cap": 1})
    with pytest.raises(KeyError, match="kernel"):
        oc.constrain(PARAMS, rules, extra={"caps": {"other": 1}})


@pytest.mark.parametrize(
    ("make", "value", "error", "message"),
    [
        (oc.max_norm, np.ones(3), ValueError, r"on 'kernel' has shape \(3,\); write one number"),
        (oc.top_k, np.ones(1, int), ValueError, r"has shape \(1,\); write one number"),
        (oc.max_norm, True, TypeError, "has dtype bool; write a real number"),
        (oc.max_norm, 1j, TypeError, "has dtype complex64; write a real number"),
        (oc.box, 1j, TypeError, r"Box: lower=arg\('a'\) on 'kernel' has dtype complex64"),
        (oc.scale, np.ones(3, complex), TypeError, "has dtype complex64; write a real number"),
        (oc.scale, None, TypeError, "gave None, which is no array"),
        (oc.scale, "1.0", TypeError, "gave '1.0', which is no array"),
        (oc.max_norm, {"a": 1.0}, TypeError, "gave {'a': 1.0}, which is no array"),
        (oc.max_norm, [[1, 2], [3]], TypeError, "which is no array"),
        (oc.max_norm, jax.random.key(0), TypeError, "has dtype key<fry>; write a real number"),
        (oc.box, np.ones(5), ValueError, r"lower has shape \(5,\), which does not broadcast"),
        (oc.scale, np.ones(5), ValueError, r"factor has shape \(5,\), which does not broadcast"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*complex")
def test_what_is_no_number_or_array(make, value, error, message):
    if jax.config.jax_enable_x64:
        message = message.replace("complex64", "complex128")
    with pytest.raises(error, match=message):
        kernel(make(oc.arg("a")), PARAMS["kernel"], a=value)


@pytest.mark.parametrize("source", [None, 1, 1.0, ["cap"], b"cap", oc.arg("cap")])
def test_a_source_is_a_name_or_a_function(source):
    with pytest.raises(TypeError, match=r"is neither the name of an argument of tx\.update"):
        oc.arg(source)
    with pytest.raises(TypeError, match="is neither the name"):
        oc.deserialize({"class_name": "MaxNorm", "config": {"max_value": {"arg": source}}})


@pytest.mark.parametrize("field", ["axis", "axis_name"])
def test_other_fields_take_no_argument(field):
    with pytest.raises(TypeError):
        oc.deserialize({"class_name": "MaxNorm", "config": {field: {"arg": "x"}}})


@pytest.mark.parametrize(
    "constraint", [oc.max_norm, oc.box, oc.scale, oc.mask, lambda a: oc.soft(oc.non_neg(), a)]
)
def test_called_by_itself_it_has_no_numbers(constraint):
    with pytest.raises(TypeError, match=r"arg\('a'\) has no numbers yet; write constraint.read\("):
        constraint(oc.arg("a"))(jnp.ones((4, 3)))
    read = constraint(oc.arg("a")).read({"a": 0.5}, "kernel")
    assert read(jnp.ones((4, 3))).shape == (4, 3)


def test_equality_is_by_the_source():
    def source(extra, path):
        return 1.0

    for make in (oc.max_norm, oc.mask, oc.scale):
        assert make(oc.arg("a")) == make(oc.arg("a"))
        assert hash(make(oc.arg("a"))) == hash(make(oc.arg("a")))
        assert make(oc.arg("a")) != make(oc.arg("b"))
        assert make(oc.arg(source)) == make(oc.arg(source))
        assert make(oc.arg(source)) != make(oc.arg("source"))


@dataclasses.dataclass(frozen=True, eq=False)
class Own(oc.Constraint):
    """A user's set with arguments and a schedule."""

    factor: Any
    rate: Any = _numbers.number(1.0)

    def __call__(self, w):
        return w * self.factor * self.rate


class Mine(oc.MaxNorm):
    """A user's subclass."""


def test_classes_of_ones_own():
    w = jnp.ones((4, 3))
    got = jax.jit(lambda z: kernel(Own(oc.arg("z"), lambda step: step + 2.0), w, z=z))(3.0)
    np.testing.assert_array_equal(got, 6.0)
    np.testing.assert_array_equal(kernel(oc.stacked(Own(oc.arg("z"))), w, z=3.0), 3.0)
    got = jax.jit(lambda c: kernel(Mine(oc.arg("c")), w, c=c))(0.5)
    np.testing.assert_allclose(got, 0.25, rtol=1e-6)


def test_in_strict_modes_and_without_jit():
    rules = {
        "kernel": oc.compose(
            oc.scale(oc.arg("f"), axis=0),
            oc.mask(oc.arg("m")),
            oc.box(oc.arg("low"), oc.arg("up")),
            oc.soft(oc.max_norm(oc.arg("cap")), oc.arg("rate")),
        )
    }
    extra = {"f": np.array([1.0, 2, 3]), "m": np.array([1, 1, 0]), "low": 0, "up": np.ones((4, 1))}
    extra |= {"cap": np.float32(1), "rate": np.array(0.5)}
    params = {"kernel": jnp.ones((4, 3), DTYPES[-1])}
    tx = oc.project(rules)

    def both():
        got = oc.constrain(params, rules, extra=extra)["kernel"]
        updates, _ = tx.update(params, tx.init(params), params, **extra)
        return float64(got), float64(updates["kernel"])

    want = both()
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        np.testing.assert_array_equal(both(), want)
    with jax.disable_jit():
        np.testing.assert_allclose(both(), want, rtol=1e-2)


def test_on_a_mesh():
    mesh = jax.make_mesh((1,), ("x",))
    put = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jax.device_put(normal((4, 3)), put)
    f = jnp.array([1.0, 2.0, 4.0], WIDEST)
    got = jax.jit(lambda w, f: kernel(oc.scale(oc.arg("f"), axis=0), w, f=f))(w, f)
    np.testing.assert_array_equal(got, np.asarray(w) * np.asarray(f))


# Scale.


@pytest.mark.parametrize(
    ("factor", "axis", "shape", "broadcast"),
    [
        (2.0, None, (4, 3), ()),
        (2.0, 0, (4, 3), ()),
        ([1.0, 2.0, 3.0], None, (4, 3), (3,)),
        ([1.0, 2.0, 3.0], 0, (4, 3), (1, 3)),
        ([1.0, 2.0, 3.0, 4.0], 1, (4, 3), (4, 1)),
        ([1.0, 2.0, 3.0, 4.0], -1, (4, 3), (4, 1)),
        ([[1.0], [2.0], [3.0], [4.0]], None, (4, 3), (4, 1)),
        ([[1.0], [2.0], [3.0], [4.0]], 0, (4, 3), (4, 1)),
        ([2.0, 3.0], (0, 2), (4, 2, 3), (1, 2, 1)),
        ([[2.0, 3.0, 4.0]], 0, (4, 2, 3), (1, 1, 3)),
        ([2.0, 3.0, 4.0], 0, (4, 2, 3), (1, 1, 3)),
        ([[2.0, 3.0, 4.0]] * 2, None, (4, 2, 3), (1, 2, 3)),
        ([2.0, 3.0, 4.0], "fan_in", (4, 3), (1, 3)),
        ([2.0, 3.0, 4.0], 0, (3,), (3,)),
        (2.0, (), (4, 3), ()),
        (2.0, None, (), ()),
        ([], 0, (4, 0), (1, 0)),
    ],
)
def test_how_a_factor_broadcasts(factor, axis, shape, broadcast):
    w = normal(shape)
    constraint = oc.scale(factor, axis=axis)
    want = np.asarray(w) * np.asarray(factor, w.dtype).reshape(broadcast)
    np.testing.assert_array_equal(kernel(constraint, w), want)
    np.testing.assert_array_equal(kernel(oc.scale(oc.arg("f"), axis=axis), w, f=factor), want)
    if axis != "fan_in":
        np.testing.assert_array_equal(constraint(w), want)
    again = oc.deserialize(json.loads(json.dumps(oc.serialize(constraint))))
    np.testing.assert_array_equal(kernel(again, w), want)


@pytest.mark.parametrize(
    ("factor", "axis", "shape", "message"),
    [
        (np.ones(4), None, (4, 3), r"factor has shape \(4,\), which does not broadcast"),
        (np.ones(4), 0, (4, 3), r"does not broadcast"),
        (np.ones((2, 3)), (0, 2), (4, 2, 3), r"shape \(2, 3\), and the units .* are \(2,\)"),
        (np.ones((1, 4, 3)), None, (4, 3), "does not broadcast"),
        (np.ones(2), (0, 1), (4, 3), r"shape \(2,\), and the units .* are \(\)"),
        (np.ones(1), None, (), "does not broadcast"),
        (1.0, 2, (4, 3), "axis 2 is out of range"),
        (1.0, 0, (), "a scalar has no axis 0"),
        (1.0, "fan_in", (2, 4, 3), "axis='fan_in' cannot be told"),
    ],
)
def test_a_factor_that_does_not_fit_is_an_error_at_bind(factor, axis, shape, message):
    tx = oc.project({"kernel": oc.scale(factor, axis=axis)})
    with pytest.raises(ValueError, match=message) as caught:
        tx.init({"kernel": jnp.ones(shape)})
    assert f"Scale on 'kernel' of shape {shape}" in str(caught.value)


@pytest.mark.parametrize(
    ("factor", "error", "message"),
    [
        (None, TypeError, "factor=None is not a number"),
        ("two", ValueError, "factor='two' is not a number"),
        ("init", ValueError, "relative to init"),
        (float("nan"), ValueError, "factor=nan is not allowed"),
        ([1.0, float("nan")], ValueError, "has a NaN"),
        (True, TypeError, "factor=True is not a number"),
        ([1j], TypeError, "is not an array of real numbers"),
        ([[1], [2, 3]], TypeError, "is not an array of real numbers"),
    ],
)
def test_what_is_no_factor(factor, error, message):
    with pytest.raises(error, match=message):
        oc.scale(factor)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_a_factor_of_one_gives_the_weights_back_bit_for_bit(dtype):
    info = jnp.finfo(dtype)
    special = [0.0, -0.0, float(info.tiny), -float(info.tiny), float(info.max), np.inf, -np.inf]
    w = jnp.concatenate([normal((99,), 0, dtype), jnp.array([*special, np.nan], dtype)])
    for constraint in (oc.scale(1.0), oc.scale(np.ones(107)), oc.scale("1", axis=0)):
        assert bits(kernel(constraint, w)) == bits(w)
        assert bits(jax.jit(constraint)(w)) == bits(w)
    assert bits(kernel(oc.scale(oc.arg("f")), w, f=1)) == bits(w)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: jnp.dtype(d).name)
def test_a_product_is_rounded_once(dtype):
    w, f = normal((50, 3), 0, dtype), np.array([0.3, 1.7, 1e-3])
    wide = np.float64 if dtype == jnp.float64 else np.float32
    want = jnp.asarray(np.asarray(w).astype(wide) * f.astype(wide), dtype)
    got = oc.scale(f, axis=0)(w)
    assert got.dtype == dtype
    assert bits(got) == bits(want)


def test_nan_and_infinity_stay_where_they_are():
    w = jnp.array([[1.0, np.nan, 2.0], [np.inf, 3.0, -np.inf]])
    np.testing.assert_array_equal(oc.scale(0.5)(w), np.asarray(w) * 0.5)
    got = kernel(oc.scale(oc.arg("f"), axis=0), jnp.ones((2, 3)), f=jnp.array([1, np.nan, np.inf]))
    np.testing.assert_array_equal(got, [[1, np.nan, np.inf]] * 2)


def test_the_derivative_of_scale():
    w, v, f = normal((4, 3)), normal((4, 3), 1), jnp.array([1.0, 0.5, 2.0], WIDEST)
    _, got = jax.jvp(oc.scale(f, axis=0), (w,), (v,))
    np.testing.assert_array_equal(got, v * f)
    gradient = jax.grad(lambda c: jnp.sum(c(w)))(oc.scale(f, axis=0))
    np.testing.assert_allclose(gradient.factor, np.sum(w, 0), rtol=1e-5, atol=1e-6)


def test_scale_is_no_set():
    constraint = oc.scale(0.5)
    assert not any((constraint.convex, constraint.smooth, constraint.elementwise))
    with pytest.raises(ValueError, match="not known to be convex"):
        oc.intersection(constraint, oc.non_neg())
    with pytest.raises(ValueError, match="not known to be a smooth set"):
        oc.tangent({"kernel": constraint}).init(PARAMS)
    (row,) = oc.report({"kernel": jnp.ones(4)}, {"kernel": constraint}).rows
    assert (row.constraint, row.outside, row.units) == ("Scale(0.5)", 1.0, None)


@pytest.mark.parametrize("jit", [False, True])
def test_scale_by_a_schedule_and_by_text(jit):
    tx = oc.project({"kernel": oc.scale(lambda step: 1 / (step + 2.0)), "bias": oc.scale("1/size")})
    update = jax.jit(tx.update) if jit else tx.update
    params, state = {"kernel": 8 * jnp.ones((4, 3)), "bias": jnp.ones(4)}, None
    state = tx.init(params)
    for want in (4, 4 / 3, 1 / 3):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], want, rtol=1e-6)
    np.testing.assert_allclose(params["bias"], 1 / 64, rtol=1e-6)


def test_scale_on_a_leaf_with_stacked_layers():
    w = normal((2, 4, 3))
    per_layer = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], w.dtype)
    got = kernel(oc.scale(per_layer, axis=1), w)
    np.testing.assert_array_equal(got, w * per_layer[:, None])
    layout = {"kernel": LeafLayout("Dense", (1,), (0,))}
    rules = {"kernel": oc.scale(per_layer, axis="fan_in")}
    got = oc.constrain({"kernel": w}, rules, layout=layout)["kernel"]
    np.testing.assert_array_equal(got, w * per_layer[:, None])
    got = kernel(oc.stacked(oc.scale([1.0, 2.0, 3.0], axis=0)), w)
    np.testing.assert_array_equal(got, w * per_layer[0])
    inside = oc.stacked(oc.part(oc.scale(2.0), "0"))
    np.testing.assert_array_equal(kernel(inside, w)[:, 0], 2 * w[:, 0])


def test_qk_clip_by_hand():
    # Kimi Team, 2025: W_q of each head times sqrt(min(1, tau / largest logit)), and W_k as well.
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.MultiHeadDotProductAttention(2, qkv_features=6, name="layer_0")(x)

    tau, x = 3.0, normal((5, 4))[None]
    model = Model()
    params = model.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda w: jnp.asarray(3 * w, WIDEST), params)

    def logits(params: Any) -> np.ndarray:
        q, k = (
            np.einsum("bti,ihd->bthd", float64(x), float64(params["layer_0"][name]["kernel"]))
            for name in ("query", "key")
        )
        return np.abs(np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(3)).max((0, 2, 3))

    def gamma(extra, path):
        return jnp.sqrt(jnp.minimum(1.0, tau / extra["max_logits"][path.split("/")[0]]))

    factor = oc.scale(oc.arg(gamma), axis=(0, 2))
    tx = optax.chain(optax.sgd(0.0), oc.project({"query/kernel": factor, "key/kernel": factor}))
    before = logits(params)
    assert before.max() > tau > before.min() * 1e-3
    largest = {"layer_0": jnp.asarray(before, WIDEST)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params, max_logits=largest)
    clipped = optax.apply_updates(params, updates)
    np.testing.assert_allclose(logits(clipped), np.minimum(before, tau), rtol=1e-5)
    by_hand = np.sqrt(np.minimum(1, tau / before))[None, :, None]
    for name in ("query", "key"):
        want = float64(params["layer_0"][name]["kernel"]) * by_hand
        got = float64(clipped["layer_0"][name]["kernel"])
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for name in ("value", "out"):
        same = clipped["layer_0"][name]["kernel"], params["layer_0"][name]["kernel"]
        assert bits(same[0]) == bits(same[1])
