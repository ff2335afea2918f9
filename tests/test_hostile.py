"""Configs from anywhere: they load, or are refused, and nothing else happens."""

import ast
import builtins
import collections
import contextlib
import importlib
import itertools
import json
import re
import signal
import sys
import types
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import optax_constraints as oc
from optax_constraints import _config, _expressions

LIMIT = 5.0  # seconds of processor time; collecting garbage after thousands of tests takes one
"""Seconds of processor time."""

LONGEST = 500
"""Characters in a pattern of a config."""

pytestmark = pytest.mark.usefixtures("registry")
fuzz = settings(max_examples=500, derandomize=True, deadline=None)

PARAMS = {
    "dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    "square": jnp.eye(3),
}

# What must not happen while a config is read. A hook stays for as long as the process does.
_FORBIDDEN = ("import", "exec", "compile", "open", "marshal.", "pickle.", "ctypes.", "socket.")
_FORBIDDEN += ("os.", "subprocess.", "shutil.", "code.", "function.", "urllib.")
_events: list[str] | None = None


def _is_of_the_parser(frame: types.FrameType) -> bool:
    """Whether ast.parse, which runs nothing, was called from the one place that may."""
    parser = ast.parse.__code__, _expressions._parsed.__wrapped__.__code__
    return frame.f_back is not None and (frame.f_code, frame.f_back.f_code) == parser


def _hook(event: str, arguments: Any) -> None:
    # inspect.signature reads the signatures of built-in classes as syntax trees.
    if event == "compile" and str(arguments[0]).startswith("b'def foo"):
        return
    if event == "compile" and _is_of_the_parser(sys._getframe(1)):
        return
    if _events is not None and event.startswith(_FORBIDDEN):
        _events.append(f"{event} {str(arguments)[:100]}")


sys.addaudithook(_hook)


class _TooLong(BaseException):
    """Not an Exception, so that nothing but `limited` takes it."""


def _too_long(signum: int, frame: Any) -> None:
    raise _TooLong


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Fails after LIMIT seconds of work."""
    before = signal.signal(signal.SIGVTALRM, _too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    except _TooLong:
        raise AssertionError(f"It took more than {LIMIT} s.") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Fails if something is imported, executed, opened or registered."""
    global _events
    modules, names = set(sys.modules), dict(_config._registry)
    original = builtins.__import__

    def import_(name: str, scope: Any = None, *rest: Any, **more: Any) -> Any:
        if (
            str((scope or {}).get("__name__")).startswith("optax_constraints")
            and _events is not None
        ):
            _events.append(f"__import__ {name}")
        return original(name, scope, *rest, **more)

    def import_module(name: str, package: Any = None) -> Any:
        raise AssertionError(f"import_module({name!r})")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "__import__", import_)
        patch.setattr(importlib, "import_module", import_module)
        _events = events = []
        try:
            yield
        finally:
            _events = None
    assert events == []
    assert set(sys.modules) == modules
    assert _config._registry == names


REFUSED = "refused"


def load(config: Any) -> Any:
    """What a config makes, or REFUSED, and never anything else."""
    with watched(), limited():
        try:
            return oc.deserialize(config)
        except (TypeError, ValueError) as error:
            assert len(str(error)) > 10  # noqa: PT017  # a result would be fine as well
            return REFUSED


def bind(rules: Any) -> bool:
    """Whether rules bind to a small tree; if not, they are refused."""
    with limited():
        try:
            oc.project(rules, strict=False).init(PARAMS)
        except (TypeError, ValueError) as error:
            assert len(str(error)) > 10  # noqa: PT017
            return False
    return True


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Loads and binds each set once, so that what JAX imports when first used is there."""
    for name, arguments in _GOOD.items():
        oc.project(oc.deserialize({"class_name": name, "config": arguments})).init(
            jnp.ones((3, 3, 3))
        )
    for relative in (oc.max_norm("2x init"), oc.max_rms("init"), oc.fixed_norm("init", axis=0)):
        oc.project({"kernel": oc.Stacked(relative), "bias": relative}, strict=False).init(PARAMS)


# The watch itself.


@pytest.mark.parametrize(
    "evil",
    [
        lambda: eval("1"),
        lambda: exec("1"),
        lambda: compile("1", "", "eval"),
        lambda: ast.parse("1"),
        lambda: importlib.import_module("os"),
        lambda: __import__("this_module_does_not_exist"),
        lambda: eval("__import__('os')", {"__name__": "optax_constraints._constraint"}),
        lambda: open("/dev/null").close(),
        lambda: __import__("os").system("true"),
        lambda: _config._registry.update(evil=oc.NonNeg),
    ],
    ids=[
        "eval",
        "exec",
        "compile",
        "parse",
        "import_module",
        "import",
        "own",
        "open",
        "system",
        "register",
    ],
)
def test_the_watch_sees(evil):
    with pytest.raises(AssertionError), watched(), contextlib.suppress(ImportError):
        evil()


def test_the_watch_ends_what_takes_too_long():
    with pytest.raises(AssertionError, match=r"more than 5\.0 s"), limited():
        for _ in itertools.count():
            pass


# A corpus by hand.

NAMES = [
    "os",
    "os.system",
    "os:system",
    "builtins.eval",
    "builtins",
    "eval",
    "exec",
    "__import__",
    "__import__('os').system('true')",
    "__builtins__",
    "__class__",
    "__init__",
    "__globals__",
    "__main__",
    "__lambda__",
    "lambda w: w",
    "import os",
    "exec('import os')",
    "{0.__class__.__mro__}",
    "%s%n",
    "keras.constraints.MaxNorm",
    "keras>MaxNorm",
    "Custom>MaxNorm",
    "optax_constraints",
    "optax_constraints._constraint",
    "optax_constraints.MaxNorm",
    "optax_constraints._config._registry",
    "FunctionConstraint",
    "_Around",
    "UnitSet",
    "register",
    "Binder",
    "type",
    "object",
    "numpy.load",
    "jax.numpy.load",
    "pickle.loads",
    "subprocess.Popen",
    "antigravity",
    "",
    " ",
    "\0",
    "MaxNorm\0",
    "maxnorm ",
    "МaxNorm",  # noqa: RUF001  # a Cyrillic letter
    "𝐌𝐚𝐱𝐍𝐨𝐫𝐦",  # noqa: RUF001
    "\ud800",
    "../../etc/passwd",
    "file:///etc/passwd",
    "max_norm" * 20_000,
]

VALUES = {
    "inf": 1e400,
    "-inf": -1e400,
    "nan": float("nan"),
    "10**30": 10**30,
    "10**400": 10**400,
    "-10**400": -(10**400),
    "10**4000": 10**4000,
    "2**31": 2**31,
    "2**63": 2**63,
    "2**64": 2**64,
    "tiny": 5e-324,
    "-0": -0.0,
    "true": True,
    "null": None,
    "empty": "",
    "text": "os.system('true')",
    "init": "init",
    "huge init": "9" * 5000 + "x init",
    "long init": "1" * 100_000 + ".",
    "nul": "\0",
    "surrogate": "\ud800",
    "list": [],
    "ragged": [[1.0], [1.0, 2.0]],
    "texts": ["os.system", "eval"],
    "nulls": [None, None],
    "nans": [float("nan")] * 3,
    "infs": [1e400] * 3,
    "large ints": [10**400] * 3,
    "three": [1.0, 2.0, 3.0],
    "long": [0.5] * 10_000,
    "wide": [[0.5] * 100] * 100,
    "deep list": json.loads("[" * 900 + "]" * 900),
    "object": {},
    "deep object": json.loads('{"a":' * 900 + "1" + "}" * 900),
    "lambda": {"class_name": "__lambda__", "config": {"value": ["4wAAAAA=", None, None]}},
    "function": {"class_name": "function", "config": "os.system", "module": "builtins"},
    "tensor": {"class_name": "__tensor__", "config": {"value": [1.0], "dtype": "float32"}},
    "numpy": {"class_name": "__numpy__", "config": {"value": [[1.0]] * 3, "dtype": "object"}},
    "tuple": {"class_name": "__tuple__", "items": [0, 1, "..."]},
    "set": {"class_name": "MaxNorm", "config": {}},
    "schedule": {"class_name": "optax.constant_schedule", "config": {"value": 1.0}},
    "index": "0",
    "slices": "::-1, ...",
    "no step": "::0",
    "large index": "9" * 18,
    "larger index": "9" * 400 + ":",
    "many commas": "," * 10_000,
    "many slices": ":," * 10_000 + ":",
    "brackets": "[" * 10_000,
    "dots": "...,...",
    "newaxis": "None",
    "call": "__import__('os').system('true')",
    "digits": "٣",
}

PATTERNS: dict[str, Any] = {
    "not closed": {"regex": "("},
    "nothing to repeat": {"regex": "*"},
    "bad range": {"regex": "[z-a]"},
    "bad escape": {"regex": "\\"},
    "bad group": {"regex": "(?P<os.system>a)"},
    "conditional": {"regex": "(?(99)a|b)"},
    "code": {"regex": "(?{os.system('true')})"},
    "look behind": {"regex": "(?<=a*)b"},
    "repeat": {"regex": "a{4294967295}"},
    "overflow": {"regex": "a{99999999999999999999}"},
    "groups": {"regex": "(a)" * 5000},
    "nested": {"regex": "(" * 5000 + ")" * 5000},
    "nested repeats": {"regex": "(?:" * 50 + "a" + "){1,60000}" * 50},
    "backtracking": {"regex": r"(a+)+$"},
    "more backtracking": {"regex": r"(?:(?:(?:.*)*)*)*!"},
    "alternatives": {"regex": "|".join(f"a{i}" for i in range(100))},
    "many alternatives": {"regex": "|".join(f"a{i}" for i in range(10_000))},
    "nul": {"regex": "\0"},
    "surrogate": {"regex": "\ud800"},
    "empty": {"regex": ""},
    "null": {"regex": None},
    "list": {"regex": ["a"]},
    "locale": {"regex": "a", "flags": int(re.LOCALE)},
    "debug": {"regex": "a", "flags": int(re.DEBUG)},
    "all flags": {"regex": "a", "flags": -1},
    "large flags": {"regex": "a", "flags": 10**400},
    "float flags": {"regex": "a", "flags": 1e400},
    "bool flags": {"regex": "a", "flags": True},
    "inline flags": {"regex": "a(?i)"},
    # Such a class takes ten milliseconds to compile.
    "classes": {"regex": "[!-\uffff]" * 20, "flags": int(re.IGNORECASE)},
    "many classes": {"regex": "[!-\uffff]" * 20_000, "flags": int(re.IGNORECASE)},
    "a lambda": {"class_name": "__lambda__"},
    "an int": 3,
    "a list": ["a"],
    "stars": "*" * 500,
    "stars and letters": "*a" * 250,
    "double stars": "**/" * 100 + "kernel",
    "many letters": "?*" * 250,
    "slashes": "/" * 10_000,
    "class": "[" * 500,
    "many classes of letters": "[" * 20_000,
    "reversed class": "[z-a]",
    "dots": "../../kernel",
    "long": "kernel" * 50_000,
    "": "",
}


def _inside(config: Any) -> Iterator[Any]:
    """A config in all the places where one can stand."""
    yield config
    yield {"kernel": config}
    yield {"dense": {"kernel": config, "bias": None}}
    yield [["kernel", config], ["**", None]]
    yield {"class_name": config}
    yield {"class_name": "function", "config": config}
    yield {"class_name": "MaxNorm", "config": {}, "registered_name": config}
    yield {"class_name": "Stacked", "config": {"constraint": config}}
    yield {"class_name": "Soft", "config": {"constraint": config, "rate": 1.0}}
    yield {"class_name": "Part", "config": {"constraint": config, "index": "0"}}
    yield {"class_name": "Compose", "config": {"constraints": [config, "non_neg"]}}
    yield {"class_name": "Intersection", "config": {"constraints": ["non_neg", config]}}


def _arguments(name: str) -> tuple[str, ...]:
    cls = _config._registry[name]
    return tuple(getattr(cls, "__dataclass_fields__", ()))


SETS = sorted(name for name in _config._registry if name[0].isupper())


def _try(config: Any) -> str:
    """Reads the JSON text of a config and binds what it makes; says how that ended."""
    loaded = load(json.loads(json.dumps(config)))
    if isinstance(loaded, str):
        return REFUSED
    return "bound" if bind(loaded) else "loaded"


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
def test_names(name):
    """None of them is known, wherever it stands."""
    found = collections.Counter(map(_try, _inside(name)))
    # As a rule's value it is a name; "registered_name" with the name of a set is refused too.
    assert found == {REFUSED: 12}
    for config in _inside(name):
        with pytest.raises((TypeError, ValueError), match=r"identifier|own, |is not|in the rule"):
            oc.deserialize(config)


@pytest.mark.parametrize("value", VALUES)
def test_values(value):
    """Each in place of each argument of each set, and as a set."""
    tried = 0
    for config in _inside(VALUES[value]):
        _try(config)
        tried += 1
    for name in SETS:
        fields = _arguments(name)
        good = _GOOD.get(name, {})
        for field in (*fields, "zzz", "self", "__class__"):
            outcome = _try({"class_name": name, "config": {**good, field: VALUES[value]}})
            if field not in fields:
                assert outcome == REFUSED, (name, field)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns(pattern):
    given = PATTERNS[pattern]
    loaded = load(json.loads(json.dumps([[given, "non_neg"]])))
    if isinstance(given, str):
        assert (loaded == REFUSED) == (len(given) > LONGEST)
        assert load({given: "non_neg"}) == (
            REFUSED if len(given) > LONGEST else {given: oc.NonNeg()}
        )
        if len(given) <= LONGEST:
            bind(loaded)
    elif loaded != REFUSED:
        assert isinstance(loaded[0][0], re.Pattern)


def test_which_regular_expressions_load():
    regular = {name: given for name, given in PATTERNS.items() if isinstance(given, dict)}
    known = {name for name, given in regular.items() if load([[given, None]]) != REFUSED}
    assert {"backtracking", "more backtracking", "alternatives", "classes", "empty"} <= known
    assert known.isdisjoint({"not closed", "bad group", "overflow", "locale", "null", "a lambda"})
    assert known.isdisjoint({"groups", "nested", "many classes", "many alternatives"})


@pytest.mark.parametrize(
    "config",
    [{"a" * 501: None}, [["a" * 501, None]], [[{"regex": "a" * 501}, None]]],
    ids=["key", "pair", "regex"],
)
def test_a_long_pattern_is_refused(config):
    with pytest.raises(ValueError, match=r"a\.\.\. is not a pattern; .* of at most 500 characters"):
        oc.deserialize(config)
    oc.deserialize(json.loads(json.dumps(config).replace("aa", "a")))


@pytest.mark.parametrize("kind", ["Stacked", "Soft", "Part", "Compose", "Intersection", "rules"])
def test_recursion(kind):
    """Sets in sets, from one to more than there is a stack for: made by hand, not from JSON."""
    outcomes = []
    config: Any = "non_neg"
    for depth in range(1, 1501):
        config = {
            "Stacked": lambda c: {"class_name": "Stacked", "config": {"constraint": c}},
            "Soft": lambda c: {"class_name": "Soft", "config": {"constraint": c, "rate": 1}},
            "Part": lambda c: {"class_name": "Part", "config": {"constraint": c, "index": "..."}},
            "Compose": lambda c: {
                "class_name": "Compose",
                "config": {"constraints": ["non_neg", c]},
            },
            "Intersection": lambda c: {
                "class_name": "Intersection",
                "config": {"constraints": ["non_neg", c], "iterations": 1},
            },
            "rules": lambda c: {"a": c},
        }[kind](config)
        if (depth <= 150 and depth % 10 == 1) or depth % 250 == 0:
            loaded = load(config)
            outcomes.append(REFUSED if loaded == REFUSED else "bound" if bind(loaded) else "loaded")
    assert outcomes[0] == ("loaded" if kind == "rules" else "bound") or kind in ("Stacked", "rules")
    assert outcomes[-1] == REFUSED


def test_what_is_registered_is_not_called():
    @oc.register(name="never_called")
    def never_called(w):
        raise AssertionError

    @oc.register
    class NeverCalled(oc.Constraint):
        def __call__(self, w, /):
            raise AssertionError

    for name in ("never_called", "NeverCalled"):
        for config in (
            name,
            {"class_name": name},
            {"kernel": name},
            [["kernel", {"class_name": name}]],
        ):
            assert load(config) != REFUSED
    assert load({"class_name": "function", "config": "never_called"}) is never_called


# Fuzz.

# Arguments that make each set, for those that need some.
_GOOD: dict[str, dict[str, Any]] = {
    "Around": {"constraint": "max_norm"},
    "Affine": {"a": [[1.0, 2.0, 3.0]]},
    "Box": {"lower": -1.0},
    "BoxSection": {"lower": 0.0, "upper": 1.0},
    "CenterAround": {"ref_value": 0.0},
    "Compose": {"constraints": ["non_neg", "max_norm"]},
    "FixedNorm": {"value": "init"},
    "FixedRMS": {"value": "init"},
    "FixedSpectralNorm": {"value": 1.0},
    "Grid": {"values": [-1, 0, 1]},
    "HalfSpace": {"normal": [1.0, 2.0, 3.0]},
    "Hyperplane": {"normal": [1.0, 2.0, 3.0]},
    "Intersection": {"constraints": ["non_neg", "max_norm"]},
    "LowRank": {"rank": 1},
    "Mask": {"mask": [1, 0, 1]},
    "MaxOperatorNorm": {
        "max_value": 1.0,
        "strides": 1,
        "padding": "SAME",
        "dilation": 1,
        "groups": 1,
    },
    "MaxRMS": {"max_value": 1.0},
    "NM": {"n": 1, "m": 3},
    "NuclearNormBall": {"radius": 1.0},
    "Part": {"constraint": "non_neg", "index": "0"},
    "Soft": {"constraint": "max_norm", "rate": 0.5},
    "Stacked": {"constraint": "non_neg"},
    "SumTo": {"value": 1.0},
    "Tied": {"labels": [0, 0, 1]},
    "TopK": {"k": 2},
    "Transport": {"rows": 0.0, "columns": 0.0},
}

_small = [VALUES[name] for name in VALUES if len(json.dumps(VALUES[name])) < 500]
_number = st.sampled_from([0, 1, 2, 3, -1, 0.5, 1.0, 1e30, 1e-30])
_scalar = st.one_of(
    _number,
    st.sampled_from(_small),
    st.sampled_from(NAMES[:-1]),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
)
_keys = "class_name config registered_name module items regex flags constraint constraints axis"
_keys += " max_value kernel __class__ **"
_json = st.recursive(
    _scalar,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(_keys.split()), inner, max_size=3),
    ),
    max_leaves=8,
)


@st.composite
def _configs(draw: st.DrawFn, depth: int = 2) -> Any:
    """Configs that are nearly right: most arguments are good, and some are anything."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.sampled_from([*SETS, *NAMES[:-1]]))
    name = draw(st.sampled_from(SETS))
    arguments = dict(_GOOD.get(name, {}))
    for field in draw(st.lists(st.sampled_from([*_arguments(name), "zzz"]), max_size=2)):
        if field == "zzz" and draw(st.integers(0, 4)):
            continue
        if field == "constraint" and depth:
            arguments[field] = draw(_configs(depth=depth - 1))
        elif field == "constraints" and depth:
            arguments[field] = draw(st.lists(_configs(depth=depth - 1), max_size=3))
        elif field == "axis":
            arguments[field] = draw(st.sampled_from([0, -1, None, [0], "fan_in"]) | _scalar)
        else:
            arguments[field] = draw(st.one_of(_number, _number, _number, _json))
    config = {"class_name": name, "config": arguments}
    for key in draw(
        st.lists(st.sampled_from(["module", "registered_name", "config", "x"]), max_size=1)
    ):
        config[key] = draw(st.none() | _json)
    return config


_pattern = st.one_of(
    st.sampled_from(
        ["kernel", "bias", "**", "*", "/dense/*", "dense/[kb]*", "", "/", "no", "[", "a//b"]
    ),
    st.text("ab*?[]/.!-", max_size=6),
)
_regex = st.fixed_dictionaries(
    {"regex": st.text("ab()[]*+?|\\.^$", max_size=6) | _scalar},
    optional={"flags": st.sampled_from([0, 2, 32, 64, 256]) | _scalar, "x": _scalar},
)


@st.composite
def _rules(draw: st.DrawFn, depth: int = 2) -> Any:
    plain = st.sampled_from(["max_norm", "non_neg", "unit_norm", None])
    value = plain if draw(st.booleans()) else st.one_of(plain, plain, _configs(), _configs(), _json)
    if depth and draw(st.integers(0, 4)) == 0:
        value = value | _rules(depth=depth - 1)
    if draw(st.booleans()):
        return draw(st.dictionaries(_pattern, value, min_size=1, max_size=3))
    patterns = st.one_of(_pattern, _pattern, _pattern, _regex)
    return draw(st.lists(st.tuples(patterns, value).map(list), min_size=1, max_size=3))


def _fuzzed(strategy: st.SearchStrategy, share: float) -> None:
    """Puts 500 configs to the test, of which a share has to load, and one to be refused."""
    found: collections.Counter = collections.Counter()

    @fuzz
    @given(strategy)
    def check(config):
        found[_try(config)] += 1

    check()
    print(dict(found))
    assert found.total() >= 500
    assert found["bound"] >= share * found.total()
    assert found[REFUSED] >= 0.05 * found.total()


@pytest.mark.parametrize(
    ("strategy", "share"),
    [(_json, 0.0), (_configs(), 0.1), (_rules(), 0.1)],
    ids=["json", "constraints", "rules"],
)
def test_fuzz(strategy, share):
    _fuzzed(strategy, share)
