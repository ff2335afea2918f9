"""The sets in models of Keras 3, on its JAX backend: imported only on request.

``import optax_constraints.keras`` does two things, once:

- It registers the sets with Keras, so that a model with ``kernel_constraint=simplex()`` is saved
  to a ``.keras`` file, loaded and cloned as it is. It has to be imported where such a file is
  loaded, too.
- It has Keras ask, where a layer makes its weights, whether the set can hold there. Keras calls
  a constraint with the weights alone, after each step. So there is no step for a schedule, no
  argument of `tx.update` for `arg`, and no state for what is relative to the weights at init;
  these are errors, as is any backend but JAX.

Keras projects after each step of its optimizers, and not at init: start from
``variable.assign(variable.constraint(variable))`` where the first weights may be outside.

Example:
    >>> import os
    >>> os.environ["KERAS_BACKEND"] = "jax"
    >>> import keras
    >>> import optax_constraints as oc
    >>> import optax_constraints.keras
    >>> layer = keras.layers.Dense(3, kernel_constraint=oc.simplex(axis=0))
    >>> again = keras.layers.Dense.from_config(layer.get_config())
    >>> again.kernel_constraint
    Simplex(total=1.0, axis=0)
"""

from typing import Any

import jax

try:
    import keras
except ImportError as error:  # of its backend, which is TensorFlow if nobody says so
    raise ImportError(
        "Keras' backend, or Keras itself, is not installed: the sets need Keras 3 on JAX. Install "
        "keras, and set the environment variable KERAS_BACKEND to 'jax' before Keras is imported."
    ) from error
from optax_constraints._axes import LeafLayout
from optax_constraints._constraint import Constraint, has_args, own_classes, parts_of
from optax_constraints._numbers import fields_of, is_schedule, limits_of
from optax_constraints._rules import Binder
from optax_constraints._text import describe
from optax_constraints.sets.combinators import compose


def _register() -> None:
    """Gives Keras the sets under names that no class of Keras has."""
    for cls in own_classes:
        keras.saving.register_keras_serializable("optax_constraints")(cls)


def _held(variable: Any, constraint: Constraint) -> Constraint:
    """A set for one variable, its axes settled, or an error that says what to write."""
    path, shape = variable.path, tuple(variable.shape)
    what = f"{constraint} on {describe(path, shape)}"
    if (backend := keras.config.backend()) != "jax":
        raise ValueError(
            f"{what}: the sets are made of JAX's operations, and Keras' backend is {backend!r}. "
            "Set the environment variable KERAS_BACKEND to 'jax' before Keras is imported. On "
            "other backends keras.constraints has MaxNorm, MinMaxNorm, UnitNorm and NonNeg, and "
            "loads the configs that serialize makes of those here."
        )
    if constraint.remembers and not constraint.starts_anew:
        raise ValueError(
            f"{what} is relative to the weights at init, and Keras keeps nothing of them: in a "
            "model that was loaded they would be others. Write a number or an array, or train "
            "with Optax and project, whose state remembers them."
        )
    if has_args(constraint) or _has_schedule(constraint):
        raise ValueError(
            f"{what}: Keras calls a constraint with the weights alone, so that there is no "
            "argument of tx.update for arg and no step for a schedule. Write a number or an "
            "array, or train with Optax and project, which knows both."
        )
    # Of two axes a name tells which is which. Of more, a depthwise or transposed convolution has
    # them in another order than a convolution, under the same name.
    layout = {path: LeafLayout("layer of Keras", None)} if len(shape) > 2 else None
    bind = Binder([(lambda path, leaf: True, constraint)], layout=layout)
    (bound,) = bind({path: jax.ShapeDtypeStruct(shape, variable.dtype)})
    held = bound.constraint
    assert held is not None
    # Keras calls it with the variable itself, of which `Constraint()` makes an array.
    return held if type(held) in own_classes else compose(Constraint(), held)


def _has_schedule(constraint: Constraint) -> bool:
    return any(
        limits_of(field) and is_schedule(getattr(part, field.name))
        for part in parts_of(constraint)
        for field in fields_of(type(part))
    )


def _ask() -> None:
    """Has each variable of Keras look at the set that it is given.

    Keras calls nothing of a constraint before the first step of a training, and `fixed_norm`
    relative to init, called with the weights alone, would then hold them where they are.
    """
    inherited: Any = keras.Variable.constraint

    def give(variable: Any, constraint: Any) -> None:
        if isinstance(constraint, Constraint):
            constraint = _held(variable, constraint)
        inherited.fset(variable, constraint)

    keras.Variable.constraint = inherited.setter(give)


_register()
_ask()
