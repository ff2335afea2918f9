"""What the library uses beyond public names is on its list, and is still what it was."""

import ast
import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import flax.core
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import meta
from flax.linen import fp8_ops
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.tree_util import GetAttrKey

import optax_constraints as oc
from optax_constraints import _sharding, recipes
from optax_constraints._private import PRIVATE, Private, called_from_optax

PACKAGE = Path(oc.__file__).parent
FILES = {str(file.relative_to(PACKAGE)): file for file in sorted(PACKAGE.rglob("*.py"))}
PUBLIC = {
    *("jax", "jax.lax", "jax.lax.linalg", "jax.nn", "jax.numpy", "jax.numpy.linalg"),
    *("jax.random", "jax.scipy", "jax.scipy.linalg", "jax.sharding", "jax.tree"),
    *("jax.tree_util", "jax.typing", "optax", "optax.tree"),
    *("flax", "flax.linen", "flax.nnx", "flax.nnx.bridge", "flax.struct"),
    *("flax.training.train_state", "keras", "keras.config", "keras.saving"),
}


# What stands in the files.


def words(text: str) -> list[str]:
    return re.findall(r"[\w<>]+", text)


@functools.cache
def nodes(file: str) -> list[ast.AST]:
    """The syntax of a file, without docstrings and without the list itself."""
    tree = ast.parse(FILES[file].read_text())
    if file == "_private.py":
        tree.body = [n for n in tree.body if "PRIVATE" not in ast.unparse(n).split("=")[0]]
    return [
        n for n in ast.walk(tree) if not isinstance(n, ast.Expr) or isinstance(n.value, ast.Call)
    ]


@functools.cache
def names(file: str) -> set[str]:
    """The words of the code, also those in text that is looked up, and not in messages."""
    found = set()
    for node in nodes(file):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.ImportFrom(names=aliases):
                found |= {alias.name for alias in aliases}
            case ast.Constant(value=str(text)) if " " not in text:
                found |= set(words(text))
    return found


@functools.cache
def dotted(file: str) -> set[str]:
    """The full names of what a file takes from JAX, Optax, Flax and Keras."""
    origins: dict[str, str] = {}
    for node in nodes(file):
        match node:
            case ast.Import(names=aliases):
                for alias in aliases:
                    first = alias.name.partition(".")[0]
                    origins[alias.asname or first] = alias.name if alias.asname else first
            case ast.ImportFrom(module=str(module), names=aliases):
                for alias in aliases:
                    origins[alias.asname or alias.name] = f"{module}.{alias.name}"
    origins = {
        name: origin
        for name, origin in origins.items()
        if origin.partition(".")[0] in ("jax", "optax", "flax", "keras")
    }
    found = set(origins.values())
    for node in nodes(file):
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        first, _, rest = text.partition(".")
        if first in origins and re.fullmatch(r"[\w.]+", rest):
            found.add(f"{origins[first]}.{rest}")
    # Not the modules on the way there.
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def is_public(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        return module in PUBLIC and not any(part.startswith("_") for part in parts[:end])
    return False


def is_part_of(name: str, entry: Private) -> bool:
    return f"{name}.".startswith(f"{entry.name}.")


def uses(entry: Private) -> set[str]:
    """The files in which something is used, by its full name or else by its last part."""
    files = {file for file in FILES if any(is_part_of(name, entry) for name in dotted(file))}
    return files or {file for file in FILES if words(entry.name)[-1] in names(file)}


@functools.cache
def own_names() -> set[str]:
    """Every name that the package itself gives to something."""
    found = set(FILES) | {Path(file).stem for file in FILES}
    for file in FILES:
        for node in nodes(file):
            match node:
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
                    found.add(name)
                case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                    found.add(name)
                case ast.alias(asname=str(name)):
                    found.add(name)
                case ast.Assign(value=ast.Constant(value=str(name))):
                    found.add(name)
                case ast.Dict(keys=keys):
                    found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return found


# What NamedTuple and sys call so.
PYTHON = {"_replace", "_fields", "_asdict", "_make", "_getframe"}
FORMATS = {"_METADATA"}  # a file of Orbax' documented format


@pytest.mark.parametrize("file", FILES)
def test_no_use_is_missing_from_the_list(file):
    here = [entry for entry in PRIVATE if file in entry.files]
    unlisted = {
        name
        for name in dotted(file)
        if not is_public(name) and not any(is_part_of(name, entry) for entry in here)
    }
    listed = {words(entry.name)[-1] for entry in here}
    own = own_names() | PYTHON | FORMATS | listed
    unlisted |= {
        name
        for name in names(file)
        if (name.startswith("_") and not name.endswith("__") and name not in own)
        or ("<locals>" in name and name not in listed)
    }
    assert not unlisted, (
        f"optax_constraints/{file} uses {', '.join(sorted(unlisted))}, which other libraries do "
        "not promise to keep. Use something public; or add it to PRIVATE in "
        "optax_constraints/_private.py, with a check in tests/test_private.py."
    )


@pytest.mark.parametrize("entry", PRIVATE, ids=lambda entry: entry.name)
def test_the_list_names_the_files(entry):
    files = uses(entry)
    assert files == set(entry.files), (
        f"{entry.name} is used in {', '.join(sorted(files)) or 'no file'}; write that in PRIVATE "
        "in optax_constraints/_private.py, or take the entry out."
    )


# What releases have to keep.

CHECKS: dict[str, Callable[[], None]] = {}


def keeps(*entries: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Makes a function the check of entries of the list."""

    def register(check: Callable[[], None]) -> Callable[[], None]:
        CHECKS.update(dict.fromkeys(entries, check))
        return check

    return register


def run(entry: Private, check: Callable[[], None]) -> None:
    try:
        check()
    except Exception as error:
        versions = ", ".join(
            f"{name} {version(name)}" for name in ("jax", "optax", "flax", "keras")
        )
        files = ", ".join(f"optax_constraints/{file}" for file in entry.files)
        raise AssertionError(
            f"{entry.name} is not what it was, in {versions}. {files} has to follow, and relies on "
            f"this: {entry.relied_on} What came: {type(error).__name__}: {error}"
        ) from error


@pytest.mark.parametrize("entry", PRIVATE, ids=lambda entry: entry.name)
def test_a_release_keeps(entry):
    run(entry, CHECKS[entry.name])


def test_each_check_has_its_entry():
    assert set(CHECKS) == {entry.name for entry in PRIVATE}


def test_what_a_failure_says(monkeypatch):
    entry = next(entry for entry in PRIVATE if entry.name == "jax.core.Tracer")
    monkeypatch.delattr(jax.core, "Tracer")
    message = (
        rf"jax.core.Tracer is not what it was, in jax {re.escape(version('jax'))}, .*"
        r"optax_constraints/_config.py, .* has to follow, and relies on this: Values that "
        r"JAX is tracing are .* AttributeError: .*Tracer"
    )
    with pytest.raises(AssertionError, match=message):
        run(entry, CHECKS[entry.name])


def test_what_is_found_in_a_file(tmp_path, monkeypatch):
    code = (
        "import jax\nimport jax.numpy as jnp\nfrom flax import linen as nn\n"
        "from jax._src import core\nfrom flax.linen import module\n"
        "x = jnp.ones(3), nn.Dense, jax.tree.map, jax.interpreters.ad.Zero, nn.module.Module\n"
        "y = x._hidden, getattr(x, '_secret'), 'chain.<locals>'\n"
    )
    (tmp_path / "new.py").write_text(code)
    monkeypatch.setitem(FILES, "new.py", tmp_path / "new.py")
    with pytest.raises(AssertionError) as caught:
        test_no_use_is_missing_from_the_list("new.py")
    found = re.search(r"new\.py uses (.*), which other libraries", str(caught.value))
    assert found is not None
    assert set(found[1].split(", ")) == {
        *("<locals>", "_hidden", "_secret", "flax.linen.module.Module"),
        *("jax._src.core", "jax.interpreters.ad.Zero"),
    }


@keeps("jax.core.Tracer")
def _() -> None:
    traced = []

    def function(x):
        traced.append(isinstance(x, jax.core.Tracer))
        return x * 1.0

    x = jnp.ones(2)
    jax.jit(function)(x)
    jax.vmap(function)(x)
    jax.grad(lambda x: function(x).sum())(x)
    assert traced == [True] * 3
    assert not isinstance(x, jax.core.Tracer)


def explicit_mesh() -> Any:
    return jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))


@keeps("jax.typeof")
def _() -> None:
    def check(w) -> None:
        sharding: Any = jax.typeof(w).sharding
        assert sharding.mesh.axis_names == ("x",)
        assert sharding.mesh.axis_types == (AxisType.Explicit,)
        assert tuple(sharding.spec) == ("x", None)

    w = jax.device_put(jnp.ones((2, 3)), NamedSharding(explicit_mesh(), PartitionSpec("x", None)))
    check(w)
    jax.eval_shape(check, w)
    nowhere: Any = jax.typeof(jnp.ones(2)).sharding
    assert nowhere.mesh.axis_names == ()
    # An array that is on no mesh: nothing to go through.
    assert tuple(nowhere.mesh.axis_types or ()) == ()


@keeps("jax.core.ShapedArray.manual_axis_type")
def _() -> None:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))

    def check(w):
        zeros = jnp.zeros(w.shape)
        assert _sharding._varying(w) == {"x"}
        assert _sharding._varying(zeros) == set()
        assert _sharding._varying(_sharding.vary_like(zeros, w)) == {"x"}
        return w

    split = PartitionSpec("x")
    shard_map = getattr(jax, "shard_map", None)
    if shard_map is not None:
        jax.eval_shape(shard_map(check, mesh=mesh, in_specs=split, out_specs=split), jnp.ones(2))
    assert _sharding._varying(jnp.ones(2)) == set()


@keeps("jax.sharding.auto_axes")
def _() -> None:
    if tuple(map(int, jax.__version__.split(".")[:2])) < (0, 7):
        return
    sharding = NamedSharding(explicit_mesh(), PartitionSpec("x", None))
    w = jax.device_put(jnp.ones((2, 3)), sharding)
    seen = []

    def function(w):
        seen.append(jax.typeof(w).sharding.mesh.axis_types)
        return w + 1

    out = jax.sharding.auto_axes(function, axes=("x",), out_sharding=jax.typeof(w).sharding)(w)
    assert seen[-1] == (AxisType.Auto,)
    np.testing.assert_array_equal(out, np.full((2, 3), 2))
    assert jax.typeof(out).sharding.mesh.axis_types == (AxisType.Explicit,)


@keeps("jax.experimental.pallas", "jax.experimental.custom_partitioning")
def _() -> None:
    # What it computes: tests/test_fused_adam.py; on a mesh: tests/distributed_worker.py.
    def step(w: Any, interpret: bool) -> Any:
        adam = recipes.fused_adam(0.1, oc.unit_norm(axis=1), interpret=interpret)
        return adam.step(w, adam.init(w), jnp.zeros_like(w))[0]

    w = jnp.array([[3.0, 4.0, 0.0]])
    np.testing.assert_allclose(step(w, True), [[0.6, 0.8, 0.0]], rtol=1e-6)
    traced = jax.jit(step, static_argnums=1).trace(w, False)
    try:
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # since JAX 0.12, where there is no GPU
        if "No supported GPU devices found" not in str(error):
            raise


def always(step: Any) -> Any:
    return step >= 0


# By name, each around a transformation.
WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "flatten": optax.flatten,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
}


def callers(wrap: Callable[[Any], Any], *, jit: bool = False) -> dict[str, list[bool]]:
    """Of which wrappers a transformation thinks that it is called, in `init` and in `update`."""
    seen: dict[str, list[bool]] = {}

    def look() -> None:
        for name in WRAPPERS:
            seen.setdefault(name, []).append(called_from_optax(name))

    def init(params):
        look()
        return optax.EmptyState()

    def update(updates, state, params=None):
        look()
        return updates, state

    tx = wrap(optax.chain(optax.sgd(0.1), optax.GradientTransformation(init, update)))
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    run = jax.jit if jit else lambda function: function
    run(tx.update)(params, run(tx.init)(params), params)
    return seen


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("name", WRAPPERS)
def test_called_from_optax(name, jit):
    seen = callers(WRAPPERS[name], jit=jit)
    assert len(seen[name]) >= 2
    assert all(seen.pop(name))
    assert not any(any(others) for others in seen.values())
    inside_another = callers(lambda tx: WRAPPERS[name](optax.masked(tx, True)), jit=jit)
    assert all(inside_another[name])
    with jax.disable_jit():
        assert all(callers(WRAPPERS[name])[name])


def test_called_from_optax_only_if_so():
    assert not any(any(seen) for seen in callers(lambda tx: tx).values())

    def flatten(function):
        return [function() for _ in range(1)]

    # A function of that name that is not Optax'.
    assert flatten(lambda: called_from_optax("flatten")) == [False]
    assert not callers(lambda tx: optax.chain(optax.flatten(optax.sgd(0.1)), tx))["flatten"][-1]


def test_called_from_optax_by_any_of_several():
    seen = []
    inner = optax.stateless(
        lambda updates, params: seen.append(called_from_optax("masked", "flatten")) or updates
    )
    tx = optax.flatten(inner)
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
    assert seen == [True]


@keeps("optax.<locals>")
def _() -> None:
    for name, wrap in WRAPPERS.items():
        assert all(callers(wrap)[name]), f"optax.{name} calls from another place"


def last_keys(tree) -> list[Any]:
    return [keys[-1] for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def bases(cls: type) -> list[str]:
    return [base.__name__ for base in cls.__mro__ if base.__module__.split(".")[0] == "flax"]


@keeps("flax.nnx.VariableState")
def _() -> None:
    value = GetAttrKey("value")
    assert last_keys(nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))) == [value] * 2
    assert last_keys(nnx.Param(jnp.ones(3))) == [value]
    boxed = nn.Partitioned(jnp.ones(3), (None,))
    assert last_keys({"w": boxed}) == [value]
    assert "Variable" in bases(nnx.Param)
    assert "Param" in bases(nnx.LoRAParam)
    assert "Param" not in bases(nnx.BatchStat)
    assert "AxisMetadata" in bases(type(boxed))


@keeps("flax.linen.recurrent.DenseParams")
def _() -> None:
    from flax.linen import recurrent

    from optax_constraints.flax._layers import _KNOWN, layer_type

    found = set()
    for module in (nn, nnx, recurrent):
        for name in _KNOWN & set(vars(module)):
            cls = getattr(module, name)
            assert cls.__name__ == name
            assert cls.__module__.startswith("flax.")
            found.add(name)
    assert found >= _KNOWN - {"PReLU"}, f"missing: {sorted(_KNOWN - found)}"
    assert layer_type(nn.Dense(3)) == "Dense"
    assert layer_type(nnx.Linear(2, 3, rngs=nnx.Rngs(0))) == "Linear"


# Linen.


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="dense")(x)


class Stack(nn.Module):
    """Layers that are scanned, mapped, compiled and plain."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(2, name="plain")(x)
        x = nn.jit(nn.Dense)(2, name="compiled")(x)
        mapped: Any = nn.vmap(
            Inner, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=3
        )
        x = mapped(name="mapped")(jnp.stack([x] * 3))[0]

        def body(module, x, _):
            return module(x), None

        scanned = nn.scan(body, {"params": 0}, split_rngs={"params": True}, length=4)
        return scanned(Inner(name="scanned"), x, None)[0]


def look_at_scopes(number: int) -> dict[tuple[str, ...], Any]:
    """The scope of each layer of a model while it is made, by path."""
    scopes = {}

    def look(next_fun, args, kwargs, context: nn.module.InterceptorContext):
        out = next_fun(*args, **kwargs)
        if context.module.scope is not None:
            scopes[context.module.path] = context.module.scope
        return out

    def make(scope, x):
        return Stack().clone(parent=scope)(x)

    init = flax.core.init(make, mutable=flax.core.DenyList("intermediates"), flags={"who": number})
    with nn.intercept_methods(look):
        _, variables = jax.eval_shape(init, {"params": jax.random.key(0)}, jnp.ones((1, 2)))
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"plain", "compiled", "mapped", "scanned"}
    return scopes


@keeps(
    "flax.core.init",
    "flax.core.DenyList",
    "flax.core.Scope",
    "flax.linen.module.InterceptorContext",
)
def _() -> None:
    scopes = look_at_scopes(1)
    assert all(isinstance(scope, flax.core.Scope) for scope in scopes.values())
    assert set(scopes) >= {(), ("plain",), ("compiled",), ("mapped",), ("mapped", "dense")}
    assert {scope.get_flag("who", None) for scope in scopes.values()} == {1}


@keeps("flax.core.Scope.get_flag")
def _() -> None:
    # The second time nn.jit has each layer in its cache.
    for number in (1, 2):
        scopes = look_at_scopes(number)
        assert ("compiled",) in scopes, "nn.jit left out a layer that it had traced before"
        assert {scope.get_flag("who", None) for scope in scopes.values()} == {number}
    other: Any = nn.Dense(1).bind({"params": {}}).scope
    assert other.get_flag("who", None) is None


@keeps("flax.core.Scope.debug_path")
def _() -> None:
    scopes = look_at_scopes(1)
    shown = {path: tuple(scope.debug_path) for path, scope in scopes.items()}
    assert all(tuple(scope.path) == path for path, scope in scopes.items())
    assert shown[("plain",)] == ("plain",)
    assert shown[("mapped", "dense")] == ("vmap(mapped)", "dense")
    assert shown[("scanned", "dense")] == ("scan(scanned)", "dense")


@keeps("flax.core.Scope.is_mutable_collection")
def _() -> None:
    making = look_at_scopes(1)[("plain",)]
    assert making.is_mutable_collection("params")
    assert not making.is_mutable_collection("intermediates")


@keeps("flax.core.Scope.put_variable")
def _() -> None:
    def double(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        layer = context.module
        layer.scope.put_variable("params", "bias", layer.variables["params"]["bias"] + 2)
        return out

    with nn.intercept_methods(double):
        variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
    np.testing.assert_array_equal(variables["params"]["bias"], np.full(3, 2))


@flax.struct.dataclass
class Box(meta.AxisMetadata):
    """Notes the axes that it is told of."""

    value: Any
    axes: tuple[int, ...] = flax.struct.field(pytree_node=False, default=())

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> Any:
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> Any:
        return self.replace(axes=(*self.axes, index))

    def remove_axis(self, index: int, params: Any) -> Any:
        return self.replace(axes=self.axes[:-1])


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.param("w", lambda key: Box(jnp.ones((2, 3)))).sum()


@keeps("flax.core.meta")
def _() -> None:
    mapped: Any = nn.vmap(
        Boxed, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=4
    )
    box = mapped().init(jax.random.key(0), jnp.ones(4))["params"]["w"]
    assert box.axes == (1,)
    assert box.value.shape == (2, 4, 3)
    assert meta.is_axis_metadata(box)
    assert not meta.is_axis_metadata(box.value)
    assert meta.unbox({"w": box})["w"] is box.value


@keeps("flax.linen.Module.__init_subclass__")
def _() -> None:
    made = []

    class Counts:
        def __init_subclass__(cls, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            made.append(cls.__dict__.get("__init__"))

    body = {
        "__annotations__": {"extra": int},
        "extra": dataclasses.field(default=1, kw_only=True),
    }
    cls: Any = type("Dense", (Counts, nn.Dense), body)
    type("Dense", (cls,), {})
    assert None not in made
    assert made[0] is not made[1]
    assert cls(3, extra=2).extra == 2


@keeps("flax.linen.recurrent.ConvLSTMCell")
def _() -> None:
    from optax_constraints.flax.linen import _CELLS

    image, x = jnp.ones((1, 4, 4, 2)), jnp.ones((1, 2))
    for name in _CELLS:
        cls = getattr(nn, name)
        assert cls.__name__ == name
        assert cls.__module__.startswith("flax.")
        conv = name == "ConvLSTMCell"
        cell = cls(3, (2, 2)) if conv else cls(3)
        inputs = image if conv else x
        carry = cell.initialize_carry(jax.random.key(0), inputs.shape)
        params = cell.init(jax.random.key(0), carry, inputs)["params"]
        # The input has 2 features, and the hidden state 3.
        features = {layer: p["kernel"].shape[-2] for layer, p in params.items() if "kernel" in p}
        assert {layer for layer, size in features.items() if size == 3} == {
            layer for layer in features if layer.startswith("h")
        }, name
        assert set(features.values()) == {2, 3}, name


@keeps("flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT")
def _() -> None:
    key = fp8_ops.OVERWRITE_WITH_GRADIENT
    params = {"params": {"w": jnp.ones(2)}, key: {"scale": jnp.ones(1)}}
    grads = {"params": {"w": jnp.ones(2)}, key: {"scale": jnp.full(1, 5.0)}}
    state = TrainState.create(apply_fn=print, params=params, tx=optax.sgd(1.0))
    new: Any = state.apply_gradients(grads=grads).params
    np.testing.assert_array_equal(new["params"]["w"], np.zeros(2))
    np.testing.assert_array_equal(new[key]["scale"], np.full(1, 5.0))


# NNX.


@keeps("flax.nnx.training.optimizer.to_opt_state")
def _() -> None:
    from flax.nnx.training.optimizer import to_opt_state

    kept: Any = to_opt_state({"a": jnp.ones(2), "b": (jnp.zeros(3),)})
    for variable in (kept["a"], kept["b"][0]):
        assert isinstance(variable, nnx.Variable)
        assert not isinstance(variable, nnx.Param)
    np.testing.assert_array_equal(kept["a"][...], np.ones(2))


@keeps("flax.nnx.Pytree._pytree__is_pytree", "flax.nnx.Object._object__is_pytree")
def _() -> None:
    class Yes(nnx.Module):
        pass

    class No(nnx.Module, pytree=False):
        pass

    there = [n for n in ("_pytree__is_pytree", "_object__is_pytree") if hasattr(Yes, n)]
    assert there, "no attribute tells whether a module is a pytree"
    assert getattr(Yes, there[0]) is True
    assert getattr(No, there[0]) is False


@keeps("flax.nnx.Optimizer.wrt")
def _() -> None:
    optimizer = nnx.Optimizer(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.sgd(0.1), wrt=nnx.Param)
    assert optimizer.wrt is nnx.Param


@keeps("flax.nnx.Conv.kernel_shape")
def _() -> None:
    rngs = nnx.Rngs(0)
    for layer in (
        nnx.Conv(4, 6, (3, 5), feature_group_count=2, rngs=rngs),
        nnx.ConvTranspose(4, 6, (3, 5), rngs=rngs),
        nnx.Einsum("ab,bc->ac", (2, 3), rngs=rngs),
    ):
        assert tuple(layer.kernel_shape) == layer.kernel[...].shape


@keeps("flax.nnx.Einsum.bias_shape")
def _() -> None:
    layer: Any = nnx.Einsum("ab,bc->ac", (2, 3), (3,), rngs=nnx.Rngs(0))
    assert tuple(layer.bias_shape) == layer.bias[...].shape == (3,)


@keeps("flax.nnx.GroupNorm.group_size")
def _() -> None:
    layer: Any = nnx.GroupNorm(6, num_groups=2, rngs=nnx.Rngs(0))
    assert layer.num_groups * layer.group_size == layer.scale[...].size == 6


@keeps("flax.nnx.GRUCell.dense_h")
def _() -> None:
    from optax_constraints.flax.nnx import _CELLS, _HIDDEN_TO_HIDDEN

    for cls in _CELLS:
        cell = cls(2, 3, rngs=nnx.Rngs(0))
        ins = {name: v.in_features for name, v in vars(cell).items() if isinstance(v, nnx.Linear)}
        hidden = {name for name, size in ins.items() if size == 3}
        assert hidden == set(ins) & set(_HIDDEN_TO_HIDDEN), cls.__name__
        assert set(ins.values()) == {2, 3}, cls.__name__


@keeps("keras.Variable.constraint")
def _() -> None:
    held: Any = keras.Variable.constraint
    assert held.fget is not None
    assert held.fset is not None
    seen = []

    def look(w):
        seen.append(w)
        return w

    layer: Any = keras.layers.Dense(2, kernel_constraint=look)
    layer.build((None, 3))
    assert layer.kernel.constraint is look
    keras.optimizers.SGD(0.1).apply([jnp.ones((3, 2))], [layer.kernel])
    assert len(seen) == 1
    assert seen[0] is layer.kernel
