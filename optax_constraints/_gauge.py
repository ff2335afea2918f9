"""What there is to see of a leaf: a number for each of its units, and the bounds of these."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from optax_constraints import _numerics
from optax_constraints._sharding import automatic, explicit_axes

_MOST = 2**16
"""Of more numbers than that a sample is shown."""


@dataclasses.dataclass(frozen=True)
class Gauge:
    """The numbers that a set bounds, such as the norm of each unit."""

    name: str
    """What the numbers are, in the plural: `"norms"`, `"singular values"`."""
    values: jax.Array
    """The numbers, in any shape."""
    low: Any = None
    """The least that is allowed, which broadcasts to `values`, or None for no bound."""
    high: Any = None
    """The largest that is allowed, likewise."""
    marks: tuple[float, ...] = ()
    """Other numbers worth a line, such as the values of a grid."""


# The text of a gauge passes through `jax.vmap` as part of its structure.
jax.tree_util.register_dataclass(
    Gauge, data_fields=["values", "low", "high"], meta_fields=["name", "marks"]
)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """The numbers of a gauge as NumPy arrays, all of them or a regular sample."""

    name: str
    values: np.ndarray
    """Finite numbers, in one axis."""
    outside: np.ndarray
    """Which of them are beyond a bound by more than rounding."""
    bounds: tuple[float, ...]
    """The bounds that all of them share, and marks; in order, and finite."""
    not_finite: int
    """How many others there are that are NaN or infinite."""
    of: int
    """How many numbers the gauge has in all."""


def sample(
    constraint: Any, weights: Any, memory: Any = (), gauge: Gauge | None = None
) -> Sample | None:
    """Takes what there is to see of a leaf or group back from its device.

    Args:
        constraint: A constraint, settled and with numbers in place of schedules.
        weights: An array, or those of a group in a tuple; not traced.
        memory: What is remembered of them.
        gauge: What `gauged` says of them, if that is known.

    Returns:
        Up to 65,536 numbers, evenly spaced in their array; in a run of several processes those
        that are on devices of this one. None if there are none.
    """
    from optax_constraints._called import called  # its imports need this file

    first = weights if isinstance(weights, jax.Array) else weights[0]

    if gauge is None:
        with jax.debug_infs(False):  # an entry without a bound has an infinite one
            gauge = called(gauged, constraint, weights, memory, compiled=True)
    assert gauge is not None
    values = _on_host(gauge.values)
    if not values.size:
        return None
    low, high = (_bound(getattr(gauge, name), end) for name, end in (("low", -1), ("high", 1)))
    finite = np.isfinite(values)
    # Of an elementwise set nothing is outside by rounding.
    eps = 0.0 if constraint.elementwise else 16 * _numerics.eps(first.dtype)
    slack = eps * float(np.max(np.abs(values), where=finite, initial=0))
    outside = (values < low - slack) | (values > high + slack)
    shared = {float(b.flat[0]) for b in (low, high) if b.size and np.all(b == b.flat[0])}
    lines = sorted(b for b in shared.union(gauge.marks) if np.isfinite(b))
    return Sample(
        gauge.name,
        values[finite],
        outside[finite],
        tuple(lines),
        int(values.size - finite.sum()),
        gauge.values.size,
    )


def gauged(constraint: Any, weights: Any, memory: Any = ()) -> Gauge:
    """The gauge of a set, on one device or a mesh."""

    def measured(_: Any, weights: Any, this: Any, memory: Any) -> Gauge:
        gauge = this.gauge(weights, memory)
        bounds = {
            name: jnp.broadcast_to(bound, gauge.values.shape)
            for name in ("low", "high")
            if np.ndim(bound := getattr(gauge, name)) and np.size(bound) > 1
        }
        return dataclasses.replace(gauge, **bounds)

    def gauge(weights: Any, memory: Any) -> Gauge:
        spec = jax.sharding.PartitionSpec()
        return automatic(measured, like, weights, constraint, memory, spec=spec)

    like = jax.tree.leaves(weights)[0]
    # Not compiled, numbers of one device do not get onto a mesh with Explicit axes.
    eager = not isinstance(like, Tracer) and explicit_axes(like)
    return (jax.jit(gauge) if eager else gauge)(weights, memory)


def _bound(bound: Any, end: int) -> np.ndarray:
    if bound is None:
        return np.asarray(end * np.inf)
    return _on_host(bound) if np.ndim(bound) and np.size(bound) > 1 else _scalar(bound)


def _scalar(bound: Any) -> np.ndarray:
    return np.asarray(bound).astype(np.float64).reshape(())


def _on_host(x: jax.Array) -> np.ndarray:
    """Some of the entries of an array, in float64."""
    step = -(-x.size // _MOST)
    # Shard by shard: arrays on one device, whatever the mesh. Replicas are the same shard.
    shards = {str(shard.index): shard.data for shard in x.addressable_shards}
    parts = [np.asarray(part.ravel()[::step] if step > 1 else part) for part in shards.values()]
    return np.concatenate([part.ravel() for part in parts]).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts of the numbers of a gauge, in bins of one width."""

    name: str
    """What the numbers are, in the plural: `"norms"`, `"singular values"`."""
    start: float
    """The left end of the first bin."""
    end: float
    """The right end of the last one."""
    least: float
    largest: float
    counts: tuple[int, ...]
    """How many numbers are in each bin."""
    outside: tuple[int, ...]
    """How many of them are beyond a bound."""
    bounds: tuple[float, ...]
    """The bounds that all numbers share, from `start` to `end`."""
    not_finite: int
    """How many numbers are NaN or infinite, and in no bin."""


def histogram(found: Sample, bins: int = 32) -> Histogram:
    """The histogram of a sample, over its numbers and their bounds."""
    values = found.values
    least, largest = (float(end(values)) if values.size else np.nan for end in (np.min, np.max))
    ends = [*found.bounds, *([least, largest] if values.size else [])] or [0.0]
    start, end = min(ends), max(ends)
    # A margin, so that a bound at one end can be told from the frame. Rounding is not spread out.
    margin = max((end - start) / 24, 0.02 * max(abs(start), abs(end))) or 1.0
    start, end = start - margin, end + margin
    places = ((values - start) * (bins / (end - start))).astype(int)
    counts, outside = (
        tuple(np.bincount(some, minlength=bins).tolist())
        for some in (places, places[found.outside])
    )
    name, bounds = found.name, found.bounds
    return Histogram(name, start, end, least, largest, counts, outside, bounds, found.not_finite)
