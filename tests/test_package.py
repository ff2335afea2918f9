"""The package as users install it, and the files that must agree with each other."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
import types
import venv
import zipfile
from pathlib import Path

import pytest
from cases import CASES

import optax_constraints as oc
from optax_constraints import _config, _constraint

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def floors(requirements: list[str]) -> dict[str, str]:
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", r) for r in requirements)
    return {m[1]: m[2] for m in found if m}


def test_floors_are_those_that_are_tested():
    declared = floors([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["flax"]])
    assert set(declared) == {"jax", "optax", "flax"}
    tested = dict(line.split("==") for line in (ROOT / "tests/floors.txt").read_text().split())
    assert tested == {**declared, "jaxlib": declared["jax"]}


def test_runtime_dependencies_are_few():
    assert set(floors(PROJECT["dependencies"])) == {"jax", "optax"}
    assert len(PROJECT["dependencies"]) == 2


def test_readme_and_changelog_name_the_versions_there_are():
    readme = (ROOT / "README.md").read_text()
    declared = floors([*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["flax"]])
    for name, version in declared.items():
        assert f"{name} {version}" in readme.lower()
    assert f"## [{oc.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


SETS = [cls for cls in _constraint.own_classes if cls is not oc.Constraint]


@pytest.mark.parametrize("cls", SETS, ids=lambda cls: cls.__name__)
def test_a_set_is_wherever_people_look(cls):
    alias = _config.snake_case(cls.__name__)
    family = cls.__module__
    assert getattr(importlib.import_module(family), alias, None) is cls, (
        f"write {alias} = {cls.__name__} below the class, in {family}"
    )
    for name in (cls.__name__, alias):
        assert getattr(oc, name, None) is cls, (
            f"write `from {family} import {name} as {name}` in optax_constraints/__init__.py"
        )
        assert _config._registry[name] is cls
    text = (ROOT / "docs/choosing.md").read_text()
    assert re.search(rf"`[^`\n]*\b{alias}\(", text), (
        f"write `{alias}(...)` in a table of docs/choosing.md"
    )
    cases = {type(part) for case in CASES for part in _constraint.parts_of(case.constraint)}
    assert cls in cases or cls in NO_SETS, (
        f"write a Case with {alias}(...) in tests/cases/{family.rpartition('.')[2]}.py"
    )


# It promises nothing that a set does; tests/test_args.py has its tests.
NO_SETS = {oc.Scale}


def test_the_public_names():
    public = {
        name
        for name, thing in vars(oc).items()
        if not name.startswith("_") and not isinstance(thing, types.ModuleType)
    }
    sets = {name for cls in SETS for name in (cls.__name__, _config.snake_case(cls.__name__))}
    verbs = {"project", "constrain", "violations", "report", "tangent", "assert_feasible", "stats"}
    verbs |= {"projected", "scale_by_unit_adam", "ScaleByUnitAdamState", "straight_through"}
    verbs |= {"ProjectState", "TangentState", "Report", "Constraint", "LeafStats"}
    pictures = {"plot", "plot_set", "plot_stats"}
    identifiers = {"get", "serialize", "deserialize", "register"}
    rules = {"arg", "joint", "across", "of_layer", "rules_from_tree"}
    assert public == sets | verbs | pictures | identifiers | rules


CHECK = """
import importlib.util, json, sys
import jax.numpy as jnp, optax
import optax_constraints as oc
tx = optax.chain(optax.sgd(0.1), oc.project({"w": oc.max_norm(1.0)}))
params = {"w": jnp.full((3, 2), 5.0)}
updates, _ = tx.update(params, tx.init(params), params)
params = optax.apply_updates(params, updates)
print(json.dumps({
    "norm": float(jnp.linalg.norm(params["w"][:, 0])),
    "flax": importlib.util.find_spec("flax") is not None,
    "file": oc.__file__,
    "version": oc.__version__,
}))
"""


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_runs_without_flax(tmp_path):
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (wheel,) = dist.glob("*.whl")
    assert wheel.name == f"optax_constraints-{oc.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"optax_constraints-{oc.__version__}.dist-info/METADATA").decode()
    package = ROOT / "optax_constraints"
    ours = {
        str(path.relative_to(ROOT))
        for path in package.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "optax_constraints/py.typed" in ours
    assert {name for name in names if ".dist-info/" not in name} == ours
    assert {name.split("/")[0] for name in names} == {
        "optax_constraints",
        f"optax_constraints-{oc.__version__}.dist-info",
    }
    assert "License-Expression: Apache-2.0" in metadata
    assert "Name: optax-constraints" in metadata

    venv.create(tmp_path / "empty", with_pip=True)
    python = str(tmp_path / "empty" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", str(wheel)], check=True)
    run = subprocess.run(
        [python, "-c", CHECK], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    result = json.loads(run.stdout)
    assert not result["flax"]
    assert Path(result["file"]).is_relative_to(tmp_path / "empty")
    assert result["version"] == oc.__version__
    assert result["norm"] == pytest.approx(1.0, rel=1e-6)
