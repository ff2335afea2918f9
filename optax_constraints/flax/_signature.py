"""The keywords of layers with constraints, as `help` and editors show them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

SUFFIX = "_constraint"
"""The end of each keyword."""

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("Dense", "DenseGeneral", "Linear", "LinearGeneral"), ("kernel", "bias")),
    **dict.fromkeys(("Einsum", "Conv", "ConvTranspose", "ConvLocal"), ("kernel", "bias")),
    "Embed": ("embedding",),
    **dict.fromkeys(("LayerNorm", "BatchNorm", "GroupNorm"), ("scale", "bias")),
    "RMSNorm": ("scale",),
    **dict.fromkeys(
        ("MultiHeadDotProductAttention", "MultiHeadAttention", "SelfAttention"),
        ("kernel", "bias", "scale"),
    ),
    **dict.fromkeys(
        ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell"),
        ("kernel", "recurrent_kernel", "bias"),
    ),
    "PReLU": ("negative_slope",),
}
"""The layers of Linen and NNX, and what their parameters are called in keywords."""


def signature(layer: type, init: Callable[..., None]) -> inspect.Signature:
    """The signature of a layer's `__init__` with keywords for constraints.

    Args:
        layer: The class.
        init: Its `__init__`, without them.

    Returns:
        The signature; for a class that is not Flax's it ends in `**constraints`.
    """
    own = {
        name: parameter
        for name, parameter in inspect.signature(init).parameters.items()
        if name != "declared_constraints"  # The field of a Linen module that keeps them.
    }
    rest = [parameter for parameter in own.values() if parameter.kind is parameter.VAR_KEYWORD]
    known = next((cls for cls in layer.__mro__ if _is_flaxs(cls)), object)
    if not rest and not _is_flaxs(layer):
        rest = [inspect.Parameter("constraints", inspect.Parameter.VAR_KEYWORD)]
    keywords = [
        inspect.Parameter(name + SUFFIX, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in PARAMETERS.get(known.__name__, ())
        if name + SUFFIX not in own
    ]
    front = [parameter for parameter in own.values() if parameter not in rest]
    return inspect.Signature([*front, *keywords, *rest])


def _is_flaxs(layer: type) -> bool:
    package = layer.__module__.split(".")[0]
    return layer.__name__ in PARAMETERS and package in ("flax", "optax_constraints")


class OfInit:
    """The `__signature__` of a class whose metaclass hides that of `__init__`."""

    def __get__(self, instance: Any, owner: Any) -> inspect.Signature:
        """The one of the class; an instance is called in another way."""
        if instance is not None:
            raise AttributeError("__signature__")
        own = inspect.signature(owner.__init__)
        return own.replace(parameters=list(own.parameters.values())[1:])
