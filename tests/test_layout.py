"""What a layout changes, and stacks: in the core, with layouts written by hand."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import float64, norms

import optax_constraints as oc
from optax_constraints import _axes
from optax_constraints._axes import LeafLayout


def leaf(*shape: int, scale: float = 3.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape) * scale, jnp.float32)


PARAMS = {
    "head": {"kernel": leaf(4, 3)},
    "stem": {"kernel": leaf(3, 3, 2, 5)},
    "blocks": {"kernel": leaf(6, 4, 4)},
}
LAYOUT = {
    "head/kernel": LeafLayout("Dense", (0,)),
    "stem/kernel": LeafLayout("Conv", (0, 1, 2)),
    "blocks/kernel": LeafLayout("Dense", (1,), (0,)),
}
FAN_IN = {"head": 0, "stem": (0, 1, 2), "blocks": 1}


@pytest.fixture(autouse=True)
def forget_warnings():
    _axes._warn_once.cache_clear()


def test_fan_in_is_that_of_the_layout():
    rules = {"kernel": oc.max_norm(1.0, axis="fan_in")}
    with pytest.raises(ValueError, match=r"'blocks/kernel' of shape .* cannot be told"):
        oc.constrain(PARAMS, rules)
    out = oc.constrain(PARAMS, rules, layout=LAYOUT)
    for name, axis in FAN_IN.items():
        np.testing.assert_allclose(norms(float64(out[name]["kernel"]), axis), 1, rtol=1e-6)
    assert all(v > 1 for v in oc.violations(PARAMS, rules, layout=LAYOUT).values())
    assert all(v == 0 for v in oc.violations(out, rules, layout=LAYOUT).values())


def test_project_takes_it_too():
    tx = optax.chain(
        optax.sgd(0.1), oc.project({"kernel": oc.unit_norm(axis="fan_in")}, layout=LAYOUT)
    )
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = jax.jit(tx.update)(grads, tx.init(PARAMS), PARAMS)
    out = optax.apply_updates(PARAMS, updates)
    for name, axis in FAN_IN.items():
        np.testing.assert_allclose(norms(float64(out[name]["kernel"]), axis), 1, rtol=1e-6)


def test_paths_under_the_key_of_linen():
    variables = {"params": PARAMS}
    row = oc.report(variables, {"kernel": oc.max_norm(1.0, axis="fan_in")}, layout=LAYOUT).rows[-1]
    assert (row.path, row.layer, row.axis) == ("params/stem/kernel", "Conv", (0, 1, 2))


def test_axes_that_the_layout_does_not_know_are_not_guessed_by_name():
    layout = {"kernel": LeafLayout("Mine", None)}
    rules = {"kernel": oc.max_norm(1.0, axis="fan_in")}
    with pytest.raises(ValueError, match="does not know the axes of this parameter of a Mine"):
        oc.constrain({"kernel": leaf(4, 3)}, rules, layout=layout)


def test_the_report_shows_the_layer():
    rules = {"kernel": oc.max_norm(1.0, axis="fan_in")}
    lines = str(oc.report(PARAMS, rules, layout=LAYOUT)).splitlines()
    assert lines[0].split()[:3] == ["path", "layer", "shape"]
    assert lines[-3].split()[:6] == [
        "stem/kernel",
        "Conv",
        "3x3x2x5",
        "float32",
        "MaxNorm(1)",
        "0,1,2",
    ]


def test_an_axis_that_contradicts_the_layout_warns_once():
    rules = {"stem/kernel": oc.max_norm(1.0)}
    message = r"'stem/kernel' of shape .*axis=0 .* this Conv run, which is axis=\(0, 1, 2\)"
    with pytest.warns(UserWarning, match=message) as warned:
        out = oc.constrain(PARAMS, rules, layout=LAYOUT)
    assert {w.filename for w in warned} == {__file__}
    np.testing.assert_array_less(norms(float64(out["stem"]["kernel"]), 0), 1 + 1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.constrain(PARAMS, rules, layout=LAYOUT)


@pytest.mark.parametrize("axis", [(0, 1, 2), (2, 0, -3), None, "fan_in"])
def test_an_axis_that_agrees_or_means_the_whole_does_not_warn(axis):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.constrain(PARAMS, {"stem/kernel": oc.max_norm(1.0, axis=axis)}, layout=LAYOUT)


def test_an_axis_of_size_1_makes_no_difference():
    # The depthwise kernel of EEGNet, (electrodes, 1, 1, filters), for which Keras writes axis=0.
    layout = {"spatial/kernel": LeafLayout("Conv", (0, 1, 2))}
    rules = {"spatial/kernel": oc.max_norm(1.0)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        oc.constrain({"spatial": {"kernel": leaf(8, 1, 1, 3)}}, rules, layout=layout)
    with pytest.warns(UserWarning, match=r"of shape \(1, 8, 1, 3\): axis=0 is not"):
        oc.constrain({"spatial": {"kernel": leaf(1, 8, 1, 3)}}, rules, layout=layout)


def test_a_layout_of_another_model_is_an_error():
    with pytest.raises(ValueError, match="knows none of the 1 leaves of this tree, such as 'w'"):
        oc.constrain({"w": leaf(3, 3)}, oc.max_norm(1.0), layout=LAYOUT)


# Stacks.


def test_a_stack_is_constrained_layer_by_layer():
    stack = leaf(6, 4, 3)
    got = oc.constrain({"w": stack}, {"w": oc.Stacked(oc.max_norm(1.0))})["w"]
    for one, before in zip(got, stack, strict=True):
        np.testing.assert_allclose(one, oc.max_norm(1.0)(before), rtol=1e-6)


@pytest.mark.parametrize(
    ("axis", "inner", "settled"),
    [
        (0, 0, (1,)),
        (1, 0, (0,)),
        (-1, -1, (1,)),
        (0, None, (1, 2)),
        ((0, 2), 0, (1,)),
        (2, (0, 1), (0, 1)),
    ],
)
@pytest.mark.filterwarnings("ignore:.* is not where the incoming weights of a unit run")
def test_the_axes_inside_are_those_of_one_slice(axis, inner, settled):
    constraint = oc.Stacked(oc.max_norm(1.0, axis=inner), axis)
    row = oc.report({"w": leaf(6, 4, 3)}, {"w": constraint}).rows[0]
    assert (row.constraint, row.axis) == ("MaxNorm(1)", settled)
    np.testing.assert_allclose(norms(float64(constraint(leaf(6, 4, 3))), settled), 1, rtol=1e-6)


def test_fan_in_inside_a_stack_is_that_of_the_layer():
    layout = {"blocks/Conv_0/kernel": LeafLayout("Conv", (0, 1, 3), (2,))}
    params = {"blocks": {"Conv_0": {"kernel": leaf(3, 3, 6, 2, 5)}}}
    by_hand = {"kernel": oc.Stacked(oc.max_norm(1.0, axis="fan_in"), axis=2)}
    for known in (layout, None):
        row = oc.report(params, by_hand, layout=known).rows[0]
        assert row.axis == (0, 1, 3)


def test_a_stack_of_a_users_own_set():
    def centred(w):
        return w - jnp.mean(w)

    stack = leaf(6, 4, 3)
    tx = optax.chain(optax.sgd(1.0), oc.project({"w": oc.Stacked(centred)}))
    params = {"w": stack}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    out = float64(optax.apply_updates(params, updates)["w"])
    np.testing.assert_allclose(out.mean((1, 2)), 0, atol=1e-6)
    row = oc.report(params, {"w": oc.Stacked(centred)}).rows[0]
    assert (row.constraint, row.units) == ("Stacked(centred)", None)


def test_a_stack_of_an_elementwise_set_counts_its_entries():
    row = oc.report({"w": leaf(6, 4, 3)}, {"w": oc.Stacked("non_neg", axis=(0, 1))}).rows[0]
    assert (row.units, row.at_bound) == (72, int(np.sum(leaf(6, 4, 3) < 0)))


def test_a_schedule_inside_a_stack():
    rules = {"w": oc.Stacked(oc.max_norm(optax.linear_schedule(4.0, 2.0, 2)))}
    for step, bound in enumerate([4, 3, 2]):
        out = oc.constrain({"w": leaf(6, 4, 3, scale=100.0)}, rules, step=step)["w"]
        np.testing.assert_allclose(norms(float64(out), 1), bound, rtol=1e-6)


def test_a_stack_serialises():
    stack = oc.Stacked(oc.min_max_norm(0.5, 1.0, axis="fan_in"), axis=(0, 1))
    config = oc.serialize({"blocks/**": stack})
    assert config["blocks/**"]["config"]["constraint"]["class_name"] == "MinMaxNorm"
    assert oc.deserialize(config) == {"blocks/**": stack}
    assert oc.Stacked("non_neg") == oc.Stacked(oc.non_neg())
    assert len({oc.Stacked("non_neg"), oc.Stacked(oc.non_neg())}) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: oc.Stacked(None), ValueError, "constraint=None constrains nothing"),
        (lambda: oc.Stacked("maxnorm"), ValueError, "Did you mean 'max_norm'"),
        (lambda: oc.Stacked(oc.non_neg(), axis=None), ValueError, "does not number slices"),
        (lambda: oc.Stacked(oc.non_neg(), axis="fan_in"), ValueError, "does not number slices"),
        (lambda: oc.Stacked(oc.non_neg(), axis=1.5), TypeError, "axis=1.5 is not an axis"),
        (
            lambda: oc.constrain({"w": leaf(3)}, {"w": oc.Stacked(oc.non_neg(), axis=1)}),
            ValueError,
            r"Stacked on 'w' of shape \(3,\): axis 1 is out of range",
        ),
        (
            lambda: oc.constrain({"w": leaf(3)}, {"w": oc.Stacked(oc.max_norm(1.0))}),
            ValueError,
            r"MaxNorm on 'w' of shape \(\): a scalar has no axis 0",
        ),
        (
            lambda: oc.constrain({"w": leaf(3, 3)}, {"w": oc.Stacked(lambda w: w[:2])}),
            ValueError,
            r"returned shape \(3, 2\); a constraint keeps the shape",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_a_layout_makes_of_a_constraint_is_tried_for_each_layout():
    class Own(oc.Constraint):
        def settle(self, path, shape, layout=None):
            rows = 2 if layout and layout.stacked else 3
            return oc.Stacked(lambda w: w[:rows])

        def __call__(self, w, /):
            return jnp.asarray(w)

    layout = {"a": LeafLayout("Dense", (0,)), "b": LeafLayout("Dense", (1,), stacked=(0,))}
    with pytest.raises(ValueError, match=r"on 'b' of shape \(3, 3\) returned shape \(3, 2\)"):
        oc.constrain({"a": leaf(3, 3), "b": leaf(3, 3)}, Own(), layout=layout)
