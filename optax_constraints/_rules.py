"""Rules bound to a tree: which constraint holds for each leaf, or group of leaves."""

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_constraints._axes import Layout, LeafLayout, layout_of
from optax_constraints._constraint import Constraint, axis_names, has_args, is_own
from optax_constraints._groups import joined, spread
from optax_constraints._patterns import (
    Across,
    Joint,
    Rule,
    Rules,
    groups,
    needs_layout,
    parse,
    unmatched,
)
from optax_constraints._patterns import Group as Named
from optax_constraints._text import describe, warn
from optax_constraints._trees import (
    are_parameters,
    check_not_flattened,
    check_some_arrays,
    is_saved_state,
    leaves_by_path,
    masked_paths,
    shape_and_dtype,
)
from optax_constraints._walk import Bindings, Bound

# Trees of which a binder keeps what it found. A training loop has one or two.
_REMEMBERED_TREES = 16


class Binder:
    """Parsed rules that bind to trees, and remember the last trees they were bound to."""

    def __init__(self, rules: Rules, *, layout: Layout | None = None, strict: bool = True):
        self._rules = parse(rules)
        self._layout = layout
        self._strict = strict
        self._cache: OrderedDict[Any, Bindings] = OrderedDict()

    def __call__(self, tree: Any) -> Bindings:
        """Binds the rules to the leaves of a tree.

        Args:
            tree: Parameters; arrays may be abstract.

        Returns:
            What holds for each leaf.

        Raises:
            ValueError: If a rule matches no leaf, or a leaf does not have the axis asked for.
            TypeError: If a rule names a leaf that is not floating-point.
        """
        leaves, treedef = jax.tree.flatten(tree)
        key = treedef, tuple(map(shape_and_dtype, leaves))
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

    def start(self, params: Any) -> Any:
        """Checks that rules fit a tree, and starts the memory of the constraints that need one."""
        bound = self(params)
        if not any(
            rule.constraint is not None and rule.constraint.remembers for rule in self._rules
        ):
            return ()
        # Optax looks for what is shaped like parameters with a tree without leaves. A leaf in
        # this place stands for any memory.
        return bound.remember(params) if jax.tree.leaves(params) else jnp.zeros(())

    def _bind(self, tree: Any) -> Bindings:
        named = leaves_by_path(tree)
        check_not_flattened(named)
        if self._rules and self._strict:
            check_some_arrays(named)
        leaves = [
            _Leaf(place, path, leaf, self._leaf_layout(path))
            for place, (path, leaf) in enumerate(named)
        ]
        parameters = are_parameters(tree)
        # Of what only looks like a saved state, a rule may name the whole path.
        ending = "/value" if is_saved_state(tree) else ""
        matched: dict[int, list[_Leaf]] = {i: [] for i in range(len(self._rules))}
        winners: dict[int, int] = {}
        for leaf in leaves:
            for i, rule in enumerate(self._rules):
                if rule.pattern is None and not parameters[leaf.place]:
                    continue
                names = {leaf.path, leaf.path + ending}
                if any(rule.matches(name, leaf.leaf, leaf.layout) for name in names):
                    matched[i].append(leaf)
                    winners.setdefault(leaf.place, i)
        if self._layout is None:
            self._check_without_layout()
        if self._strict and leaves:
            self._check_all_used(leaves, matched, set(winners.values()), tree)
            self._check_layout([leaf.path for leaf in leaves])
        bound = {leaf.place: _bind_leaf(None, leaf, set()) for leaf in leaves}
        for i, rule in enumerate(self._rules):
            checked: set[Any] = set()
            if isinstance(rule.pattern, (Joint, Across)):
                for group in groups(rule.pattern, matched[i]):
                    own = [leaf for leaf in group.leaves if winners[leaf.place] == i]
                    if own:
                        _check_whole(rule, group, own)
                        for leaf in group.leaves:
                            del bound[leaf.place]
                        # The block of a group stands where the first of its leaves is.
                        first = min(leaf.place for leaf in group.leaves)
                        bound[first] = _bind_group(rule, group)
                continue
            for leaf in matched[i]:
                if winners[leaf.place] == i:
                    bound[leaf.place] = _bind_leaf(rule, leaf, checked)
        return Bindings([bound[place] for place in sorted(bound)])

    def _leaf_layout(self, path: str) -> LeafLayout | None:
        return layout_of(self._layout, path)

    def _check_without_layout(self) -> None:
        for rule in self._rules:
            if rule.pattern is not None and needs_layout(rule.pattern):
                raise ValueError(
                    f"The rule {rule} goes by types of layers, which only the model knows; write "
                    "layout=layout(model), from optax_constraints.flax."
                )

    def _check_layout(self, paths: list[str]) -> None:
        if self._layout and not any(map(self._leaf_layout, paths)):
            raise ValueError(
                f"The layout knows none of the {len(paths)} leaves of this tree, such as "
                f"{paths[0]!r}: its own are {', '.join(map(repr, list(self._layout)[:3]))} and "
                "so on. Make it from the model that these parameters belong to."
            )

    def _check_all_used(
        self,
        leaves: "list[_Leaf]",
        matched: "dict[int, list[_Leaf]]",
        won: set[int],
        tree: Any,
    ) -> None:
        for i, rule in enumerate(self._rules):
            if rule.pattern is None:
                continue
            if not matched[i]:
                layers = {leaf.layout.layer for leaf in leaves if leaf.layout}
                paths = [leaf.path for leaf in leaves]
                raise ValueError(unmatched(rule, paths, layers, masked_paths(tree)))
            if i not in won:
                warn(
                    f"The rule {rule} does nothing: an earlier rule matches each of its leaves "
                    "first. Put the more specific rule first."
                )


class _Leaf(NamedTuple):
    """A leaf of a tree."""

    place: int
    path: str
    leaf: Any
    layout: LeafLayout | None

    @property
    def abstract(self) -> jax.ShapeDtypeStruct | None:
        known = shape_and_dtype(self.leaf)
        return None if known is None else jax.ShapeDtypeStruct(*known)


def _bind_leaf(rule: Rule | None, leaf: _Leaf, checked: set[Any]) -> Bound:
    constraint = None
    if rule is not None and rule.constraint is not None:
        shape, dtype = _floating(rule, leaf)
        constraint = rule.constraint.settle(leaf.path, shape, leaf.layout)
        if (shape, dtype, leaf.layout) not in checked:
            checked.add((shape, dtype, leaf.layout))
            _check_keeps_shape(constraint, leaf.path, jax.ShapeDtypeStruct(shape, dtype))
    return Bound(
        leaf.path, constraint, (leaf.place,), (leaf.path,), (leaf.layout,), (leaf.abstract,)
    )


def _bind_group(rule: Rule, group: Named) -> Bound:
    if rule.constraint is None:
        raise ValueError(
            f"The rule {rule}: None leaves a group free; write that for its leaves, as in "
            f"{group.leaves[0].path!r}: None."
        )
    arrays = tuple(jax.ShapeDtypeStruct(*_floating(rule, leaf)) for leaf in group.leaves)
    places, paths, _, layouts = zip(*group.leaves, strict=True)
    make = joined if isinstance(rule.pattern, Joint) else spread
    constraint = make(group.name, rule.constraint, paths, arrays, layouts)
    _check_keeps_shape(constraint.constraint, group.name, constraint.whole(arrays))
    return Bound(group.name, constraint, places, paths, layouts, arrays)


def _check_whole(rule: Rule, group: Named, own: list[_Leaf]) -> None:
    """Raises if a rule does not have all leaves of a group."""
    taken = [repr(leaf.path) for leaf in group.leaves if leaf not in own]
    if taken:
        raise ValueError(
            f"The rule {rule} takes the leaves of {group.name!r} as one, and an earlier rule has "
            f"taken {', '.join(taken)}. Put this rule first, or leave those out of its patterns."
        )
    if group.missing:
        paths = ", ".join(repr(leaf.path) for leaf in own)
        raise ValueError(
            f"The rule {rule} takes leaves of one parent as one, and beside {paths} there is none "
            f"that matches {', '.join(map(repr, group.missing))}. Write an earlier rule for what "
            f"stands alone, such as {own[0].path!r}: None."
        )


def _floating(rule: Rule, leaf: _Leaf) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a leaf that can be constrained."""
    known = shape_and_dtype(leaf.leaf)
    if known is None or not jnp.issubdtype(known[1], jnp.floating):
        what = (
            type(leaf.leaf).__name__
            if known is None
            else f"{describe(leaf.path, known[0])}, {known[1]}"
        )
        raise TypeError(
            f"The rule {rule} names {leaf.path!r} ({what}), and only floating-point arrays can be "
            f"constrained; leave it free with an earlier rule {leaf.path!r}: None."
        )
    return known


def _check_keeps_shape(constraint: Constraint, path: str, leaf: jax.ShapeDtypeStruct) -> None:
    # What sums over an axis of a mesh cannot be tried where there is none, nor what reads `arg`.
    if is_own(constraint) or axis_names(constraint) or has_args(constraint):
        return
    try:
        out = jax.eval_shape(constraint.at(0), leaf)
    except Exception as error:
        error.add_note(
            f"This happened in the constraint {constraint} on {describe(path, leaf.shape)}."
        )
        raise
    where = f"The constraint {constraint} on {describe(path, leaf.shape)}"
    known = shape_and_dtype(out)
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
