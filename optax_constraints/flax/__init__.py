"""Constraints declared on Flax layers, and what a model says of its parameters.

`linen` and `nnx` have the layers of the two frameworks with `<parameter>_constraint` keywords;
`declared` and `layout` take a model of either.
"""

from typing import Any

from flax import nnx as _flax_nnx

from optax_constraints._axes import LeafLayout as LeafLayout
from optax_constraints._constraint import Constraint
from optax_constraints.flax import linen as linen
from optax_constraints.flax import nnx as nnx


def declared(model: Any, *example_inputs: Any, **kwargs: Any) -> dict[str, Constraint]:
    """The constraints that a model's layers declare, as rules for the verbs.

    Args:
        model: A Linen or NNX module.
        *example_inputs: What the model is called with; a Linen module needs them, and arrays
            may be abstract.
        **kwargs: Keyword arguments of that call.

    Returns:
        Rules: a path from the root of the parameters -> constraint.
    """
    return _framework(model).declared(model, *example_inputs, **kwargs)


def layout(model: Any, *example_inputs: Any, **kwargs: Any) -> dict[str, LeafLayout]:
    """What a model says of each of its parameters, for the argument `layout` of the verbs.

    Args:
        model: A Linen or NNX module.
        *example_inputs: What the model is called with; a Linen module needs them, and arrays
            may be abstract.
        **kwargs: Keyword arguments of that call.

    Returns:
        Path -> type of the layer, axes of a unit's incoming weights, axes of stacked layers.
    """
    return _framework(model).layout(model, *example_inputs, **kwargs)


def _framework(model: Any) -> Any:
    return nnx if isinstance(model, _flax_nnx.Module) else linen
