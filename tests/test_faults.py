"""Faults: killed processes, gradients that are not finite, states of something else."""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CASES, DTYPES, Case, bits, float64, norms

import optax_constraints as oc

KILLS = 20


@pytest.mark.slow
def test_a_run_that_is_killed_20_times_is_the_run_that_never_stopped(tmp_path):
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("killed_run.py"), tmp_path, str(KILLS), "0"],
        # Without the cache of compiled programs, in which a kill could leave half of one.
        env={k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    print(json.dumps(seen))
    # Each process went on from the latest checkpoint that the one before it had finished.
    assert len(seen["resumed"]) == KILLS + 1
    assert seen["resumed"] == seen["latest"]
    assert seen["latest"] == sorted(seen["latest"])
    # There were kills in the middle of a checkpoint, and checkpoints between the kills.
    assert sum(map(bool, seen["unfinished"])) >= 3
    assert len(set(seen["latest"])) >= KILLS / 2
    assert seen["steps"] > seen["latest"][-1] >= KILLS
    # The end is the same to the bit: parameters, Adam's moments, counts and memory.
    assert seen["exit codes"] == [0, 0]
    assert seen["killed"] == seen["undisturbed"]


# Gradients that are not finite.


def _one_of_each() -> dict[str, Case]:
    """A case for each type of set, by the name of its leaf."""
    cases = {type(case.constraint).__name__: case for case in reversed(CASES)}
    return dict(sorted(cases.items()))


@pytest.mark.slow  # compiles every set
def test_apply_if_finite_keeps_every_set_feasible_and_finite():
    cases = _one_of_each()
    dtype = DTYPES[0]
    rules = {f"/{name}": case.constraint for name, case in cases.items()}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=c.shape), dtype) for name, c in cases.items()}
    params = oc.constrain(params, rules)
    tx = optax.apply_if_finite(optax.chain(optax.adam(0.6), oc.project(rules)), 100)

    steps = 12
    good = {name: rng.normal(size=(steps, *case.shape)) for name, case in cases.items()}
    spoilt = {name: g.copy() for name, g in good.items()}
    bad = [1, 4, 5, 6, 9, 11]
    # One entry of one leaf is enough; in turn in the first leaf, in the last, and in all.
    names = list(cases)
    for number, value, where in zip(
        bad,
        [np.nan, np.inf, -np.inf] * 2,
        [names[:1], names[-1:], names] * 2,
        strict=True,
    ):
        for name in where:
            spoilt[name][number].flat[number % spoilt[name][number].size] = value

    @jax.jit
    def train(params, gradients):
        def step(carry, gradient):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        gradients = jax.tree.map(lambda g: jnp.asarray(g, dtype), gradients)
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[1]

    after = train(params, spoilt)
    for name, case in cases.items():
        trace = [float64(params[name]), *float64(after[name])]
        for number, (before, now) in enumerate(itertools.pairwise(trace)):
            assert np.all(np.isfinite(now)), (name, number)
            slack = 0 if case.constraint.elementwise else case.slack * jnp.finfo(dtype).eps
            assert np.max(case.outside(now)) <= slack, (name, number)
            if number in bad:
                assert np.array_equal(before, now), (name, number)
        assert not np.array_equal(trace[0], trace[-1]), name

    # Nothing of the bad steps is left: what comes after is what would have come without them.
    rest = [number for number in range(steps) if number not in bad]
    without = train(params, {name: g[np.array(rest * 2)] for name, g in good.items()})
    for name in cases:
        got = after[name][np.array(rest)]
        assert bits(got) == bits(without[name][: len(rest)]), name


# States of other rules and other parameters, through Orbax.

PARAMS = {
    "dense": {"kernel": 3 * jax.random.normal(jax.random.key(0), (4, 3)), "bias": jnp.ones(3)},
    "out": {"kernel": jax.random.normal(jax.random.key(1), (3, 2))},
}
PARAMS = jax.tree.map(jnp.float32, PARAMS)


def _saved(path: Path, tx: optax.GradientTransformation, params=PARAMS) -> dict:
    """The state of `tx` as a checkpoint gives it to somebody who knows nothing of it."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"project": tx.init(params)._asdict(), "params": params})
        checkpointer.wait_until_finished()
        return checkpointer.restore(path)


def test_a_restored_state_of_its_own_rules_goes_on(tmp_path):
    tx = oc.project({"kernel": oc.fixed_norm("init"), "bias": oc.non_neg()})
    saved = _saved(tmp_path / "own", tx)
    params = jax.tree.map(lambda p: 2 * p, saved["params"])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, oc.ProjectState(**saved["project"]), params)
    back = optax.apply_updates(params, updates)["out"]["kernel"]
    want = norms(float64(PARAMS["out"]["kernel"]), None)
    np.testing.assert_allclose(norms(float64(back), None), want, rtol=1e-6)
    assert int(state.updates_seen) == 1


def _wider(params):
    return {**params, "out": {"kernel": jnp.ones((3, 5), jnp.float32)}}


@pytest.mark.parametrize(
    ("saved_rules", "saved_params", "message"),
    [
        (
            {"dense/kernel": oc.max_norm("2x init")},
            PARAMS,
            "The state remembers nothing of 'out/kernel', which its constraint needs",
        ),
        (
            oc.fixed_norm("init"),
            PARAMS,
            "The state remembers 'dense/bias', and no constraint of these rules does",
        ),
        (
            {"kernel": oc.fixed_norm("init", axis=None)},
            PARAMS,
            "The state remembers ((1, 1), dtype('float32')) (shape, dtype) of 'dense/kernel', and "
            "its constraint needs ((1, 3), dtype('float32'))",
        ),
        (
            {"kernel": oc.max_norm("init")},
            _wider(PARAMS),
            "The state remembers ((1, 5), dtype('float32')) (shape, dtype) of 'out/kernel', and "
            "its constraint needs ((1, 2), dtype('float32'))",
        ),
        (
            {"kernel": oc.max_norm(1.0)},
            PARAMS,
            "The state remembers nothing of 'dense/kernel', which its constraint needs",
        ),
    ],
    ids=["fewer rules", "more rules", "other axis", "other shape", "no memory"],
)
@pytest.mark.parametrize("verb", ["update", "jit", "constrain", "violations"])
def test_a_restored_state_of_something_else_is_refused(
    verb, saved_rules, saved_params, message, tmp_path
):
    rules = {"kernel": oc.max_norm("init"), "bias": oc.non_neg()}
    saved = _saved(tmp_path / "other", oc.project(saved_rules), saved_params)
    state = oc.ProjectState(**saved["project"])
    assert int(state.updates_seen) == 0
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    tx = oc.project(rules)
    use = {
        "update": lambda: tx.update(zeros, state, PARAMS),
        "jit": lambda: jax.jit(tx.update)(zeros, state, PARAMS),
        "constrain": lambda: oc.constrain(PARAMS, rules, state=state),
        "violations": lambda: oc.violations(PARAMS, rules, state=state),
    }[verb]
    ending = ".*it is the state of other rules or other parameters. Start with tx.init"
    with pytest.raises(ValueError, match=re.escape(message) + ending):
        use()


def test_a_checkpoint_of_other_rules_does_not_restore_into_this_state(tmp_path):
    """Orbax compares trees by itself, where it is told what to expect."""
    mine = oc.project({"kernel": oc.fixed_norm("init")}).init(PARAMS)
    for name, rules in {"more": oc.fixed_norm("init"), "none": oc.non_neg()}.items():
        other = oc.project(rules).init(PARAMS)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, other)
            checkpointer.wait_until_finished()
            with pytest.raises(ValueError, match="memory"):
                checkpointer.restore(tmp_path / name, jax.eval_shape(lambda: mine))
