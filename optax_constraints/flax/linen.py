"""Constraints declared on Flax Linen layers, and a train state that applies them.

Each layer here is Flax's own of that name, and takes a keyword for each of its parameters:
`kernel_constraint=`, `bias_constraint=` and so on. What it computes, its parameters, their names
and their initial values are those of Flax's layer, so checkpoints stay as they are. `declared`
reads what a model's layers declare, as ordinary rules; `layout` reads which axes are a unit's
incoming weights.

Example:
    >>> import jax, jax.numpy as jnp, optax
    >>> import optax_constraints as oc
    >>> from flax import linen as nn
    >>> from optax_constraints.flax import linen as ocl
    >>> model = nn.Sequential([ocl.Dense(4, kernel_constraint=oc.max_norm(1.0)), nn.Dense(1)])
    >>> x = jnp.ones((2, 3))
    >>> ocl.declared(model, x)
    {'/layers_0/kernel': MaxNorm(max_value=1.0, axis=0)}
    >>> rules, layout = ocl.declared(model, x), ocl.layout(model, x)
    >>> tx = optax.chain(optax.adam(1e-3), oc.project(rules, layout=layout))
    >>> state = tx.init(model.init(jax.random.key(0), x)["params"])
"""

import dataclasses
import functools
import glob
import itertools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.core
import jax
from flax import linen as nn
from flax import nnx, struct
from flax.core import meta
from flax.nnx import bridge

from optax_constraints._axes import LeafLayout
from optax_constraints._constraint import Constraint
from optax_constraints._text import shown
from optax_constraints._trees import path_of
from optax_constraints.flax._layers import layer_type, own_convolution, own_fan_in
from optax_constraints.flax._signature import SUFFIX, signature
from optax_constraints.flax._static import (
    layer_constraint,
    split_arrays,
)
from optax_constraints.flax._train_state import TrainState as TrainState
from optax_constraints.sets.combinators import Stacked
from optax_constraints.sets.operator import Convolution

# Layers.


class _Declared:
    """What a layer declares: (parameter, constraint) pairs.

    Not a dataclass and not a tuple: Flax looks into those, and would take the arrays that a
    constraint may hold for parts of the module.
    """

    def __init__(self, pairs: tuple[tuple[str, Constraint], ...] = ()):
        self.pairs = pairs

    def updated(self, layer: str, keywords: Mapping[str, Any]) -> "_Declared":
        """These with the constraints that keywords of a layer add, replace or take away."""
        pairs = dict(self.pairs)
        for keyword, value in keywords.items():
            name = keyword.removesuffix(SUFFIX)
            constraint = layer_constraint(f"{layer}: {keyword}={shown(value)}", value)
            pairs.pop(name, None)
            if constraint is not None:
                pairs[name] = constraint
        return _Declared(tuple(pairs.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Declared) and dict(self.pairs) == dict(other.pairs)

    def __hash__(self) -> int:
        return hash(frozenset(self.pairs))

    def __repr__(self) -> str:
        return repr(dict(self.pairs))


class _Constrained:
    """The part that `constrained` adds to a layer: it turns keywords into the one field."""

    declared_constraints: _Declared

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # Linen writes a new __init__ for each subclass, also for those that nn.scan makes.
        super().__init_subclass__(**kwargs)
        init = cls.__init__
        cls.__init__ = _collecting(init)
        vars(cls.__init__)["__signature__"] = signature(cls, init)


def declarations(module: nn.Module) -> tuple[tuple[str, Constraint], ...]:
    """What a layer itself declares: (parameter, constraint) pairs."""
    return module.declared_constraints.pairs if isinstance(module, _Constrained) else ()


def _collecting(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        fields = {field.name for field in dataclasses.fields(self)}
        keywords = {
            key: kwargs.pop(key)
            for key in list(kwargs)
            if key.endswith(SUFFIX) and key not in fields
        }
        if keywords:
            before = kwargs.get("declared_constraints", _Declared())
            kwargs["declared_constraints"] = before.updated(type(self).__name__, keywords)
        init(self, *args, **kwargs)

    return __init__


@functools.cache
def constrained(layer: Any) -> Any:
    """A Linen layer that takes a constraint for each of its parameters.

    The layer computes what it did: name, parameters, initial values and outputs are the same.
    Its constructor also takes `<parameter>_constraint=`, whose value is anything that
    `optax_constraints.get` accepts. Nothing happens until `declared` reads it.

    On a layer made of layers the keyword holds for every parameter of that name inside it,
    other than those of a layer that declares its own. In recurrent cells `kernel_constraint` is
    for the input's kernels, and `recurrent_kernel_constraint` for those of the hidden state.

    Args:
        layer: A Linen module class: one of Flax's, or of your own. It works as a decorator.

    Returns:
        A subclass of the same name; the same one each time.

    Raises:
        TypeError: If `layer` is no Linen module class.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from optax_constraints.flax.linen import constrained, declared
        >>> @constrained
        ... class Scale(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return x * self.param("factor", nn.initializers.ones, x.shape[-1:])
        >>> declared(Scale(factor_constraint="non_neg"), jnp.ones((2, 3)))
        {'/factor': NonNeg()}
    """
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise TypeError(f"constrained takes a Linen module class, not {layer!r}.")
    if issubclass(layer, _Constrained):
        return layer
    own = layer.__module__.split(".")[0] == "flax"
    body = {
        "__module__": __name__ if own else layer.__module__,
        "__qualname__": layer.__qualname__,
        "__doc__": f"Flax's `{layer.__name__}`, as `constrained` makes it."
        if own
        else layer.__doc__,
        "__annotations__": {"declared_constraints": _Declared},
        "declared_constraints": dataclasses.field(default=_Declared(), kw_only=True),
    }
    return type(layer.__name__, (_Constrained, layer), body)


# A type checker cannot learn from `constrained` which keywords it adds.
if TYPE_CHECKING:
    # There is nothing but types in that file.
    from optax_constraints.flax._linen_layers import *  # noqa: F403  # pyright: ignore[reportMissingModuleSource]
else:
    Dense = constrained(nn.Dense)
    DenseGeneral = constrained(nn.DenseGeneral)
    Einsum = constrained(nn.Einsum)
    Conv = constrained(nn.Conv)
    ConvTranspose = constrained(nn.ConvTranspose)
    ConvLocal = constrained(nn.ConvLocal)
    Embed = constrained(nn.Embed)
    LayerNorm = constrained(nn.LayerNorm)
    BatchNorm = constrained(nn.BatchNorm)
    GroupNorm = constrained(nn.GroupNorm)
    RMSNorm = constrained(nn.RMSNorm)
    MultiHeadDotProductAttention = constrained(nn.MultiHeadDotProductAttention)
    MultiHeadAttention = constrained(nn.MultiHeadAttention)
    SelfAttention = constrained(nn.SelfAttention)
    LSTMCell = constrained(nn.LSTMCell)
    OptimizedLSTMCell = constrained(nn.OptimizedLSTMCell)
    GRUCell = constrained(nn.GRUCell)
    SimpleCell = constrained(nn.SimpleCell)
    PReLU = constrained(nn.PReLU)


# Reading a model.


def declared(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Constraint]:
    """What the layers of a model declare, as rules for `variables["params"]`.

    Cost: the model is traced once, as by `jax.eval_shape`; nothing is computed.

    Args:
        model: The model, not bound to variables.
        *args: An example of what it is called with; arrays may be `jax.ShapeDtypeStruct`.
        **kwargs: The same by name, such as `train=False`. `method=` names another method than
            `__call__`, as for `model.init`.

    Returns:
        For each constrained parameter its path, with a leading `/`, and the constraint. Where
        layers are stacked, as by `nn.scan` or `nn.vmap`, the constraint is `Stacked`: each
        layer is constrained by itself.

    Raises:
        ValueError: If a layer declares a constraint for a parameter that it does not have, or
            a parameter is not the one that its layer made, so that its axes cannot be told.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> from optax_constraints.flax import linen as ocl
        >>> cell = ocl.SimpleCell(3, recurrent_kernel_constraint=oc.unit_norm())
        >>> ocl.declared(cell, jnp.ones((1, 3)), jnp.ones((1, 2)))
        {'/h/kernel': UnitNorm(axis=0)}
    """
    rules: dict[str, Constraint] = {}
    for path, (leaf, constraint) in parameters(model, args, kwargs).items():
        if constraint is not None:
            stacked = leaf.layout(path).stacked
            if stacked:
                constraint = Stacked(constraint, stacked[0] if len(stacked) == 1 else stacked)
            # Names may hold what a pattern would read as a wildcard.
            rules["/" + glob.escape(path)] = constraint
    return rules


def layout(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, LeafLayout]:
    """What a model says of the axes of each leaf of `variables["params"]`.

    Given to `project` and the other verbs, it makes `axis="fan_in"` certain for every layer of
    Flax. Cost: as for `declared`.

    Args:
        model: As for `declared`.
        *args: As for `declared`.
        **kwargs: As for `declared`.

    Returns:
        For the path of each leaf its layer's type, the axes of the leaf along which a unit's
        incoming weights run (None in a layer that is not Flax's), those along which layers are
        stacked, and what a convolution does with its kernel.

    Raises:
        ValueError: If a parameter is not the one that its layer made, so that its axes cannot
            be told.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import linen as nn
        >>> from optax_constraints.flax.linen import layout
        >>> layout(nn.Dense(3, use_bias=False), jnp.ones((1, 2)))
        {'kernel': LeafLayout(layer='Dense', fan_in=(0,), stacked=())}
    """
    leaves = _trace(model, args, kwargs).leaves
    return {path: leaf.layout(path) for path, leaf in leaves.items()}


def parameters(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> "dict[str, tuple[Parameter, Constraint | None]]":
    """The parameters of a model by path, with what is declared for each as its layer sees it."""
    trace = _trace(model, args, kwargs)
    for layer in trace.layers:
        layer.check(trace.leaves)

    def constraint(leaf: Parameter) -> Constraint | None:
        around = [layer for layer in trace.layers if layer.holds(leaf)]
        if leaf.own_constraint is not None or not around:
            return leaf.own_constraint
        return dict(max(around, key=_Layer.depth).constraints)[leaf.kind]

    return {path: (leaf, constraint(leaf)) for path, leaf in trace.leaves.items()}


@dataclasses.dataclass
class Parameter:
    """One parameter, as the layer that owns it sees it."""

    owner: tuple[str, ...]
    layer: str
    kind: str
    """The keyword that constrains it, without its ending."""
    own_shape: tuple[int, ...]
    own_fan_in: tuple[int, ...] | None
    own_stacked: tuple[int, ...] = ()
    """Axes along which layers are stacked inside of the layer."""
    own_constraint: Constraint | None = None
    """What is declared inside of the layer."""
    axes: tuple[int | None, ...] = ()
    """For each axis of the leaf the axis that the layer sees, or None for a stack of layers."""
    shape: tuple[int, ...] = ()
    convolution: Convolution | None = None

    def layout(self, path: str) -> LeafLayout:
        """The axes of the leaf."""
        fits = len(self.axes) == len(self.shape)
        own = [(a, size) for a, size in zip(self.axes, self.shape, strict=fits) if a is not None]
        if not fits or own != list(enumerate(self.own_shape)):
            raise ValueError(
                f"The axes of {path!r} cannot be told: its layer {self.layer} made shape "
                f"{self.own_shape}, and the model has shape {self.shape}, which comes from "
                "something other than nn.scan or nn.vmap. Write a rule of your own for it, "
                f"with its axes, such as {{{'/' + path!r}: max_norm(2.0, axis=0)}}."
            )
        fan_in = self.own_fan_in
        return LeafLayout(
            self.layer,
            None if fan_in is None else tuple(i for i, a in enumerate(self.axes) if a in fan_in),
            tuple(i for i, a in enumerate(self.axes) if a is None or a in self.own_stacked),
            self.convolution,
        )


class _Layer(NamedTuple):
    """A layer that declares constraints."""

    path: tuple[str, ...]
    name: str
    constraints: tuple[tuple[str, Constraint], ...]

    def depth(self) -> int:
        return len(self.path)

    def around(self, leaf: Parameter) -> bool:
        return leaf.owner[: len(self.path)] == self.path

    def holds(self, leaf: Parameter) -> bool:
        return self.around(leaf) and leaf.kind in dict(self.constraints)

    def check(self, leaves: Mapping[str, Parameter]) -> None:
        """Raises if a keyword is for a parameter that the layer does not have."""
        has = sorted({leaf.kind for leaf in leaves.values() if self.around(leaf)})
        for name, constraint in self.constraints:
            if name not in has:
                where = repr("/".join(self.path)) if self.path else "the model itself"
                known = ", ".join(kind + SUFFIX + "=" for kind in has) or "none"
                raise ValueError(
                    f"{where} ({self.name}) was given {name}{SUFFIX}={constraint!r}, and has no "
                    f"parameter {name!r}. Its parameters take {known}; leave this one out, or "
                    "switch the parameter on, as by use_bias=True."
                )


class _Axes(struct.PyTreeNode, meta.AxisMetadata[Any]):
    """A parameter on its way out of stacked layers, which tell it of each axis they add."""

    held: Any
    """The array, in the box of its own that it may have."""
    axes: tuple[int | None, ...] = struct.field(pytree_node=False)

    def __getattr__(self, name: str) -> Any:
        # Tied layers read each other's variables as if they were not in this box.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.held, name)

    def __jax_array__(self) -> Any:
        return meta.unbox(self.held)

    def unbox(self) -> Any:
        return self.held

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(held=val)

    def add_axis(self, index: int, params: Any) -> Any:
        at = index % (len(self.axes) + 1)
        held = meta.add_axis(self.held, index, params)
        return self.replace(held=held, axes=(*self.axes[:at], None, *self.axes[at:]))

    def remove_axis(self, index: int, params: Any) -> Any:
        at = index % len(self.axes)
        held = meta.remove_axis(self.held, index, params)
        return self.replace(held=held, axes=self.axes[:at] + self.axes[at + 1 :])


class _Trace:
    """What the methods of a model's layers show, one after the other, while it is traced."""

    def __init__(self) -> None:
        # A number never comes back, as the address of an object does.
        self.number = next(_numbers)
        self.leaves: dict[str, Parameter] = {}
        self.layers: list[_Layer] = []
        # By path, and by the stacks that it is seen from.
        self.axes: dict[tuple[str, tuple[str, ...]], tuple[int | None, ...]] = {}

    def __call__(
        self,
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        """Calls a method, then looks at its layer."""
        result = next_fun(*args, **kwargs)
        scope = context.module.scope
        # A model may run another one by itself, whose parameters are no part of it.
        if scope is not None and scope.get_flag(_FLAG, None) == self.number:
            self._look(context.module, scope)
        return result

    def _look(self, module: nn.Module, scope: flax.core.Scope) -> None:
        if pairs := declarations(module):
            layer = _Layer(module.path, type(module).__name__, pairs)
            if layer not in self.layers:
                self.layers.append(layer)
        if not scope.is_mutable_collection("params"):
            return
        # Inside nn.scan and nn.vmap, parameters are boxed to learn of the axes they get on the
        # way out. Elsewhere a model, or a wrapper such as nn.WeightNorm, looks at them.
        around = _transformations(scope)
        stacks = tuple(kind for kind in around if kind in _STACKS)
        boxes = around != () and around[-1] in _STACKS
        inside = _nnx_parameters(module) if isinstance(module, bridge.ToLinen) else {}
        for name, value in dict(module.variables.get("params", {})).items():

            def seen(keys: Any, leaf: Any, name: str = name) -> Any:
                own_path = "/".join(filter(None, (str(name), path_of(keys))))
                path = "/".join((*module.path, own_path))
                held = leaf.held if isinstance(leaf, _Axes) else leaf
                bare = meta.unbox(held)
                if path not in self.leaves:
                    # Layers inside this one have returned before: what is new is its own.
                    own = inside.get(own_path) or _own(module, name, bare, whole=not keys)
                    self.leaves[path] = own
                if isinstance(leaf, _Axes):
                    self.axes[path, stacks] = leaf.axes
                axes = self.axes.setdefault((path, stacks), tuple(range(bare.ndim)))
                return _Axes(held, axes) if boxes else held

            new = jax.tree_util.tree_map_with_path(seen, value, is_leaf=meta.is_axis_metadata)
            scope.put_variable("params", name, new)


_STACKS = ("scan", "vmap")


def _transformations(scope: flax.core.Scope) -> tuple[str, ...]:
    """Those around a scope that stack parameters or rewrite them, the innermost last.

    Flax writes them into the names of a path for errors: `("vmap(scan(tower))", "Dense_0")`
    is a scan around a vmap.
    """
    shown = tuple(scope.debug_path)
    names = ("",) * (len(shown) - len(scope.path)) + tuple(scope.path)
    found: list[str] = []
    for text, name in zip(shown, names, strict=True):
        kinds = []
        while text != name:
            kind, text = text[:-1].split("(", 1)
            kinds.append(kind)
        found += [kind for kind in reversed(kinds) if kind in (*_STACKS, "map_variables")]
    return tuple(found)


_FLAG = "optax_constraints"
_numbers = itertools.count()


def _own(module: nn.Module, name: str, value: Any, *, whole: bool) -> Parameter:
    """A parameter that a layer has just made; `whole` unless it is a part of one."""
    layer = layer_type(module) or type(module).__name__
    fan_in, convolution = None, None
    if whole:
        fan_in = own_fan_in(module, name, value.shape)
        convolution = own_convolution(module, name)
    kind = _kind(module, name)
    return Parameter(module.path, layer, kind, value.shape, fan_in, convolution=convolution)


def _nnx_parameters(module: bridge.ToLinen) -> dict[str, Parameter]:
    """The parameters of the NNX module in a Linen one, by path."""
    # That file imports this one.
    from optax_constraints.flax import nnx as onnx

    def make() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **module.kwargs, **rngs)

    found = {}
    for leaf in onnx.leaves(nnx.eval_shape(make)):
        known = leaf.layout()
        if leaf.constraint is not None:
            leaf.rule()  # raises if it does not fit
        found[leaf.path] = Parameter(
            module.path,
            known.layer,
            leaf.kind,
            leaf.shape,
            known.fan_in,
            known.stacked,
            leaf.constraint,
            convolution=known.convolution,
        )
    return found


_CELLS = frozenset(
    ["LSTMCell", "OptimizedLSTMCell", "GRUCell", "MGUCell", "SimpleCell", "ConvLSTMCell"]
)


def _kind(module: nn.Module, name: str) -> str:
    """The name of the parameter, or `recurrent_kernel` for kernels of a cell's hidden state."""
    in_cell = any(
        cls.__name__ in _CELLS and cls.__module__.split(".")[0] == "flax"
        for cls in type(module.parent).__mro__
    )
    if in_cell and name == "kernel" and (module.name or "").startswith("h"):
        return "recurrent_kernel"
    return name


def _trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Trace:
    """Traces the initialisation of a model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{model!r} is not a Linen module; write declared(model, x).")
    trace = _Trace()
    kwargs = dict(kwargs)
    method = kwargs.pop("method", None) or "__call__"
    arrays, rebuild = split_arrays((args, kwargs))

    def run(scope: flax.core.Scope, arrays: list[Any]) -> None:
        args, kwargs = rebuild(arrays)
        bound = model.clone(parent=scope)
        if isinstance(method, str):
            getattr(bound, method)(*args, **kwargs)
        else:
            method(bound, *args, **kwargs)

    # The flag also keeps nn.jit from taking a layer out of its cache, unseen.
    flags = {_FLAG: trace.number}
    init = flax.core.init(run, mutable=flax.core.DenyList("intermediates"), flags=flags)
    with nn.intercept_methods(trace):
        key = jax.eval_shape(lambda: jax.random.key(0))
        rngs = dict.fromkeys(("params", "dropout", "default"), key)
        _, variables = jax.eval_shape(init, rngs, arrays)
    found, trace.leaves = trace.leaves, {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(
        variables.get("params", {}), is_leaf=meta.is_axis_metadata
    )[0]:
        path = path_of(keys)
        if path not in found:
            raise ValueError(
                f"{path!r} was made outside of the methods of {type(model).__name__} and its "
                "layers, so nothing is known of it. Write rules by path for this model."
            )
        axes = leaf.axes if isinstance(leaf, _Axes) else trace.axes.get((path, ()), ())
        leaf = meta.unbox(leaf)
        trace.leaves[path] = dataclasses.replace(found[path], axes=axes, shape=leaf.shape)
    return trace
