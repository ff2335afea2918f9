"""What this library uses of JAX, Optax, Flax and Keras beyond what they document.

Their next releases may change any of it without a word. `tests/test_private.py` has a check for
each entry of `PRIVATE`, which says what has changed and which files have to follow, and it
fails for a use that is not listed here.
"""

import sys
from typing import NamedTuple


class Private(NamedTuple):
    """Something that is used beyond public names."""

    name: str
    """What it is called. The last part is the word that stands in the files."""
    files: tuple[str, ...]
    """Where it is used."""
    relied_on: str
    """What has to stay true."""


PRIVATE = (
    # JAX.
    Private(
        "jax.core.Tracer",
        (
            "_called.py",
            "_config.py",
            "_constraint.py",
            "_divided.py",
            "_gauge.py",
            "_html.py",
            "_numbers.py",
            "_numerics.py",
            "_plot.py",
            "_project.py",
            "_projected.py",
            "_report.py",
            "flax/_static.py",
            "recipes.py",
            "sets/elementwise.py",
        ),
        "Values that JAX is tracing are instances of it, and arrays are not.",
    ),
    Private(
        "jax.typeof",
        ("_divided.py", "_sharding.py", "sets/part.py"),
        "The type of an array has a sharding with a spec and a mesh, and the mesh has the names "
        "and the types of its axes: none for an array that is on no mesh.",
    ),
    Private(
        "jax.sharding.auto_axes",
        ("_sharding.py",),
        "Since JAX 0.7: runs a function without the Explicit axes that are named, and shards the "
        "result as asked. It is looked up, so if it moves, Explicit meshes fail later.",
    ),
    Private(
        "jax.core.ShapedArray.manual_axis_type",
        ("_sharding.py",),
        "Inside jax.shard_map the type of an array says over which axes it varies, as "
        "`manual_axis_type.varying`, before JAX 0.10 as `vma`; lax.pcast, before it lax.pvary, "
        "makes it vary over more.",
    ),
    Private(
        "jax.experimental.pallas",
        ("_adam_rows.py",),
        "A kernel over blocks of arrays, with loads and stores under a mask, compiles for CUDA "
        "GPUs by Triton and runs in the interpreter. It is imported where a leaf can use it.",
    ),
    Private(
        "jax.experimental.custom_partitioning",
        ("_adam_rows.py",),
        "A function that says itself how a mesh divides it; without a mesh it is what it was.",
    ),
    # Optax.
    Private(
        "optax.<locals>",
        ("_private.py",),
        "Wrappers such as optax.flatten call what they wrap from a function inside them, in a "
        "module below `optax`, so that its frame has a name such as `flatten.<locals>.init_fn`.",
    ),
    # Flax, both frameworks.
    Private(
        "flax.nnx.VariableState",
        ("_trees.py",),
        "Variables of NNX and boxes of Linen, subclasses of Flax's Variable and AxisMetadata, are "
        "pytrees with the array at the key GetAttrKey('value'); parameters of NNX are Params.",
    ),
    Private(
        "flax.linen.recurrent.DenseParams",
        ("flax/_layers.py",),
        "Layers are told by the names of their classes, in a module below `flax`.",
    ),
    # Flax Linen.
    Private(
        "flax.core.init",
        ("flax/linen.py",),
        "Makes variables with a function of a scope, and takes `mutable` and `flags`.",
    ),
    Private(
        "flax.core.DenyList",
        ("flax/linen.py",),
        "Names collections that are not mutable; all others are.",
    ),
    Private(
        "flax.core.Scope",
        ("flax/linen.py",),
        "The scope of a module is `module.scope`, and a module may be bound to one by "
        "`clone(parent=scope)`.",
    ),
    Private(
        "flax.core.Scope.get_flag",
        ("flax/linen.py",),
        "The flags of `init` reach every scope of the model and no scope of another one, and "
        "keep nn.jit from leaving out a layer that it has traced without them.",
    ),
    Private(
        "flax.core.Scope.debug_path",
        ("flax/linen.py",),
        "The same as `path`, but inside nn.scan and nn.vmap, where names become `scan(name)`.",
    ),
    Private(
        "flax.core.Scope.is_mutable_collection",
        ("flax/linen.py",),
        "Tells whether a module may make parameters.",
    ),
    Private(
        "flax.core.Scope.put_variable",
        ("flax/linen.py",),
        "Replaces a parameter of a module while it is made.",
    ),
    Private(
        "flax.core.meta",
        ("flax/linen.py",),
        "nn.scan and nn.vmap call `add_axis` of each AxisMetadata among the parameters, with the "
        "axis that they add.",
    ),
    Private(
        "flax.linen.module.InterceptorContext",
        ("flax/_bridge.py", "flax/linen.py"),
        "What nn.intercept_methods hands on has the layer as `module`.",
    ),
    Private(
        "flax.linen.Module.__init_subclass__",
        ("flax/linen.py",),
        "Writes a new __init__ for each subclass, and takes fields that are keywords only.",
    ),
    Private(
        "flax.linen.recurrent.ConvLSTMCell",
        ("flax/linen.py",),
        "In cells of these names, the layers for the hidden state have names that begin with h, "
        "and no others have.",
    ),
    Private(
        "flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT",
        ("flax/_train_state.py",),
        "TrainState keeps float8 scales under this key, and the parameters beside it as `params`.",
    ),
    # Flax NNX.
    Private(
        "flax.nnx.training.optimizer.to_opt_state",
        ("flax/nnx.py",),
        "Puts each array of a tree into a variable that is no parameter.",
    ),
    Private(
        "flax.nnx.Pytree._pytree__is_pytree",
        ("flax/nnx.py",),
        "False for modules made with pytree=False, as for Object._object__is_pytree before 0.12.",
    ),
    Private(
        "flax.nnx.Object._object__is_pytree",
        ("flax/nnx.py",),
        "The older name of Pytree._pytree__is_pytree; one of the two is there.",
    ),
    Private(
        "flax.nnx.Optimizer.wrt",
        ("flax/nnx.py",),
        "The filter that an optimizer was made with.",
    ),
    Private(
        "flax.nnx.Conv.kernel_shape",
        ("flax/nnx.py",),
        "The shape that the layer gave its kernel; of ConvTranspose and Einsum, too.",
    ),
    Private(
        "flax.nnx.Einsum.bias_shape",
        ("flax/nnx.py",),
        "The shape that the layer gave its bias.",
    ),
    Private(
        "flax.nnx.GroupNorm.group_size",
        ("flax/nnx.py",),
        "How many features a group has.",
    ),
    Private(
        "flax.nnx.GRUCell.dense_h",
        ("flax/nnx.py",),
        "The layers for the hidden state are hi, hf, hg and ho, or dense_h.",
    ),
    # Keras.
    Private(
        "keras.Variable.constraint",
        ("keras.py",),
        "A property, by whose setter `Layer.add_weight` gives a new variable its constraint; "
        "optimizers call what the variable holds with the variable.",
    ),
)


def called_from_optax(*wrappers: str) -> bool:
    """Whether one of these wrappers of Optax is calling, at any distance.

    Some wrappers change what is inside them in ways that cannot be seen there: `flatten` hands
    on all parameters as one vector, `apply_if_finite` compares what comes back with what it
    would have returned itself. So the callers are looked through, which works while JAX traces,
    and not in a function that was traced before.

    Args:
        *wrappers: Their names, such as `"flatten"`.

    Returns:
        Whether a function inside one of them is among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        wrapper, inside, _ = frame.f_code.co_qualname.partition(".<locals>")
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if inside and wrapper in wrappers and package == "optax":
            return True
        frame = frame.f_back
    return False
