"""Methods of constraints that are traced and lowered once for all leaves that are alike."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer

from optax_constraints._constraint import Constraint, is_own
from optax_constraints._numerics import is_array


def called(
    what: str | Callable[..., Any], constraint: Constraint, *args: Any, compiled: bool = False
) -> Any:
    """A method of a constraint, or a function of it, which is traced once for all its like.

    Under `jax.jit`, leaves of one shape under equal constraints share the trace and what it is
    lowered to, and XLA puts that in the place of each call. Sets of a user's own, which may count
    on being called, and those with arrays that they may look into, are called as they are.

    Args:
        what: The name of the method, or a function of the constraint and other arguments.
        constraint: The constraint, with numbers in place of schedules.
        *args: Trees of arrays.
        compiled: Whether it is compiled also outside of `jax.jit`.

    Returns:
        What it returns.
    """
    numbers, structure = jax.tree.flatten(constraint)
    known = any(is_array(x) and not isinstance(x, Tracer) for x in numbers)
    shared = compiled or any(isinstance(x, Tracer) for x in jax.tree.leaves(args))
    if known or not shared or not is_own(constraint):
        return _call(what, constraint, args)
    # Equal numbers of two types, such as 1 and True, may mean two things.
    plain = tuple(None if isinstance(x, Tracer) else (type(x), x) for x in numbers)
    arrays = [x for x in numbers if isinstance(x, Tracer)]
    return _called(what, structure, plain, arrays, args)


def _call(what: str | Callable[..., Any], constraint: Constraint, args: Any) -> Any:
    function = getattr(type(constraint), what) if isinstance(what, str) else what
    return function(constraint, *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _called(what: Any, structure: Any, plain: Any, arrays: Any, args: Any) -> Any:
    rest = iter(arrays)
    numbers = [next(rest) if own is None else own[1] for own in plain]
    return _call(what, structure.unflatten(numbers), args)
