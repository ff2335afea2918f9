"""Identifiers and configs: `get`, `serialize`, `deserialize`, `register`."""

import copy
import dataclasses
import functools
import importlib
import json
import os
import re
import sys
import types

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from cases import CASES
from keras.src.legacy.saving import json_utils

import optax_constraints as oc
from optax_constraints import _constraint

NAMES = {
    "Constraint": oc.Constraint,
    "constraint": oc.Constraint,
    "MaxNorm": oc.MaxNorm,
    "max_norm": oc.MaxNorm,
    "MinMaxNorm": oc.MinMaxNorm,
    "min_max_norm": oc.MinMaxNorm,
    "NonNeg": oc.NonNeg,
    "non_neg": oc.NonNeg,
    "UnitNorm": oc.UnitNorm,
    "unit_norm": oc.UnitNorm,
}

# What both libraries make, by class name and arguments.
TWINS = {
    "Constraint": ("Constraint", {}),
    "MaxNorm": ("MaxNorm", {}),
    "MaxNorm-float": ("MaxNorm", {"max_value": 0.75, "axis": 1}),
    "MaxNorm-list": ("MaxNorm", {"max_value": 1.5, "axis": [0, 1]}),
    "MaxNorm-None": ("MaxNorm", {"max_value": 3, "axis": None}),
    "MaxNorm-numpy": ("MaxNorm", {"max_value": np.float32(0.3), "axis": np.int64(-1)}),
    "MinMaxNorm": ("MinMaxNorm", {}),
    "MinMaxNorm-all": (
        "MinMaxNorm",
        {"min_value": 0.5, "max_value": 2.0, "rate": 0.25, "axis": [0, 1]},
    ),
    "MinMaxNorm-numpy": ("MinMaxNorm", {"min_value": np.float32(0.5), "rate": np.float32(0.7)}),
    "UnitNorm": ("UnitNorm", {}),
    "UnitNorm-last": ("UnitNorm", {"axis": -1}),
    "UnitNorm-list": ("UnitNorm", {"axis": [0, 1, 2]}),
    "NonNeg": ("NonNeg", {}),
}

W = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)


pytestmark = pytest.mark.usefixtures("registry")


def through_json(config):
    return json.loads(json.dumps(config, allow_nan=False))


class Shifted(oc.Constraint):
    """A user's class that needs an argument."""

    def __init__(self, by):
        self.by = by

    def __call__(self, w):
        return jnp.asarray(w) + self.by

    def get_config(self):
        return {"by": self.by}


def halve(w):
    return w / 2


# get.


@pytest.mark.parametrize("name", NAMES)
def test_get_knows_the_names_that_keras_knows(name):
    constraint = oc.get(name)
    assert type(constraint) is NAMES[name]
    assert type(keras.constraints.get(name)).__name__ == type(constraint).__name__
    if dataclasses.is_dataclass(constraint):
        assert constraint == NAMES[name]()


def test_no_other_names_are_written_as_those_of_keras(registry):
    modules = {name: _constraint.own_classes[cls] for name, cls in registry.items()}
    assert {name for name, module in modules.items() if module == "keras.constraints"} == set(NAMES)


@pytest.mark.parametrize("alias", [name for name in NAMES if name.islower()])
def test_aliases_are_the_same_object(alias):
    if alias != "constraint":  # The base class has the alias as a name only, as in Keras.
        assert getattr(oc, alias) is NAMES[alias]


def test_get_of_none_is_none():
    assert oc.get(None) is None


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "MinMaxNorm", "config": {"max_value": 3.0, "axis": [0, 1]}},
        {"class_name": "min_max_norm", "config": {"max_value": 3.0, "axis": [0, 1]}},
        types.MappingProxyType(
            {"class_name": "MinMaxNorm", "config": {"max_value": 3.0, "axis": (0, 1)}}
        ),
        {
            "module": "keras.constraints",
            "class_name": "MinMaxNorm",
            "config": {"min_value": 0.0, "max_value": 3.0, "rate": 1.0, "axis": [0, 1]},
            "registered_name": None,
        },
    ],
    ids=["short", "alias", "proxy", "long"],
)
def test_get_reads_configs(config):
    assert oc.get(config) == oc.min_max_norm(max_value=3.0, axis=(0, 1))
    assert oc.deserialize(config) == oc.get(config)


@pytest.mark.parametrize("config", [{}, {"config": {}}, {"config": None}])
def test_a_config_may_leave_out_its_arguments(config):
    assert oc.get({"class_name": "MaxNorm", **config}) == oc.MaxNorm()


@pytest.mark.parametrize("cls", [cls for name, cls in NAMES.items() if name[0].isupper()])
def test_get_calls_a_class(cls):
    assert type(oc.get(cls)) is cls


@pytest.mark.parametrize(
    "thing", [oc.max_norm(3.0), Shifted(1.0), halve, abs, functools.partial(jnp.clip, min=0)]
)
def test_get_returns_other_callables_as_they_are(thing):
    assert oc.get(thing) is thing


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_nrom", r"'max_nrom'\. Did you mean 'max_norm' or .*register"),
        ("unitnorm", r"'unitnorm'\. Did you mean .*'unit_norm'"),
        ("non_negative", r"'non_negative'\. Did you mean .*'non_neg'"),
        ("qqqq", r"'qqqq'\. Known names are affine, .*box, .*max_norm, .*unit_norm.*\. .*register"),
        ("", r"''\. Known names are "),
        ("builtins.abs", r"Could not interpret constraint identifier: 'builtins.abs'"),
        ("optax_constraints.MaxNorm", r"identifier: 'optax_constraints.MaxNorm'\. .*register"),
    ],
)
def test_an_unknown_name_lists_the_closest(name, message):
    for read in (oc.get, oc.deserialize, lambda name: oc.get({"class_name": name, "config": {}})):
        with pytest.raises(ValueError, match=message):
            read(name)


@pytest.mark.parametrize(
    "thing", [3, 2.5, True, {1, 2}, [oc.max_norm(1.0)], (1, 2), b"max_norm", W], ids=repr
)
def test_get_refuses_what_is_no_identifier(thing):
    message = f"Could not interpret constraint identifier: {thing!r}. Write a constraint such as"
    with pytest.raises(ValueError, match=re.escape(message)):
        oc.get(thing)


def test_get_refuses_a_class_of_something_else():
    with pytest.raises(ValueError, match=r"<class 'int'>\. Write a constraint such as max_norm"):
        oc.get(int)


def test_get_refuses_a_class_that_needs_arguments():
    message = r"'by'\. Write an instance, such as Shifted\(\.\.\.\)\."
    with pytest.raises(ValueError, match=message):
        oc.get(Shifted)
    oc.register(Shifted)
    with pytest.raises(ValueError, match=r"identifier: 'Shifted': .*" + message):
        oc.get("Shifted")


@pytest.mark.parametrize("config", [{}, {"kernel": "max_norm"}, {"class_name": None}], ids=str)
def test_get_refuses_a_mapping_that_is_no_config(config):
    with pytest.raises(ValueError, match=r"has no key 'class_name'\. Rules by pattern go to"):
        oc.get(config)


# The forms of Keras.


@pytest.mark.parametrize("twin", TWINS)
def test_configs_are_those_of_keras(twin):
    name, arguments = TWINS[twin]
    ours = getattr(oc, name)(**arguments)
    theirs = getattr(keras.constraints, name)(**arguments)

    config = keras.constraints.serialize(theirs)
    assert oc.serialize(ours) == config
    assert json.dumps(oc.serialize(ours)) == json.dumps(config)

    loaded_here = oc.deserialize(through_json(config))
    loaded_there = keras.constraints.deserialize(through_json(oc.serialize(ours)))
    assert type(loaded_here) is type(ours)
    assert type(loaded_there) is type(theirs)
    assert loaded_there.get_config() == through_json(config)["config"]
    np.testing.assert_array_equal(loaded_here(W), ours(W))
    np.testing.assert_array_equal(loaded_there(W), theirs(W))
    # Units here have norms around 2, and Keras' epsilon is 1e-7.
    np.testing.assert_allclose(loaded_here(W), loaded_there(W), rtol=1e-6)


@pytest.mark.parametrize("name", ["MaxNorm", "MinMaxNorm", "UnitNorm"])
def test_a_tuple_axis_survives_the_way_from_and_to_keras(name):
    ours = getattr(oc, name)(axis=(0, 1))
    theirs = getattr(keras.constraints, name)(axis=(0, 1))

    config = keras.constraints.serialize(theirs)
    assert oc.deserialize(config) == ours
    assert through_json(oc.serialize(ours)) == through_json(config)
    # Keras' legacy JSON marks tuples.
    marked = json_utils.Encoder().encode(config)
    assert "__tuple__" in marked
    assert oc.deserialize(json.loads(marked)) == ours
    there = keras.constraints.deserialize(oc.serialize(ours))
    np.testing.assert_array_equal(there(W), theirs(W))


UNKNOWN_TO_KERAS = {
    "fan_in": lambda: oc.max_norm(1.0, axis="fan_in"),
    "text": lambda: oc.max_norm("2x init"),
    "text in one of two": lambda: oc.min_max_norm(0.0, "init"),
    "infinity": lambda: oc.max_norm(np.inf),
    "axis_name": lambda: oc.unit_norm(axis_name="data"),
}


@pytest.mark.parametrize("name", UNKNOWN_TO_KERAS)
def test_what_keras_does_not_know_it_refuses_when_it_loads(name):
    ours = UNKNOWN_TO_KERAS[name]()
    config = through_json(oc.serialize(ours))
    assert (config["module"], config["registered_name"]) == ("optax_constraints", None)
    assert oc.deserialize(config) == ours
    layer = keras.layers.Dense(3).get_config() | {"kernel_constraint": config}
    for load in (
        lambda: keras.constraints.deserialize(config),
        lambda: keras.constraints.get(config),
        lambda: keras.layers.Dense.from_config(layer),
    ):
        with pytest.raises(TypeError, match=r"(?s)Norm'> could not be .*axis_name"):
            load()


# Strict JSON.


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_set_is_strict_json(case):
    config = json.dumps(oc.serialize({"w": case.constraint}), allow_nan=False)
    (loaded,) = oc.deserialize(json.loads(config)).values()
    assert type(loaded) is type(case.constraint)
    w = jnp.asarray(np.random.default_rng(0).normal(size=case.shape), jnp.float32)
    np.testing.assert_array_equal(jax.jit(loaded)(w), jax.jit(case.constraint)(w))


@dataclasses.dataclass(frozen=True, eq=False)
class Settings(oc.Constraint):
    """A user's class with numbers in places of its own, and text that only looks like one."""

    table: dict
    order: str = "inf"

    def __call__(self, w, /):
        return jnp.asarray(w)

    def get_config(self):
        return {"table": self.table, "order": self.order}


def test_numbers_that_json_does_not_have_are_text():
    config = oc.serialize(oc.box(-np.inf, np.array([1.0, np.inf])))
    assert config["config"] == {"lower": "-Infinity", "upper": [1.0, "Infinity"]}
    loaded = oc.deserialize(through_json(config))
    assert loaded.lower == -np.inf
    np.testing.assert_array_equal(loaded.upper, [1, np.inf])
    assert oc.box(0.0, np.inf).get_config() == {"lower": 0.0, "upper": np.inf}
    # Also inside other constraints, and as Keras and older versions write them.
    stack = oc.stacked(oc.soft(oc.box(0.0, np.inf), 0.5))
    assert oc.deserialize(through_json(oc.serialize(stack))) == stack
    assert oc.get({"class_name": "Box", "config": {"upper": np.inf}}).upper == np.inf
    there = keras.constraints.serialize(keras.constraints.MaxNorm(np.inf))
    assert oc.deserialize(there).max_value == np.inf


def test_a_users_class_may_have_such_numbers_anywhere():
    oc.register(Settings)
    own = Settings({"low": -np.inf, "rows": [np.nan, (1.0, np.inf)]})
    config = through_json(oc.serialize(own))
    assert config["config"] == {
        "table": {"low": "-Infinity", "rows": ["NaN", [1.0, "Infinity"]]},
        "order": "inf",
    }
    loaded = oc.deserialize(config)
    assert loaded.order == "inf"
    assert loaded.table["low"] == -np.inf
    np.testing.assert_array_equal(loaded.table["rows"][0], np.nan)
    assert loaded.table["rows"][1] == [1.0, np.inf]


@pytest.mark.parametrize("text", ["Infinity", "NaN", "infinity"])
def test_such_text_is_checked_like_the_number(text):
    with pytest.raises((TypeError, ValueError), match="rate="):
        oc.get({"class_name": "MinMaxNorm", "config": {"rate": text}})


def test_a_jax_number_in_a_keras_config_loads():
    config = keras.constraints.serialize(keras.constraints.MaxNorm(jnp.float32(1.5)))
    loaded = oc.deserialize(through_json(config))
    np.testing.assert_array_equal(loaded(W), oc.max_norm(1.5)(W))


@pytest.mark.parametrize(
    "items", [{}, {"items": 5}, {"items": None}, {"items": "01"}], ids=["none", "5", "null", "str"]
)
def test_a_malformed_tuple_is_refused(items):
    config = {"class_name": "MaxNorm", "config": {"axis": {"class_name": "__tuple__", **items}}}
    with pytest.raises((TypeError, ValueError), match=r"axis="):
        oc.deserialize(config)


def test_numbers_of_jax_become_plain():
    config = oc.serialize(oc.min_max_norm(jnp.int32(1), jnp.bfloat16(2), np.float16(0.5)))
    assert config["config"] == {"min_value": 1, "max_value": 2.0, "rate": 0.5, "axis": 0}
    assert [type(value) for value in config["config"].values()] == [int, float, float, int]


def test_names_and_classes_serialise_like_instances():
    config = oc.serialize(oc.MaxNorm())
    for thing in (oc.MaxNorm, "max_norm", "MaxNorm", config, {"class_name": "MaxNorm"}):
        assert oc.serialize(thing) == config
    assert oc.serialize(None) is None
    assert oc.deserialize(None) is None


def test_fan_in_survives():
    assert oc.deserialize(through_json(oc.serialize(oc.max_norm(axis="fan_in")))) == oc.max_norm(
        axis="fan_in"
    )


# Round trips of rules.


def same_rules(a, b):
    """Whether two rules are the same, with lists and tuples alike and patterns by value."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same_rules(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(
            pattern == other and same_rules(value, other_value)
            for (pattern, value), (other, other_value) in zip(a, b, strict=True)
        )
    return a == b


RULES = {
    "mapping": {"kernel": oc.max_norm(0.5, axis=[0]), "bias": oc.non_neg()},
    "order": {"b": oc.non_neg(), "a": oc.unit_norm(), "c": None},
    "none": {"Dense_0/kernel": None, "kernel": oc.unit_norm()},
    "nested": {"Dense_0": {"kernel": oc.max_norm(0.5), "bias": None}, "bias": oc.non_neg()},
    "nested-twice": {"a": {"b": {"c": oc.min_max_norm(0.5, 0.75, rate=0.5)}}},
    "pairs": [("Dense_0/*", oc.max_norm(0.5)), ("**", None)],
    "regex": [(re.compile(r".*/KERNEL", re.IGNORECASE), oc.max_norm(0.5)), ("bias", None)],
    "verbose": [(re.compile(r".* / kernel  # all", re.VERBOSE | re.ASCII), oc.unit_norm())],
    "nothing": {},
    "no pairs": [],
}


@pytest.mark.parametrize("name", RULES)
def test_rules_survive_json(name):
    rules = RULES[name]
    again = oc.deserialize(through_json(oc.serialize(rules)))
    assert same_rules(again, rules)


def test_the_flags_of_a_pattern_survive():
    pattern = re.compile(r".*/KERNEL", re.IGNORECASE | re.VERBOSE)
    config = through_json(oc.serialize([(pattern, None)]))
    ((again, _),) = oc.deserialize(config)
    assert (again.pattern, again.flags) == (pattern.pattern, pattern.flags)
    assert again.fullmatch("Dense_0/kernel")


def test_patterns_as_keys_become_pairs():
    pattern = re.compile("b.*")
    rules = {"a": "max_norm", pattern: None}
    assert oc.deserialize(through_json(oc.serialize(rules))) == [
        ("a", oc.MaxNorm()),
        (pattern, None),
    ]


def test_names_in_rules():
    rules = {"kernel": "max_norm", "bias": {"class_name": "NonNeg"}, "scale": oc.UnitNorm}
    again = oc.deserialize(through_json(oc.serialize(rules)))
    assert again == {"kernel": oc.MaxNorm(), "bias": oc.NonNeg(), "scale": oc.UnitNorm()}
    # A hand-written config may hold the names themselves.
    assert oc.deserialize({"kernel": "max_norm", "bias": None}) == {
        "kernel": oc.MaxNorm(),
        "bias": None,
    }
    assert oc.deserialize([["kernel", "max_norm"]]) == [("kernel", oc.MaxNorm())]
    assert oc.deserialize("max_norm") == oc.MaxNorm()


@pytest.mark.parametrize("name", ["mapping", "none", "nested", "pairs", "regex"])
def test_loaded_rules_do_the_same(name):
    rules = RULES[name]
    rng = np.random.default_rng(1)
    params = {
        "Dense_0": {"kernel": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)},
        "Dense_1": {"kernel": rng.normal(size=(3, 2)), "bias": rng.normal(size=2)},
    }
    params = jax.tree.map(jnp.float32, params)
    wanted = oc.constrain(params, rules)
    got = oc.constrain(params, oc.deserialize(through_json(oc.serialize(rules))))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), wanted, params)
    assert any(jax.tree.leaves(changed))


# Configs from anywhere.


@pytest.mark.parametrize("form", ["class", "dotted", "function", "registered", "bare", "rules"])
def test_a_config_imports_nothing(form, tmp_path, monkeypatch):
    name = f"never_imported_{form}"
    (tmp_path / f"{name}.py").write_text(
        "import builtins\n"
        f"builtins.{name} = True\n"
        "class Evil:\n"
        "    def __call__(self, w):\n"
        "        return w\n"
        "def evil(w):\n"
        "    return w\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    config = {
        "class": {"module": name, "class_name": "Evil", "config": {}, "registered_name": None},
        "dotted": {"class_name": f"{name}.Evil", "config": {}},
        "function": {
            "module": name,
            "class_name": "function",
            "config": "evil",
            "registered_name": "evil",
        },
        "registered": {
            "module": name,
            "class_name": "Evil",
            "config": {},
            "registered_name": f"{name}>Evil",
        },
        "bare": f"{name}.Evil",
        "rules": {"kernel": {"module": name, "class_name": "Evil", "config": {}}},
    }[form]

    with pytest.raises(ValueError, match=r"Could not interpret constraint identifier.*register"):
        oc.deserialize(config)
    assert name not in sys.modules
    assert not hasattr(sys.modules["builtins"], name)

    # It was there to be imported.
    module = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    assert callable(module.Evil())
    monkeypatch.delattr("builtins." + name)


def test_the_module_of_a_config_does_not_count():
    config = {"module": "os", "class_name": "MaxNorm", "config": {"max_value": 3.0}}
    assert oc.deserialize(config) == oc.max_norm(3.0)


@pytest.mark.parametrize(
    "config",
    [
        {"class_name": "os.system", "config": {"command": "exit 3"}},
        {"module": "os", "class_name": "system", "config": {"command": "exit 3"}},
        {"module": "os", "class_name": "function", "config": "system", "registered_name": "system"},
        {"module": "builtins", "class_name": "function", "config": "eval"},
        {"class_name": "__lambda__", "config": {"value": ["4wAAAAA=", None, None]}},
        {"class_name": "__tensor__", "config": {"value": 1.0, "dtype": "float32"}},
        {"class_name": "__numpy__", "config": {"value": [1.0], "dtype": "float32"}},
        {"class_name": "__tuple__", "items": [1, 2]},
        {"class_name": "__class__", "config": {}},
        {"class_name": "FunctionConstraint", "config": {"function": "abs"}},
        {"module": "keras.layers", "class_name": "Lambda", "config": {}},
        {"module": "keras.layers", "class_name": "Dense", "config": {"units": 3}},
    ],
    ids=lambda config: f"{config.get('module')}-{config['class_name']}",
)
def test_only_registered_names_load(config):
    for read in (oc.get, oc.deserialize, lambda config: oc.deserialize({"kernel": config})):
        with pytest.raises(ValueError, match="Could not interpret constraint identifier"):
            read(config)


@pytest.mark.parametrize("name", ["max_norm", "MaxNorm", "Constraint"])
def test_a_class_is_no_function(name):
    """A class in place of a function would be called with the weights as its bound."""
    try:
        loaded = oc.deserialize({"class_name": "function", "config": name})
    except (TypeError, ValueError) as error:
        assert re.search(name, str(error))  # noqa: PT017  # an instance would be fine as well
    else:
        assert isinstance(loaded, oc.Constraint)


@pytest.mark.parametrize("value", [3, 1.5, True, ["MaxNorm"], {"a": 1}], ids=repr)
@pytest.mark.parametrize("key", ["class_name", "registered_name"])
def test_names_in_a_config_are_strings(key, value):
    config = {"class_name": "MaxNorm", "config": {}, key: value}
    with pytest.raises(TypeError, match=rf"The config .*{re.escape(repr(value))}.* not a string"):
        oc.deserialize(config)


@pytest.mark.parametrize("arguments", ["abc", 3, 2.0, [2.0], [["max_value", 2.0]], True], ids=repr)
def test_the_arguments_of_a_config_are_a_mapping(arguments):
    message = rf"MaxNorm: config={re.escape(repr(arguments))} is not a mapping of arguments"
    with pytest.raises(TypeError, match=message):
        oc.deserialize({"class_name": "MaxNorm", "config": arguments})


def test_the_arguments_of_a_config_have_names():
    with pytest.raises(TypeError, match=r"MaxNorm: config=\{1: 2\} is not a mapping of arguments"):
        oc.deserialize({"class_name": "MaxNorm", "config": {1: 2}})


@pytest.mark.parametrize("name", [None, 3, ["MaxNorm"]], ids=repr)
def test_a_function_config_names_it(name):
    with pytest.raises(TypeError, match="names no registered function"):
        oc.deserialize({"class_name": "function", "config": name})


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("MaxNorm", {"max": 2.0}, "max_value, axis, axis_name"),
        ("MaxNorm", {"max_value": 2.0, "rate": 1.0}, "max_value, axis, axis_name"),
        ("MinMaxNorm", {"low": 1}, "min_value, max_value, rate, axis, axis_name"),
        ("UnitNorm", {"max_value": 2.0}, "axis, axis_name"),
        ("NonNeg", {"axis": 0}, "none"),
    ],
)
def test_wrong_arguments_list_the_right_ones(name, arguments, wanted):
    wrong = [key for key in arguments if key not in wanted][-1:] or list(arguments)
    message = rf"{name}: the config .*{wrong[0]}.* Its arguments are: {wanted}\."
    with pytest.raises(ValueError, match=message):
        oc.deserialize({"class_name": name, "config": arguments})


def test_missing_arguments_list_the_right_ones():
    oc.register(Shifted)
    with pytest.raises(ValueError, match=r"Shifted: .*'by'\. Its arguments are: by\."):
        oc.deserialize({"class_name": "Shifted", "config": {}})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_value": "two"}, ValueError, "max_value='two' is not a number"),
        ({"max_value": None}, TypeError, "max_value=None is not a number"),
        ({"max_value": True}, TypeError, "max_value=True is not a number"),
        ({"max_value": [2.0]}, TypeError, r"max_value=\[2.0\] is not a number"),
        ({"max_value": {"class_name": "MaxNorm"}}, TypeError, "max_value={.*} is not a number"),
        ({"max_value": -1}, ValueError, "max_value=-1 is not allowed; write a number at least 0"),
        ({"max_value": float("nan")}, ValueError, "max_value=nan is not allowed"),
        ({"max_value": 10**400}, ValueError, "max_value=1000.* is too large for a float"),
        ({"max_value": -(10**400)}, ValueError, "max_value=-1000.* is too large for a float"),
        ({"axis": "0"}, ValueError, "axis='0' is not known; write an int"),
        ({"axis": 1.5}, TypeError, "axis=1.5 is not an axis; write an int"),
        ({"axis": True}, TypeError, "axis=True is not an axis; write an int"),
        ({"axis": {}}, TypeError, "axis={} is not an axis; write an int"),
        ({"axis": [[0]]}, TypeError, r"axis=\[0\] is not an axis; write an int"),
        ({"axis": [0, 0]}, ValueError, r"axis=\[0, 0\] names an axis twice"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_bad_values_are_refused(arguments, error, message):
    with pytest.raises(error, match="MaxNorm: " + message):
        oc.deserialize({"class_name": "MaxNorm", "config": arguments})


def test_a_number_too_long_to_print_is_refused():
    config = {"class_name": "MaxNorm", "config": {"max_value": 10**5000}}
    with pytest.raises(ValueError, match=r"MaxNorm: max_value=.* is too large for a float"):
        oc.deserialize(config)


def test_an_axis_of_any_size_is_refused_on_the_weights():
    constraint = oc.deserialize({"class_name": "MaxNorm", "config": {"axis": 10**400}})
    with pytest.raises(ValueError, match=r"axis 1000.* is out of range; this leaf has the axes -3"):
        constraint(W)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (3, "3 is not the config of a constraint or of rules"),
        (2.5, "2.5 is not the config"),
        ({1: None}, "has strings as keys, not 1"),
        ([3], "3 is not a pair"),
        (["ab"], "'ab' is not a pair"),
        ([["kernel"]], r"\['kernel'\] is not a pair"),
        ([["kernel", None, None]], "is not a pair"),
        ([[3, None]], "3 is not a pattern; write a string"),
        ([[None, None]], "None is not a pattern; write a string"),
    ],
    ids=repr,
)
def test_what_is_no_config_of_rules_is_refused(config, message):
    with pytest.raises(TypeError, match=message):
        oc.deserialize(config)


@pytest.mark.parametrize(
    "pattern",
    [
        {},
        {"flags": 0},
        {"regex": "("},
        {"regex": 3},
        {"regex": ["a"]},
        {"regex": "a", "flags": "i"},
        {"regex": "a", "flags": None},
        {"regex": "a", "flags": 10**400},
        {"regex": "a", "flags": int(re.LOCALE)},
        {"regex": "a{99999999999999999999}"},
        {"regex": "(" * 10_000 + ")" * 10_000},
    ],
    ids=lambda pattern: repr(pattern)[:40],
)
def test_a_bad_pattern_is_refused(pattern):
    with pytest.raises(ValueError, match=r"is not a pattern; write a string, or \{'regex'"):
        oc.deserialize([[pattern, None]])


def test_a_pattern_prints_nothing(capfd):
    try:
        oc.deserialize([[{"regex": "a", "flags": int(re.DEBUG)}, None]])
    except ValueError as error:
        assert "is not a pattern" in str(error)  # noqa: PT017  # dropping the flag would do
    assert capfd.readouterr() == ("", "")


def nested(kind, depth=10_000):
    value = None
    for _ in range(depth):
        value = {"dict": {"a": value}, "list": [value], "pairs": [["a", value]]}[kind]
    return value


@pytest.mark.parametrize("kind", ["dict", "list", "pairs"])
@pytest.mark.parametrize(
    "place",
    {
        "rules": lambda deep: deep,
        "rule": lambda deep: {"kernel": deep},
        "class_name": lambda deep: {"class_name": deep},
        "registered_name": lambda deep: {"class_name": "MaxNorm", "registered_name": deep},
        "config": lambda deep: {"class_name": "MaxNorm", "config": deep},
        "function": lambda deep: {"class_name": "function", "config": deep},
        "unknown": lambda deep: {"class_name": "MaxNorm", "config": {"zzz": deep}},
        "max_value": lambda deep: {"class_name": "MaxNorm", "config": {"max_value": deep}},
        "axis": lambda deep: {"class_name": "MaxNorm", "config": {"axis": deep}},
        "rate": lambda deep: {"class_name": "MinMaxNorm", "config": {"rate": deep}},
        "items": lambda deep: {
            "class_name": "MaxNorm",
            "config": {"axis": {"class_name": "__tuple__", "items": deep}},
        },
        "pattern": lambda deep: [[deep, None]],
        "regex": lambda deep: [[{"regex": deep}, None]],
        "flags": lambda deep: [[{"regex": "a", "flags": deep}, None]],
    }.items(),
    ids=lambda place: place[0],
)
def test_deep_nesting_is_refused(place, kind):
    config = place[1](nested(kind))
    message = None
    try:
        oc.deserialize(config)
    except (TypeError, ValueError) as error:
        message = str(error)
    except RecursionError:
        pass
    assert message is not None, "neither a TypeError nor a ValueError"
    assert re.search(r"nested|is not a|not fit|no registered", message)


def test_nested_rules_may_be_as_deep_as_a_model():
    rules = oc.non_neg()
    for _ in range(20):
        rules = {"block": rules}
    assert oc.deserialize(through_json(oc.serialize(rules))) == rules


# What has no JSON form.


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (oc.max_norm(lambda step: 1.0), "MaxNorm.max_value is a schedule, which has no JSON form"),
        (oc.max_norm(optax.constant_schedule(1.0)), "MaxNorm.max_value is a schedule"),
        (oc.min_max_norm(rate=lambda step: 1.0), "MinMaxNorm.rate is a schedule"),
        (lambda w: w, "<lambda>.* has no JSON form.*register"),
        (halve, "halve.* has no JSON form.*register"),
        (abs, "abs.* has no JSON form.*register"),
        (functools.partial(jnp.clip, min=0), "partial.* has no JSON form.*register"),
        (Shifted(1.0), "Shifted.* has no JSON form.*register"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_has_no_json_form_says_so(thing, message):
    for given in (thing, {"kernel": thing}, {"a": {"b": thing}}, [("kernel", thing)]):
        with pytest.raises(TypeError, match=message):
            oc.serialize(given)


def test_a_traced_number_has_no_json_form():
    @jax.jit
    def traced(bound):
        with pytest.raises(
            TypeError, match=r"MaxNorm.max_value is a traced value, .*write a number"
        ):
            oc.serialize(oc.max_norm(bound))
        return bound

    assert traced(1.5) == 1.5


@pytest.mark.parametrize(
    "pattern",
    [lambda path, leaf: True, 3, None, re.compile(b"kernel")],
    ids=["predicate", "int", "None", "bytes"],
)
def test_a_pattern_without_json_form_says_so(pattern):
    message = f"The pattern {re.escape(repr(pattern))} has no JSON form; write a string or a"
    with pytest.raises(TypeError, match=message):
        oc.serialize([(pattern, oc.max_norm(1.0))])
    with pytest.raises(TypeError, match=message):
        oc.serialize({"bias": None, pattern: oc.max_norm(1.0)})


def test_a_subclass_is_not_written_as_its_base():
    class Tight(oc.MaxNorm):
        pass

    with pytest.raises(TypeError, match=r"Tight\(.* has no JSON form.*register"):
        oc.serialize(Tight(1.0))
    oc.register(Tight)
    again = oc.deserialize(through_json(oc.serialize(Tight(1.5, axis=1))))
    assert again == Tight(1.5, axis=1)
    assert type(again) is Tight


def test_a_field_without_json_form_says_so():
    @oc.register
    @dataclasses.dataclass(frozen=True, eq=False)
    class Holds(oc.Constraint):
        thing: object = None

    with pytest.raises(TypeError, match=r"Holds.thing=.*object.* has no JSON form.*get_config"):
        oc.serialize(Holds(object()))


@pytest.mark.parametrize("pair", [3, "kernel", ("kernel",), ("kernel", None, None)], ids=repr)
def test_serialize_names_what_is_no_pair(pair):
    with pytest.raises(TypeError, match=re.escape(repr(pair))):
        oc.serialize([pair])


# register.


def test_register_decorates_a_class():
    @oc.register
    class Own(Shifted):
        pass

    assert isinstance(Own, type)
    config = oc.serialize(Own(2.0))
    assert config == {
        "module": "optax_constraints",
        "class_name": "Own",
        "config": {"by": 2.0},
        "registered_name": "Own",
    }
    again = oc.deserialize(through_json(config))
    assert type(again) is Own
    assert again.by == 2.0


def test_register_decorates_a_class_under_a_name():
    @oc.register(name="mine>Own")
    class Own(oc.Constraint):
        pass

    assert type(oc.get("mine>Own")) is Own
    assert oc.serialize(Own())["registered_name"] == "mine>Own"
    assert type(oc.deserialize(through_json(oc.serialize(Own())))) is Own
    with pytest.raises(ValueError, match=r"identifier: 'Own'.*Did you mean 'mine>Own'"):
        oc.get("Own")


@pytest.mark.parametrize("name", [None, "half"])
def test_register_takes_functions(name):
    registered = oc.register(halve, name=name)
    known = name or "halve"
    assert registered is halve
    assert oc.get(known) is halve
    config = oc.serialize({"kernel": halve})
    assert config["kernel"]["class_name"] == "function"
    assert config["kernel"]["registered_name"] == known
    again = oc.deserialize(through_json(config))
    assert again == {"kernel": halve}


def test_a_lambda_needs_a_name():
    with pytest.raises(TypeError, match=r"A lambda has no name; write register\(.*name='...'\)"):
        oc.register(lambda w: w)
    identity = oc.register(lambda w: w, name="identity")
    assert oc.get("identity") is identity


@pytest.mark.parametrize(
    "thing",
    [oc.max_norm(1.0), Shifted(1.0), int, 3, "MaxNorm", functools.partial(abs), abs],
    ids=lambda thing: type(thing).__name__,
)
def test_register_refuses_what_is_no_class_or_function(thing):
    message = f"register takes a subclass of Constraint or a function, not {re.escape(repr(thing))}"
    with pytest.raises(TypeError, match=message):
        oc.register(thing)
    with pytest.raises(TypeError, match=message):
        oc.register(thing, name="thing")


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_the_library_are_taken(name):
    before = oc.get(name)
    with pytest.raises(ValueError, match=rf"The name '{name}' is taken by .*name=\.\.\."):
        oc.register(Shifted, name=name)
    assert type(oc.get(name)) is type(before)


def test_a_name_cannot_be_registered_twice():
    def clip(w):
        return w

    oc.register(halve, name="own")
    with pytest.raises(ValueError, match="The name 'own' is taken by <function halve"):
        oc.register(clip, name="own")
    assert oc.get("own") is halve


def test_one_definition_may_have_several_names():
    oc.register(Shifted)
    oc.register(Shifted, name="shift")
    for config in (
        {"class_name": "Shifted", "config": {"by": 1.0}},
        {"class_name": "shift", "config": {"by": 1.0}},
        {"class_name": "Other", "registered_name": "shift", "config": {"by": 1.0}},
    ):
        assert type(oc.deserialize(config)) is Shifted


def test_a_cell_that_runs_again_replaces_what_it_registered():
    cell = (
        "@oc.register\n"
        "class Cell(oc.Constraint):\n"
        "    run = {run}\n"
        "@oc.register\n"
        "def cell(w):\n"
        "    return w + {run}\n"
    )
    namespace = {"oc": oc, "__name__": "__main__"}
    for run in (1, 2):
        exec(cell.format(run=run), namespace)
        assert type(oc.get("Cell")) is namespace["Cell"]
        assert oc.get("Cell").run == run
        assert oc.get("cell")(0) == run
        assert type(oc.deserialize(oc.serialize(namespace["Cell"]()))) is namespace["Cell"]

    namespace["__name__"] = "somewhere_else"
    with pytest.raises(ValueError, match="The name 'Cell' is taken"):
        exec(cell.format(run=3), namespace)


def test_a_dataclass_has_a_config_from_its_fields():
    @oc.register
    @dataclasses.dataclass(frozen=True, eq=False)
    class Between(oc.Constraint):
        low: float
        high: float = 1.0

        def __call__(self, w):
            return jnp.clip(jnp.asarray(w), self.low, self.high)

    config = through_json(oc.serialize(Between(np.float64(0.5))))
    assert config["config"] == {"low": 0.5, "high": 1.0}
    assert oc.deserialize(config) == Between(0.5)


def test_a_class_may_read_its_config_itself():
    @oc.register
    class Renamed(Shifted):
        def get_config(self):
            return {"amount": self.by}

        @classmethod
        def from_config(cls, config):
            return cls(config["amount"])

    again = oc.deserialize(through_json(oc.serialize(Renamed(2.0))))
    assert type(again) is Renamed
    assert again.by == 2.0


# Equality and hashing.

EQUAL = [
    (oc.MaxNorm(), oc.MaxNorm(2, axis=0)),
    (oc.MaxNorm(2), oc.MaxNorm(2.0)),
    (oc.MaxNorm(np.float32(2)), oc.MaxNorm(2.0)),
    (oc.MaxNorm(axis=[0, 1]), oc.MaxNorm(axis=(0, 1))),
    (oc.MinMaxNorm(0.5, axis=[0]), oc.MinMaxNorm(0.5, axis=(0,))),
    (oc.UnitNorm(axis=None), oc.UnitNorm(axis=None)),
    (oc.UnitNorm(axis="fan_in"), oc.UnitNorm(axis="fan_in")),
    (oc.NonNeg(), oc.NonNeg()),
]
UNEQUAL = [
    (oc.MaxNorm(1.0), oc.MaxNorm(2.0)),
    (oc.MaxNorm(axis=0), oc.MaxNorm(axis=1)),
    (oc.MaxNorm(axis=0), oc.MaxNorm(axis=(0,))),
    (oc.MaxNorm(axis=(0, 1)), oc.MaxNorm(axis=None)),
    (oc.MinMaxNorm(rate=0.5), oc.MinMaxNorm()),
    (oc.UnitNorm(), oc.MaxNorm(1.0)),
    (oc.NonNeg(), oc.Constraint()),
    (oc.NonNeg(), oc.UnitNorm()),
    (oc.MaxNorm(lambda step: 1.0), oc.MaxNorm(lambda step: 1.0)),
    (oc.MaxNorm(), "MaxNorm"),
    (oc.MaxNorm(), None),
    (Shifted(1.0), Shifted(1.0)),
]


@pytest.mark.parametrize(("a", "b"), EQUAL, ids=lambda c: repr(c))
def test_equal_fields_are_equal(a, b):
    assert a == b
    assert hash(a) == hash(b)
    assert {a: "found"}[b] == "found"


@pytest.mark.parametrize(("a", "b"), UNEQUAL, ids=lambda c: getattr(type(c), "__name__", "c"))
def test_different_fields_are_not_equal(a, b):
    assert a != b
    assert len({a: 1, b: 2}) == 2


@pytest.mark.parametrize("make", [jnp.float32, lambda x: np.array(x, np.float32)])
@pytest.mark.parametrize(
    "kind", [oc.MaxNorm, oc.MinMaxNorm, oc.MaxRMS, oc.FixedNorm, oc.SumTo, oc.Simplex]
)
def test_arrays_count_by_value(kind, make):
    one, same, other = make(0.5), make(0.5), make(0.25)
    assert kind(one) == kind(same)
    assert hash(kind(one)) == hash(kind(same))
    assert {kind(one): "found"}[kind(same)] == "found"
    assert kind(one) != kind(other)
    assert kind(one) != kind(0.5)
    assert kind(one) != kind(np.array(0.5, np.float16))


@pytest.mark.parametrize("kind", [oc.Box, oc.Hyperplane, lambda a: oc.Stacked(oc.Mask(a))])
def test_arrays_of_another_shape_are_not_equal(kind):
    one = kind(np.array([1.0, np.pi]))
    assert one == kind(np.array([1.0, np.pi])) == copy.deepcopy(one)
    assert hash(one) == hash(copy.deepcopy(one))
    assert one != kind(np.array([[1.0, np.pi]]))
    assert one != kind(np.array([1.0, 3.0]))
    assert one != kind(np.array([1.0, np.pi], np.float32))


def test_a_traced_number_equals_itself_only():
    def compared(number, other):
        constraint = oc.max_norm(number)
        assert constraint == oc.max_norm(number)
        assert hash(constraint) == hash(oc.max_norm(number))
        assert constraint != oc.max_norm(other)
        assert constraint != oc.max_norm(jnp.float32(1.0))
        return number

    jax.jit(compared)(1.0, 1.0)


def test_a_subclass_is_not_equal_to_its_base():
    class Tight(oc.MaxNorm):
        pass

    assert Tight(2.0) != oc.MaxNorm(2.0)
    assert oc.MaxNorm(2.0) != Tight(2.0)
    assert Tight(2.0) == Tight(2.0)


def test_a_constraint_is_a_static_argument():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(constraint, w):
        traces.append(constraint)
        return constraint(w)

    first = apply(oc.max_norm(1.0, axis=[0]), W)
    np.testing.assert_array_equal(first, jax.jit(oc.max_norm(1.0, axis=0))(W))
    np.testing.assert_array_equal(first, apply(oc.max_norm(1.0, axis=(0,)), W))
    assert len(traces) == 1
    np.testing.assert_array_equal(apply(oc.max_norm(0.5), W), jax.jit(oc.max_norm(0.5))(W))
    assert len(traces) == 2


def test_constraints_do_not_change():
    constraint = oc.max_norm(1.0)
    with pytest.raises(dataclasses.FrozenInstanceError, match="max_value"):
        constraint.max_value = 2.0  # pyright: ignore[reportAttributeAccessIssue]  # it is frozen
