"""Patterns: which leaves a rule names, and how rules are written."""

import difflib
import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax.numpy as jnp

from optax_constraints._config import Identifier, as_constraint, several
from optax_constraints._constraint import Constraint
from optax_constraints._trees import shape_and_dtype

Predicate: TypeAlias = Callable[[str, Any], bool]
"""What a rule asks of the path and the leaf: its shape and dtype, not its values. `project` asks
it once for all trees of one structure with the same shapes and dtypes, so that a leaf is under
the same rule in each step."""
Pattern: TypeAlias = str | re.Pattern[str] | Predicate
# Keys of a mapping are patterns; Mapping[Pattern, ...] would refuse a dict[str, ...].
Rules: TypeAlias = Identifier | Mapping[Any, Any] | Sequence[tuple[Pattern, Any]] | None


class Rule(NamedTuple):
    """One pattern and what it assigns. A bare constraint is a rule without a pattern."""

    pattern: Pattern | None
    constraint: Constraint | None

    def matches(self, path: str, leaf: Any) -> bool:
        """Whether the rule names this leaf."""
        if self.pattern is None:
            return is_floating(leaf)
        if isinstance(self.pattern, str):
            return _glob(self.pattern, path)
        if isinstance(self.pattern, re.Pattern):
            return self.pattern.fullmatch(path) is not None
        return bool(self.pattern(path, leaf))

    def __str__(self) -> str:
        """The pattern, as errors name it."""
        if isinstance(self.pattern, re.Pattern):
            return f"re.compile({self.pattern.pattern!r})"
        return repr(self.pattern)


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
        if prefix and not isinstance(pattern, str):
            raise TypeError(
                f"In the nested rules under {prefix!r} the key {pattern!r} is not a string; "
                "give regular expressions and predicates at the top level, as pairs."
            )
        if isinstance(pattern, str):
            if prefix and pattern.startswith("/"):
                raise ValueError(
                    f"In the nested rules under {prefix!r} the key {pattern!r} is anchored at "
                    "the root; leave out its leading '/'."
                )
            pattern = f"{prefix}/{pattern}" if prefix else pattern
            if not pattern.strip("/"):
                raise ValueError(f"The pattern {pattern!r} is empty; write '**' for every leaf.")
        elif isinstance(pattern, re.Pattern):
            if not isinstance(pattern.pattern, str):
                raise TypeError(f"The pattern {pattern!r} matches bytes; compile it from a str.")
        elif not callable(pattern) or isinstance(pattern, (type, Constraint)):
            raise TypeError(
                f"The pattern {pattern!r} is not a string, a compiled regular expression or "
                "a predicate (path, leaf) -> bool."
            )
        rule = Rule(cast(Pattern, pattern), None)
        if isinstance(value, Mapping) and "class_name" not in value:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"The rule {rule} holds nested rules, which need a string as their key."
                )
            rules += _parse_pairs(list(value.items()), pattern)
        else:
            rules.append(rule._replace(constraint=_as_constraint(value, rule)))
    return rules


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


def unmatched(rule: Rule, paths: list[str], masked: Sequence[str] = ()) -> str:
    """Why a rule matches no leaf, as far as that can be told, and what to write.

    Args:
        rule: The rule.
        paths: The paths of all leaves, of which there is at least one.
        masked: The paths of leaves that are not there, since Optax has masked them.

    Returns:
        The text of an error.
    """
    text = f"The rule {rule} matches no leaf"
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
