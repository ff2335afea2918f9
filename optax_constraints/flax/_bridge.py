"""Linen modules in NNX models, by `flax.nnx.bridge.ToNNX`."""

from typing import Any, TypeAlias

import jax
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from optax_constraints._constraint import Constraint
from optax_constraints.flax import linen
from optax_constraints.flax._static import split_arrays

Keys: TypeAlias = tuple[Any, ...]
Parts: TypeAlias = dict[Keys, dict[str, tuple[linen.Parameter, Constraint | None]]]
"""By the path of each wrapper, what its Linen module says of the parameters inside."""


def linen_parts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts:
    """What the Linen modules in an NNX model say of their parameters.

    They say it when they are called. So the model is traced to see what it calls them with,
    and then each of them, as Linen models are.

    Args:
        model: The NNX model.
        args: What it is called with. Without inputs nothing is known.
        kwargs: The same by name.

    Returns:
        What is known of each Linen module that the model calls.
    """
    modules = dict(_wrapped(model))
    if not modules or not (args or kwargs):
        return {}
    # A name comes along through whatever NNX does to the model.
    marks = {f"{__name__} {i}": keys for i, keys in enumerate(modules)}
    calls: list[tuple[Keys, Any]] = []
    inside: list[str] = []

    def watch(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        name, method = context.module.name, context.method_name
        # Flax runs setup, and a function of its own to try it, before the first call.
        own = method != "setup" and hasattr(type(context.module), method)
        if name not in marks or name in inside or not own:
            return next_fun(*args, **kwargs)
        arrays, rebuild = split_arrays((args, {**kwargs, "method": method}))
        shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
        calls.append((marks[name], rebuild(shapes)))
        inside.append(name)
        try:
            return next_fun(*args, **kwargs)
        finally:
            inside.remove(name)

    graphdef, state = nnx.split(model)
    arrays, rebuild = split_arrays((args, kwargs))

    def run(state: Any, arrays: Any) -> None:
        copied = nnx.merge(graphdef, state)
        names = {keys: name for name, keys in marks.items()}
        for keys, node in list(nnx.iter_graph(copied)):
            if keys in names:
                setattr(node, _attribute(node), modules[keys].clone(name=names[keys]))
        args, kwargs = rebuild(arrays)
        copied(*args, **kwargs)

    with nn.intercept_methods(watch):
        jax.eval_shape(run, state, arrays)
    parts: Parts = {}
    for keys, (args, kwargs) in calls:
        parts.setdefault(keys, {}).update(linen.parameters(modules[keys], args, kwargs))
    return parts


def check_known(model: Any, parts: Parts) -> None:
    """Raises if a Linen module in an NNX model may declare something that nobody has read.

    Args:
        model: The NNX model.
        parts: What is known of its Linen modules.

    Raises:
        ValueError: If there is such a module.
    """
    for keys, module in _wrapped(model):
        if keys not in parts and _may_declare(module):
            path = "/".join(map(str, keys))
            raise ValueError(
                f"{repr(path) if path else 'This model'} is a Linen {type(module).__name__} in a "
                "ToNNX, and what its layers declare is only known from a call that reaches it. "
                "Write declared(model, x) and layout(model, x), with what the model is called "
                "with, and give those to project, or to Optimizer as rules= and layout=."
            )


def _attribute(wrapper: bridge.ToNNX) -> str:
    """Where a wrapper has its module; in Flax 0.11 it is the second."""
    return "to_nnx__module" if "to_nnx__module" in vars(wrapper) else "module"


def _wrapped(model: Any) -> list[tuple[Keys, nn.Module]]:
    return [
        (keys, vars(node)[_attribute(node)])
        for keys, node in nnx.iter_graph(model)
        if isinstance(node, bridge.ToNNX)
    ]


def _may_declare(module: Any) -> bool:
    """Whether a Linen module, or one that it may make, can have a layer with constraints."""
    if isinstance(module, (list, tuple)):
        return any(map(_may_declare, module))
    if isinstance(module, dict):
        return any(map(_may_declare, module.values()))
    if not isinstance(module, nn.Module):
        return False
    if linen.declarations(module):
        return True
    package = type(module).__module__.split(".")[0]
    # A module that is not Flax's may make layers when it is called.
    return package not in ("flax", "optax_constraints") or _may_declare(
        [value for name, value in vars(module).items() if name != "parent"]
    )
