"""Constraints declared on Flax layers, and what a model says of its parameters.

`linen` and `nnx` have the layers of the two frameworks with `<parameter>_constraint` keywords;
`declared` and `layout` take a model of either.
"""

from typing import Any

from flax import linen as _flax_linen
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

    Raises:
        TypeError: If the model is no module of Flax.
    """
    return _framework("declared", model).declared(model, *example_inputs, **kwargs)


def layout(model: Any, *example_inputs: Any, **kwargs: Any) -> dict[str, LeafLayout]:
    """What a model says of each of its parameters, for the argument `layout` of the verbs.

    Args:
        model: A Linen or NNX module.
        *example_inputs: What the model is called with; a Linen module needs them, and arrays
            may be abstract.
        **kwargs: Keyword arguments of that call.

    Returns:
        Path -> type of the layer, axes of a unit's incoming weights, axes of stacked layers.

    Raises:
        TypeError: If the model is no module of Flax.
    """
    return _framework("layout", model).layout(model, *example_inputs, **kwargs)


def _framework(verb: str, model: Any) -> Any:
    if isinstance(model, _flax_nnx.Module):
        return nnx
    if isinstance(model, _flax_linen.Module):
        return linen
    if isinstance(model, type) and issubclass(model, (_flax_nnx.Module, _flax_linen.Module)):
        raise TypeError(
            f"{verb} takes a model, and {model.__name__} is a class; write {verb}"
            f"({model.__name__}(...)), with its arguments."
        )
    kind = f"class {model.__name__}" if isinstance(model, type) else type(model).__name__
    raise TypeError(
        f"{verb} takes a Linen or NNX module, and this {kind} is none. For models of Equinox, "
        "Haiku and others write rules by path, such as {'linear/weight': max_norm(2.0, "
        "axis='fan_in')}, and no layout: 'fan_in' knows the names of their layers, `weight` and "
        "`w` with `bias` and `b`, and says where it does not; write the axes there, such as "
        "axis=1 for a weight (out, in)."
    )
