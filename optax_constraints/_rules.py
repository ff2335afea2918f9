"""Rules: patterns of paths -> one bound constraint per leaf."""

import dataclasses
import difflib
import fnmatch
import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from optax_constraints._axes import Layout, LeafLayout
from optax_constraints._constraint import (
    Constraint,
    Identifier,
    as_constraint,
    axis_names,
    is_builtin,
)
from optax_constraints._private import called_from_optax
from optax_constraints._text import describe, warn

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
            return _is_floating(leaf)
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


@dataclasses.dataclass(frozen=True)
class Bound:
    """A leaf's path, with its constraint, axes settled, or None for a leaf that is free."""

    path: str
    constraint: Constraint | None
    layout: LeafLayout | None = None
    leaf: jax.ShapeDtypeStruct | None = None
    """Shape and dtype of a leaf that is constrained."""

    @property
    def remembers(self) -> bool:
        """Whether the constraint does."""
        return self.constraint is not None and self.constraint.remembers

    def remember(self, leaf: Any) -> Any:
        """What the constraint remembers of the leaf."""
        constraint = cast(Constraint, self.at(0))
        # A copy, lest the state and the parameters be one buffer, and both donated.
        return jax.tree.map(jnp.array, constraint.remember(jnp.asarray(leaf)))

    @functools.cached_property
    def memory(self) -> Any:
        """Structure, shapes and dtypes of what the constraint remembers."""
        return jax.eval_shape(self.remember, self.leaf)

    def at(self, step: jax.typing.ArrayLike) -> Constraint | None:
        """The constraint with its schedules evaluated at a step."""
        return None if self.constraint is None else self.constraint.at(step)


def keyed(bound: list[Bound]) -> Iterator[tuple[str, Bound]]:
    """Each leaf with the key of its memory: its path, numbered where it is not the first."""
    taken = {leaf_bound.path for leaf_bound in bound}
    seen: dict[str, int] = {}
    for leaf_bound in bound:
        path = leaf_bound.path
        number = seen[path] = seen.get(path, 0) + 1
        key = path if number == 1 else f"{path}#{number}"
        while number > 1 and key in taken:  # another leaf has this very path
            key += "#"
        taken.add(key)
        yield key, leaf_bound


# Trees of which a binder keeps what it found. A training loop has one or two.
_REMEMBERED_TREES = 16


class Binder:
    """Parsed rules that bind to trees, and remember the last trees they were bound to."""

    def __init__(self, rules: Rules, *, layout: Layout | None = None, strict: bool = True):
        self._rules = parse(rules)
        self._layout = layout
        self._strict = strict
        self._cache: OrderedDict[Any, list[Bound]] = OrderedDict()

    @property
    def remembers(self) -> bool:
        """Whether any of the constraints does."""
        return any(
            rule.constraint is not None and rule.constraint.remembers for rule in self._rules
        )

    def __call__(self, tree: Any) -> list[Bound]:
        """Binds the rules to the leaves of a tree, in the order of `jax.tree.leaves`.

        Args:
            tree: Parameters; arrays may be abstract.

        Returns:
            One `Bound` per leaf.

        Raises:
            ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.
            TypeError: If a rule names a leaf that is not floating-point.
        """
        leaves, treedef = jax.tree.flatten(tree)
        key = treedef, tuple(map(_shape_and_dtype, leaves))
        try:
            bound = self._cache.pop(key, None) or self._bind(tree)
            self._cache[key] = bound
        except (TypeError, ValueError):
            # Static parts of the tree may not hash, or, as NumPy arrays, not compare. If it was
            # the rules, this raises again.
            return self._bind(tree)
        if len(self._cache) > _REMEMBERED_TREES:
            self._cache.popitem(last=False)
        return bound

    def _bind(self, tree: Any) -> list[Bound]:
        leaves = leaves_by_path(tree)
        _check_not_flattened(leaves)
        winners = []
        matched, won = set(), set()
        for path, leaf in leaves:
            matching = [i for i, rule in enumerate(self._rules) if rule.matches(path, leaf)]
            matched.update(matching)
            won.update(matching[:1])
            winners.append(self._rules[matching[0]] if matching else None)
        if self._strict and leaves:
            self._check_all_used([path for path, _ in leaves], matched, won)
            self._check_layout([path for path, _ in leaves])
        checked: set[Any] = set()
        bound = []
        for (path, leaf), rule in zip(leaves, winners, strict=True):
            layout = self._leaf_layout(path)
            constraint = rule and _settle(rule, path, leaf, layout, checked)
            abstract = jax.ShapeDtypeStruct(*known) if (known := _shape_and_dtype(leaf)) else None
            bound.append(Bound(path, constraint, layout, abstract))
        return bound

    def _leaf_layout(self, path: str) -> LeafLayout | None:
        if self._layout is None:
            return None
        # Linen's `init` returns the parameters under this key.
        return self._layout.get(path) or self._layout.get(path.removeprefix("params/"))

    def _check_layout(self, paths: list[str]) -> None:
        if self._layout and not any(map(self._leaf_layout, paths)):
            raise ValueError(
                f"The layout knows none of the {len(paths)} leaves of this tree, such as "
                f"{paths[0]!r}: its own are {', '.join(map(repr, list(self._layout)[:3]))} and "
                "so on. Make it from the model that these parameters belong to."
            )

    def _check_all_used(self, paths: list[str], matched: set[int], won: set[int]) -> None:
        for i, rule in enumerate(self._rules):
            if rule.pattern is None:
                continue
            if i not in matched:
                raise ValueError(_unmatched(rule, paths))
            if i not in won:
                warn(
                    f"The rule {rule} does nothing: an earlier rule matches each of its leaves "
                    "first. Put the more specific rule first."
                )


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
                    f"Rules in a sequence are pairs (pattern, constraint), and {pair!r} is none."
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


def leaves_by_path(tree: Any) -> list[tuple[str, Any]]:
    """The leaves of a tree in the order of `jax.tree.leaves`, each with its path.

    The path is the keys joined by "/". The attribute `value` under which Flax's variables and
    boxes hold their array is left out; a key, field or attribute of that name elsewhere is not.
    """
    return [(path_of(keys), leaf) for keys, leaf in _walk(tree)]


def _walk(tree: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if _is_box(tree):
        for (key,), node in tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]:
            for rest, leaf in _walk(node):
                yield (_BOXED if key == GetAttrKey("value") else key, *rest), leaf
        return
    for keys, node in tree_flatten_with_path(tree, is_leaf=_is_box)[0]:
        for rest, leaf in _walk(node) if _is_box(node) else [((), node)]:
            yield (*keys, *rest), leaf


# In the place of the attribute under which a box holds an array.
_BOXED = jax.tree_util.DictKey("value")


def _is_box(node: Any) -> bool:
    return _is_box_type(type(node))


@functools.cache
def _is_box_type(cls: type) -> bool:
    """Whether objects of a class are variables of NNX, or boxes of metadata of Linen."""
    names = ("Variable", "VariableState", "AxisMetadata")
    return any(
        base.__name__ in names and base.__module__.partition(".")[0] == "flax"
        for base in cls.__mro__
    )


def without_boxes(tree: Any) -> Any:
    """A tree with arrays in the place of Flax's variables and boxes."""
    return jax.tree.map(
        lambda node: jax.tree.leaves(node)[0] if _is_box(node) else node, tree, is_leaf=_is_box
    )


def path_of(keys: Sequence[Any]) -> str:
    """Keys of a leaf joined by "/", without those that boxes add at the end."""
    while len(keys) > 1 and keys[-1] is _BOXED:
        keys = keys[:-1]
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


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


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    """Shape and dtype of an array, an abstract array or a Python number; else None."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        # As a JAX array: without x64, NumPy's float64 is float32.
        dtype = jnp.result_type(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf.dtype
        return tuple(leaf.shape), dtype
    if isinstance(leaf, (bool, int, float, complex)):
        return (), jnp.result_type(leaf)
    return None


def _is_floating(leaf: Any) -> bool:
    known = _shape_and_dtype(leaf)
    return known is not None and jnp.issubdtype(known[1], jnp.floating)


def _settle(
    rule: Rule, path: str, leaf: Any, layout: LeafLayout | None, checked: set[Any]
) -> Constraint | None:
    if rule.constraint is None:
        return None
    known = _shape_and_dtype(leaf)
    if known is None or not jnp.issubdtype(known[1], jnp.floating):
        what = type(leaf).__name__ if known is None else f"{describe(path, known[0])}, {known[1]}"
        raise TypeError(
            f"The rule {rule} names {path!r} ({what}), and only floating-point arrays can be "
            f"constrained; leave it free with an earlier rule {path!r}: None."
        )
    shape, dtype = known
    constraint = rule.constraint.settle(path, shape, layout)
    key = id(rule.constraint), shape, dtype, layout
    # What sums over an axis of a mesh cannot be tried where there is none.
    if not is_builtin(constraint) and key not in checked and not axis_names(constraint):
        checked.add(key)
        _check_keeps_shape(constraint, path, jax.ShapeDtypeStruct(shape, dtype))
    return constraint


def _check_keeps_shape(constraint: Constraint, path: str, leaf: jax.ShapeDtypeStruct) -> None:
    try:
        out = jax.eval_shape(constraint.at(0), leaf)
    except Exception as error:
        error.add_note(
            f"This happened in the constraint {constraint} on {describe(path, leaf.shape)}."
        )
        raise
    where = f"The constraint {constraint} on {describe(path, leaf.shape)}"
    known = _shape_and_dtype(out)
    if known is None:
        raise TypeError(f"{where} returned a {type(out).__name__}; return one array.")
    if known[0] != leaf.shape:
        raise ValueError(
            f"{where} returned shape {known[0]}; a constraint keeps the shape, so return "
            f"an array of shape {leaf.shape}."
        )
    if known[1] != leaf.dtype:
        raise TypeError(
            f"{where} returned {known[1]} for {leaf.dtype}; a constraint keeps the dtype, so "
            "return result.astype(w.dtype)."
        )


def _unmatched(rule: Rule, paths: list[str]) -> str:
    text = f"The rule {rule} matches no leaf"
    if paths == [""]:
        return (
            f"{text}: the parameters are one array without a path. Give a constraint without "
            "a pattern, or, if optax.flatten made that array, take flatten out of the way."
        )
    if isinstance(rule.pattern, str):
        depth = rule.pattern.strip("/").count("/") + 1
        tail = {path: "/".join(path.split("/")[-depth:]) for path in paths}
        key = rule.pattern.strip("/")
        ranked = sorted(paths, key=lambda p: -difflib.SequenceMatcher(None, key, tail[p]).ratio())
    else:
        ranked = paths
    shown = ", ".join(map(repr, ranked[:5]))
    more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
    return (
        f"{text} of the {len(paths)} in this tree. The closest paths are {shown}{more}. Write "
        "the end of a path, in whole segments; or pass strict=False if this tree is only a "
        "part of the model."
    )


def _check_not_flattened(leaves: list[tuple[str, Any]]) -> None:
    """Raises if `optax.flatten` made one vector of all the parameters.

    From inside, that vector looks like a model with a single vector of weights, and a
    norm over it would be taken without complaint. So the caller is looked up.
    """
    if len(leaves) != 1 or leaves[0][0] or getattr(leaves[0][1], "ndim", 0) != 1:
        return
    if called_from_optax("flatten"):
        raise ValueError(
            "optax.flatten hands the parameters on as one vector, in which paths and axes "
            "are lost. Put project outside it: chain(flatten(optimizer), project(rules))."
        )
