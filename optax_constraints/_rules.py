"""Rules bound to a tree: a constraint for each leaf, and the walk over them."""

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_constraints._axes import Layout, LeafLayout
from optax_constraints._constraint import Constraint, axis_names, has_args, is_own
from optax_constraints._groups import Group, joined, spread
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
from optax_constraints._private import called_from_optax
from optax_constraints._text import describe, shown, warn
from optax_constraints._trees import (
    OtherStructureError,
    are_parameters,
    check_some_arrays,
    is_saved_state,
    leaves_by_path,
    masked_paths,
    rearranged,
    shape_and_dtype,
    without_boxes,
    without_saved,
)


@dataclasses.dataclass(frozen=True)
class Bound:
    """A leaf, or a group of leaves, with its constraint, axes settled, or None if it is free."""

    path: str
    """The path of the leaf, or the name of the group."""
    constraint: Constraint | None
    places: tuple[int, ...]
    """The numbers of the leaves among those of the tree."""
    paths: tuple[str, ...]
    """The path of each leaf."""
    layouts: tuple[LeafLayout | None, ...]
    leaves: tuple[jax.ShapeDtypeStruct | None, ...]
    """Shapes and dtypes."""

    @property
    def is_group(self) -> bool:
        """Whether the constraint takes several arrays at once."""
        return isinstance(self.constraint, Group)

    @functools.cached_property
    def needs_args(self) -> bool:
        """Whether the constraint needs extra arguments of `tx.update`."""
        return self.constraint is not None and has_args(self.constraint)

    @property
    def remembers(self) -> bool:
        """Whether the constraint does."""
        return self.constraint is not None and self.constraint.remembers

    def of(self, leaves: Sequence[Any]) -> Any:
        """What the constraint takes, out of all leaves: an array, or a tuple of them."""
        own = tuple(leaves[place] for place in self.places)
        return own if self.is_group else own[0]

    def remember(self, weights: Any) -> Any:
        """What the constraint remembers of its weights."""
        assert self.constraint is not None
        # A copy, lest the state and the parameters be one buffer, and both donated.
        memory = self.constraint.remember(jax.tree.map(jnp.asarray, weights))
        return jax.tree.map(jnp.array, memory)

    @functools.cached_property
    def memory(self) -> Any:
        """Structure, shapes and dtypes of what the constraint remembers."""
        return jax.eval_shape(self.remember, self.leaves if self.is_group else self.leaves[0])


class Visit(NamedTuple):
    """What a verb sees of a leaf or a group of leaves."""

    bound: Bound
    constraint: Constraint | None
    """The constraint with its numbers at one step; None if the leaf is free."""
    weights: Any
    """An array, or those of a group in a tuple."""
    memory: Any
    """What is remembered of them, or ()."""


class Bindings:
    """Rules bound to one tree: what each verb walks over.

    Args:
        bound: What holds for each leaf or group, in the order of the tree.
    """

    def __init__(self, bound: list[Bound]):
        self._bound = bound
        self._keys = list(_keys([b.path for b in bound]))

    def __iter__(self) -> Iterator[Bound]:
        return iter(self._bound)

    def __len__(self) -> int:
        return len(self._bound)

    @property
    def _rememberers(self) -> dict[str, Bound]:
        """By the key of its memory, what has one."""
        pairs = zip(self._keys, self._bound, strict=True)
        return {key: bound for key, bound in pairs if bound.remembers}

    def remember(self, params: Any) -> dict[str, Any]:
        """What constraints remember of the parameters at init, by key."""
        leaves = jax.tree.leaves(params)
        found = {key: (bound, bound.of(leaves)) for key, bound in self._rememberers.items()}
        weights = jax.tree.leaves([own for _, own in found.values()])
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in weights):
            return {key: bound.remember(own) for key, (bound, own) in found.items()}
        # As Adam does, arrays of the right shapes. What should be put in their place and is not,
        # must not pass for norms.
        return jax.tree.map(_unset, {key: bound.memory for key, (bound, _) in found.items()})

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
        self,
        params: Any,
        memory: Mapping[str, Any],
        *,
        step: jax.typing.ArrayLike,
        extra: Mapping[str, Any] | None,
    ) -> Iterator[Visit]:
        """Each leaf or group with its constraint at one step.

        Args:
            params: The parameters.
            memory: What `recall` returned.
            step: The step that schedules see.
            extra: The extra arguments that `arg` reads.

        Yields:
            A visit for each.
        """
        leaves = jax.tree.leaves(params)
        for key, bound in zip(self._keys, self._bound, strict=True):
            weights, constraint = bound.of(leaves), bound.constraint
            if constraint is None:
                yield Visit(bound, None, weights, ())
                continue
            constraint = constraint.at(step)
            if bound.needs_args:
                constraint = constraint.read({} if extra is None else extra, bound.path)
            weights = jax.tree.map(jnp.asarray, weights)
            yield Visit(bound, constraint, weights, memory.get(key, ()))

    def map(
        self,
        function: Callable[..., tuple[Any, Any]],
        params: Any,
        memory: Mapping[str, Any],
        *,
        step: jax.typing.ArrayLike,
        extra: Mapping[str, Any] | None,
        updates: Any = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Puts something else in the place of each constrained leaf.

        Args:
            function: Takes a constraint, its weights, what is remembered of them and, if there
                are updates, their update; returns what comes in their place and what to remember.
            params: The parameters.
            memory: What `recall` returned.
            step: The step that schedules see.
            extra: The extra arguments that `arg` reads.
            updates: A tree like the parameters, where leaves that do not move may be absent.

        Returns:
            A tree like the parameters, in which free leaves are as they were, or are their
            updates; and by key what constraints now remember.
        """
        treedef = jax.tree.structure(params)
        new = jax.tree.leaves(params) if updates is None else treedef.flatten_up_to(updates)
        kept = {}
        visits = self.visits(params, memory, step=step, extra=extra)
        for key, (bound, constraint, weights, own) in zip(self._keys, visits, strict=True):
            if constraint is None:
                continue
            given = [new[place] for place in bound.places]
            if updates is None:
                result, own = function(constraint, weights, own)
            elif _moves(bound, given):
                update = jax.tree.map(jnp.asarray, bound.of(new))
                result, own = function(constraint, weights, own, update)
            else:
                result = tuple(given) if bound.is_group else given[0]
            for place, leaf in zip(
                bound.places, result if bound.is_group else (result,), strict=True
            ):
                new[place] = leaf
            if constraint.remembers:
                kept[key] = own
        return treedef.unflatten(new), kept


def _moves(bound: Bound, updates: list[Any]) -> bool:
    """Whether there are updates; of a group, for all of its leaves or for none."""
    absent = [path for path, u in zip(bound.paths, updates, strict=True) if is_absent(u)]
    if absent and len(absent) < len(updates):
        raise ValueError(
            f"{bound.path!r} is constrained as one, and has updates for some of its leaves, but "
            f"none for {', '.join(map(repr, absent))}. Update all of them or none, or leave those "
            "out of the group."
        )
    return not absent


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
        named = leaves_by_path(tree)
        _check_not_flattened(named)
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
        if self._layout is None:
            return None
        # Linen's `init` returns the parameters under this key.
        return self._layout.get(path) or self._layout.get(path.removeprefix("params/"))

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
