"""Writes what a type checker sees of the layers in optax_constraints/flax/nnx.py.

NNX takes its keywords in `__init__`, and a type cannot say "those, and some more": so they are
copied. `python tests/nnx_stub.py` copies them again from the Flax that is installed, and a test
compares.
"""

import collections.abc
import inspect
import pathlib
import types
import typing
from typing import Any

import flax
from flax import nnx

import optax_constraints.flax.nnx as onnx
from optax_constraints.flax._signature import SUFFIX

PATH = pathlib.Path(onnx.__file__).with_name("_nnx_layers.pyi")
PLAIN = {type(None): "None", **{t: t.__name__ for t in (bool, int, float, str)}}


def layers() -> dict[str, type]:
    """Those of Flax, by name."""
    ours = {name: cls for name, cls in vars(onnx).items() if "_takes_constraints" in dir(cls)}
    return {name: cls for name, cls in ours.items() if issubclass(cls, nnx.Module)}


def type_of(hint: Any) -> str:
    """A type in names that the stub imports; Any where that would take Flax' private ones."""
    if hint in PLAIN:
        return PLAIN[hint]
    if hint is nnx.Rngs:
        return "nnx.Rngs"
    origin, arguments = typing.get_origin(hint), [type_of(a) for a in typing.get_args(hint)]
    if origin in (typing.Union, types.UnionType) and "Any" not in arguments:
        return " | ".join(sorted(arguments, key=lambda argument: argument == "None"))
    if origin is collections.abc.Sequence:
        return f"Sequence[{', '.join(arguments)}]"
    return "Any"


def init(name: str, cls: type) -> str:
    """The `__init__` of one layer."""
    hints = typing.get_type_hints(getattr(nnx, name).__init__)
    lines, keyword_only = ["self"], False
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("*")
        hint = "Identifier | None"
        if not parameter.name.endswith(SUFFIX):
            hint = type_of(hints.get(parameter.name, Any))
        default = repr(parameter.default).replace("'", '"')
        default = default if type(parameter.default) in PLAIN else "..."
        default = "" if parameter.default is parameter.empty else f" = {default}"
        lines.append(f"{parameter.name}: {hint}{default}")
    return "".join(f"        {line},\n" for line in lines)


def stub() -> str:
    """The stub file."""
    head = f"""# Written by tests/nnx_stub.py, from Flax {flax.__version__}.

from collections.abc import Sequence
from typing import Any

from flax import nnx

from optax_constraints._config import Identifier
"""
    return head + "".join(
        f"\nclass {name}(nnx.{name}):\n    def __init__(\n{init(name, cls)}    ) -> None: ...\n"
        for name, cls in layers().items()
    )


if __name__ == "__main__":
    PATH.write_text(stub())
