"""What a set has to bring to be put through the tests of its promises."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

import optax_constraints as oc

# With x64 the same promises are tested in float64, and only there.
DTYPES = [jnp.float64] if jax.config.jax_enable_x64 else [jnp.float32, jnp.bfloat16, jnp.float16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A constraint, and what a slow and obvious NumPy program says of it in float64."""

    constraint: oc.Constraint = dataclasses.field(kw_only=False)
    project: Callable[[np.ndarray], np.ndarray] = dataclasses.field(kw_only=False)
    """The nearest allowed array, or what comes in its place."""
    outside: Callable[[np.ndarray], np.ndarray] = dataclasses.field(kw_only=False)
    """How far outside the set, relative to its bound: an array or one number, 0 inside."""
    shape: tuple[int, ...] = (7, 5, 3)
    allowed: Callable[[], np.ndarray] | None = None
    """An allowed array, not all zeros, that every dtype holds exactly. Without it: the
    projection of random weights, a little shrunk towards zero."""
    unit: tuple[int, ...] | None = None
    """The axes of what is projected together, such as (-2, -1) for matrices. Not needed for
    elementwise sets and for those with an axis."""
    near: float = 1e-7
    """How near to the nearest point the result is in float32, relative to the largest entry;
    `near_in` has it for other dtypes. The rounding to the dtype of the weights comes on top."""
    slack: float = 4
    """How far outside, in eps of the dtype, the weights may be after a step."""
    nearest: bool = True
    """Whether the projection is the nearest point of its set, if that is convex."""
    adds: bool = False
    """Whether the projection adds to entries rather than scaling them, so that their rounding
    goes by the largest entry of the unit."""

    def __str__(self) -> str:
        return repr(self.constraint).replace("\n", "")[:80]

    def near_in(self, dtype) -> float:
        """`near` for weights of a dtype; projections of half precision are in float32."""
        if dtype != jnp.float64:
            return self.near
        # The reference rounds in float64, too.
        return 2 * self.near * float(jnp.finfo(dtype).eps / jnp.finfo(jnp.float32).eps)

    @property
    def unit_axes(self) -> tuple[int, ...]:
        """The axes of what is projected together; none for an elementwise set."""
        if self.unit is not None:
            return self.unit
        if self.constraint.elementwise:
            return ()
        return self.constraint.settle("w", self.shape).axis


def norms(w: np.ndarray, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """Norms in float64, by scaling with the largest entry."""
    largest = np.max(np.abs(w), axis=axis, keepdims=True)
    largest = np.where(largest == 0, 1, largest)
    return largest * np.sqrt(np.sum((w / largest) ** 2, axis=axis, keepdims=True))


def float64(x: jax.typing.ArrayLike) -> np.ndarray:
    """The values of an array of any floating dtype."""
    return np.asarray(jnp.asarray(x)).astype(np.float64)


@functools.partial(jax.jit, static_argnums=0)
def derivatives(
    constraint: oc.Constraint, w: jax.Array, dw: jax.Array, dual: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a projection makes of a tangent and of a cotangent, in one program."""
    _, forward = jax.jvp(constraint, (w,), (dw,))
    (backward,) = jax.vjp(constraint, w)[1](dual)
    return forward, backward


def bits(x: jax.typing.ArrayLike) -> bytes:
    """What two arrays share that are equal to the bit."""
    return np.asarray(x).tobytes()
