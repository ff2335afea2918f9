"""The keywords of layers, as people, editors and type checkers see them."""

import ast
import inspect
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax
import nnx_stub
import pytest
from flax import linen as nn
from flax import nnx
from packaging.version import Version
from test_flax_linen import CASES as LINEN_CASES
from test_flax_nnx import CASES as NNX_CASES

import optax_constraints.flax.linen as ocl
import optax_constraints.flax.nnx as onnx
from optax_constraints.flax._signature import PARAMETERS

ROOT = pathlib.Path(__file__).parents[1]
LINEN_STUB = ROOT / "optax_constraints/flax/_linen_layers.pyi"


def keywords(name: str) -> list[str]:
    return [f"{parameter}_constraint" for parameter in PARAMETERS[name]]


def linen_layers() -> dict[str, Any]:
    layers = {name: cls for name, cls in vars(ocl).items() if hasattr(cls, "declared_constraints")}
    return {name: cls for name, cls in layers.items() if hasattr(nn, name)}


# At run time.


@pytest.mark.parametrize("name", LINEN_CASES)
def test_the_keywords_of_a_linen_layer_are_its_parameters(name):
    case = LINEN_CASES[name]
    model = case.build(ocl)
    found = {leaf.kind for leaf, _ in ocl.parameters(model, case.args, {}).values()}
    # Attention has scales if it normalizes queries and keys.
    assert found | {"scale"} == {*PARAMETERS[type(model).__name__], "scale"}


@pytest.mark.parametrize("case", NNX_CASES, ids=str)
def test_the_keywords_of_an_nnx_layer_are_its_parameters(case):
    if not hasattr(onnx, case.name):
        pytest.skip(f"this Flax has no nnx.{case.name}")
    layer = case.make(getattr(onnx, case.name), nnx.Rngs(0), {})
    assert {leaf.kind for leaf in onnx.leaves(layer)} | {"scale"} == {
        *PARAMETERS[case.name],
        "scale",
    }


def test_the_scales_of_attention():
    both = {"num_heads": 2, "normalize_qk": True, "scale_constraint": "non_neg"}
    attention = ocl.MultiHeadDotProductAttention(**both)
    assert set(ocl.declared(attention, *LINEN_CASES["MultiHeadAttention"].args)) == {
        "/query_ln/scale",
        "/key_ln/scale",
    }
    attention = onnx.MultiHeadAttention(**both, in_features=4, decode=False, rngs=nnx.Rngs(0))
    assert set(onnx.declared(attention)) == {"/query_ln/scale", "/key_ln/scale"}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(cls, getattr(nn, name)) for name, cls in linen_layers().items()]
    + [(cls, getattr(nnx, name)) for name, cls in nnx_stub.layers().items()],
)
def test_a_signature_is_that_of_flax_and_the_keywords(ours, theirs):
    of_flax = dict(inspect.signature(theirs.__init__).parameters)
    del of_flax["self"]
    found = dict(inspect.signature(ours).parameters)
    added = {name: found.pop(name) for name in keywords(ours.__name__)}
    assert found == of_flax
    assert {parameter.kind for parameter in added.values()} == {inspect.Parameter.KEYWORD_ONLY}
    assert {parameter.default for parameter in added.values()} == {None}


def test_signatures_of_layers_of_ones_own():
    @ocl.constrained
    class Linen(nn.Module):
        size: int
        own_constraint: float = 1.0

    class Wider(ocl.Dense):
        width: int = 2

    @ocl.constrained
    class Taken(nn.Embed):
        embedding_constraint: float = 1.0

    @onnx.constrained
    class Own(nnx.Module):
        def __init__(self, size, *, own_constraint=1.0):
            self.size = size

        def __call__(self, x, y):
            return x + y

    class Other(onnx.Linear):
        def __init__(self, size, rngs):
            super().__init__(size, size, rngs=rngs)

    def names(thing: Any) -> list[str]:
        return [
            str(p).split("=")[0].split(":")[0] for p in inspect.signature(thing).parameters.values()
        ]

    assert names(Linen) == ["size", "own_constraint", "parent", "name", "**constraints"]
    assert names(Wider)[-6:] == [
        "width",
        "parent",
        "name",
        "kernel_constraint",
        "bias_constraint",
        "**constraints",
    ]
    assert names(Taken)[-4:] == ["embedding_constraint", "parent", "name", "**constraints"]
    assert names(Own) == ["size", "own_constraint", "**constraints"]
    assert names(Own(3)) == ["x", "y"]
    assert names(Other) == ["size", "rngs"]
    assert "kernel_constraint" in names(type("Same", (onnx.Linear,), {}))


# For type checkers.


def test_the_linen_stub_has_each_layer_and_its_keywords():
    classes = [
        node for node in ast.parse(LINEN_STUB.read_text()).body if isinstance(node, ast.ClassDef)
    ]
    mixins = {
        cls.name: [node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)][1:]
        for cls in classes
        if cls.name.startswith("_")
    }
    found = {}
    for cls in classes[len(mixins) :]:
        theirs, *bases = map(ast.unparse, cls.bases)
        assert theirs == f"nn.{cls.name}"
        found[cls.name] = [keyword for base in bases for keyword in mixins[base]]
    assert {name: sorted(found[name]) for name in found} == {
        name: sorted(keywords(name)) for name in linen_layers()
    }


def test_the_nnx_stub_is_that_of_this_flax():
    text = nnx_stub.PATH.read_text()
    written = text.split("Flax ", 1)[1].split("\n", 1)[0].removesuffix(".")
    if Version(flax.__version__) < Version(written):
        pytest.skip(f"the stub is that of Flax {written}")
    # Another release with the same signatures needs no other stub.
    assert nnx_stub.stub().split("\n", 1)[1] == text.split("\n", 1)[1], (
        f"Flax {flax.__version__} has other layers than the stub; run python tests/nnx_stub.py"
    )


SAMPLE = """
import optax_constraints as oc
from flax import nnx
from optax_constraints.flax import linen, nnx as onnx
from optax_constraints.flax.linen import Conv
from optax_constraints.flax.nnx import GRUCell

rngs = nnx.Rngs(0)
linen.Dense(64, kernel_constraint=oc.max_norm(2.0), bias_constraint="non_neg", name="dense")
linen.Dense(features=64, use_bias=False, kernel_constraint=None)
linen.LSTMCell(3, recurrent_kernel_constraint=oc.unit_norm)
Conv(3, (2, 2), kernel_constraint=lambda w: w)
kernel = onnx.Linear(2, 3, kernel_constraint=oc.max_norm(2.0), use_bias=False, rngs=rngs).kernel
GRUCell(2, 3, recurrent_kernel_constraint="unit_norm", rngs=rngs)
onnx.Embed(num_embeddings=2, features=3, embedding_constraint=oc.unit_norm(-1), rngs=rngs)

linen.Dense(64, kernal_constraint=None)  # No parameter named "kernal_constraint"
linen.Dense(64, use_bais=False)  # No parameter named "use_bais"
linen.Dense(kernel_constraint=None)  # Argument missing for parameter "features"
linen.Embed(2, 3, kernel_constraint=None)  # No parameter named "kernel_constraint"
linen.Dense(64, kernel_constraint=2.0)  # "float" is not assignable to "Constraint"
onnx.Linear(2, 3, kernal_constraint=None, rngs=rngs)  # No parameter named "kernal_constraint"
onnx.Linear(2, 3, use_bais=False, rngs=rngs)  # No parameter named "use_bais"
onnx.Linear(2, kernel_constraint=None, rngs=rngs)  # Argument missing for parameter "out_features"
onnx.Linear("2", 3, rngs=rngs)  # "Literal['2']" is not assignable to "int"
onnx.Linear(2, 3, rngs=rngs).kernle  # Cannot access attribute "kernle"
"""


def test_pyright_knows_the_keywords(tmp_path):
    sample = tmp_path / "sample.py"
    sample.write_text(SAMPLE)
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    run = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, sample],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[int, str] = {}
    for diagnostic in json.loads(run.stdout)["generalDiagnostics"]:
        line = diagnostic["range"]["start"]["line"]
        found[line] = found.get(line, "") + diagnostic["message"]
    wanted = {
        i: line.split("  # ")[1] for i, line in enumerate(SAMPLE.split("\n")) if "  # " in line
    }
    assert set(found) == set(wanted), found
    for line, message in wanted.items():
        assert message in found[line]
