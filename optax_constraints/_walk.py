"""What rules bind to: leaves and groups with their constraints, and the walk over them.

Every verb walks here. What constraints remember of their leaves is found here, too.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_constraints._axes import LeafLayout
from optax_constraints._constraint import Constraint, has_args, moved
from optax_constraints._divided import AnyMesh, Work, divided
from optax_constraints._groups import Group
from optax_constraints._text import shown
from optax_constraints._trees import OtherStructureError, rearranged, without_boxes, without_saved


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

    @property
    def work(self) -> float:
        """About how long the projection takes, where 1 is a pass over one entry."""
        size = sum(math.prod(leaf.shape) for leaf in self.leaves if leaf is not None)
        if self.constraint is None:
            return 0
        # Measured: a factorisation of n by n takes some n / 4 times as long as a pass.
        decomposed = size**0.5 / 4 if self.constraint.spreads else 0
        return size * (1 if self.constraint.elementwise else 2 + decomposed)

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


# A single array that does not move has None for all of its updates.
_NO_UPDATES: Any = object()


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

    @functools.cached_property
    def largest(self) -> int:
        """The size of the largest leaf or group that is constrained."""
        own = (b.leaves for b in self._bound if b.constraint is not None)
        sizes = (sum(math.prod(x.shape) for x in leaves if x is not None) for leaves in own)
        return max(sizes, default=0)

    @property
    def keyed(self) -> list[tuple[str, Bound]]:
        """Each leaf or group with its key: its path or name, numbered where it is not the first."""
        return list(zip(self._keys, self._bound, strict=True))

    @property
    def constrained(self) -> dict[str, Bound]:
        """By its key, what is not free."""
        return {key: bound for key, bound in self.keyed if bound.constraint is not None}

    def turns(self, count: int) -> "list[Bindings]":
        """These bindings in parts of about equal work; what is not in a part is free there.

        The largest first, each where there is least: the same parts for the same rules and leaves.
        """
        parts: list[tuple[float, set[str]]] = [(0.0, set()) for _ in range(count)]
        found = self.constrained
        for key in sorted(found, key=lambda key: found[key].work, reverse=True):
            least = min(range(count), key=lambda i: parts[i][0])
            work, own = parts[least]
            parts[least] = work + found[key].work, own | {key}
        free = {key: dataclasses.replace(bound, constraint=None) for key, bound in self.keyed}
        return [
            Bindings([bound if key in own else free[key] for key, bound in self.keyed])
            for _, own in parts
            if own
        ]

    @property
    def _rememberers(self) -> dict[str, Bound]:
        """By the key of its memory, what has one."""
        return {key: bound for key, bound in self.keyed if bound.remembers}

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
            with contextlib.suppress(OtherStructureError):
                have[key] = rearranged(have[key], want[key])
            old, new = (jax.tree.map(_shape_and_dtype, tree[key]) for tree in (have, want))
            if old != new:
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
            if not isinstance(weights, jax.Array):
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
        updates: Any = _NO_UPDATES,
        mesh: AnyMesh | None = None,
        divides: bool = False,
    ) -> tuple[Any, dict[str, Any]]:
        """Puts something else in the place of each constrained leaf.

        Args:
            function: Takes a constraint, its weights, what is remembered of them and, if there
                are updates, their update; returns what comes in their place and what to remember.
                If it `divides`, it may get `done` besides: the projection, and what to remember.
            params: The parameters.
            memory: What `recall` returned.
            step: The step that schedules see.
            extra: The extra arguments that `arg` reads.
            updates: A tree like the parameters, where leaves that do not move may be absent.
            mesh: Over which matrices are divided; None for that of `jax.set_mesh`.
            divides: Whether `function` projects, so that matrices may be divided over a mesh.

        Returns:
            A tree like the parameters, in which free leaves are as they were, or are their
            updates; and by key what constraints now remember.
        """
        treedef = jax.tree.structure(params)
        new = jax.tree.leaves(params) if updates is _NO_UPDATES else treedef.flatten_up_to(updates)
        kept = {}
        visits = []
        for visit in self.visits(params, memory, step=step, extra=extra):
            bound, update = visit.bound, None
            came = [new[place] for place in bound.places]
            if visit.constraint is not None and updates is not _NO_UPDATES and _moves(bound, came):
                update = jax.tree.map(jnp.asarray, bound.of(new))
            visits.append((visit, update))
        moves = updates is not _NO_UPDATES
        done = self._divided(visits, mesh, moves) if divides else {}
        for key, (visit, update) in zip(self._keys, visits, strict=True):
            bound, constraint, weights, own = visit
            if constraint is None:
                continue
            result = bound.of(new)
            if not moves or update is not None:
                moving = () if update is None else (update,)
                elsewhere = {"done": done[key]} if key in done else {}
                result, own = function(constraint, weights, own, *moving, **elsewhere)
            results = result if bound.is_group else (result,)
            for place, leaf in zip(bound.places, results, strict=True):
                new[place] = leaf
            if constraint.remembers:
                kept[key] = own
        return treedef.unflatten(new), kept

    def _divided(
        self, visits: list[tuple[Visit, Any]], mesh: AnyMesh | None, moves: bool
    ) -> dict[str, tuple[Any, Any]]:
        """By key, the projections that are found on other devices than those of their leaves."""
        work = {}
        for key, (visit, update) in zip(self._keys, visits, strict=True):
            bound, constraint, weights, memory = visit
            if constraint is None or not constraint.spreads or bound.is_group:
                continue
            if moves and update is None:  # a frozen leaf, which stays as it is
                continue
            # Before a step, sets with schedules and numbers of leaves are equal or not.
            same = object() if bound.needs_args else bound.constraint
            total = weights if update is None else moved(weights, update)
            work[key] = Work(same, constraint, total, memory)
        done = divided(list(work.values()), mesh)
        return {k: new for k, new in zip(work, done, strict=True) if new is not None}


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


class WithStats(NamedTuple):
    """What is in the place of a memory where there are statistics, too.

    Not a field beside the memory: states that were saved without it would no longer load.
    """

    remembered: Any
    stats: Any


def parted(memory: Any) -> tuple[Any, Any]:
    """What is remembered, and the statistics beside it or None."""
    if isinstance(memory, Mapping) and set(memory) == set(WithStats._fields):
        memory = WithStats(**memory)  # restored without its type
    return memory if isinstance(memory, WithStats) else (memory, None)


def states_in(state: Any) -> list[Any]:
    """The states of `project` in an optimizer's state, and what else has memory."""
    return [s for s in jax.tree.leaves(state, is_leaf=_is_state) if _is_state(s)]


def memory_in(state: Any) -> Any:
    """What constraints remember, out of an optimizer's state."""
    states = states_in(state)
    if not states:
        raise ValueError(
            f"There is no state of project in {shown(type(state))}; pass what tx.init(params) or "
            "tx.update returned, where project is in tx."
        )
    memories = [s["memory"] if isinstance(s, Mapping) else s.memory for s in states]
    found = {id(memory): parted(memory)[0] for memory in memories}
    own = [memory for memory in found.values() if isinstance(memory, Mapping)]
    return by_path(own, "remember", "state=states['generator'] or state=state[-1]") or ()


def by_path(found: Sequence[Mapping[str, Any]], verb: str, instead: str) -> dict[str, Any]:
    """What several states have by path, together.

    Raises:
        ValueError: If two have the same path.
    """
    together: dict[str, Any] = {}
    for own in found:
        twice = sorted({*together} & {*own})
        if twice:
            raise ValueError(
                f"There are several states of project here that {verb} {twice[0]!r}, such as "
                "those of two models, or of a chain with project in it twice; pass the one of "
                f"these parameters alone, as in {instead}."
            )
        together.update(own)
    return together


def _is_state(x: Any) -> bool:
    """Whether something has the memory of constraints, like a state of `project`.

    That may be restored without its type; train states and optimizers say it of themselves.
    """
    if isinstance(x, Mapping):
        return set(x) == {"updates_seen", "memory"}
    return getattr(type(x), "has_memory_of_constraints", False)
