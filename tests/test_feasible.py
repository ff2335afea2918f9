"""`assert_feasible`: what a test of one's own training loop needs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case

import optax_constraints as oc

PARAMS = {
    "dense": {"kernel": 3 * jax.random.normal(jax.random.key(0), (5, 4)), "bias": jnp.ones(4)},
    "out": {"kernel": jax.random.normal(jax.random.key(1), (4, 2))},
}
RULES = {"kernel": oc.max_norm(1.0), "bias": oc.non_neg()}


def after_one_step(*transformations, params=PARAMS):
    tx = optax.chain(*transformations)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(grads, tx.init(params), params)
    return optax.apply_updates(params, updates), state


def test_project_at_the_end_passes():
    params, _ = after_one_step(optax.sgd(2.0), oc.project(RULES))
    oc.assert_feasible(params, RULES)


@pytest.mark.parametrize(
    "chain",
    [
        (oc.project(RULES), optax.sgd(2.0)),
        (optax.sgd(2.0), oc.project(RULES), optax.add_decayed_weights(-0.1)),
        (optax.sgd(2.0), oc.project({"kernel": oc.max_norm(1.0)})),
    ],
    ids=["before the optimizer", "followed by another", "a rule left out"],
)
def test_misuse_is_seen(chain):
    params, _ = after_one_step(*chain)
    with pytest.raises(
        AssertionError, match=r"outside .* set(.|\n)*Is project last in its chain\?"
    ):
        oc.assert_feasible(params, RULES)


def test_the_message_lists_the_worst_first():
    params = {**PARAMS, "dense": {**PARAMS["dense"], "bias": jnp.array([0.0, 0, -0.5, 1])}}
    with pytest.raises(AssertionError) as error:
        oc.assert_feasible(params, RULES)
    lines = str(error.value).splitlines()
    assert lines[0] == "3 of 3 constrained leaves are outside their sets:"
    assert re.fullmatch(r"  dense/kernel \(5x4, float32\) is \d+\.\d+ from MaxNorm\(1\)", lines[1])
    assert lines[2].startswith("  out/kernel (4x2, float32)")
    assert lines[3] == "  dense/bias (4, float32) is 0.5 from NonNeg()"
    assert lines[4].startswith("Is project last in its chain? Weights that were loaded")


def test_of_many_leaves_ten_are_listed_and_a_nan_is_the_worst():
    params = {f"w{i:02}": -jnp.full(2, float(i + 1)) for i in range(12)}
    params["w03"] = jnp.array([jnp.nan, 1.0])
    with pytest.raises(AssertionError) as error:
        oc.assert_feasible(params, oc.non_neg())
    lines = str(error.value).splitlines()
    assert lines[0] == "12 of 12 constrained leaves are outside their sets; the worst 10:"
    assert lines[1] == "  w03 (2, float32) is nan from NonNeg()"
    assert lines[2].startswith("  w11 ")
    assert len(lines) == 12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_project_returns_passes(case: Case, dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=case.shape), dtype)
    oc.assert_feasible({"w": case.constraint(w)}, {"w": case.constraint})
    # Elementwise sets are held to the bit, all others up to rounding only.
    if case.constraint.elementwise:
        with pytest.raises(AssertionError, match="1 of 1 constrained leaves is outside its set"):
            oc.assert_feasible({"w": w}, {"w": case.constraint})


def test_rounding_is_let_pass_and_no_more():
    w = oc.unit_norm()(PARAMS["dense"]["kernel"])
    oc.assert_feasible(w * (1 + 1e-6), oc.unit_norm())
    with pytest.raises(AssertionError):
        oc.assert_feasible(w * (1 + 1e-5), oc.unit_norm())
    with pytest.raises(AssertionError):
        oc.assert_feasible(w * (1 + 1e-6), oc.unit_norm(), tolerance=1)


def test_what_overflows_is_not_rounding():
    w = jnp.full(4, 3e38)  # its norm is infinite in float32, and so is its distance
    with pytest.raises(AssertionError, match=r"\(4, float32\) is inf from Simplex"):
        oc.assert_feasible({"w": w}, oc.simplex())
    assert not oc.report({"w": w}, oc.simplex()).rows[0].inside


def test_a_schedule_is_that_of_the_last_update_and_memory_comes_from_the_state():
    rules = {"kernel": oc.fixed_norm("init"), "bias": oc.box(upper=lambda step: 2.0 - step)}
    params, state = after_one_step(optax.sgd(-3.0), oc.project(rules))
    oc.assert_feasible(params, rules, step=0, state=state)
    with pytest.raises(AssertionError, match="1 of 3 constrained leaves is outside its set"):
        oc.assert_feasible(params, rules, step=1, state=state)
    longer = jax.tree.map(lambda p: 1.1 * p, params)
    with pytest.raises(AssertionError, match="3 of 3 constrained"):
        oc.assert_feasible(longer, rules, step=0, state=state)


def test_rules_that_match_nothing_are_errors_here_too():
    with pytest.raises(ValueError, match="matches no"):
        oc.assert_feasible(PARAMS, {"kernels": oc.non_neg()})
