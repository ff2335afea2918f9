"""What papers and production systems do with weights, each a few lines over the rest.

Imported only on request: ``from optax_constraints import recipes``.
"""

import functools
import glob
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._args import arg
from optax_constraints._axes import Axis, Layout, check_axis, layout_of, settle_axis
from optax_constraints._constraint import Constraint
from optax_constraints._fused_adam import FusedOptimizer as FusedOptimizer
from optax_constraints._fused_adam import fused_adam as fused_adam
from optax_constraints._patterns import Pattern, is_floating, parse, unmatched
from optax_constraints._project import project
from optax_constraints._text import describe, shown
from optax_constraints._trees import leaves_by_path, shape_and_dtype
from optax_constraints._walk import is_absent
from optax_constraints.sets.combinators import compose, stacked
from optax_constraints.sets.elementwise import scale
from optax_constraints.sets.norm import fixed_norm, unit_norm
from optax_constraints.sets.part import part


def relative_step(
    axis: Axis = None, *, layout: Layout | None = None
) -> optax.GradientTransformationExtraArgs:
    """Scales the update of each unit to the norm of its weights: ``u * ||p|| / ||u||``.

    After it a learning rate of 0.01 moves each unit by 1% of its norm, whatever the optimizer made
    of the gradient. A unit of zeros never moves. The step of Y. You, I. Gitman and B. Ginsburg,
    "Large batch training of convolutional networks", 2017, without weight decay, for whole tensors;
    of Y. Liu, J. Bernstein, M. Meister and Y. Yue, "Learning by turning: neural architecture aware
    optimisation", ICML 2021, for neurons. Leaves that are not floating-point are passed over. Two
    passes over a leaf and its update.

    Args:
        axis: The axes along which one unit runs, as for `max_norm`; by default the whole tensor.
            (-2, -1) is each matrix of a stack, and a matrix that is in none.
        layout: As for `project`.

    Returns:
        The transformation. It keeps the sign of the updates, has no state, and needs `params`.

    Raises:
        TypeError: If `axis` is of the wrong kind.
        ValueError: If `axis` names an axis twice; in `update`, if a leaf does not have it or there
            are no `params`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from optax_constraints import recipes
        >>> tx = optax.chain(optax.adam(1.0), recipes.relative_step(), optax.scale(0.01))
        >>> w = jnp.array([3.0, 4.0])
        >>> updates, _ = tx.update(jnp.array([0.1, 0.2]), tx.init(w), w)
        >>> print(f"{jnp.linalg.norm(updates):.4f}")  # 1% of the norm of w
        0.0500
    """
    axis = check_axis("relative_step", axis)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        if params is None:
            raise ValueError(
                "relative_step needs the parameters; write tx.update(grads, state, params)."
            )
        treedef = jax.tree.structure(params)

        def scaled(path: str, p: Any, u: Any) -> Any:
            if is_absent(u) or not is_floating(p):
                return u
            axes = settle_axis("relative_step", axis, jnp.shape(p), path, layout_of(layout, path))
            dtype = _numerics.compute_dtype(jnp.result_type(p), jnp.result_type(u))
            weights, step = (jnp.asarray(x, dtype) for x in (p, u))
            size, length = (_numerics.norm(x, axes) for x in (weights, step))
            # Below this an update counts as none, as in AdamH.
            return (step / jnp.maximum(length, 1e-10) * size).astype(jnp.result_type(u))

        pairs = zip(leaves_by_path(params), treedef.flatten_up_to(updates), strict=True)
        return treedef.unflatten([scaled(path, p, u) for (path, p), u in pairs]), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def hyperball(
    optimizer: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis: Axis = None,
    layout: Layout | None = None,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that turns weights by a given angle, and keeps their norms at init.

    The update of each unit is as long as its weights times `learning_rate`; then the norm is set
    back to what it was at init, so that it does not drift. With Adam that is AdamH, with Muon
    MuonH. K. Wen et al., "Fantastic pretraining optimizers and where to find them II: hyperball
    optimization", 2026. It is for matrices: give embeddings, biases and scales an optimizer of
    their own with `optax.partition`. Beside the optimizer, four passes over a leaf.

    Args:
        optimizer: Any optimizer of Optax. Its own learning rate cancels: write 1. Not only a part
            of one, such as `optax.scale_by_adam`, whose updates lead uphill.
        learning_rate: Length of a step by the norm of the weights, a number or a schedule.
        axis: The axes along which one unit runs, as for `relative_step`.
        layout: As for `project`.

    Returns:
        The transformation. Its `update` needs `params`, and hands extra arguments on.

    Raises:
        TypeError: If `axis` is of the wrong kind.
        ValueError: If `axis` names an axis twice; at init, if a leaf does not have it.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from optax_constraints import recipes
        >>> tx = recipes.hyperball(optax.adam(1.0), 0.1)
        >>> w = {"kernel": jnp.array([[3.0], [4.0]])}
        >>> updates, state = tx.update({"kernel": jnp.ones((2, 1))}, tx.init(w), w)
        >>> w = optax.apply_updates(w, updates)
        >>> print(f"{jnp.linalg.norm(w['kernel']):.4f}")
        5.0000
    """
    return optax.chain(
        optimizer,
        relative_step(axis, layout=layout),
        optax.scale_by_learning_rate(learning_rate, flip_sign=False),
        project(fixed_norm("init", axis), layout=layout),
    )


def qk_clip(
    threshold: jax.typing.ArrayLike,
    *,
    query: str = "query/kernel",
    key: str = "key/kernel",
    nope: int | None = None,
    axis: Axis = (-3, -1),
    statistic: str = "max_logits",
) -> dict[str, Constraint]:
    """Rules that shrink the attention heads whose logits grew above a threshold.

    With the largest logit `s` of a head in the forward pass, ``gamma = min(1, threshold / s)``
    goes half into the query and half into the key: each is multiplied by its root. In multi-head
    latent attention the columns with rotary positions of the key are common to all heads. There
    the query takes all of gamma, and the key none. Kimi Team, "Kimi K2: Open agentic
    intelligence", 2025, section 2.1.

    Hand over the maxima with each update: ``tx.update(grads, state, params, max_logits=...)``, as
    a tree with one array for each attention module: what ``sow("intermediates", "max_logits",
    ...)`` collects in Linen, and `nnx.pop(model, nnx.Intermediate)` in NNX. An array has a number
    for each head, (heads,), or (layers, heads) of scanned layers. A kernel takes the array of the
    module that owns it, or of the next one around that. A kernel without an array is an error:
    rules such as ``{"layer_0/**": None, **qk_clip(100.0)}`` leave a layer as it is.

    Args:
        threshold: The largest logit that is allowed.
        query: Pattern of the query kernels (in, heads, depth).
        key: Pattern of the key kernels; in latent attention of those of keys and values.
        nope: In latent attention, how many of the first columns of a head have no positions.
        axis: All axes of a kernel but those of layers and heads; (-3, -1) also for
            kernels (layers, in, heads, depth).
        statistic: The name under which the maxima are given, and found in the tree.

    Returns:
        Two rules.

    Raises:
        TypeError: If `threshold` is no number.
        ValueError: If `threshold` is not positive and finite; on an update, if a kernel has no
            maxima.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import optax_constraints as oc
        >>> from optax_constraints import recipes
        >>> tx = optax.chain(optax.sgd(0.1), oc.project(recipes.qk_clip(100.0)))
        >>> kernel = {"kernel": jnp.ones((4, 2, 3))}  # (in, heads, depth)
        >>> w = {"attention": {"query": kernel, "key": kernel}}
        >>> logits = {"attention": {"max_logits": jnp.array([400.0, 50.0])}}
        >>> grads = optax.tree.zeros_like(w)
        >>> updates, _ = tx.update(grads, tx.init(w), w, max_logits=logits)
        >>> optax.apply_updates(w, updates)["attention"]["query"]["kernel"][0, :, 0]
        Array([0.5, 1. ], dtype=float32)
    """
    try:
        largest = jnp.asarray(threshold)
    except (TypeError, ValueError) as error:
        raise TypeError(f"qk_clip: threshold={shown(threshold)} is no number; {_WRITE}") from error
    if not isinstance(largest, Tracer) and not jnp.all((largest > 0) & (largest < jnp.inf)):
        raise ValueError(
            f"qk_clip: threshold={shown(threshold)} is not positive and finite; {_WRITE}"
        )

    def gamma(extra: Any, path: str) -> jax.Array:
        logits = _nearest(extra[statistic], path, statistic)
        logits = logits.astype(_numerics.compute_dtype(logits.dtype))
        # min(1, threshold / logits), also where all logits are negative.
        return largest / jnp.maximum(logits + 1e-6, largest)

    def root(extra: Any, path: str) -> jax.Array:
        return jnp.sqrt(gamma(extra, path))

    half, whole = (scale(arg(source), axis) for source in (root, gamma))
    if nope is None:
        return {query: half, key: half}
    first = part(half, (..., slice(nope)))
    return {query: compose(first, part(whole, (..., slice(nope, None)))), key: first}


_WRITE = "write the largest logit that is allowed, such as 100.0."


def _nearest(tree: Any, path: str, statistic: str) -> jax.Array:
    """The array of the module that owns a parameter, or of the next one around that."""
    found: dict[tuple[str, ...], list[Any]] = {}
    leaves = [(own.split("/") if own else [], leaf) for own, leaf in leaves_by_path(tree)]
    named = [own for own in leaves if statistic in own[0]]
    for segments, leaf in named or leaves:  # modules may collect other things, too
        end = segments.index(statistic) if statistic in segments else len(segments)
        found.setdefault(tuple(segments[:end]), []).append(leaf)
    above = path.removeprefix("params/").split("/")
    for depth in range(len(above) - 1, -1, -1):
        if own := found.get(tuple(above[:depth])):
            # A module that was called twice collects twice.
            return functools.reduce(jnp.maximum, map(jnp.asarray, own))
    modules = ", ".join(repr("/".join(owner)) for owner in found) or "none"
    raise ValueError(
        f"qk_clip on {path!r}: {statistic} has no array of a module around it, and those it has "
        f"are of {modules}. Collect the largest logits of each head there; or put a rule "
        f"{{{'/'.join([*above[:-2], '**'])!r}: None}} in front, to leave these kernels as they are."
    )


_NAMES = ("out", "proj", "out_proj", "o_proj", "c_proj", "wo", "down", "down_proj", "fc2", "w2")
_WRITERS = [pattern for name in _NAMES for pattern in (name, f"{name}/*")]


def ngpt_rules(
    params: Any,
    writes: "Pattern | Sequence[Pattern] | None" = None,
    *,
    layout: Layout | None = None,
) -> dict[str, Constraint]:
    """Rules for a transformer on the sphere: unit norm along the residual stream, matrix by matrix.

    What reads the stream has one unit for each output, along its incoming weights; so has a table
    of embeddings for each token. What writes to the stream has one unit for each input, along its
    outgoing weights. All units are as long as the stream is wide, which is checked. Vectors and
    scalars, such as scales, stay free. I. Loshchilov, C.-P. Hsieh, S. Sun and B. Ginsburg, "nGPT:
    Normalized transformer with representation learning on the hypersphere", ICLR 2025.

    Args:
        params: The parameters, or an Equinox or NNX module.
        writes: A pattern, or several, of what writes to the stream: the last projections of
            attention and of the MLP. By default what is called `out`, `proj`, `out_proj`,
            `o_proj`, `c_proj`, `wo`, `down`, `down_proj`, `fc2` or `w2`. Look at the rules then:
            a square matrix of another name counts as one that reads.
        layout: What `layout(model)` of `optax_constraints.flax` says of each leaf, for layers that
            name and rank do not tell, and for scanned ones.

    Returns:
        For the anchored path of each matrix its rule.

    Raises:
        ValueError: If a pattern, or every name above, matches no leaf, the fan-in of a matrix
            cannot be told, or units differ in length.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> from optax_constraints import recipes
        >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "scale": jnp.ones(4),
        ...           "fc": {"kernel": jnp.ones((4, 16))}, "proj": {"kernel": jnp.ones((16, 4))}}
        >>> rules = recipes.ngpt_rules(params, writes=["proj/kernel"])
        >>> params = oc.constrain(params, rules)
        >>> print(jnp.linalg.norm(params["proj"]["kernel"], axis=1).shape, params["scale"][0])
        (16,) 1.0
    """
    several: Any = writes if isinstance(writes, (list, tuple)) else [writes]
    patterns = parse([(pattern, None) for pattern in (_WRITERS if writes is None else several)])
    leaves = [(path, leaf, layout_of(layout, path)) for path, leaf in leaves_by_path(params)]
    idle = [rule for rule in patterns if not any(rule.matches(*leaf) for leaf in leaves)]
    if idle and writes is not None:
        raise ValueError(f"ngpt_rules: {unmatched(idle[0], [p for p, *_ in leaves], set())}")
    if len(idle) == len(patterns):
        found = ", ".join(repr(path) for path, *_ in leaves[:10]) or "none"
        raise ValueError(
            "ngpt_rules: none of the usual names of what writes to the residual stream is here: "
            f"{', '.join(_NAMES)}. The leaves are {found}. Name in writes= what writes to the "
            'stream, such as writes=["attention/last/kernel"].'
        )
    rules: dict[str, Constraint] = {}
    lengths: dict[str, int] = {}
    for path, leaf, own in leaves:
        shape, _ = shape_and_dtype(leaf) or ((), None)
        layers = own.stacked if own is not None else ()
        if len(shape) - len(layers) < 2 or not is_floating(leaf):
            continue
        fan_in = settle_axis("ngpt_rules", "fan_in", shape, path, own)
        pattern = "/" + glob.escape(path)
        if any(rule.matches(path, leaf, own) for rule in patterns):
            slices = (*fan_in, *layers)
            rules[pattern] = stacked(unit_norm(axis=None), axis=slices)
            units = [size for i, size in enumerate(shape) if i not in slices]
        else:
            rules[pattern] = unit_norm(axis=fan_in)
            units = [shape[axis] for axis in fan_in]
        lengths[describe(path, shape)] = math.prod(units)
    if len(set(lengths.values())) > 1:
        told = "; ".join(f"{length} of {what}" for what, length in lengths.items())
        raise ValueError(
            f"ngpt_rules: units differ in length, and each has to be as long as the residual "
            f"stream is wide: {told}. Name in writes= what writes to the stream."
        )
    return rules
