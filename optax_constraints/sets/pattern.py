"""Sets that are given by a pattern: where zeros are, which signs, what is equal to what."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_constraints._args import Arg
from optax_constraints._axes import LeafLayout, drop_axes
from optax_constraints._config import builtin
from optax_constraints._constraint import Constraint, own_arrays
from optax_constraints._gauge import Gauge
from optax_constraints._numbers import unread
from optax_constraints._numerics import is_array, is_readable
from optax_constraints._sharding import automatic
from optax_constraints._text import describe, shown
from optax_constraints.sets._common import widen
from optax_constraints.sets.combinators import Stacked
from optax_constraints.sets.elementwise import (
    Elementwise,
    as_array,
    beside,
    check_broadcasts,
    clipped,
    is_concrete,
)


def _is_init(pattern: Any) -> bool:
    """Whether a pattern is that of the weights at init."""
    return isinstance(pattern, str) and pattern == "init"


def _check_text(owner: str, name: str, pattern: Any) -> None:
    if isinstance(pattern, str) and not _is_init(pattern):
        raise TypeError(
            f"{owner}: {name}={shown(pattern)} is not an array of real numbers; write one, or "
            "'init' for the pattern of the weights at init."
        )


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Mask(Elementwise):
    """Weights are zero where the mask is, or were at init: ``{w : w = 0 where mask = 0}``.

    For fixed sparsity: pruned networks, causal and block-diagonal kernels, known adjacency. A
    linear subspace, so convex; exact in every dtype, and NaN stays NaN.

    With `"init"` weights stay zero where they are zero when `project` is initialised, as in
    sparse training and for checkpoints that were pruned. `project` keeps that in its state, as
    one bool for each weight, sharded like the weights. Without that state, as in
    `constrain(params, rules)`, weights count as those at init.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Args:
        mask: An array that broadcasts to the weights, of bools or of numbers of which those
            that are not zero are free; or a function from the shape of the weights to one,
            such as ``lambda shape: np.tri(*shape)``. A function has no JSON form. Or `"init"`,
            or `arg`.

    Raises:
        TypeError: If `mask` is none of these.
        ValueError: At bind, if the mask does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import optax_constraints as oc
        >>> oc.mask(lambda shape: np.tri(*shape))(jnp.ones((2, 2)))
        Array([[1., 0.],
               [1., 1.]], dtype=float32)
    """

    mask: jax.typing.ArrayLike | list | Callable[[tuple[int, ...]], jax.typing.ArrayLike]

    smooth = True
    sign_preserving = True

    def __post_init__(self):
        _check_text("Mask", "mask", self.mask)
        if not callable(self.mask) and not isinstance(self.mask, (str, Arg)):
            object.__setattr__(self, "mask", as_array("Mask", "mask", self.mask))
        own_arrays(self)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether the mask is that of the weights at init."""
        return _is_init(self.mask)

    def remember(self, w: jax.Array) -> Any:
        """Which weights are not zero, if that is the mask."""
        return w != 0 if self.remembers else ()

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array of any shape to which the mask broadcasts."""
        return self.advance(jnp.asarray(w), ())[0]

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the mask that it had at init, if that is remembered."""
        if self.remembers:
            free = jnp.asarray(memory) if is_array(memory) else self.remember(w)
        else:
            free = beside(self._free("", w.shape), w)
        return _zero_where(~free, w), memory

    def _free(self, path: str, shape: tuple[int, ...]) -> jax.Array:
        mask: Any = self.mask(shape) if callable(self.mask) else self.mask
        if isinstance(mask, Arg):
            raise unread(mask)
        check_broadcasts("Mask", "mask", mask, path, shape)
        return jnp.asarray(mask).astype(bool)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint, if its mask broadcasts to the leaf."""
        del layout
        if not isinstance(self.mask, (str, Arg)):
            self._free(path, shape)
        return self

    def get_config(self) -> dict[str, Any]:
        """The mask as nested lists."""
        if callable(self.mask):
            raise TypeError(
                f"Mask.mask={shown(self.mask)} is a function, which has no JSON form; write the "
                "array that it returns."
            )
        return super().get_config()

    def __str__(self) -> str:
        """How the report shows it: arrays by their shape."""
        if callable(self.mask):
            return f"Mask({getattr(self.mask, '__name__', 'function')})"
        if isinstance(self.mask, (str, Arg)):
            return f"Mask({self.mask!r})"
        return f"Mask({'x'.join(map(str, np.shape(cast(Any, self.mask))))})"

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """The entries that the mask holds at zero; None if it is that at init."""
        if self.remembers:
            return None
        return jnp.broadcast_to(beside(~self._free("", w.shape), w), w.shape)

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        return f"{{ w : w = 0 where {'w₀' if self.remembers else 'mask'} = 0 }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries; only a zero is allowed where the mask has one."""
        if self.remembers:
            free = memory if is_array(memory) else self.remember(w)
        else:
            free = beside(self._free("", w.shape), w)
        most = jnp.where(free, jnp.inf, 0)
        return Gauge("entries", w, -most, most, (0.0,))


mask = Mask


def _zero_where(zero: jax.Array, w: jax.Array) -> jax.Array:
    """Zeros, except that a NaN stays, and so does a zero of either sign: but its derivative."""
    kept = jnp.where(jnp.abs(w) > 0, jnp.zeros((), w.dtype), lax.stop_gradient(w))
    return automatic(lambda w, zero, kept: jnp.where(zero, kept, w), w, zero, kept)


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class ZeroDiagonal(Elementwise):
    """Square matrices with a zero diagonal: ``{w : w[..., i, i] = 0}``.

    The last two axes are the matrix, those before them number matrices. A linear subspace, so
    convex; exact in every dtype.

    Item-to-item recommenders use it, so that no item predicts itself: H. Steck,
    "Embarrassingly shallow autoencoders for sparse data", WWW 2019.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Raises:
        ValueError: At bind, if the last two axes of the leaf are not a square.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.zero_diagonal()(jnp.ones((2, 2)))
        Array([[0., 1.],
               [1., 0.]], dtype=float32)
    """

    formula = "{ W : Wᵢᵢ = 0 }"

    smooth = True
    sign_preserving = True

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one square matrix, or each of an array of them."""
        w = jnp.asarray(w)
        self.settle("", w.shape)
        return _zero_where(beside(jnp.eye(w.shape[-1], dtype=bool), w), w)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint, if the leaf holds square matrices."""
        del layout
        if len(shape) < 2 or shape[-1] != shape[-2]:
            raise ValueError(
                f"ZeroDiagonal on {describe(path, shape)}: the last two axes are not a square "
                "matrix; leave this leaf free, or write Mask with an array."
            )
        return self

    def on_bound(self, w: jax.Array) -> jax.Array:
        """The diagonal."""
        return jnp.broadcast_to(jnp.eye(w.shape[-1], dtype=bool), w.shape)

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries of diagonals."""
        del memory
        return Gauge("entries of the diagonal", jnp.diagonal(w, axis1=-2, axis2=-1), 0.0, 0.0)


zero_diagonal = ZeroDiagonal


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Sign(Elementwise):
    """Each weight has the sign of the pattern, or is zero: ``{w : w * pattern >= 0}``.

    Convex; where the pattern is 0 a weight is free. The projection sets weights of the other sign
    to zero, exactly in every dtype, and NaN stays NaN.

    With `"init"` weights keep the signs that they have when `project` is initialised, and those
    that are zero then are free. `project` keeps that in its state, as an int8 for each weight,
    sharded like the weights. Without that state, as in `constrain(params, rules)`, weights count
    as those at init.

    With one sign for each input it is Dale's law: a neuron excites all others or inhibits them
    all (H. F. Song, G. R. Yang and X.-J. Wang, "Training excitatory-inhibitory recurrent neural
    networks for cognitive tasks", PLOS Comput. Biol. 12(2), 2016). With 0 and 1 it is what a
    network needs to be monotone in some of its inputs.

    Cost:
        None: it fuses with the optimizer's own pass over the weights.

    Args:
        pattern: An array of -1, 0 and 1 that broadcasts to the weights, such as one of shape
            (in, 1) for a kernel (in, out); `"init"`; or `arg`.

    Raises:
        TypeError: If `pattern` is none of these.
        ValueError: If the array has other numbers; at bind, if it does not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import optax_constraints as oc
        >>> oc.sign([[1], [-1]])(jnp.array([[0.5, -1.0], [0.5, -1.0]]))
        Array([[ 0.5,  0. ],
               [ 0. , -1. ]], dtype=float32)
    """

    pattern: Any = "init"

    sign_preserving = True

    def __post_init__(self):
        own_arrays(self)
        _check_text("Sign", "pattern", self.pattern)
        if isinstance(self.pattern, (str, Arg)):
            return
        array = as_array("Sign", "pattern", self.pattern)
        if is_concrete(array):
            if not np.all(np.isin(np.asarray(array).astype(np.float64), (-1, 0, 1))):
                raise ValueError(
                    f"Sign: pattern={shown(self.pattern)} has other numbers than -1, 0 and 1; "
                    "write np.sign(pattern)."
                )
            array = array.astype(np.int8)
        object.__setattr__(self, "pattern", array)

    @property
    def remembers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]  # read only
        """Whether the signs are those at init."""
        return _is_init(self.pattern)

    def remember(self, w: jax.Array) -> Any:
        """The signs of the weights, if they are the pattern."""
        return (w > 0).astype(jnp.int8) - (w < 0).astype(jnp.int8) if self.remembers else ()

    def _signs(self, w: jax.Array, memory: Any) -> jax.Array:
        """The pattern, with as many axes as the weights."""
        if isinstance(self.pattern, Arg):
            raise unread(self.pattern)
        if self.remembers:
            return jnp.asarray(memory) if is_array(memory) else self.remember(w)
        check_broadcasts("Sign", "pattern", self.pattern, None, w.shape)
        return beside(jnp.asarray(self.pattern), w)

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one array of any shape to which the pattern broadcasts."""
        return self.advance(jnp.asarray(w), ())[0]

    def advance(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """Projects one array with the signs that it had at init, if they are remembered."""
        return self._onto(w, memory, True), memory

    def aim(self, w: jax.Array, memory: Any) -> tuple[jax.Array, Any]:
        """What an update leads to."""
        return self._onto(w, memory, False), memory

    def _onto(self, w: jax.Array, memory: Any, signed: bool) -> jax.Array:
        signs, zero = self._signs(w, memory), jnp.zeros((), w.dtype)
        negative = jnp.where(signs < 0, clipped(w, None, zero, signed), w)
        return jnp.where(signs > 0, clipped(w, zero, None, signed), negative)

    def _along(self, w: jax.Array, v: jax.Array, memory: Any, slack: jax.Array) -> jax.Array:
        signs, slack = self._signs(w, memory), slack.astype(w.dtype)
        v = jnp.where((signs > 0) & (w <= slack), jnp.maximum(v, 0), v)
        return jnp.where((signs < 0) & (w >= -slack), jnp.minimum(v, 0), v)

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint, if its pattern broadcasts to the leaf."""
        del layout
        if not isinstance(self.pattern, (str, Arg)):
            check_broadcasts("Sign", "pattern", self.pattern, path, shape)
        return self

    def on_bound(self, w: jax.Array) -> jax.Array | None:
        """The entries that are zero and have a sign; None if that is the one at init."""
        return None if self.remembers else (self._signs(w, ()) != 0) & (w == 0)

    @property
    def formula(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The set in symbols."""
        return f"{{ w : w · {'sign(w₀)' if self.remembers else 'pattern'} ≥ 0 }}"

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """The entries; which are allowed on what side of zero, the pattern says."""
        signs = self._signs(w, memory)
        low, high = jnp.where(signs > 0, 0, -jnp.inf), jnp.where(signs < 0, 0, jnp.inf)
        return Gauge("entries", w, low, high, (0.0,))


sign = Sign


@builtin
@dataclasses.dataclass(frozen=True, eq=False)
class Tied(Constraint):
    """Entries of one label are equal: ``{w : w[i] = w[j] where labels[i] = labels[j]}``.

    For weights with a symmetry: Toeplitz, circulant and other equivariant kernels, shared and
    hashed weights. A linear subspace: convex and smooth. The projection takes the mean of each
    label, and is the nearest point; entries of one label are then equal exactly, in every dtype.
    Means are taken twice, the second time of what the first has left, so that they are right up to
    rounding however many entries there are. A label with an entry that is not finite becomes NaN.

    J. Ott et al., "Learning in the machine: To share or not to share?", Neural Networks 126,
    2020, is on weights that are shared; S. Ravanbakhsh, J. Schneider and B. Poczos, "Equivariance
    through parameter-sharing", ICML 2017, on labels that follow from a symmetry.

    Cost:
        Three passes over the weights. Each sums into an array with one number for each label, which
        is what moves between the devices of a mesh.

    Args:
        labels: An array of integers that broadcasts to the weights; or a function from the
            shape of the weights to one, which has no JSON form. Labels are renumbered from 0.
            Along an axis that they lack, or have with length 1, all entries are tied: for layers
            that are stacked write ``stacked(tied(labels))``.

    Raises:
        TypeError: If `labels` are no integers, or traced.
        ValueError: At bind, if they do not broadcast.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> import optax_constraints as oc
        >>> toeplitz = oc.tied(lambda shape: np.subtract.outer(*map(np.arange, shape)))
        >>> toeplitz(jnp.array([[1.0, 2.0], [3.0, 5.0]]))
        Array([[3., 2.],
               [3., 3.]], dtype=float32)
    """

    formula = "{ w : wᵢ = wⱼ where {labels}ᵢ = {labels}ⱼ }"

    labels: jax.typing.ArrayLike | list | Callable[[tuple[int, ...]], jax.typing.ArrayLike]

    convex = True
    smooth = True

    def __post_init__(self):
        if not callable(self.labels):
            object.__setattr__(self, "labels", _renumbered(self.labels))

    def __call__(self, w: jax.typing.ArrayLike, /) -> jax.Array:
        """Projects one floating-point array; means are taken in float32 or wider."""
        w = jnp.asarray(w)
        widen("Tied", w)
        labels = self._labels(None, w.shape)
        if not w.size:
            return w
        return automatic(_ties, w, beside(jnp.asarray(labels), w), _sizes(labels))

    def gauge(self, w: Any, memory: Any = ()) -> Gauge:
        """By how much entries differ from the mean of their label."""
        del memory
        return Gauge("differences from the mean of the label", w - self(w), 0.0, 0.0)

    def _labels(self, path: str | None, shape: tuple[int, ...]) -> Any:
        labels = _renumbered(self.labels(shape)) if callable(self.labels) else self.labels
        check_broadcasts("Tied", "labels", labels, path, shape)
        return labels

    def settle(
        self, path: str, shape: tuple[int, ...], layout: LeafLayout | None = None
    ) -> Constraint:
        """This constraint, if its labels broadcast to the leaf, or to each layer of a stack."""
        axes = layout.stacked if layout is not None else ()
        if axes and (callable(self.labels) or np.ndim(self.labels) <= len(shape) - len(axes)):
            self._labels(path, drop_axes(shape, axes))
            return Stacked(self, axes).settle(path, shape)
        self._labels(path, shape)
        return self

    def get_config(self) -> dict[str, Any]:
        """The labels as nested lists."""
        if callable(self.labels):
            raise TypeError(
                f"Tied.labels={shown(self.labels)} is a function, which has no JSON form; write "
                "the array that it returns."
            )
        return super().get_config()

    def __str__(self) -> str:
        """How the report shows it: arrays by their shape."""
        if callable(self.labels):
            return f"Tied({getattr(self.labels, '__name__', 'function')})"
        return f"Tied({'x'.join(map(str, np.shape(cast(Any, self.labels))))})"


tied = Tied


def _renumbered(labels: Any) -> np.ndarray:
    """Labels as numbers from 0, without gaps."""
    array = as_array("Tied", "labels", labels)
    if array.dtype.kind not in "iub" or not is_readable(array):
        raise TypeError(
            f"Tied: labels={shown(labels)} are not an array of concrete integers; write one, such "
            "as [0, 0, 1] to tie the first two entries."
        )
    numbers = np.unique(np.asarray(array), return_inverse=True)[1]
    return numbers.reshape(array.shape).astype(np.int32)


def _sizes(labels: Any) -> jax.Array:
    """How often there is each label; by NumPy where it can: XLA takes long to fold such a sum."""
    if is_readable(labels):
        return jnp.asarray(np.bincount(np.asarray(labels).ravel()), jnp.int32)
    # As an argument of a compiled function, labels are not known, but for their range.
    return jnp.zeros(labels.size, jnp.int32).at[labels].add(1)


@jax.custom_jvp
def _tied(w: jax.Array, labels: jax.Array, sizes: jax.Array) -> jax.Array:
    """The mean of each label in the place of its entries; labels have as many axes."""
    x = widen("Tied", w)
    # From the largest, so that the mean of equal entries is that.
    axes = _shared_axes(x, labels)
    lowest = jnp.full(sizes.shape, jnp.finfo(x.dtype).min, x.dtype)
    mean = lowest.at[labels].max(jnp.max(x, axis=axes, keepdims=True))[labels]
    for _ in range(2):
        mean = mean + _mean(x - mean, labels, sizes)
    mean = jnp.where(jnp.isfinite(mean), mean, jnp.nan).astype(w.dtype)
    return jnp.where(mean == w, w, mean)  # a zero keeps its sign


@_tied.defjvp
def _tied_jvp(primals: Any, tangents: Any) -> Any:
    w, labels, sizes = primals
    dx = widen("Tied", tangents[0])
    mean = jnp.broadcast_to(_mean(dx, labels, sizes), dx.shape)
    return _tied(w, labels, sizes), mean.astype(w.dtype)


# Compiled by itself, so that calls outside jit find the program they made before.
_ties = jax.jit(_tied)


def _mean(x: jax.Array, labels: jax.Array, sizes: jax.Array) -> jax.Array:
    """The mean over each label, beside its labels."""
    axes = _shared_axes(x, labels)
    total = jnp.zeros(sizes.shape, x.dtype).at[labels].add(jnp.sum(x, axis=axes, keepdims=True))
    count = jnp.maximum(sizes, 1) * (x.size // labels.size)
    return (total / count.astype(x.dtype))[labels]


def _shared_axes(x: jax.Array, labels: jax.Array) -> tuple[int, ...]:
    """The axes along which all entries have the same label."""
    return tuple(a for a in range(x.ndim) if labels.shape[a] < x.shape[a])
