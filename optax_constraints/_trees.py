"""Trees of parameters: paths of their leaves, boxes around them, and what comes back of a save."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from optax_constraints._private import called_from_optax


def leaves_by_path(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda node: False
) -> list[tuple[str, Any]]:
    """The leaves of a tree in the order of `jax.tree.leaves`, each with its path.

    The path is the keys joined by "/". The attribute `value` under which Flax's variables and
    boxes hold their array is left out, and so is the key that takes its place when a whole state
    of NNX is saved and comes back as dicts. A key, field or attribute of that name elsewhere is
    not.
    """
    last = -1 if is_saved_state(tree) else None
    return [(path_of(keys[:last]), leaf) for keys, leaf in _walk(tree, is_leaf)]


def _walk(tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if _is_box(tree):
        for (key,), node in tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)[0]:
            for rest, leaf in _walk(node, is_leaf):
                yield (_BOXED if key == GetAttrKey("value") else key, *rest), leaf
        return
    for keys, node in tree_flatten_with_path(tree, is_leaf=lambda x: _is_box(x) or is_leaf(x))[0]:
        for rest, leaf in _walk(node, is_leaf) if _is_box(node) else [((), node)]:
            yield (*keys, *rest), leaf


# In the place of the attribute under which a box holds an array.
_BOXED = jax.tree_util.DictKey("value")


def _is_box(node: Any) -> bool:
    """Whether an object is a variable of NNX, or a box of metadata of Linen."""
    return _is_flax(type(node), "Variable", "VariableState", "AxisMetadata")


@functools.cache
def _is_flax(cls: type, *names: str) -> bool:
    """Whether a class is one of Flax' classes of these names, or a subclass."""
    return any(
        base.__name__ in names and base.__module__.partition(".")[0] == "flax"
        for base in cls.__mro__
    )


def is_saved_state(tree: Any) -> bool:
    """Whether each array of a tree is in a dict of its own, under the key `value`.

    One parameter called `value` tells nothing: attention has them. What Optax has masked may be
    anything.
    """
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: _is_saved_variable(x) or _is_masked(x))
    return bool(nodes) and nodes[0] is not tree and all(map(_is_saved_variable, nodes))


def _is_saved_variable(node: Any) -> bool:
    is_one = isinstance(node, Mapping) and set(node) == {"value"}
    return is_one and jax.tree.structure(node["value"]).num_nodes == 1


def without_saved(tree: Any, like: Any) -> Any:
    """A tree with arrays in the place of saved variables, unless another has them, too."""
    if not is_saved_state(tree) or is_saved_state(like):
        return tree
    return jax.tree.map(lambda node: node["value"], tree, is_leaf=_is_saved_variable)


# The collections that modules of Linen have beside their parameters.
_COLLECTIONS = {"params", "batch_stats", "cache", "intermediates", "perturbations"}


def are_parameters(tree: Any) -> list[bool]:
    """Of each leaf, whether a constraint for all parameters is meant for it.

    Where some of NNX' variables are Params, the other variables are not parameters; where there
    are Linen's `params` beside other collections of its modules, those are not. In other trees
    all leaves may be parameters.
    """
    if isinstance(tree, Mapping) and "params" in tree and _COLLECTIONS.issuperset(tree):
        return [path.partition("/")[0] == "params" for path, _ in leaves_by_path(tree)]
    kinds = [
        type(node) for node in jax.tree.leaves(tree, is_leaf=_is_box) for _ in jax.tree.leaves(node)
    ]
    if not any(_is_flax(kind, "Param") for kind in kinds):
        return [True] * len(kinds)
    return [_is_flax(kind, "Param") or not _is_flax(kind, "Variable") for kind in kinds]


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


def shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any] | None:
    """Shape and dtype of an array, an abstract array or a Python number; else None."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        # As a JAX array: without x64, NumPy's float64 is float32.
        dtype = jnp.result_type(leaf) if isinstance(leaf, (np.ndarray, np.generic)) else leaf.dtype
        return tuple(leaf.shape), dtype
    if isinstance(leaf, (bool, int, float, complex)):
        return (), jnp.result_type(leaf)
    return None


def masked_paths(tree: Any) -> list[str]:
    """The paths of the leaves that `optax.masked` or `optax.partition` took out of a tree."""
    shown = jax.tree.map(
        lambda leaf: _MASKED if _is_masked(leaf) else leaf, tree, is_leaf=_is_masked
    )
    return [path for path, leaf in leaves_by_path(shown) if leaf is _MASKED]


_MASKED = object()


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def check_arrays(tree: Any) -> None:
    """Raises if somebody gives a module, or another object, in the place of its parameters.

    Trees without leaves pass, as long as they are containers: a part of a model may be empty.
    """
    alone = jax.tree.structure(tree).num_nodes == 1
    container = isinstance(tree, (Mapping, list, tuple, type(None)))
    if alone and not container and shape_and_dtype(tree) is None:
        raise TypeError(_no_arrays(f"This {_kind(tree)} is", "no array and no tree of arrays"))


def check_some_arrays(leaves: list[tuple[str, Any]]) -> None:
    """Raises if there are leaves, and none is an array."""
    if leaves and all(shape_and_dtype(leaf) is None for _, leaf in leaves):
        path, leaf = leaves[0]
        where = f", such as the {_kind(leaf)} at {path!r}," if path else f" (a {_kind(leaf)})"
        raise TypeError(_no_arrays(f"The leaves of this tree{where} are", "no arrays"))


def _kind(thing: Any) -> str:
    return f"class {thing.__name__}" if isinstance(thing, type) else type(thing).__name__


def _no_arrays(what: str, instead: str) -> str:
    return (
        f"{what} {instead}, so that there is nothing to constrain. Give the parameters: in Flax "
        'Linen model.init(key, x)["params"], in NNX nnx.state(model, nnx.Param), in Equinox the '
        "model itself, in Haiku what init returned."
    )


class OtherStructureError(Exception):
    """Two trees that do not have the same keys."""


def rearranged(tree: Any, like: Any) -> Any:
    """The leaves of one tree in the containers of another, paired by key or by number.

    Raises:
        OtherStructureError: If one has keys that the other has not.
    """
    if not jax.tree.leaves(like) and not jax.tree.leaves(tree):
        return like  # of nothing, containers may be lost
    own, other = (_children(t) for t in (tree, like))
    if own is None or other is None:
        if own is other:
            return tree
        raise OtherStructureError
    if set(own[0]) != set(other[0]):
        raise OtherStructureError
    return other[1].unflatten([rearranged(own[0][key], child) for key, child in other[0].items()])


def _children(tree: Any) -> tuple[dict[Any, Any], Any] | None:
    """What stands below the root of a tree, by key or number, and the root; None for a leaf."""
    found, root = tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(root):
        return None
    return {jax.tree_util.keystr(keys, simple=True): child for keys, child in found}, root


def check_not_flattened(leaves: list[tuple[str, Any]]) -> None:
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
