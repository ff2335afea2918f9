"""Adam and a bound on the norms of rows in one pass over memory: a Pallas kernel for GPUs.

XLA takes two passes, since the factor of a row is known only after its last entry. A row that
fits in the registers of one block of threads needs one: weights, gradient and moments are read,
weights and moments are written, and nothing else goes through memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.experimental.pallas import triton
from jax.sharding import NamedSharding, PartitionSpec

from optax_constraints import _numerics

_BLOCK = 4096
"""Entries of a block, where rows are shorter than that."""


class Numbers(NamedTuple):
    """The numbers of AdamW at one step."""

    learning_rate: Any
    decays: tuple[Any, Any]
    """Of the first and second moments."""
    gains: tuple[Any, Any]
    """``1 - decay``, which float32 would round more."""
    corrections: tuple[Any, Any]
    """``1 - decay**t`` at step t, which counts from 1."""
    eps: Any
    weight_decay: Any


@functools.partial(jax.jit, static_argnames="interpret")
def adam_rows(
    constraint: Any,
    numbers: Numbers,
    p: jax.Array,
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    at_init: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of AdamW, and the projection of each row of what it gives.

    The arithmetic is in float32. A result is rounded to its dtype before the projection, too, so
    that allowed rows stay as Adam made them, to the bit. On a mesh each device takes its rows;
    rows that are split over devices take two passes and a sum over the devices.

    Args:
        constraint: A set of norms. Its numbers are scalars.
        numbers: Those of Adam.
        p: Weights (rows, entries), of rows that fit into registers.
        g: Gradients.
        m: First moments.
        v: Second moments.
        at_init: The norms (rows, 1) at init, if the constraint goes by them.
        interpret: Whether to run in Pallas' interpreter, which any platform can.

    Returns:
        The new weights and moments. If the arguments are donated they are written in place.
    """
    own, structure = jax.tree.flatten((numbers, constraint))
    scalars = jnp.stack([jnp.asarray(x, jnp.float32) for x in own])
    norms = jnp.zeros((len(p), 1), jnp.float32) if at_init is None else at_init
    length, remembers = p.shape[1], at_init is not None
    return _over_devices(scalars, p, g, m, v, norms, structure, length, remembers, interpret)


def _adam(numbers: Numbers, arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A step of AdamW, in float32; weights are rounded to their dtype."""
    p, g, m, v = (x.astype(jnp.float32) for x in arrays)
    (b1, b2), (gain1, gain2), (correction1, correction2) = numbers[1:4]
    m = gain1 * g + b1 * m
    v = gain2 * jnp.square(g) + b2 * v
    step = m / correction1 / (jnp.sqrt(v / correction2) + numbers.eps)
    moved = p - numbers.learning_rate * (step + numbers.weight_decay * p)
    return moved.astype(arrays[0].dtype), m, v


def _scale(constraint: Any, w: jax.Array, at_init: jax.Array | None, length: int) -> jax.Array:
    """The factors of rows, by norms whose squares stay in the range of float32."""
    up = _numerics.power_below(jnp.max(jnp.abs(w), axis=1, keepdims=True))
    # The inverse by its exponent: a GPU may round a division.
    bits = (254 << 23) - lax.bitcast_convert_type(up, jnp.int32)
    down = lax.bitcast_convert_type(bits, jnp.float32)
    squares = jnp.sum(jnp.square(w * down), axis=1, keepdims=True)
    norm = jnp.sqrt(squares) * up / constraint._one(length)
    return constraint._scale(norm, norm if at_init is None else at_init)


def _kernel(
    scalars: jax.Array,
    p: jax.Array,
    g: jax.Array,
    m: jax.Array,
    v: jax.Array,
    norms: jax.Array,
    structure: Any,
    length: int,
    remembers: bool,
    interpret: bool,
) -> Any:
    rows = len(p)
    # Blocks have powers of two as their sizes, and masks where the array ends.
    width = _power_of_two(length)
    height = max(1, min(_BLOCK // width, _power_of_two(rows)))

    def kernel(scalars: Any, p: Any, g: Any, m: Any, v: Any, norms: Any, *new: Any) -> None:
        row = pl.program_id(0) * height + lax.broadcasted_iota(jnp.int32, (height, 1), 0)
        inside = (row < rows) & (lax.broadcasted_iota(jnp.int32, (1, width), 1) < length)
        own = [scalars[i] for i in range(scalars.shape[0])]
        numbers, constraint = jax.tree.unflatten(structure, own)
        w, *moments = _adam(numbers, [_load(x, inside) for x in (p, g, m, v)])
        w = jnp.where(inside, w.astype(jnp.float32), 0)
        at_init = _load(norms, row < rows) if remembers else None
        w = w * _scale(constraint, w, at_init, length)
        for ref, x in zip(new, (w, *moments), strict=True):
            _store(ref, x.astype(ref.dtype), inside)

    block = pl.BlockSpec((height, width), lambda i: (i, 0))
    column = pl.BlockSpec((height, 1), lambda i: (i, 0))
    return pl.pallas_call(
        kernel,
        grid=(-(-rows // height),),
        in_specs=[pl.BlockSpec(scalars.shape, lambda i: (0,)), *[block] * 4, column],
        out_specs=[block] * 3,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (p, m, v)],
        input_output_aliases={1: 0, 3: 1, 4: 2},
        compiler_params=triton.CompilerParams(num_warps=min(max(height * width // 512, 1), 16)),
        interpret=interpret,
        name="adam_rows",
    )(scalars, p, g, m, v, norms)


_STATIC = (6, 7, 8, 9)
_over_devices = custom_partitioning(_kernel, static_argnums=_STATIC)


def _rows_of(shardings: Any) -> tuple[Any, Any]:
    """Over which axes of the mesh rows, and entries of a row, are divided: as the weights are."""
    spec = (*shardings[1].sharding.spec, None, None)
    return spec[0], spec[1]


def _result_shardings(*args: Any) -> Any:
    mesh, operands = args[len(_STATIC)], args[len(_STATIC) + 1]
    return (NamedSharding(mesh, PartitionSpec(*_rows_of(operands))),) * 3


def _divided(
    structure: Any, length: int, remembers: bool, interpret: bool, mesh: Any, operands: Any, _: Any
) -> Any:
    """What each device does, and how arrays lie."""
    rows, entries = _rows_of(operands)
    array, column = (NamedSharding(mesh, PartitionSpec(rows, x)) for x in (entries, None))
    axes = () if entries is None else (entries,) if isinstance(entries, str) else entries

    def part(scalars: Any, p: Any, g: Any, m: Any, v: Any, norms: Any) -> Any:
        if not axes:
            return _kernel(scalars, p, g, m, v, norms, structure, length, remembers, interpret)
        numbers, constraint = jax.tree.unflatten(structure, list(scalars))
        w, first, second = _adam(numbers, (p, g, m, v))
        split = constraint._replace(axis=(1,), axis_name=axes)
        w, _ = split.advance(w, norms if remembers else ())
        return w, first.astype(m.dtype), second.astype(v.dtype)

    whole = NamedSharding(mesh, PartitionSpec(None))
    return mesh, part, (array,) * 3, (whole, *(array,) * 4, column)


_over_devices.def_partition(
    infer_sharding_from_operands=_result_shardings,
    partition=_divided,
    sharding_rule="k, r c, r c, r c, r c, r one -> r c, r c, r c",
)


def _power_of_two(n: int) -> int:
    """The next one from a size on."""
    return 1 << (n - 1).bit_length()


def _load(ref: Any, mask: jax.Array) -> jax.Array:
    if hasattr(triton, "load"):
        return triton.load(ref, mask=mask, other=0)
    # Older versions of JAX; pyright knows the newest only.
    return getattr(pl, "load")(ref, (slice(None),) * 2, mask=mask, other=0)  # noqa: B009


def _store(ref: Any, x: jax.Array, mask: jax.Array) -> None:
    if hasattr(triton, "store"):
        triton.store(ref, x, mask=mask)
    else:
        getattr(pl, "store")(ref, (slice(None),) * 2, x, mask=mask)  # noqa: B009
