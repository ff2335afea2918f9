"""The table that people read."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_constraints as oc
from optax_constraints import _called


def rows(table: oc.Report) -> dict[str, object]:
    return {row.path: row for row in table.rows}


def test_each_column():
    kernel = jnp.asarray(np.diag([3.0, 0.5, 0.0]), jnp.bfloat16)
    params = {"kernel": kernel, "bias": jnp.array([-3.0, 0.0, 1.0]), "step": jnp.int32(7)}
    table = oc.report(params, {"kernel": oc.max_norm(1.0), "bias": oc.non_neg()})
    assert [row.path for row in table.rows] == ["bias", "kernel", "step"]
    row = rows(table)["kernel"]
    assert (row.shape, row.dtype, row.constraint, row.axis, row.units, row.at_bound) == (
        (3, 3),
        "bfloat16",
        "MaxNorm(1)",
        (0,),
        3,
        1,
    )
    np.testing.assert_allclose(row.outside, 2.0, rtol=1e-6)
    row = rows(table)["bias"]
    assert (row.constraint, row.axis, row.units, row.at_bound) == ("NonNeg()", None, 3, 2)
    assert row.outside == 3.0
    free = rows(table)["step"]
    assert (free.shape, free.constraint, free.units, free.outside) == ((), None, None, None)


def test_the_text():
    kernel, bias, gain = 2 * jnp.eye(3), jnp.zeros(3), jnp.ones(())
    params = {"Dense_0": {"kernel": kernel, "bias": bias}, "gain": gain}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    text = str(oc.report(params, {"kernel": oc.max_norm(1.5), "gain": jnp.tanh}))
    header, rule, bias, kernel, gain, *summary = text.splitlines()
    columns = ["path", "shape", "dtype", "constraint", "axis", "units", "at bound", "outside"]
    assert [name.strip() for name in header.split("  ") if name] == columns
    assert set(rule) == {"-"}
    assert bias.split() == ["Dense_0/bias", "3", "float32", "free", "-", "-", "-", "-"]
    assert kernel.split() == [
        *("Dense_0/kernel", "3x3", "float32", "MaxNorm(1.5)", "0", "3", "3", "0.866")
    ]
    assert gain.split() == ["gain", "scalar", "float32", "tanh", "-", "-", "-", "0.238"]
    assert summary == [
        "2 of 3 leaves constrained; 3 of 3 units at their bound",
        "furthest outside: 0.866 in Dense_0/kernel",
    ]


def test_when_all_is_well_it_says_so():
    params = oc.constrain({"kernel": 2 * jnp.eye(3)}, oc.max_norm(1.5))
    assert str(oc.report(params, oc.max_norm(1.5))).endswith(
        "1 of 1 leaves constrained; 3 of 3 units at their bound; none outside"
    )


def test_nan_is_the_furthest_outside():
    params = {"a": jnp.full((2, 2), 9.0), "b": jnp.full((2, 2), jnp.nan), "c": jnp.ones((2, 2))}
    assert str(oc.report(params, oc.max_norm(1.0))).endswith("furthest outside: nan in b")


def test_units_at_either_bound():
    columns = jnp.array([[0.5, 1.0, 2.0, 0.0]])
    row = oc.report({"w": columns}, oc.min_max_norm(0.5, 2.0)).rows[0]
    assert (row.units, row.at_bound) == (4, 3)
    for constraint in (oc.unit_norm(), oc.fixed_norm(0.5, axis=0)):
        assert oc.report({"w": columns}, constraint).rows[0].at_bound == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_projected_units_count_as_at_their_bound(dtype):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)) * 3, dtype)
    for constraint in (
        oc.max_norm(1.0),
        oc.min_max_norm(0.5, 1.0),
        oc.unit_norm(),
        oc.fixed_norm(0.5, axis=0),
        oc.max_rms(0.5, axis=0),
    ):
        row = oc.report({"w": constraint(w)}, constraint).rows[0]
        assert (row.units, row.at_bound) == (32, 32)


@pytest.mark.parametrize("make", [oc.max_norm, oc.max_rms, functools.partial(oc.min_max_norm, 0.0)])
def test_bounds_relative_to_init_are_not_known_here(make):
    params, rules = {"w": jnp.eye(3)}, make("init")
    state = oc.project(rules).init(params)
    assert oc.report(params, rules, state=state).rows[0].at_bound is None


def test_numbers_are_those_of_the_step():
    rules = {"w": oc.max_norm(optax.linear_schedule(4.0, 2.0, 2))}
    params = {"w": jnp.ones((2, 2))}
    named = [oc.report(params, rules, step=step).rows[0].constraint for step in range(3)]
    assert named == ["MaxNorm(4)", "MaxNorm(3)", "MaxNorm(2)"]


def large_tree() -> dict[str, object]:
    rng = np.random.default_rng(0)

    def leaf(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    tree: dict[str, object] = {
        f"TransformerEncoderBlock_{i}": {
            "MultiHeadDotProductAttention_0": {
                name: {"kernel": leaf(16, 4, 4), "bias": leaf(4, 4)}
                for name in ("query", "key", "value")
            },
            "MlpBlock_0": {"Dense_0": {"kernel": leaf(16, 32), "bias": leaf(32)}},
        }
        for i in range(25)
    }
    return tree


def test_200_leaves_in_100_columns():
    rules = {"kernel": oc.min_max_norm(0.5, 1.25, rate=0.75), "Dense_0/bias": oc.non_neg()}
    table = oc.report(large_tree(), rules)
    lines = str(table).splitlines()
    assert len(table.rows) == 200
    assert len(lines) == 204
    assert max(map(len, lines)) <= 100
    # Every leaf can still be told from every other.
    paths = [line.split()[0] for line in lines[2:-2]]
    assert len(set(paths)) == 200
    # The columns stand under their headers.
    start = lines[0].index("constraint")
    assert {line[start:].split()[0] for line in lines[2:-2]} >= {"free", "NonNeg()"}


def test_one_very_long_path():
    table = oc.report({"x" * 300: jnp.ones(3)}, {"*": oc.non_neg()})
    assert max(map(len, str(table).splitlines())) <= 100


def test_one_array_and_no_array():
    assert "(root)" in str(oc.report(jnp.ones((2, 2)), oc.max_norm(1.0)))
    assert str(oc.report({}, oc.max_norm(1.0))) == "no leaves"


def test_unmatched_rules_are_errors_here_too():
    with pytest.raises(ValueError, match="'kernal' matches no leaf"):
        oc.report(large_tree(), {"kernal": oc.non_neg()})
    assert len(oc.report(large_tree(), {"kernal": oc.non_neg()}, strict=False).rows) == 200


def test_leaves_of_one_shape_under_equal_constraints_share_a_program():
    params = {f"layer_{i}": jnp.full((5, 7), i / 4) for i in range(6)}
    before = _called._called._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    table = oc.report(params, oc.max_norm(1.75))
    assert _called._called._cache_size() == before + 1  # pyright: ignore[reportFunctionMemberAccess]
    outside = [row.outside for row in table.rows]
    want = [7**0.5 * max(0.0, 5**0.5 * i / 4 - 1.75) for i in range(6)]
    np.testing.assert_allclose(outside, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [3, 2**15 + 1], ids=["read back", "on its device"])
def test_of_small_leaves_and_of_large_ones(rows, dtype):
    w = jnp.tile(jnp.asarray([[-3e30, 4e30], [-3.0, 0.0], [0.0, -1.0]], dtype), (rows // 3 + 1, 1))
    (row,) = oc.report({"w": w}, oc.non_neg()).rows
    assert (row.units, row.at_bound) == (w.size, w.size - len(w) // 3)
    assert row.outside == pytest.approx(float(oc.violations(w, oc.non_neg())[""]), rel=1e-6)
    assert not row.inside
    (row,) = oc.report({"embedding": w}, oc.max_norm(1.0, axis=1)).rows
    assert (row.units, row.at_bound) == (len(w), len(w))
    assert row.outside == pytest.approx(float(oc.violations(w, oc.max_norm(1.0, axis=1))[""]))
    assert (
        oc.report({"embedding": oc.max_norm(1.0, axis=1)(w)}, oc.max_norm(1.0, axis=1))
        .rows[0]
        .inside
    )


def test_what_xla_takes_for_zero_is_not_outside_and_infinity_does_not_warn():
    w = jnp.array([-1e-40, 0.0])
    assert oc.report({"w": w}, oc.non_neg()).rows[0].inside
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = oc.report({"w": jnp.array([jnp.inf, -1.0])}, oc.non_neg()).rows
    assert np.isnan(row.outside)
    assert not row.inside


def test_an_interval_around_the_norm_at_init():
    rules = {"w": oc.min_max_norm("0.5x init", "2x init")}
    w = {"w": jnp.ones((4, 3))}
    tx = oc.project(rules, stats=True)
    updates, state = tx.update(w, tx.init(w), w)
    (own,) = oc.stats(state).values()
    assert own.at_bound == -1  # not known
    (row,) = oc.report(optax.apply_updates(w, updates), rules, state=state).rows
    assert (row.inside, row.at_bound) == (True, None)
    (row,) = oc.report({"w": 3 * w["w"]}, rules, state=state).rows
    assert row.outside == pytest.approx(12**0.5)
