"""Rules bound to a tree: a constraint for each leaf, and the walk over them."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_constraints._axes import Layout, LeafLayout
from optax_constraints._constraint import Constraint, axis_names, is_own
from optax_constraints._patterns import Rule, Rules, parse, unmatched
from optax_constraints._private import called_from_optax
from optax_constraints._text import describe, shown, warn
from optax_constraints._trees import (
    OtherStructureError,
    are_parameters,
    check_some_arrays,
    leaves_by_path,
    masked_paths,
    rearranged,
    shape_and_dtype,
    without_boxes,
    without_saved,
)


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
        assert self.constraint is not None
        # A copy, lest the state and the parameters be one buffer, and both donated.
        return jax.tree.map(jnp.array, self.constraint.remember(jnp.asarray(leaf)))

    @functools.cached_property
    def memory(self) -> Any:
        """Structure, shapes and dtypes of what the constraint remembers."""
        return jax.eval_shape(self.remember, self.leaf)


class Visit(NamedTuple):
    """What a verb sees of a leaf."""

    bound: Bound
    constraint: Constraint | None
    """The constraint with its numbers at one step; None if the leaf is free."""
    weights: Any
    memory: Any
    """What is remembered of the leaf, or ()."""


class Bindings:
    """Rules bound to one tree: what each verb walks over.

    Args:
        bound: What holds for each leaf, in the order of `jax.tree.leaves`.
    """

    def __init__(self, bound: list[Bound]):
        self._bound = bound
        self._keys = list(_keys([b.path for b in bound]))

    def __iter__(self) -> Iterator[Bound]:
        return iter(self._bound)

    @property
    def _rememberers(self) -> dict[str, Bound]:
        """By the key of its memory, what has one."""
        pairs = zip(self._keys, self._bound, strict=True)
        return {key: bound for key, bound in pairs if bound.remembers}

    def remember(self, params: Any) -> dict[str, Any]:
        """What constraints remember of the parameters at init, by key."""
        leaves = dict(zip(self._keys, jax.tree.leaves(params), strict=True))
        found = self._rememberers
        if not any(isinstance(leaves[key], jax.ShapeDtypeStruct) for key in found):
            return {key: bound.remember(leaves[key]) for key, bound in found.items()}
        # As Adam does, arrays of the right shapes. What should be put in their place and is not,
        # must not pass for norms.
        return jax.tree.map(_unset, {key: bound.memory for key, bound in found.items()})

    def recall(self, memory: Any) -> dict[str, Any]:
        """What a state remembers, as the constraints left it.

        A state that was saved may come back with NumPy arrays, lists in place of tuples and other
        mappings; what belongs together has the same key.

        Args:
            memory: The memory of a state.

        Returns:
            By key, what each constraint remembers, as JAX arrays.

        Raises:
            ValueError: If it is not the memory of these constraints and leaves.
        """
        want = {key: bound.memory for key, bound in self._rememberers.items()}
        have = without_boxes(dict(memory)) if isinstance(memory, Mapping) else {}
        have = without_saved(have, want)
        other = "it is the state of other rules or other parameters. Start with tx.init(params)."
        for key in sorted({*have, *want}):
            if key not in want:
                raise ValueError(
                    f"The state remembers {key!r}, and no constraint of these rules does: {other}"
                )
            if key not in have:
                raise ValueError(
                    f"The state remembers nothing of {key!r}, which its constraint needs: {other}"
                )
            try:
                have[key] = rearranged(have[key], want[key])
                old, new = (jax.tree.map(_shape_and_dtype, tree[key]) for tree in (have, want))
                fits = old == new
            except OtherStructureError:
                old, new = (jax.tree.map(_shape_and_dtype, tree[key]) for tree in (have, want))
                fits = False
            if not fits:
                raise ValueError(
                    f"The state remembers {shown(old)} (shape, dtype) of {key!r}, and its "
                    f"constraint needs {shown(new)}: {other}"
                )
        return jax.tree.map(jnp.asarray, have)

    def visits(
        self, params: Any, memory: Mapping[str, Any], step: jax.typing.ArrayLike
    ) -> Iterator[Visit]:
        """Each leaf with its constraint at one step.

        Args:
            params: The parameters.
            memory: What `recall` returned.
            step: The step that schedules see.

        Yields:
            A visit a leaf.
        """
        leaves = jax.tree.leaves(params)
        for key, bound, leaf in zip(self._keys, self._bound, leaves, strict=True):
            if bound.constraint is None:
                yield Visit(bound, None, leaf, ())
            else:
                constraint = bound.constraint.at(step)
                yield Visit(bound, constraint, jnp.asarray(leaf), memory.get(key, ()))

    def map(
        self,
        function: Callable[..., tuple[Any, Any]],
        params: Any,
        memory: Mapping[str, Any],
        step: jax.typing.ArrayLike,
        updates: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Puts something else in the place of each constrained leaf.

        Args:
            function: Takes a constraint, its leaf, what is remembered of that and, if there are
                updates, its update; returns the new leaf and what to remember.
            params: The parameters.
            memory: What `recall` returned.
            step: The step that schedules see.
            updates: A tree like the parameters, where leaves that do not move may be absent.

        Returns:
            A tree like the parameters, in which free leaves are as they were, or are their
            updates; and by key what constraints now remember.
        """
        treedef = jax.tree.structure(params)
        given = [None] * treedef.num_leaves if updates is None else treedef.flatten_up_to(updates)
        new, kept = [], {}
        visits = zip(self._keys, self.visits(params, memory, step), given, strict=True)
        for key, (_, constraint, weights, own), update in visits:
            result = weights if updates is None else update
            if constraint is not None and updates is None:
                result, own = function(constraint, weights, own)
            elif constraint is not None and not is_absent(update):
                result, own = function(constraint, weights, own, jnp.asarray(update))
            if constraint is not None and constraint.remembers:
                kept[key] = own
            new.append(result)
        return treedef.unflatten(new), kept


def is_absent(update: Any) -> bool:
    """Whether a leaf gets no update: a frozen one, or one that `optax.masked` took out."""
    return update is None or isinstance(update, optax.MaskedNode)


def _unset(like: jax.ShapeDtypeStruct) -> jax.Array:
    value = np.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0
    return jnp.asarray(np.full(like.shape, value, like.dtype))


def _shape_and_dtype(x: Any) -> Any:
    return jnp.shape(x), jnp.result_type(x)


def like_before(memory: Any, kept: dict[str, Any]) -> Any:
    """A new memory in the containers of the old one."""
    return rearranged(kept, memory) if kept else memory


def _keys(paths: list[str]) -> Iterator[str]:
    """The key of each leaf's memory: its path, numbered where it is not the first."""
    taken = set(paths)
    seen: dict[str, int] = {}
    for path in paths:
        number = seen[path] = seen.get(path, 0) + 1
        key = path if number == 1 else f"{path}#{number}"
        while number > 1 and key in taken:  # another leaf has this very path
            key += "#"
        taken.add(key)
        yield key


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
        leaves = leaves_by_path(tree)
        _check_not_flattened(leaves)
        if self._rules and self._strict:
            check_some_arrays(leaves)
        winners = []
        matched, won = set(), set()
        for (path, leaf), is_parameter in zip(leaves, are_parameters(tree), strict=True):
            matching = [
                i
                for i, rule in enumerate(self._rules)
                if rule.matches(path, leaf) and (is_parameter or rule.pattern is not None)
            ]
            matched.update(matching)
            won.update(matching[:1])
            winners.append(self._rules[matching[0]] if matching else None)
        if self._strict and leaves:
            self._check_all_used([path for path, _ in leaves], matched, won, tree)
            self._check_layout([path for path, _ in leaves])
        checked: set[Any] = set()
        bound = []
        for (path, leaf), rule in zip(leaves, winners, strict=True):
            layout = self._leaf_layout(path)
            constraint = rule and _settle(rule, path, leaf, layout, checked)
            known = shape_and_dtype(leaf)
            abstract = None if known is None else jax.ShapeDtypeStruct(*known)
            bound.append(Bound(path, constraint, layout, abstract))
        return Bindings(bound)

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

    def _check_all_used(
        self, paths: list[str], matched: set[int], won: set[int], tree: Any
    ) -> None:
        for i, rule in enumerate(self._rules):
            if rule.pattern is None:
                continue
            if i not in matched:
                raise ValueError(unmatched(rule, paths, masked_paths(tree)))
            if i not in won:
                warn(
                    f"The rule {rule} does nothing: an earlier rule matches each of its leaves "
                    "first. Put the more specific rule first."
                )


def _settle(
    rule: Rule, path: str, leaf: Any, layout: LeafLayout | None, checked: set[Any]
) -> Constraint | None:
    if rule.constraint is None:
        return None
    known = shape_and_dtype(leaf)
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
    if not is_own(constraint) and key not in checked and not axis_names(constraint):
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
