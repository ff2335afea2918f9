"""Flax NNX layers that declare their own constraints, and what a model of them says.

Example:
    >>> import jax.numpy as jnp, optax
    >>> from flax import nnx
    >>> import optax_constraints as oc
    >>> import optax_constraints.flax.nnx as onnx
    >>> class Model(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.hidden = onnx.Linear(2, 4, kernel_constraint=oc.max_norm(1.0), rngs=rngs)
    ...         self.head = onnx.Linear(4, 1, bias_constraint="non_neg", rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.head(nnx.relu(self.hidden(x)))
    >>> model = Model(nnx.Rngs(0))
    >>> onnx.declared(model)
    {'/head/bias': NonNeg(), '/hidden/kernel': MaxNorm(max_value=1.0, axis=0)}
    >>> optimizer = onnx.Optimizer(model, optax.adam(0.1))
    >>> grads = nnx.grad(lambda model: model(jnp.ones((1, 2))).sum())(model)
    >>> _ = optimizer.update(model, grads)
    >>> bool((jnp.linalg.norm(model.hidden.kernel[...], axis=0) <= 1 + 1e-6).all())
    True
"""

import dataclasses
import functools
import glob
import inspect
import itertools
import types
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.nnx.training.optimizer import to_opt_state

from optax_constraints import _stats
from optax_constraints._axes import Layout, LeafLayout, drop_axes, insert_axes
from optax_constraints._constrain import constrain_bound
from optax_constraints._constraint import Constraint
from optax_constraints._divided import AnyMesh, check_mesh
from optax_constraints._lost_steps import warn_of_lost_steps
from optax_constraints._patterns import Rules
from optax_constraints._rules import Binder
from optax_constraints._text import describe, shown
from optax_constraints._trees import leaves_by_path
from optax_constraints._walk import parted
from optax_constraints.flax import linen
from optax_constraints.flax._bridge import Parts, check_known, linen_parts
from optax_constraints.flax._layers import layer_type, own_convolution, own_fan_in
from optax_constraints.flax._signature import SUFFIX, OfInit, signature
from optax_constraints.flax._static import HeldLayout, HeldRules, binder, layer_constraint
from optax_constraints.sets.combinators import Stacked
from optax_constraints.sets.operator import Convolution

Keys = tuple[Any, ...]
Shape = tuple[int, ...]

_CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell)
_HIDDEN_TO_HIDDEN = ("hi", "hf", "hg", "ho", "dense_h")
# They make their own layers, so that those are stacked together or not at all.
_UNITS = (nnx.MultiHeadAttention, *_CELLS)


# Their items belong to the module that holds them.
_CONTAINERS = tuple(getattr(nnx, name) for name in ("List", "Dict") if hasattr(nnx, name))


class _Declared(NamedTuple):
    """A constraint for one kind of parameter of a layer."""

    name: str
    constraint: Constraint
    leaves: tuple[tuple[Keys, Shape], ...]
    """Where they are in the layer, and their shapes when it was made: under `nnx.vmap` those
    of one layer, which the stacked arrays do not tell."""


@dataclasses.dataclass(frozen=True)
class _Declarations:
    """What a layer declares. NNX hashes it as a static attribute; a bare tuple is a pytree."""

    entries: tuple[_Declared, ...]


@functools.cache
def constrained(layer: type[nnx.Module]) -> Any:
    """A layer class that takes a constraint for each of its parameters.

    The class that comes back is a subclass of the same name, and makes the same parameters
    from the same random numbers: checkpoints and outputs do not change. A constraint is
    declared, not applied: `Optimizer` applies it, or `optax_constraints.project` with
    `declared(model)`.

    For a parameter called `kernel` the keyword is `kernel_constraint`, and it takes whatever
    `optax_constraints.get` takes; None declares nothing. A layer made of layers hands it on to
    each parameter of that name inside, and a constraint declared further inside wins. In
    recurrent cells `kernel_constraint` is for the kernels of the input, and
    `recurrent_kernel_constraint` for those of the hidden state, as in Keras.

    Costs nothing when the layer runs. The same class in gives the same class out.

    Args:
        layer: A subclass of `nnx.Module`, Flax's own or yours, that makes its parameters
            in `__init__`. It also works as a decorator.

    Returns:
        The subclass. A keyword that `layer` itself takes stays its own.

    Raises:
        TypeError: If `layer` is no such class; when a layer is made, if a constraint does not
            hash.
        ValueError: When a layer is made, if it has no parameter of that name, or the value is
            no constraint.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import optax_constraints as oc
        >>> @constrained
        ... class Scale(nnx.Module):
        ...     def __init__(self, features):
        ...         self.gain = nnx.Param(jnp.ones(features))
        >>> declared(Scale(3, gain_constraint=oc.non_neg()))
        {'/gain': NonNeg()}
    """
    if not (inspect.isclass(layer) and issubclass(layer, nnx.Module)):
        raise TypeError(
            f"constrained takes a subclass of nnx.Module, not {layer!r}; write "
            "constrained(nnx.Linear)(2, 3, kernel_constraint=..., rngs=rngs)."
        )
    if "_takes_constraints" in vars(layer):
        return layer
    own = inspect.signature(layer.__init__).parameters

    @functools.wraps(layer.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = [name for name in kwargs if name.endswith(SUFFIX) and name not in own]
        wanted = {name: kwargs.pop(name) for name in given}
        layer.__init__(self, *args, **kwargs)
        _declare(self, wanted)

    vars(__init__)["__signature__"] = signature(layer, layer.__init__)
    body = {
        "__init__": __init__,
        "__signature__": OfInit(),
        # Not the text of `layer`: its examples would be run again as doctests of this one.
        "__doc__": f"`{layer.__module__}.{layer.__name__}` that takes `<parameter>_constraint=`.",
        "__module__": __name__ if layer.__module__.startswith("flax.") else layer.__module__,
        "__qualname__": layer.__qualname__,
        "_takes_constraints": True,
    }
    # Flax asks each subclass anew whether it is a pytree.
    is_pytree = getattr(layer, "_pytree__is_pytree", getattr(layer, "_object__is_pytree", True))
    options = {} if is_pytree else {"pytree": False}
    return types.new_class(layer.__name__, (layer,), options, lambda body_: body_.update(body))


def _declare(module: Any, wanted: Mapping[str, Any]) -> None:
    """Keeps the constraints that a layer was given."""
    entries = {entry.name: entry for entry in _declarations(module)}
    modules, params = _walk(module)
    leaves: dict[str, list[tuple[Keys, Shape]]] = {}
    for keys, param in params:
        leaves.setdefault(_name(modules, keys), []).append((keys, tuple(param.shape)))
    for keyword, value in wanted.items():
        where = f"{type(module).__name__}({keyword}={shown(value)})"
        name = keyword.removesuffix(SUFFIX)
        constraint = layer_constraint(where, value)
        try:
            hash(constraint)
        except TypeError as error:
            raise TypeError(f"{where}: {error}") from error
        if constraint is None:
            continue
        if name not in leaves:
            has = ", ".join(sorted(leaves)) or "none at all"
            raise ValueError(
                f"{where}: this layer has no parameter {name!r}; it has {has}. Leave the keyword "
                "out, or switch the parameter on, as with use_bias=True."
            )
        entries[name] = _Declared(name, constraint, tuple(leaves[name]))
    if entries:
        module._optax_constraints = _Declarations(tuple(entries.values()))


def _declarations(module: Any) -> tuple[_Declared, ...]:
    held = vars(module).get("_optax_constraints")
    return held.entries if isinstance(held, _Declarations) else ()


def _walk(model: Any) -> tuple[dict[Keys, Any], list[tuple[Keys, Any]]]:
    """The modules by path, and each parameter once, under the path that `nnx.state` uses."""
    modules, params = {}, {}
    for keys, value in nnx.iter_graph(model):
        if isinstance(value, nnx.Module):
            modules[keys] = value
        elif isinstance(value, nnx.Param) and hasattr(value, "shape"):
            params.setdefault(id(value), (keys, value))
    return modules, list(params.values())


def _name(modules: Mapping[Keys, Any], keys: Keys) -> str:
    """The name of a parameter in keywords: its last one, since the items of lists have none."""
    name = next((key for key in reversed(keys) if isinstance(key, str)), "")
    in_cell = isinstance(modules.get(keys[:-2]), _CELLS)
    if in_cell and name == "kernel" and keys[-2] in _HIDDEN_TO_HIDDEN:
        return "recurrent_kernel"
    return name


def _child(node: Any, key: Any) -> Any:
    return node[key] if isinstance(node, (Mapping, Sequence)) else getattr(node, key)


class Leaf(NamedTuple):
    """One parameter of a model, and what is known of it."""

    path: str
    kind: str
    """The keyword that constrains it, without its ending."""
    shape: Shape
    layer: str
    own: Shape | None
    """The shape that its layer gave it; None if not known."""
    own_fan_in: tuple[int, ...] | None
    """The axes of a unit's incoming weights in an array of that shape."""
    stackings: list[tuple[int, ...]]
    """The axes along which layers may be stacked; empty if its shape does not fit the layer's."""
    unit: int
    """The same for parameters that were made in one call."""
    constraint: Constraint | None
    own_stacked: tuple[int, ...] = ()
    """Axes of an array of the shape `own` along which layers are stacked already."""
    convolution: Convolution | None = None

    @property
    def pattern(self) -> str:
        """The pattern of its path: names may hold what would be read as a wildcard."""
        return "/" + glob.escape(self.path)

    def stacked(self) -> tuple[int, ...]:
        """The axes along which layers are stacked."""
        if len(self.stackings) > 1:
            axes = " or ".join(str(a[0] if len(a) == 1 else a) for a in self.stackings)
            raise ValueError(
                f"{describe(self.path, self.shape)} holds a stack of {self.layer} parameters of "
                f"shape {self.own}, and its sizes do not tell whether along axis {axes}. Stack "
                "another number of layers; or declare nothing here and give the stack axis in a "
                f"rule, {{{self.pattern!r}: Stacked(constraint, axis=...)}}, whose constraint has "
                "an explicit axis, without layout(model)."
            )
        outer = self.stackings[0] if self.stackings else ()
        return tuple(sorted((*outer, *insert_axes(self.own_stacked, outer))))

    def layout(self) -> LeafLayout:
        """The axes of the leaf."""
        stacked, fan_in = self.stacked(), self.own_fan_in
        if fan_in is not None:
            fan_in = insert_axes(fan_in, self.stackings[0] if self.stackings else ())
        return LeafLayout(self.layer, fan_in, stacked, self.convolution)

    def rule(self) -> Constraint:
        """The constraint of the leaf, for the array in which its layers are stacked."""
        assert self.constraint is not None
        if not self.stackings:
            raise ValueError(
                f"{describe(self.path, self.shape)} had the shape {self.own} when its {self.layer} "
                f"declared {self.constraint} for it, and is no stack of such arrays. Declare "
                "nothing here and give a rule for its path."
            )
        axes = self.stacked()
        return (
            Stacked(self.constraint, axes[0] if len(axes) == 1 else axes)
            if axes
            else (self.constraint)
        )


def leaves(model: Any, parts: Parts | None = None) -> list[Leaf]:
    """Reads the parameters of a model, in the order of its graph."""
    modules, params = _walk(model)
    owners: dict[int, list[tuple[Any, str]]] = {}
    found: dict[int, list[tuple[int, Constraint, Shape]]] = {}
    for keys, module in modules.items():
        if not isinstance(module, _CONTAINERS):
            for name, value in vars(module).items():
                owners.setdefault(id(value), []).append((module, name))
        for entry in _declarations(module):
            for inside, own in entry.leaves:
                param = _declared_param(keys, module, entry, inside)
                found.setdefault(id(param), []).append((len(inside), entry.constraint, own))

    leaves = []
    for keys, param in params:
        path, shape = "/".join(map(str, keys)), tuple(param.shape)
        above = [modules[keys[:i]] for i in range(len(keys), -1, -1) if keys[:i] in modules]
        nearest = next((m for m in above if not isinstance(m, _CONTAINERS)), model)
        holders = owners.get(id(param), [(nearest, _name(modules, keys))])
        # Of the layers that share a parameter, those that Flax made know its axes.
        holders = [h for h in holders if _own_shape(*h) is not None] or holders[:1]
        owner, name = holders[0]
        constraints = sorted(found.get(id(param), ()), key=lambda declaration: declaration[0])
        constraint = _nearest_constraint(path, constraints)
        part = None
        for wrapper, inside in (parts or {}).items():
            if keys[: len(wrapper)] == wrapper:
                part = inside.get("/".join(map(str, keys[len(wrapper) :])))
        if part is not None:
            leaves.append(_of_linen(path, shape, *part, around=constraint))
            continue
        own, stackings = None, []
        for own_shape in (_own_shape(owner, name), *(own for _, _, own in constraints[:1])):
            if own_shape is not None and not stackings:
                own, stackings = own_shape, _stackings(shape, own_shape)
        fan_ins = {own_fan_in(*h, own) for h in holders} if own is not None and stackings else set()
        convolutions = {own_convolution(*h) for h in holders} if fan_ins else set()
        leaves.append(
            Leaf(
                path,
                _name(modules, keys),
                shape,
                layer_type(owner) or type(owner).__name__,
                own,
                fan_ins.pop() if len(fan_ins) == 1 else None,
                stackings,
                id(next((m for m in above if isinstance(m, _UNITS)), owner)),
                constraint,
                convolution=convolutions.pop() if len(convolutions) == 1 else None,
            )
        )
    return [leaf._replace(stackings=_narrow(leaf, leaves)) for leaf in leaves]


def _of_linen(
    path: str,
    shape: Shape,
    own: linen.Parameter,
    constraint: Constraint | None,
    around: Constraint | None,
) -> Leaf:
    """A parameter of a Linen module, of which that module says this."""
    known = own.layout(path)
    return Leaf(
        path,
        own.kind,
        shape,
        known.layer,
        own.shape,
        known.fan_in,
        _stackings(shape, own.shape),
        id(own),
        around if constraint is None else constraint,
        known.stacked,
        known.convolution,
    )


def _declared_param(keys: Keys, module: Any, entry: _Declared, inside: Keys) -> Any:
    try:
        param = functools.reduce(_child, inside, module)
    except (AttributeError, LookupError):
        param = None
    if not isinstance(param, nnx.Param):
        path = "/".join(map(str, (*keys, *inside)))
        raise ValueError(
            f"{path!r} has the constraint {entry.constraint} from the {entry.name}{SUFFIX} of "
            f"a {type(module).__name__}, and is no parameter any more. Make the layer again, "
            "with the constraints that it now needs."
        )
    return param


def _nearest_constraint(path: str, found: list[tuple[int, Constraint, Shape]]) -> Any:
    """The constraint that was declared on the innermost layer, of those in this order."""
    nearest = [constraint for depth, constraint, _ in found if depth == found[0][0]]
    if any(constraint != nearest[0] for constraint in nearest):
        raise ValueError(
            f"The layers that share {path!r} declare different constraints "
            f"for it: {' and '.join(map(str, nearest))}. Declare it on one of them."
        )
    return nearest[0] if nearest else None


def _own_shape(layer: Any, name: str) -> Shape | None:
    """The shape of a parameter of a Flax layer, by the layer's own attributes."""
    kind = layer_type(layer)
    if kind in ("Conv", "ConvTranspose", "Linear") and name == "bias":
        return (layer.out_features,)
    if kind in ("Conv", "ConvTranspose", "Einsum") and name == "kernel":
        return tuple(layer.kernel_shape)
    if (kind, name) == ("Einsum", "bias"):
        return tuple(layer.bias_shape)
    if (kind, name) == ("Linear", "kernel"):
        return layer.in_features, layer.out_features
    if kind == "LinearGeneral" and name in ("kernel", "bias"):
        ins = layer.in_features if name == "kernel" else ()
        return (*layer.batch_axis.values(), *ins, *layer.out_features)
    if (kind, name) == ("Embed", "embedding"):
        return layer.num_embeddings, layer.features
    if kind == "GroupNorm" and name in ("scale", "bias"):
        return (layer.num_groups * layer.group_size,)
    if kind in ("BatchNorm", "InstanceNorm", "LayerNorm", "RMSNorm") and name in ("scale", "bias"):
        return (layer.num_features,)
    return () if (kind, name) == ("PReLU", "negative_slope") else None


def _stackings(shape: Shape, own: Shape) -> list[tuple[int, ...]]:
    """The axes that leave `own` when they are taken out of `shape`; each way to choose them."""
    if len(shape) == len(own):
        return [()]
    subsets = itertools.combinations(range(len(shape)), max(len(shape) - len(own), 0))
    return [axes for axes in subsets if drop_axes(shape, axes) == own]


def _narrow(leaf: Leaf, leaves: list[Leaf]) -> list[tuple[int, ...]]:
    """Keeps the stackings that agree with those of the parameters made in the same call.

    They share one `out_axes`, which counts from the front or, if negative, from the end.
    """
    if len(leaf.stackings) < 2:
        return leaf.stackings
    extra = len(leaf.stackings[0])
    unit = [other for other in leaves if other.unit == leaf.unit]
    others = [other for other in unit if other.stackings and len(other.stackings[0]) == extra]

    def agrees(axes: tuple[int, ...], from_end: bool) -> bool:
        shifts = [len(o.shape) - len(leaf.shape) if from_end else 0 for o in others]
        return all(
            tuple(a + shift for a in axes) in o.stackings
            for o, shift in zip(others, shifts, strict=True)
        )

    kept = [axes for axes in leaf.stackings if agrees(axes, False) or agrees(axes, True)]
    return kept or leaf.stackings


def declared(model: nnx.Module, *example_inputs: Any, **kwargs: Any) -> dict[str, Constraint]:
    """The constraints that the layers of a model declare, as rules.

    Reads the module graph once; runs nothing.

    Args:
        model: A module; its arrays may be abstract, as from `nnx.eval_shape`.
        *example_inputs: Needed only for Linen modules in it, by `nnx.bridge.ToNNX`: an example
            of what the model is called with. Arrays may be abstract.
        **kwargs: The same by name.

    Returns:
        For each parameter with a constraint the pattern of its path, anchored at the root, and
        the constraint: `Stacked(constraint, axis)` where layers are stacked, as by `nnx.vmap`.
        A parameter that layers share is there once, under the path of `nnx.state`.

    Raises:
        ValueError: If sizes do not tell along which axis layers are stacked; if layers that
            share a parameter declare different constraints for it; if a parameter is gone; if
            a Linen module may declare something and the inputs are missing.

    Example:
        >>> from flax import nnx
        >>> import optax_constraints as oc
        >>> @nnx.vmap
        ... def stack(key):
        ...     return Linear(2, 3, kernel_constraint=oc.unit_norm(), rngs=nnx.Rngs(key))
        >>> declared(stack(jax.random.split(jax.random.key(0), 5)))
        {'/kernel': Stacked(constraint=UnitNorm(axis=0), axis=0)}
    """
    parts = linen_parts(model, example_inputs, kwargs)
    check_known(model, parts)
    found = leaves(model, parts)
    return {leaf.pattern: leaf.rule() for leaf in found if leaf.constraint is not None}


def layout(model: nnx.Module, *example_inputs: Any, **kwargs: Any) -> dict[str, LeafLayout]:
    """What a model says of each of its parameters, for `axis="fan_in"` and the report.

    Reads the module graph once; runs nothing.

    Args:
        model: A module; its arrays may be abstract, as from `nnx.eval_shape`.
        *example_inputs: Needed only for Linen modules in it, by `nnx.bridge.ToNNX`: an example
            of what the model is called with. Arrays may be abstract.
        **kwargs: The same by name.

    Returns:
        For the path of each `nnx.Param` the type of its layer (Flax's, where it is made from
        one), the axes of a unit's incoming weights, None where nobody knows, the axes along which
        layers are stacked, and what a convolution does with its kernel. Axes are those of the array
        as it is stored.

    Raises:
        ValueError: As for `declared`.

    Example:
        >>> from flax import nnx
        >>> conv = nnx.Conv(2, 3, kernel_size=(5, 5), use_bias=False, rngs=nnx.Rngs(0))
        >>> layout(conv)["kernel"][:3]
        ('Conv', (0, 1, 2), ())
    """
    parts = linen_parts(model, example_inputs, kwargs)
    return {leaf.path: leaf.layout() for leaf in leaves(model, parts)}


# `layout` is also the name of an argument.
_layout_of = layout


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` after whose update the parameters of the model are in their sets.

    The weights become ``P(p + u)`` to the bit, where `u` is the update of `tx` and `P` the
    projection. With `project` at the end of `tx` they are ``p + (P(p + u) - p)``, which rounds
    once more. A schedule in a constraint sees `step`, which is 0 in the first update.

    Cost: one pass over each constrained leaf, or two for a norm, after the update. With
    `stats=True`, and one more pass, `optax_constraints.stats(optimizer)` has how hard each
    constraint binds.

    Args:
        model: The model. It is not kept.
        tx: An Optax transformation, without `project`.
        wrt: Which variables are trained, as for `nnx.Optimizer`.
        rules: Which leaf is under which constraint, as for `project`; by default what the
            model's layers declare, as far as it is trained.
        layout: By default that of the model.
        mesh: As for `project`.
        stats: As for `project`; an update is here what the weights moved by.
        **options: Further arguments of `nnx.Optimizer`.

    Raises:
        ValueError: If there are no rules and nothing is declared; if the rules do not fit the
            model, as for `project`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from flax import nnx
        >>> import optax_constraints as oc
        >>> model = Linear(1, 2, bias_constraint=oc.non_neg(), rngs=nnx.Rngs(0))
        >>> optimizer = Optimizer(model, optax.sgd(1.0))
        >>> grads = nnx.grad(lambda model: model(jnp.ones((1, 1))).sum())(model)
        >>> _ = optimizer.update(model, grads)
        >>> model.bias[...]
        Array([0., 0.], dtype=float32)
    """

    has_memory_of_constraints = True

    def __init__(
        self,
        model: Any,
        tx: optax.GradientTransformation,
        *,
        wrt: Any = nnx.Param,
        rules: Rules = None,
        layout: Layout | None = None,
        mesh: AnyMesh | None = None,
        stats: bool = False,
        **options: Any,
    ):
        """Makes the state of `tx`, and checks that the rules fit the model."""
        super().__init__(model, tx, wrt=wrt, **options)
        params = nnx.state(model, wrt)
        if rules is None:
            trained = {"/" + glob.escape(path) for path, _ in leaves_by_path(params)}
            rules = {p: constraint for p, constraint in declared(model).items() if p in trained}
            if not rules:
                raise ValueError(
                    f"No layer of this {type(model).__name__} declares a constraint for what is "
                    "trained, and there are no rules. Make a layer with one, as in optax_"
                    "constraints.flax.nnx.Linear(2, 3, kernel_constraint=max_norm(2.0), "
                    'rngs=rngs), or write Optimizer(..., rules={"kernel": max_norm(2.0)}).'
                )
        self._rules = HeldRules(rules)
        self._layout = HeldLayout(_layout_of(model) if layout is None else layout)
        self._mesh = check_mesh("Optimizer", mesh)
        bind = self._bind()
        # Raises if the rules do not fit.
        memory = _stats.start(bind, params) if stats else bind.start(params)
        warn_of_lost_steps(bind(params))
        if any(bound.needs_args for bound in bind(params)):
            self.tx = optax.with_extra_args_support(self.tx)
        self.memory = nnx.data(to_opt_state(memory))

    def _bind(self) -> Binder:
        return binder(self._rules, self._layout)

    def update(self, model: Any, grads: Any, /, **kwargs: Any) -> Any:
        """Updates the model and the optimizer's state, and projects the parameters.

        Args:
            model: The model.
            grads: Gradients, from `nnx.grad`.
            **kwargs: For `tx.update`.

        Returns:
            What `nnx.Optimizer.update` returns: the updates before projection.
        """
        # Unsigned in NNX; schedules subtract from it.
        step = jnp.asarray(self.step[...], jnp.int32)
        has_stats = parted(self.memory)[1] is not None
        before = jax.tree.map(jnp.asarray, nnx.state(model, self.wrt)) if has_stats else None
        updates = super().update(model, grads, **kwargs)
        memory = jax.tree.map(lambda held: held[...], self.memory, is_leaf=_is_variable)
        params, memory = constrain_bound(
            nnx.state(model, self.wrt),
            self._bind(),
            memory,
            step=step,
            extra=kwargs,
            before=before,
            mesh=self._mesh,
        )
        nnx.update(model, params)
        jax.tree.map(_set, self.memory, memory, is_leaf=_is_variable)
        return updates


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _set(variable: nnx.Variable, array: jax.Array) -> None:
    variable[...] = array


# A type checker cannot learn from `constrained` which keywords it adds.
if TYPE_CHECKING:
    # There is nothing but types in that file.
    from optax_constraints.flax._nnx_layers import *  # noqa: F403  # pyright: ignore[reportMissingModuleSource]
else:
    Linear = constrained(nnx.Linear)
    LinearGeneral = constrained(nnx.LinearGeneral)
    Einsum = constrained(nnx.Einsum)
    Conv = constrained(nnx.Conv)
    ConvTranspose = constrained(nnx.ConvTranspose)
    Embed = constrained(nnx.Embed)
    LayerNorm = constrained(nnx.LayerNorm)
    BatchNorm = constrained(nnx.BatchNorm)
    GroupNorm = constrained(nnx.GroupNorm)
    RMSNorm = constrained(nnx.RMSNorm)
    MultiHeadAttention = constrained(nnx.MultiHeadAttention)
    LSTMCell = constrained(nnx.LSTMCell)
    OptimizedLSTMCell = constrained(nnx.OptimizedLSTMCell)
    GRUCell = constrained(nnx.GRUCell)
    SimpleCell = constrained(nnx.SimpleCell)
    if hasattr(nnx, "PReLU"):  # not yet in Flax 0.11
        PReLU = constrained(nnx.PReLU)
