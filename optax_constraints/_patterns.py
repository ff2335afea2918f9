"""Patterns: which leaves a rule names, and how rules are written."""

import dataclasses
import difflib
import fnmatch
import glob
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp

from optax_constraints._axes import LeafLayout
from optax_constraints._config import Identifier, as_constraint, pattern_type, several
from optax_constraints._constraint import Constraint
from optax_constraints._text import shown
from optax_constraints._trees import leaves_by_path, shape_and_dtype

Predicate: TypeAlias = Callable[[str, Any], bool]
"""What a rule asks of the path and the leaf: its shape and dtype, not its values. `project` asks
it once for all trees of one structure with the same shapes and dtypes, so that a leaf is under
the same rule in each step."""
Pattern: TypeAlias = "str | re.Pattern[str] | Predicate | OfLayer | Joint | Across"
# Keys of a mapping are patterns; Mapping[Pattern, ...] would refuse a dict[str, ...].
Rules: TypeAlias = Identifier | Mapping[Any, Any] | Sequence[tuple[Pattern, Any]] | None


def matches(pattern: Pattern, path: str, leaf: Any, layout: LeafLayout | None) -> bool:
    """Whether a pattern names a leaf."""
    if isinstance(pattern, str):
        return _glob(pattern, path)
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(path) is not None
    if isinstance(pattern, OfLayer):
        own = layout is not None and layout.layer == pattern.layer
        return own and matches(pattern.pattern, path, leaf, layout)
    if isinstance(pattern, (Joint, Across)):
        return any(matches(part, path, leaf, layout) for part in pattern.patterns)
    return bool(pattern(path, leaf))


@pattern_type("of_layer")
@dataclasses.dataclass(frozen=True)
class OfLayer:
    """What `of_layer` returns."""

    layer: str
    pattern: Pattern = "*"

    def __post_init__(self):
        if not isinstance(self.layer, str) or not self.layer:
            raise TypeError(
                f"of_layer: layer={shown(self.layer)} is no type of layer; write its name, such "
                "as 'Conv'."
            )
        _check_pattern(self.pattern, "of_layer: ")

    def __repr__(self) -> str:
        return f"of_layer({self.layer!r}, {_shown(self.pattern)})"


def of_layer(layer: str | type, pattern: Pattern = "*") -> Any:
    """A pattern for the parameters of all layers of one type.

    It needs `layout=layout(model)` of `optax_constraints.flax` in the verb, which knows the type.

    Args:
        layer: The layer's class or its name, such as `"Conv"`. Layers of your own count as the
            Flax layer that they are made from, as in the report.
        pattern: Which of its parameters, `"kernel"`; by default all.

    Returns:
        What to write in the place of a pattern.

    Raises:
        TypeError: If `layer` is neither a name nor a class, or `pattern` is no pattern.

    Example:
        >>> import optax_constraints as oc
        >>> {oc.of_layer("Conv", "kernel"): oc.max_norm(2.0, axis="fan_in")}
        {of_layer('Conv', 'kernel'): MaxNorm(max_value=2.0, axis='fan_in')}
    """
    return OfLayer(layer.__name__ if isinstance(layer, type) else layer, pattern)


class _Several:
    """What names groups of leaves."""

    patterns: tuple[Pattern, ...]

    def __repr__(self) -> str:
        # Without addresses of functions: of `across` this is a key in the state of `project`.
        shown = (
            getattr(part, "__qualname__", type(part).__name__) if callable(part) else _shown(part)
            for part in self.patterns
        )
        return f"{type(self).__name__.lower()}({', '.join(shown)})"


@pattern_type("joint")
@dataclasses.dataclass(frozen=True, repr=False)
class Joint(_Several):
    """What `joint` returns."""

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern):
        """Takes the patterns as `joint` does."""
        if len(patterns) < 2:
            raise TypeError(
                f"joint: {len(patterns)} pattern is given; write two or more, as in "
                "joint('kernel', 'bias')."
            )
        checked = tuple(_check_pattern(pattern, "joint: ") for pattern in patterns)
        object.__setattr__(self, "patterns", checked)


@pattern_type("across")
@dataclasses.dataclass(frozen=True, repr=False)
class Across(_Several):
    """What `across` returns."""

    patterns: tuple[Pattern, ...]

    def __init__(self, *patterns: Pattern):
        """Takes the patterns as `across` does."""
        if not patterns:
            raise TypeError("across: no pattern is given; write one, as in across('**/kernel').")
        checked = tuple(_check_pattern(pattern, "across: ") for pattern in patterns)
        object.__setattr__(self, "patterns", checked)


def joint(*patterns: Pattern) -> Any:
    """A pattern for leaves of one layer that are constrained together, unit by unit.

    A Dense kernel (in, out) and its bias (out,) become one array (in + 1, out), whose axis 0 is
    a unit: ``{joint("kernel", "bias"): max_norm(2.0)}`` bounds the norm of all that flows into a
    unit. Leaves that share a parent are a group. The fan-in of each is flattened into the rows;
    biases and scales are one row. Stacked layers stay apart: a `layout` tells them, or
    ``stacked(...)`` in the rule. Costs a copy of the group beside what the constraint costs.

    Args:
        *patterns: Two or more, each for one of the leaves, in the order of the rows.

    Returns:
        What to write in the place of a pattern.

    Raises:
        TypeError: If there are fewer than two, or one is no pattern. The verbs raise a
            ValueError if a layer has only some of the leaves, if an earlier rule has taken some,
            or if the numbers of units differ.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> params = {"kernel": jnp.array([[3.0, 0.3]]), "bias": jnp.array([4.0, 0.4])}
        >>> oc.constrain(params, {oc.joint("kernel", "bias"): oc.max_norm(1.0)})["bias"]
        Array([0.8, 0.4], dtype=float32)
    """
    return Joint(*patterns)


def across(*patterns: Pattern) -> Any:
    """A pattern for leaves that are constrained together, as one vector.

    For the norm of a whole model, or a share of nonzeros that layers divide among themselves:
    ``{across("**/kernel"): top_k(0.1)}``. The vector has one axis, 0. Norms, `top_k`, `simplex`
    and `l1_ball` work on the leaves where they are, and on a mesh only sums over them move; other
    sets make one array of them.

    Args:
        *patterns: One or more; each leaf that matches one of them is part of the vector.

    Returns:
        What to write in the place of a pattern.

    Raises:
        TypeError: If there is none, or one is no pattern. The verbs raise a ValueError if an
            earlier rule has taken some of the leaves.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> params = {"a": {"kernel": jnp.array([3.0])}, "b": {"kernel": jnp.array([4.0])}}
        >>> oc.constrain(params, {oc.across("**/kernel"): oc.max_norm(1.0)})["b"]["kernel"]
        Array([0.8], dtype=float32)
    """
    return Across(*patterns)


def rules_from_tree(tree: Any) -> Any:
    """Rules from a tree of constraints that has the structure of the parameters.

    Args:
        tree: Anything that `get` accepts in the place of each parameter, or None where it is free,
            or where there is no parameter, as in a layer without a bias.

    Returns:
        Rules: for each leaf but None the pattern of its path, anchored at the root.

    Raises:
        ValueError: If two leaves of one path have different constraints.

    Example:
        >>> import optax_constraints as oc
        >>> oc.rules_from_tree({"kernel": oc.max_norm(2.0), "bias": None})
        {'/kernel': MaxNorm(max_value=2.0, axis=0)}
    """

    def is_leaf(node: Any) -> bool:
        is_config = isinstance(node, Mapping) and "class_name" in node
        return node is None or isinstance(node, Constraint) or is_config

    if is_leaf(tree) or jax.tree_util.all_leaves([tree]):
        return tree
    rules: dict[str, Any] = {}
    for path, thing in leaves_by_path(tree, is_leaf):
        if thing is None:
            continue
        pattern = "/" + glob.escape(path)
        if pattern in rules and rules[pattern] != thing:
            raise ValueError(
                f"rules_from_tree: two leaves have the path {path!r}, and different constraints: "
                f"{rules[pattern]} and {thing}. A rule goes by path; give them the same."
            )
        rules[pattern] = thing
    return rules


def needs_layout(pattern: Pattern) -> bool:
    """Whether a pattern asks for the type of a layer."""
    if isinstance(pattern, (Joint, Across)):
        return any(map(needs_layout, pattern.patterns))
    return isinstance(pattern, OfLayer)


class Group(NamedTuple):
    """Leaves that a pattern takes as one."""

    name: str
    leaves: list[Any]
    missing: list[Pattern]
    """The patterns of `joint` that none of its leaves matches."""


def groups(pattern: Joint | Across, leaves: list[Any]) -> list[Group]:
    """The groups that a pattern makes of the leaves that it matches.

    Args:
        pattern: The pattern.
        leaves: Leaves with their `path`, `leaf` and `layout`, in the order of the tree.

    Returns:
        The groups: of `joint` one for each parent, with leaves in the order of its patterns.
    """
    if isinstance(pattern, Across):
        return [Group(str(pattern), leaves, [])] if leaves else []
    found: dict[str, list[Any]] = {}
    for leaf in leaves:
        found.setdefault(leaf.path.rpartition("/")[0], []).append(leaf)
    made = []
    for parent, own in found.items():
        members: list[Any] = []
        missing = []
        for part in pattern.patterns:
            named = [leaf for leaf in own if matches(part, leaf.path, leaf.leaf, leaf.layout)]
            members += [leaf for leaf in named if leaf not in members]
            missing += [] if named else [part]
        name = "+".join(leaf.path.rpartition("/")[2] for leaf in members)
        made.append(Group(f"{parent}/{name}" if parent else name, members, missing))
    return made


def _shown(pattern: object) -> str:
    return f"re.compile({pattern.pattern!r})" if isinstance(pattern, re.Pattern) else repr(pattern)


class Rule(NamedTuple):
    """One pattern and what it assigns. A bare constraint is a rule without a pattern."""

    pattern: "Pattern | None"
    constraint: Constraint | None

    def matches(self, path: str, leaf: Any, layout: LeafLayout | None = None) -> bool:
        """Whether the rule names this leaf."""
        if self.pattern is None:
            return is_floating(leaf)
        return matches(self.pattern, path, leaf, layout)

    def __str__(self) -> str:
        """The pattern, as errors name it."""
        return _shown(self.pattern)


def parse(rules: Rules) -> list[Rule]:
    """Turns any form of rules into a list of `Rule`, in order.

    Args:
        rules: A bare constraint, a mapping or a sequence of pairs.

    Returns:
        The rules.

    Raises:
        TypeError: If a pattern is no string, regular expression or predicate.
        ValueError: If a value is no constraint, identifier or None.
    """
    if isinstance(rules, Mapping) and "class_name" not in rules:
        return _parse_pairs(list(rules.items()), "")
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        for pair in rules:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    "Rules in a sequence are pairs (pattern, constraint), and "
                    f"{pair!r} is none. {several(rules)}".rstrip()
                )
        return _parse_pairs(list(rules), "")
    constraint = _as_constraint(rules)
    return [] if constraint is None else [Rule(None, constraint)]


def _parse_pairs(pairs: list[Any], prefix: str) -> list[Rule]:
    rules = []
    for pattern, value in pairs:
        pattern = _check_pattern(_under(prefix, pattern) if prefix else pattern)
        rule = Rule(pattern, None)
        nested = _nested(value)
        if nested is not None:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"The rule {rule} holds nested rules, which need a string as their key."
                )
            rules += _parse_pairs(nested, pattern)
        else:
            rules.append(rule._replace(constraint=_as_constraint(value, rule)))
    return rules


def _nested(value: Any) -> list[Any] | None:
    """The pairs of rules inside a rule, or None for a constraint."""
    if isinstance(value, Mapping) and "class_name" not in value:
        return list(value.items())
    pairs = isinstance(value, (list, tuple)) and bool(value)
    pairs = pairs and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value)
    return list(value) if pairs else None


def _check_pattern(pattern: Any, where: str = "") -> Pattern:
    if isinstance(pattern, str):
        if not pattern.strip("/"):
            raise ValueError(f"{where}The pattern {pattern!r} is empty; write '**' for every leaf.")
    elif isinstance(pattern, re.Pattern):
        if not isinstance(pattern.pattern, str):
            raise TypeError(f"{where}The pattern {pattern!r} matches bytes; compile it from a str.")
    elif isinstance(pattern, (Joint, Across)) and where:
        raise TypeError(
            f"{where}The pattern {pattern!r} names groups; write patterns of single leaves."
        )
    elif isinstance(pattern, (OfLayer, Joint, Across)):
        return pattern
    elif not callable(pattern) or isinstance(pattern, (type, Constraint)):
        raise TypeError(
            f"{where}The pattern {pattern!r} is not a string, a compiled regular expression or "
            "a predicate (path, leaf) -> bool."
        )
    return cast(Pattern, pattern)


def _under(prefix: str, pattern: Pattern) -> Pattern:
    """A pattern inside the nested rules of another."""
    if isinstance(pattern, (Joint, Across)):
        return type(pattern)(*(_under(prefix, part) for part in pattern.patterns))
    if isinstance(pattern, OfLayer):
        return OfLayer(pattern.layer, _under(prefix, pattern.pattern))
    if not isinstance(pattern, str):
        raise TypeError(
            f"In the nested rules under {prefix!r} the key {pattern!r} is not a string; "
            "give regular expressions and predicates at the top level, as pairs."
        )
    if pattern.startswith("/"):
        raise ValueError(
            f"In the nested rules under {prefix!r} the key {pattern!r} is anchored at "
            "the root; leave out its leading '/'."
        )
    return f"{prefix}/{pattern}"


def _as_constraint(value: Any, rule: Rule | None = None) -> Constraint | None:
    try:
        return as_constraint(value)
    except (TypeError, ValueError) as error:
        where = f"In the rule {rule}: " if rule else ""
        raise type(error)(f"{where}{error}") from error


def _glob(pattern: str, path: str) -> bool:
    """Whether a pattern matches whole segments at the end of a path."""
    segments = pattern.strip("/").split("/")
    if not pattern.startswith("/"):
        segments = ["**", *segments]
    return _match_segments(segments, path.split("/") if path else [])


def _match_segments(pattern: list[str], path: list[str]) -> bool:
    # reachable[j]: the pattern read so far matches the first j segments of the path.
    reachable = [True] + [False] * len(path)
    for segment in pattern:
        if segment == "**":
            first = reachable.index(True) if True in reachable else len(reachable)
            reachable = [j >= first for j in range(len(reachable))]
        else:
            reachable = [False] + [
                reachable[j] and fnmatch.fnmatchcase(path[j], segment) for j in range(len(path))
            ]
    return reachable[-1]


def is_floating(leaf: Any) -> bool:
    known = shape_and_dtype(leaf)
    return known is not None and jnp.issubdtype(known[1], jnp.floating)


def unmatched(rule: Rule, paths: list[str], layers: set[str], masked: Sequence[str] = ()) -> str:
    """Why a rule matches no leaf, as far as that can be told, and what to write.

    Args:
        rule: The rule.
        paths: The paths of all leaves, of which there is at least one.
        layers: The types of layers in the layout.
        masked: The paths of leaves that are not there, since Optax has masked them.

    Returns:
        The text of an error.
    """
    text = f"The rule {rule} matches no leaf"
    if needs_layout(cast(Pattern, rule.pattern)):
        text += f" (the layout knows the layers {', '.join(sorted(layers))})"
    if paths == [""]:
        return (
            f"{text}: the parameters are one array without a path. Give a constraint without "
            "a pattern, or, if optax.flatten made that array, take flatten out of the way."
        )
    # A predicate would want the leaf.
    hidden = [path for path in masked if not callable(rule.pattern) and rule.matches(path, None)]
    if hidden:
        return (
            f"{text} that is here: optax.masked, optax.partition or the like has masked "
            f"{_some(hidden)}. Leave the rule out here, and give it to a project that sees its "
            "leaves; or pass strict=False."
        )
    if not isinstance(rule.pattern, str):
        return (
            f"{text} of the {len(paths)} in this tree. The closest paths are {_some(paths)}. {_HOW}"
        )
    name = rule.pattern.rstrip("/")
    own = [path for path in paths if _glob(f"{name}/**", path)]
    ranked = own + [path for path in _by_likeness(rule.pattern, paths) if path not in own]
    advice = _HOW
    if own:
        below = "*" if all(_glob(f"{name}/*", path) for path in own) else "**"
        advice = (
            f"{rule} is the name of a module or of a container: for all leaves in it write "
            f"'{name}/{below}'."
        )
    return (
        f"{text} of the {len(paths)} in this tree. The closest paths are {_some(ranked)}. {advice}"
    )


_HOW = (
    "Write the end of a path, in whole segments; or pass strict=False if this tree is only a "
    "part of the model."
)


def _some(paths: list[str]) -> str:
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return ", ".join(map(repr, paths[:5])) + more


def _by_likeness(pattern: str, paths: list[str]) -> list[str]:
    """Paths in the order in which a part of them, as long as the pattern, is like it."""
    key = pattern.strip("/")
    depth = key.count("/") + 1

    def likeness(path: str) -> tuple[float, bool]:
        segments = path.split("/")
        parts = ["/".join(segments[i : i + depth]) for i in range(len(segments))]
        ratios = [difflib.SequenceMatcher(None, key, part).ratio() for part in parts]
        end = max(0, len(segments) - depth)
        return max(ratios), ratios[end] == max(ratios)

    return sorted(paths, key=likeness, reverse=True)
