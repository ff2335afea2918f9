"""First moments: which buffers of an optimizer's state are vectors like the gradient."""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey, tree_flatten_with_path

from optax_constraints._trees import shape_and_dtype

# The fields in which states keep first moments: Adam and most others, momentum of SGD.
_FIELDS = ("mu", "trace")

# By class, those of Optax' states that have other ones. An average that is only subtracted from
# gradients, or the centre of a variance, has to stay what it is: after a projection, nu - mu ** 2
# of a centered RMSProp may be negative. Below GaLoreState, moments have bases of their own.
_FIELDS_OF: dict[str, tuple[str, ...] | None] = {
    "DAdaptAdamWState": ("exp_avg",),
    "EmaState": ("ema",),
    "GaLoreState": None,
    "MomoAdamState": ("exp_avg",),
    "MomoState": ("exp_avg",),
    "ProdigyState": ("exp_avg",),
    "ScaleByAdanState": ("m", "v", "g"),
    "ScaleByAdemamixState": ("m1", "m2"),
    "ScaleByOptimisticGradientState": ("previous_gradient",),
    "ScaleByRStdDevState": (),
    "ScaleByRStdDevWithCountState": (),
    "ScaleBySM3State": ("nu",),
    "ScaleBySimplifiedAdEMAMixState": ("m",),
}

Moment = list[jax.Array | None]
"""By leaf of the parameters, the first moment of it, or None."""


def map_first_moments(
    function: Callable[[Moment], Moment],
    state: Any,
    params: Any,
    fields: Collection[str] | None = None,
) -> Any:
    """Puts other first moments into an optimizer's state, however deep its wrappers nest.

    What is in the right field is paired with the parameters by path and shape, so that masked
    leaves and factored moments stay as they are.

    Args:
        function: Takes the first moments in one field, and returns those to put in their place.
        state: The state.
        params: The parameters.
        fields: The fields of states that hold first moments; None for those of Optax' optimizers.

    Returns:
        The state, with all else as it was.
    """
    leaves, treedef = tree_flatten_with_path(params)
    places = {keys: place for place, (keys, _) in enumerate(leaves)}
    known = [shape_and_dtype(leaf) for _, leaf in leaves]

    def place_of(keys: Any, leaf: Any) -> int | None:
        place, own = places.get(keys), shape_and_dtype(leaf)
        if place is None or own is None or not jnp.issubdtype(own[1], jnp.floating):
            return None
        like = known[place]
        return place if like is not None and like[0] == own[0] else None

    def replaced(tree: Any) -> Any:
        found, root = tree_flatten_with_path(tree)
        own = [(place_of(keys, leaf), leaf) for keys, leaf in found]
        moment: Moment = [None] * len(leaves)
        for place, leaf in own:
            if place is not None:
                moment[place] = leaf
        new = function(moment)
        return root.unflatten([leaf if place is None else new[place] for place, leaf in own])

    def visited(node: Any) -> Any:
        names = _fields_of(node, fields)
        children, root = _children(node)
        # Parameters may have fields of these names, too, and so has a second moment of them.
        if not children or names is None or jax.tree.structure(node) == treedef:
            return node
        return root.unflatten(
            [(replaced if _is_one_of(key, names) else visited)(child) for key, child in children]
        )

    return visited(state)


def field_names(state: Any) -> Iterator[str]:
    """The names of all fields in a state, which may come several times."""
    for key, child in _children(state)[0]:
        if isinstance(key, GetAttrKey):
            yield key.name
        yield from field_names(child)


def _fields_of(node: Any, fields: Collection[str] | None) -> Collection[str] | None:
    """The fields of one state; None where no first moment is, not even further down."""
    if fields is not None:
        return fields
    cls = type(node)
    in_optax = cls.__module__.partition(".")[0] == "optax"
    return _FIELDS_OF.get(cls.__name__, _FIELDS) if in_optax else _FIELDS


def _is_one_of(key: Any, names: Collection[str]) -> bool:
    return isinstance(key, GetAttrKey) and key.name in names


def _children(node: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """What stands right below a node, with its keys, and the structure of the node."""
    found, root = tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    return [(keys[0], child) for keys, child in found if keys], root
