"""Rules: which constraint each leaf gets, and what is said when the rules are wrong."""

import dataclasses
import re
import types
import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_constraints as oc
from optax_constraints import _rules
from optax_constraints._rules import Binder


def _zeros(*shape: int) -> jax.Array:
    return jnp.zeros(shape, jnp.float32)


PARAMS = {
    "Dense_0": {"bias": _zeros(4), "kernel": _zeros(3, 4)},
    "Dense_1": {"bias": _zeros(5), "kernel": _zeros(4, 5)},
    "Dense_10": {"bias": _zeros(2), "kernel": _zeros(5, 2)},
    "bias_proj": {"kernel": _zeros(2, 2)},
    "head": {"inner": {"bias": _zeros(2), "kernel": _zeros(2, 2)}},
}
KERNELS = {
    "Dense_0/kernel",
    "Dense_1/kernel",
    "Dense_10/kernel",
    "bias_proj/kernel",
    "head/inner/kernel",
}
BIASES = {"Dense_0/bias", "Dense_1/bias", "Dense_10/bias", "head/inner/bias"}


def assigned(rules: Any, params: Any = PARAMS, **options: Any) -> dict[str, str]:
    """The constraint of each constrained leaf, as the report names it."""
    bound = Binder(rules, **options)(params)
    return {leaf.path: str(leaf.constraint) for leaf in bound if leaf.constraint is not None}


def half(w: jax.Array) -> jax.Array:
    return w / 2


# Forms of rules.


@pytest.mark.parametrize(
    ("bare", "shown"),
    [
        (oc.max_norm(3.0), "MaxNorm(3)"),
        (oc.MaxNorm, "MaxNorm(2)"),
        ("non_neg", "NonNeg()"),
        ("NonNeg", "NonNeg()"),
        ({"class_name": "MaxNorm", "config": {"max_value": 4.0}}, "MaxNorm(4)"),
        (half, "half"),
        (lambda w: w / 2, "<lambda>"),
    ],
)
def test_bare_constraint_takes_every_floating_leaf(bare, shown):
    assert assigned(bare) == dict.fromkeys(KERNELS | BIASES, shown)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (oc.max_norm(3.0), "MaxNorm(3)"),
        (oc.MaxNorm, "MaxNorm(2)"),
        ("unit_norm", "UnitNorm()"),
        ({"class_name": "MaxNorm", "config": {"max_value": 4.0}}, "MaxNorm(4)"),
        (half, "half"),
    ],
)
def test_mapping_takes_anything_that_names_a_constraint(value, shown):
    assert assigned({"kernel": value}) == dict.fromkeys(KERNELS, shown)


def test_a_lambda_is_the_projection():
    new = oc.constrain({"w": jnp.ones(3, jnp.float32)}, {"w": lambda w: w / 2})
    np.testing.assert_array_equal(new["w"], np.full(3, 0.5, np.float32))


@pytest.mark.parametrize("nothing", [None, {}, [], ()])
def test_no_rules_leave_everything_free(nothing):
    assert assigned(nothing) == {}
    params = {"w": -jnp.ones(3, jnp.float32)}
    assert oc.constrain(params, nothing)["w"] is params["w"]


def test_nested_mapping_is_the_same_as_joined_keys():
    nested = {
        "Dense_0": {"kernel": oc.max_norm(1.0), "bias": None},
        "head": {"inner": {"kernel": oc.unit_norm()}, "**": oc.non_neg()},
        "bias": oc.non_neg(),
    }
    joined = {
        "Dense_0/kernel": oc.max_norm(1.0),
        "Dense_0/bias": None,
        "head/inner/kernel": oc.unit_norm(),
        "head/**": oc.non_neg(),
        "bias": oc.non_neg(),
    }
    expected = {
        "Dense_0/kernel": "MaxNorm(1)",
        "Dense_1/bias": "NonNeg()",
        "Dense_10/bias": "NonNeg()",
        "head/inner/bias": "NonNeg()",
        "head/inner/kernel": "UnitNorm()",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert assigned(nested) == assigned(joined) == expected


def test_nested_mapping_can_be_anchored_at_its_outermost_key():
    params = {"a": {"w": _zeros(2)}, "b": {"a": {"w": _zeros(2)}}}
    assert set(assigned({"/a": {"w": oc.non_neg()}}, params)) == {"a/w"}
    assert set(assigned({"a": {"w": oc.non_neg()}}, params)) == {"a/w", "b/a/w"}


@pytest.mark.parametrize("make", [list, tuple])
def test_pairs(make):
    rules = make([("Dense_0/kernel", oc.max_norm(1.0)), ["kernel", "unit_norm"]])
    expected = dict.fromkeys(KERNELS, "UnitNorm()") | {"Dense_0/kernel": "MaxNorm(1)"}
    assert assigned(rules) == expected


def test_regular_expression_matches_the_whole_path():
    assert set(assigned([(re.compile(r"Dense_\d+/kernel"), "non_neg")])) == {
        "Dense_0/kernel",
        "Dense_1/kernel",
        "Dense_10/kernel",
    }
    # Neither the beginning nor the end of a path is enough.
    for part in (r"Dense_1/ker", r"kernel", r"Dense_1"):
        with pytest.raises(ValueError, match=rf"re\.compile\('{part}'\) matches no leaf"):
            assigned([(re.compile(part), "non_neg")])
    assert set(assigned({re.compile(r".*BIAS", re.IGNORECASE): "non_neg"})) == BIASES


def test_predicate_is_called_with_path_and_leaf():
    calls = []

    def square(path, leaf):
        calls.append((path, leaf))
        return leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1]

    assert set(assigned([(square, "non_neg")])) == {"bias_proj/kernel", "head/inner/kernel"}
    assert {path for path, _ in calls} == KERNELS | BIASES
    assert all(leaf is PARAMS["Dense_0"]["bias"] for path, leaf in calls if path == "Dense_0/bias")
    by_path = {lambda path, leaf: path.startswith("Dense_1/"): "non_neg"}
    assert set(assigned(by_path)) == {"Dense_1/bias", "Dense_1/kernel"}


def test_none_leaves_a_leaf_free():
    rules = {"Dense_0/kernel": None, "kernel": oc.unit_norm()}
    assert set(assigned(rules)) == KERNELS - {"Dense_0/kernel"}


def test_the_first_rule_that_matches_wins():
    special_first = [("Dense_0/kernel", oc.max_norm(1.0)), ("kernel", oc.max_norm(2.0))]
    assert assigned(special_first)["Dense_0/kernel"] == "MaxNorm(1)"
    assert assigned(special_first)["Dense_1/kernel"] == "MaxNorm(2)"
    with pytest.warns(UserWarning, match="'Dense_0/kernel' does nothing"):
        assert assigned(special_first[::-1])["Dense_0/kernel"] == "MaxNorm(2)"


def test_a_rule_behind_others_warns_and_does_not_raise():
    rules = [
        ("Dense_0/kernel", "non_neg"),
        ("Dense_0/bias", None),
        ("Dense_0/*", "unit_norm"),
    ]
    with pytest.warns(UserWarning, match=r"'Dense_0/\*' does nothing.*more specific rule first"):
        assert assigned(rules) == {"Dense_0/kernel": "NonNeg()"}
    with pytest.warns(UserWarning, match="'Dense_0/kernel' does nothing"):
        oc.project([("kernel", None), ("Dense_0/kernel", "non_neg")]).init(PARAMS)


@pytest.mark.parametrize(
    "verb",
    [
        lambda rules: oc.constrain(PARAMS, rules),
        lambda rules: oc.violations(PARAMS, rules),
        lambda rules: oc.report(PARAMS, rules),
        lambda rules: jax.jit(oc.constrain, static_argnums=1)(PARAMS, rules),
        lambda rules: optax.chain(optax.sgd(0.1), oc.project(rules)).init(PARAMS),
    ],
    ids=["constrain", "violations", "report", "jit", "chain"],
)
def test_warnings_point_at_the_line_of_the_caller(verb):
    with pytest.warns(UserWarning, match="does nothing") as warned:
        verb((("kernel", oc.max_norm(1.0)), ("Dense_0/kernel", None)))
    assert {w.filename for w in warned} == {__file__}


def test_a_rule_that_wins_one_leaf_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assigned([("Dense_0/kernel", "non_neg"), ("kernel", "unit_norm")])


# What a pattern matches.

_PATTERNS = [
    ("kernel", KERNELS),
    ("bias", BIASES),
    ("Dense_0/kernel", {"Dense_0/kernel"}),
    ("Dense_1/kernel", {"Dense_1/kernel"}),
    ("Dense_1/*", {"Dense_1/bias", "Dense_1/kernel"}),
    ("Dense_?/kernel", {"Dense_0/kernel", "Dense_1/kernel"}),
    ("Dense_*/kernel", {"Dense_0/kernel", "Dense_1/kernel", "Dense_10/kernel"}),
    ("Dense_[01]/bias", {"Dense_0/bias", "Dense_1/bias"}),
    ("Dense_[0-9]/bias", {"Dense_0/bias", "Dense_1/bias"}),
    ("Dense_[!0]/bias", {"Dense_1/bias"}),
    ("inner/kernel", {"head/inner/kernel"}),
    ("/head/inner/kernel", {"head/inner/kernel"}),
    ("/*/kernel", KERNELS - {"head/inner/kernel"}),
    ("/**/kernel", KERNELS),
    ("head/**", {"head/inner/bias", "head/inner/kernel"}),
    ("head/**/kernel", {"head/inner/kernel"}),
    ("head/**/inner/**/kernel/**", {"head/inner/kernel"}),
    ("/head/*", set()),
    ("**", KERNELS | BIASES),
    ("*", KERNELS | BIASES),
    ("*/*/*", {"head/inner/bias", "head/inner/kernel"}),
    ("b*", BIASES),
    ("bias*/kernel", {"bias_proj/kernel"}),
    ("Dense_1", set()),
    ("ernel", set()),
    ("kern", set()),
    ("Kernel", set()),
    ("ense_1/kernel", set()),
    ("/kernel", set()),
    ("/inner/kernel", set()),
    ("head/kernel", set()),
    ("head*kernel", set()),
    ("inner.kernel", set()),
]


@pytest.mark.parametrize(("pattern", "paths"), _PATTERNS, ids=[p for p, _ in _PATTERNS])
def test_pattern(pattern, paths):
    assert set(assigned({pattern: "non_neg"}, strict=False)) == paths
    if not paths:
        with pytest.raises(ValueError, match="matches no leaf"):
            assigned({pattern: "non_neg"})


def test_a_dict_key_with_slashes_counts_as_segments():
    params = {"mlp/~/linear_0": {"w": _zeros(2, 2)}, "mlp/~/linear_01": {"w": _zeros(2, 2)}}
    assert set(assigned({"linear_0/w": "non_neg"}, params)) == {"mlp/~/linear_0/w"}


def _matches(pattern: str, path: str) -> bool:
    """The slow, obvious matcher."""
    segments = pattern.strip("/").split("/")
    keys = path.split("/")
    starts = [0] if pattern.startswith("/") else range(len(keys) + 1)
    return any(_matches_segments(segments, keys[start:]) for start in starts)


def _matches_segments(segments: list[str], keys: list[str]) -> bool:
    if not segments:
        return not keys
    if segments[0] == "**":
        return any(_matches_segments(segments[1:], keys[i:]) for i in range(len(keys) + 1))
    return (
        len(keys) > 0
        and _matches_text(segments[0], keys[0])
        and _matches_segments(segments[1:], keys[1:])
    )


def _matches_text(pattern: str, text: str) -> bool:
    if not pattern:
        return not text
    if pattern[0] == "*":
        return any(_matches_text(pattern[1:], text[i:]) for i in range(len(text) + 1))
    if not text:
        return False
    if pattern[0] == "?":
        return _matches_text(pattern[1:], text[1:])
    if pattern[0] == "[":
        end = pattern.index("]")
        return text[0] in pattern[1:end] and _matches_text(pattern[end + 1 :], text[1:])
    return pattern[0] == text[0] and _matches_text(pattern[1:], text[1:])


_segment = st.text("ab_1.+~", min_size=1, max_size=4)
_path = st.lists(_segment, min_size=1, max_size=4).map("/".join)
_glob_segment = st.lists(
    st.sampled_from(["a", "b", "_", "1", ".", "+", "*", "?", "[ab]", "[_1]"]),
    min_size=1,
    max_size=4,
).map("".join)


@st.composite
def _pattern_and_paths(draw: st.DrawFn) -> tuple[str, list[str]]:
    paths = draw(st.lists(_path, min_size=1, max_size=6, unique=True))
    segments = draw(st.lists(_glob_segment | st.just("**"), min_size=1, max_size=4))
    if draw(st.booleans()):  # A pattern made from one of the paths matches more often.
        segments = list(draw(st.sampled_from(paths)).split("/"))
        for i in range(len(segments)):
            segments[i] = draw(st.sampled_from([segments[i]] * 3 + ["*", "**", "?"]))
            if draw(st.integers(0, 3)) == 0:
                segments[i] = draw(_glob_segment)
        segments = segments[draw(st.integers(0, len(segments) - 1)) :]
        segments[:0] = draw(st.lists(st.just("**"), max_size=1))
    return draw(st.sampled_from(["", "", "/"])) + "/".join(segments), paths


@settings(max_examples=400, derandomize=True, deadline=None)
@given(_pattern_and_paths())
def test_patterns_match_as_the_reference_does(case):
    pattern, paths = case
    leaf = np.zeros(1, np.float32)
    # A free leaf comes back as the same object, and the others as arrays of JAX.
    new = oc.constrain(dict.fromkeys(paths, leaf), {pattern: lambda w: w}, strict=False)
    found = {path for path in paths if new[path] is not leaf}
    assert found == {path for path in paths if _matches(pattern, path)}


# Rules that match nothing.


def test_unmatched_rule_names_the_nearest_paths_first():
    with pytest.raises(
        ValueError,
        match=r"The rule 'kernal' matches no leaf of the 9 in this tree\. The closest paths are ",
    ) as caught:
        oc.project({"kernal": "non_neg"}).init(PARAMS)
    listed = re.findall(r"'([^']+)'", str(caught.value).split("closest paths are")[1])
    assert set(listed) == KERNELS
    assert "and 4 more" in str(caught.value)
    with pytest.raises(ValueError, match=r"closest paths are 'Dense_10/kernel'"):
        oc.project({"Dens_10/kernel": "non_neg"}).init(PARAMS)
    # As many segments as the pattern has are compared, not the whole path.
    with pytest.raises(ValueError, match="closest paths are 'encoder/attention/kernel', 'nal/b'"):
        oc.project({"kernal": "non_neg"}).init(
            {"encoder": {"attention": {"kernel": _zeros(2)}}, "nal": {"b": _zeros(2)}}
        )
    with pytest.raises(ValueError, match="closest paths are 'model/encoder/attention/kernel'"):
        oc.project({"attention/kernal": "non_neg"}).init(
            {"attention": {"b": _zeros(2)}, "model/encoder": {"attention": {"kernel": _zeros(2)}}}
        )


@pytest.mark.parametrize(
    "verb",
    [
        lambda params, rules, **options: oc.project(rules, **options).init(params),
        oc.constrain,
        oc.violations,
        oc.report,
    ],
    ids=["project", "constrain", "violations", "report"],
)
def test_every_verb_rejects_a_rule_without_a_leaf(verb):
    unmatched = {"kernel": "non_neg", "gamma": None}
    with pytest.raises(ValueError, match="The rule 'gamma' matches no leaf"):
        verb(PARAMS, unmatched)
    verb(PARAMS, unmatched, strict=False)
    for empty in ({}, [], None, {"a": None, "b": {}}, {"a": optax.MaskedNode()}):
        verb(empty, unmatched)


def test_predicate_that_matches_nothing_is_an_error():
    def nowhere(path, leaf):
        return False

    with pytest.raises(ValueError, match=r"<function .*nowhere.*> matches no leaf"):
        assigned([(nowhere, "non_neg")])


def test_one_unmatched_nested_key_is_named_in_full():
    with pytest.raises(ValueError, match="The rule 'Dense_0/gamma' matches no leaf"):
        assigned({"Dense_0": {"kernel": "non_neg", "gamma": "non_neg"}})


def test_strict_false_still_applies_what_matches():
    assert set(assigned({"gamma": "unit_norm", "bias": "non_neg"}, strict=False)) == BIASES


# Rules that are wrong by themselves: an error without any parameters.


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"kernel": 3.0}, ValueError, r"In the rule 'kernel': .*identifier: 3\.0"),
        ({"kernel": "max_nrom"}, ValueError, "In the rule 'kernel': .*'max_norm'"),
        ({"kernel": [oc.non_neg()]}, ValueError, r"In the rule 'kernel': .*\[NonNeg\(\)\]"),
        ({"a": {"b": 3.0}}, ValueError, "In the rule 'a/b': "),
        ([(re.compile("x.y"), 3.0)], ValueError, r"In the rule re\.compile\('x\.y'\): "),
        (3.0, ValueError, r"identifier: 3\.0"),
        ("max_nrom", ValueError, "Did you mean 'max_norm'"),
        ({3: "non_neg"}, TypeError, "pattern 3 is not a string"),
        ({None: "non_neg"}, TypeError, "pattern None is not a string"),
        ({("a", "b"): "non_neg"}, TypeError, r"pattern \('a', 'b'\) is not a string"),
        ({b"kernel": "non_neg"}, TypeError, "pattern b'kernel' is not a string"),
        ([(oc.non_neg(), "kernel")], TypeError, r"pattern NonNeg\(\) is not a string"),
        ([(oc.NonNeg, "kernel")], TypeError, "pattern <class .*NonNeg'> is not a string"),
        ({"a": {re.compile("b"): "non_neg"}}, TypeError, "nested rules under 'a'.*top level"),
        ({"a": {half: "non_neg"}}, TypeError, "nested rules under 'a'.*top level"),
        ({"a": {3: "non_neg"}}, TypeError, "nested rules under 'a' the key 3 is not a string"),
        ({re.compile("a"): {"b": "non_neg"}}, TypeError, "need a string as their key"),
        ({half: {"b": "non_neg"}}, TypeError, "need a string as their key"),
        ({"a": {"/b": "non_neg"}}, ValueError, "under 'a' the key '/b'.*leading '/'"),
        ({"": "non_neg"}, ValueError, "pattern '' is empty; write '\\*\\*'"),
        ({"/": "non_neg"}, ValueError, "pattern '/' is empty"),
        ({re.compile(b"kernel"): "non_neg"}, TypeError, "matches bytes; compile it from a str"),
        ([("kernel",)], TypeError, r"pairs \(pattern, constraint\), and \('kernel',\) is none"),
        ([("a", "non_neg", 1)], TypeError, r"and \('a', 'non_neg', 1\) is none"),
        (["kernel"], TypeError, "and 'kernel' is none"),
        (("kernel", oc.non_neg()), TypeError, "and 'kernel' is none"),
        (["ab"], TypeError, "and 'ab' is none"),
    ],
)
def test_wrong_rules_raise_at_once(rules, error, message):
    with pytest.raises(error, match=message):
        oc.project(rules)


# Leaves that a constraint cannot take.


@pytest.mark.parametrize(
    ("leaf", "dtype"),
    [
        (jnp.zeros(3, jnp.int32), "int32"),
        (jnp.zeros(3, bool), "bool"),
        (jnp.zeros(3, jnp.complex64), "complex64"),
    ],
)
def test_a_rule_that_names_a_leaf_that_is_not_floating(leaf, dtype):
    params = {"net": {"steps": leaf, "w": _zeros(3)}}
    with pytest.raises(
        TypeError,
        match=rf"rule '\*\*' names 'net/steps' .*shape \(3,\), {dtype}.*'net/steps': None",
    ):
        oc.project({"**": "non_neg"}).init(params)
    assert assigned({"net/steps": None, "**": "non_neg"}, params) == {"net/w": "NonNeg()"}


def test_a_rule_that_names_a_leaf_that_is_no_array():
    with pytest.raises(TypeError, match=r"rule 'act' names 'act' \(.*function.*'act': None"):
        assigned({"act": "non_neg"}, {"act": half, "w": _zeros(2)})


def test_a_bare_constraint_passes_over_leaves_that_are_not_floating():
    params = {
        "count": jnp.full(3, -1, jnp.int32),
        "flag": jnp.zeros((), bool),
        "key": jax.random.key(0),
        "phase": jnp.full(3, -1, jnp.complex64),
        "steps": -3,
        "w": -jnp.ones(3, jnp.float32),
    }
    new = oc.constrain(params, oc.max_norm(1.0))
    for name in params.keys() - {"w"}:
        assert new[name] is params[name]
    np.testing.assert_allclose(np.linalg.norm(new["w"]), 1, rtol=1e-6)
    assert list(oc.violations(params, oc.max_norm(1.0))) == ["w"]
    oc.project(oc.max_norm(1.0)).init(params)


@pytest.mark.parametrize("rules", [{"scale": oc.max_norm(1.0)}, oc.max_norm(1.0)])
@pytest.mark.parametrize("leaf", [np.float32(3.0), 3.0, jnp.asarray(3.0, jnp.bfloat16)])
def test_a_norm_along_an_axis_of_a_scalar(rules, leaf):
    with pytest.raises(
        ValueError, match=r"MaxNorm on 'a/scale' of shape \(\): a scalar has no axis 0.*axis=None"
    ):
        oc.project(rules).init({"a": {"scale": leaf}})


def test_scalar_leaves_can_be_constrained():
    params = {"low": -1.5, "high": jnp.asarray(3.0, jnp.float32)}
    new = oc.constrain(params, oc.non_neg())
    assert new["low"] == 0
    assert new["high"] == 3
    assert oc.constrain(params, {"high": oc.max_norm(1.0, axis=None)})["high"] == 1
    tx = oc.project(oc.non_neg())
    updates, _ = tx.update({"low": 1.0, "high": -5.0}, tx.init(params), params)
    assert updates == {"low": 1.5, "high": -3}


# A user's own constraint.


@pytest.mark.parametrize("form", ["function", "class"])
@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda w: w.sum(), ValueError, r"returned shape \(\).* an array of shape \(3, 2\)"),
        (lambda w: w.T, ValueError, r"returned shape \(2, 3\).* an array of shape \(3, 2\)"),
        (lambda w: w[None], ValueError, r"returned shape \(1, 3, 2\)"),
        (lambda w: w.astype(jnp.bfloat16), TypeError, r"returned bfloat16 for float32.*astype"),
        (lambda w: w > 0, TypeError, r"returned bool for float32"),
        (lambda w: {"w": w}, TypeError, "returned a dict; return one array"),
        (lambda w: None, TypeError, "returned a NoneType; return one array"),
    ],
    ids=["scalar", "transposed", "longer", "bfloat16", "bool", "dict", "None"],
)
def test_a_constraint_keeps_shape_and_dtype(form, result, error, message):
    class Mine(oc.Constraint):
        def __call__(self, w):
            return result(w)

    mine = Mine() if form == "class" else result
    with pytest.raises(error, match=rf"on 'a/kernel' of shape \(3, 2\).*{message}"):
        oc.project({"kernel": mine}).init({"a": {"kernel": _zeros(3, 2)}})


def test_a_class_that_returns_two_arrays():
    class Both(oc.Constraint):
        def __call__(self, w) -> Any:
            return w, w

    with pytest.raises(TypeError, match=r"Both on 'w' of shape \(2,\) returned a tuple"):
        oc.project({"w": Both()}).init({"w": _zeros(2)})


def test_an_exception_in_a_users_function_names_the_leaf():
    class WrongPlaceError(Exception):
        pass

    def fails_on_matrices(w):
        if w.ndim == 2:
            raise WrongPlaceError("matrix")
        return w

    with pytest.raises(WrongPlaceError, match="matrix") as caught:
        oc.project(fails_on_matrices).init({"a": {"b": _zeros(2), "w": _zeros(4, 2)}})
    notes = " ".join(caught.value.__notes__)
    assert "fails_on_matrices on 'a/w' of shape (4, 2)" in notes


@dataclasses.dataclass
class _NotHashable:
    """A callable object, as a user writes one without thinking of hashes."""

    low: float

    def __call__(self, w: jax.Array) -> jax.Array:
        return jnp.maximum(w, jnp.asarray(self.low, w.dtype))


@dataclasses.dataclass
class _NotHashableConstraint(oc.Constraint):
    low: float = 0.0

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        w = jnp.asarray(w)
        return jnp.maximum(w, jnp.asarray(self.low, w.dtype))


@pytest.mark.parametrize("mine", [_NotHashable(0.5), _NotHashableConstraint(0.5)])
def test_a_callable_need_not_hash(mine):
    params = {"w": jnp.array([-1.0, 2.0], jnp.float32)}
    new = oc.constrain(params, {"w": mine})
    np.testing.assert_array_equal(new["w"], np.array([0.5, 2.0], np.float32))
    tx = oc.project({"w": mine})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates: Any = tx.update(zeros, tx.init(params), params)[0]
    np.testing.assert_array_equal(updates["w"], np.array([1.5, 0.0], np.float32))


# Parameters that lost their paths.


@pytest.mark.parametrize("rules", [oc.max_norm(1.0), {"w": oc.max_norm(1.0)}, {"**": "non_neg"}])
@pytest.mark.parametrize("strict", [True, False])
def test_optax_flatten_around_project_is_an_error(rules, strict):
    tx = optax.flatten(optax.chain(optax.sgd(0.1), oc.project(rules, strict=strict)))
    with pytest.raises(ValueError, match=r"optax\.flatten .*Put project outside it"):
        tx.init({"w": _zeros(2, 3), "b": _zeros(3)})


def test_project_outside_of_optax_flatten():
    params = {"w": jnp.full((2, 3), 5.0, jnp.float32), "b": jnp.full(3, -1.0, jnp.float32)}
    tx = optax.chain(
        optax.flatten(optax.adam(0.1)), oc.project({"w": oc.max_norm(1.0), "b": oc.non_neg()})
    )
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new: Any = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
    np.testing.assert_allclose(np.linalg.norm(new["w"], axis=0), np.ones(3), rtol=1e-5)
    np.testing.assert_array_equal(new["b"], np.zeros(3))


def test_one_vector_as_the_whole_parameters():
    params = jnp.array([3.0, 4.0], jnp.float32)
    tx = optax.chain(optax.sgd(1.0), oc.project(oc.max_norm(1.0)))
    updates, _ = tx.update(jnp.zeros_like(params), tx.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new, [0.6, 0.8], rtol=1e-6)
    assert list(oc.violations(params, "non_neg")) == [""]
    with pytest.raises(ValueError, match=r"'w' matches no leaf: .*one array without a path"):
        oc.project({"w": oc.max_norm(1.0)}).init(params)


def test_leaves_of_the_same_path_are_all_measured():
    params = {"a": {"b": -jnp.ones(4, jnp.float32)}, "a/b": jnp.ones(4, jnp.float32)}
    measured = oc.violations(params, oc.non_neg())
    assert max(float(v) for v in measured.values()) == 2


# Binding happens once a tree.


def test_a_tree_seen_before_is_not_bound_again():
    calls = []

    def is_matrix(path, leaf):
        calls.append(path)
        return leaf.ndim == 2

    tx = oc.project([(is_matrix, oc.max_norm(1.0))])
    params = {"b": _zeros(2), "w": jnp.ones((3, 2), jnp.float32)}
    state = tx.init(params)
    assert calls == ["b", "w"]
    step = jax.jit(tx.update)
    for _ in range(3):
        updates, state = step(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    tx.init(jax.eval_shape(lambda: params))
    assert calls == ["b", "w"]
    tx.init({"b": _zeros(2), "w": _zeros(4, 2)})
    assert calls == ["b", "w"] * 2
    tx.init({"b": _zeros(2), "v": _zeros(3, 2)})
    assert calls == ["b", "w"] * 2 + ["b", "v"]


@pytest.mark.parametrize("leaves", [4, 5, 6])
def test_paths_that_are_not_shown_are_counted(leaves):
    params = {f"layer{i}": {"bias": jnp.ones(2)} for i in range(leaves)}
    with pytest.raises(ValueError, match="The closest paths are") as error:
        oc.project({"kernel": oc.non_neg()}).init(params)
    assert ("more. Write" in str(error.value)) == (leaves > 5)
    assert leaves <= 5 or "and 1 more" in str(error.value)


def test_constraints_of_ones_own_are_tried_once_for_each_shape():
    tried = []

    class Own(oc.Constraint):
        def __call__(self, w, /):
            return jnp.asarray(w)

        def at(self, step):
            tried.append(step)
            return self

    oc.project(Own()).init({"a": _zeros(3), "b": _zeros(3), "c": _zeros(2, 3)})
    before = len(tried)
    oc.project(Own()).init({"a": _zeros(3), "b": _zeros(4), "c": _zeros(2, 3)})
    assert len(tried) == 2 * before + 1


@pytest.mark.parametrize("attribute", ["shape", "dtype"])
def test_leaves_that_only_look_like_arrays(attribute):
    params = {"kernel": _zeros(3), "odd": types.SimpleNamespace(**{attribute: ()})}
    assert set(assigned({"kernel": "non_neg"}, params)) == {"kernel"}
    with pytest.raises(TypeError, match=r"'odd' \(SimpleNamespace\), and only floating-point"):
        oc.project({"odd": "non_neg"}).init(params)


def test_the_trees_that_a_binder_remembers_are_few():
    bind = _rules.Binder({"w": oc.non_neg()})
    for n in range(40):
        bind({"w": jnp.zeros(n)})
        bind({"w": jnp.zeros(3)})  # in use, so that it stays
    assert len(bind._cache) == _rules._REMEMBERED_TREES
    last = bind({"w": jnp.zeros(3)})
    assert bind({"w": jnp.ones(3)}) is last


class _WithTable(eqx.Module):
    """A module with an array that is no parameter, and that Python cannot compare."""

    weight: jax.Array
    table: np.ndarray = eqx.field(static=True)


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_a_module_with_a_static_array_binds():
    tx = oc.project({"weight": oc.non_neg()})
    models = [_WithTable(-jnp.ones(2), np.arange(n)) for n in (2, 2, 3)]
    for model in models:
        state = tx.init(model)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, model), state, model)
            np.testing.assert_array_equal(updates.weight, 1)


def test_a_predicate_decides_once_for_trees_of_the_same_shapes():
    tx = oc.project([(lambda path, leaf: leaf.min() < 0, oc.non_neg())])
    params = {"w": -jnp.ones(2)}
    state = tx.init(params)
    # Neither the values of a step nor those that JAX traces are asked.
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update({"w": -jnp.ones(2)}, state, {"w": jnp.ones(2)})
        np.testing.assert_array_equal(updates["w"], -1)


def test_numpy_float64_is_what_jax_makes_of_it(recwarn):
    kinds = []

    def mine(w):
        kinds.append((w.shape, w.dtype))
        return jnp.minimum(w, 0)

    oc.constrain({"w": np.ones(3)}, {"w": mine})
    assert set(kinds) == {((3,), jnp.result_type(float))}
    assert not recwarn.list
