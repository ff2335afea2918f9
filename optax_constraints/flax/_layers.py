"""What Flax's layers say of their own parameters; Linen and NNX share names and shapes."""

from collections.abc import Mapping
from typing import Any

from jax import lax

from optax_constraints.sets.operator import Convolution

# Parameters that are one vector of the whole layer, whatever its shape.
_VECTORS = ("bias", "scale")


def own_fan_in(layer: Any, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes along which a unit's incoming weights run, in one parameter of a layer.

    Args:
        layer: A Linen or NNX module; subclasses count as the layer they are made from.
        name: Name of the parameter.
        shape: Its shape, as the layer sees it.

    Returns:
        The axes, or None for a layer or a parameter that this table does not know.
    """
    kind = layer_type(layer)
    batch = _batch_axes(layer, kind)
    if name in _VECTORS and kind is not None:
        return tuple(range(batch, len(shape)))
    if (kind, name) == ("Embed", "embedding"):
        return (1,)
    if (kind, name) == ("PReLU", "negative_slope"):
        return tuple(range(len(shape)))
    if name != "kernel":
        return None
    if kind in ("Dense", "DenseParams", "Linear"):
        return (0,)
    if kind in ("DenseGeneral", "LinearGeneral"):
        axis = layer.axis
        return tuple(range(batch, batch + (1 if isinstance(axis, int) else len(axis))))
    if kind == "Einsum":
        return _einsum_fan_in(layer.einsum_str)
    if kind == "Conv":
        return tuple(range(len(shape) - 1))
    if kind == "ConvLocal":  # (*positions, window and in, out)
        return (len(shape) - 2,)
    if kind == "ConvTranspose":
        window = tuple(range(len(shape) - 2))
        return (*window, len(shape) - (1 if layer.transpose_kernel else 2))
    return None


def own_convolution(layer: Any, name: str) -> Convolution | None:
    """What a convolution of Flax does with its kernel; None for other parameters and layers.

    Nor is it known with a mask, or with a function of the user's own in the place of JAX's.
    """
    kind = layer_type(layer)
    if name != "kernel" or kind not in ("Conv", "ConvTranspose"):
        return None
    changed = ("mask", "conv_general_dilated", "conv_general_dilated_cls")
    if any(getattr(layer, field, None) not in _USUAL for field in changed):
        return None
    window = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else layer.kernel_size

    def sizes(given: Any) -> tuple[int, ...]:
        given = 1 if given is None else given
        return (given,) * len(window) if isinstance(given, int) else tuple(given)

    padding = layer.padding
    if not isinstance(padding, (str, int)):
        padding = tuple(own if isinstance(own, int) else tuple(own) for own in padding)
    strides, dilation = sizes(layer.strides), sizes(layer.kernel_dilation)
    ones = (1,) * len(window)
    if kind == "Conv":
        groups, apart = layer.feature_group_count, sizes(layer.input_dilation)
        return Convolution(strides, padding, dilation, groups, apart)
    # It goes around a circle of whole strides, which has no frequencies but those of a line.
    padding = "VALID" if padding == "CIRCULAR" else padding
    # With its kernel transposed, it is the adjoint of a convolution with these strides.
    of_kernel, of_image = (strides, ones) if layer.transpose_kernel else (ones, strides)
    return Convolution(of_kernel, padding, dilation, 1, of_image)


_USUAL = (None, lax.conv_general_dilated)
_KNOWN = frozenset(
    {
        *("Dense", "DenseParams", "Linear", "DenseGeneral", "LinearGeneral", "Einsum"),
        *("Conv", "ConvLocal", "ConvTranspose", "Embed", "PReLU"),
        *("LayerNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "RMSNorm"),
    }
)


def layer_type(layer: Any) -> str | None:
    """The name of the Flax layer that a module is or is made from; None for any other."""
    for cls in type(layer).__mro__:
        if cls.__name__ in _KNOWN and cls.__module__.split(".")[0] == "flax":
            return cls.__name__
    return None


def _batch_axes(layer: Any, kind: str | None) -> int:
    """How many leading axes of a kernel number independent layers."""
    if kind == "DenseGeneral":
        batch = layer.batch_dims
        return 1 if isinstance(batch, int) else len(batch)
    if kind == "LinearGeneral":
        batch = layer.batch_axis
        return len(batch) if isinstance(batch, Mapping) else 0
    return 0


def _einsum_fan_in(einsum_str: str | None) -> tuple[int, ...] | None:
    """The axes of the kernel that do not appear in the output of an Einsum layer."""
    if einsum_str is None:
        return None
    inputs, output = einsum_str.replace(" ", "").split("->")
    kernel = inputs.split(",")[1]
    if "..." in kernel:
        return None
    return tuple(i for i, label in enumerate(kernel) if label not in output)
