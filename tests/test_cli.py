"""The command `optax-constraints`: what it reads, what it says, and its exit status."""

import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import safetensors.flax
from flax import nnx

import optax_constraints as oc
from optax_constraints import _checkpoints
from optax_constraints._cli import main

RULES = {"kernel": oc.max_norm(2.0), "bias": oc.non_neg()}
INSIDE = {
    "dense": {"kernel": jnp.eye(4, 3), "bias": jnp.zeros(3, jnp.bfloat16)},
    "layers": [{"kernel": jnp.eye(2)}, {"kernel": jnp.eye(2)}],
}
OUTSIDE = {**INSIDE, "dense": {"kernel": 3 * jnp.eye(4, 3), "bias": jnp.zeros(3, jnp.bfloat16)}}


def write_rules(path: Path, rules) -> Path:
    path.write_text(json.dumps(oc.serialize(rules)))
    return path


@pytest.fixture(scope="module")
def rules(tmp_path_factory) -> Path:
    return write_rules(tmp_path_factory.mktemp("rules") / "rules.json", RULES)


@pytest.fixture
def check(rules, capsys):
    """Runs `check` with the arguments given, and returns its status, stdout and stderr."""

    def run(checkpoint, *arguments, rules=rules):
        status = main(["check", str(checkpoint), "--rules", str(rules), *arguments])
        return status, *capsys.readouterr()

    return run


def refused(result, what: str):
    """Whether a run ended with status 2 and one line that says why."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert re.fullmatch(rf"optax-constraints: error: [^\n]*{what}[^\n]*\n", err), err


def flat(tree, separator="/"):
    return {
        jax.tree_util.keystr(keys, simple=True, separator=separator): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def save_orbax(path, tree, **options):
    # `options` are those of the newest layout, or of the ones before it.
    ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)).save(path, tree)


def save_standard(path, tree):
    with ocp.StandardCheckpointer() as saver:
        saver.save(path, tree)


def save_items(path, tree):
    with ocp.CheckpointManager(path) as manager:
        for step in (3, 20):
            own = {k: v for k, v in tree.items() if k != "extra"}
            items = {"params": ocp.args.StandardSave(own), "about": ocp.args.JsonSave({"a": 1})}
            manager.save(step, args=ocp.args.Composite(**items))


def save_npz(path, tree):
    arrays = {name: np.asarray(x, np.float32) for name, x in flat(tree).items()}
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


WRITERS = {
    "orbax": save_standard,
    "orbax files": lambda path, tree: save_orbax(path, tree, use_ocdbt=False),
    "orbax zarr3": lambda path, tree: save_orbax(path, tree, use_zarr3=True),
    "orbax items": save_items,
    "safetensors": lambda path, tree: safetensors.flax.save_file(flat(tree), path),
    "safetensors with dots": lambda path, tree: safetensors.flax.save_file(flat(tree, "."), path),
    "npz": save_npz,
    "msgpack": lambda path, tree: path.write_bytes(flax.serialization.to_bytes(tree)),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read(kind, check, tmp_path):
    WRITERS[kind](tmp_path / "good", INSIDE)
    status, out, err = check(tmp_path / "good")
    assert (status, err) == (0, "")
    assert "inside: all 4 constrained arrays" in out
    report = str(oc.report(INSIDE, RULES))
    if kind == "npz":
        report = report.replace("bfloat16", "float32")
    table = "\n".join(out.splitlines()[1:-1])
    words, expected = (re.sub("-{5,}", "", text).split() for text in (table, report))
    assert words == expected  # columns are narrower without bfloat16
    WRITERS[kind](tmp_path / "bad", OUTSIDE)
    status, out, _ = check(tmp_path / "bad")
    assert status == 1
    assert "OUTSIDE: 1 of 4 constrained arrays:\n  dense/kernel is 1.73 from MaxNorm(2)" in out


SAVE_SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np, orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))
kernel = jnp.arange(32.0).reshape(8, 4)
tree = {
    "both": {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("data", "model")))},
    "rows": {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("data")))},
}
with ocp.StandardCheckpointer() as saver:
    saver.save(sys.argv[1], tree)
"""


def test_shards_of_several_devices_become_whole_arrays(check, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", SAVE_SHARDED, str(tmp_path / "sharded")]
    subprocess.run(command, check=True, env={**os.environ, "XLA_FLAGS": flags})
    exact = oc.fixed_norm(float(np.linalg.norm(np.arange(32.0))))
    rules = write_rules(tmp_path / "rules.json", {"kernel": exact})
    assert check(tmp_path / "sharded", rules=rules)[0] == 0
    leaf = _checkpoints.open_checkpoint(tmp_path / "sharded").tree["both"]["kernel"]
    np.testing.assert_array_equal(np.asarray(leaf), np.arange(32.0).reshape(8, 4))


def test_one_array_is_read_at_a_time(check, tmp_path, monkeypatch):
    arrays = {f"{i}/kernel": jnp.eye(3) for i in range(4)}
    safetensors.flax.save_file({**arrays, "free": jnp.ones(3)}, tmp_path / "file")
    read, live = [], []

    def spy(self):
        live.append(sum(x.shape == (3, 3) for x in jax.live_arrays()))
        read.append(self.name)
        return jnp.array(original(self))

    original = _checkpoints.Leaf.__jax_array__
    before = sum(x.shape == (3, 3) for x in jax.live_arrays())
    del arrays
    monkeypatch.setattr(_checkpoints.Leaf, "__jax_array__", spy)
    assert check(tmp_path / "file")[0] == 2  # no bias
    assert check(tmp_path / "file", "--no-strict")[0] == 0
    assert len(read) == 4
    assert len(set(live)) == 1
    assert live[0] < before


def test_parameters_beside_an_optimizer(check, tmp_path):
    params = {"kernel": jnp.eye(3), "bias": -jnp.ones(3)}
    relative = {"kernel": oc.fixed_norm("init"), "bias": oc.sign("init")}
    tx = optax.chain(optax.adam(0.1), oc.project(relative))
    state = tx.init(params)
    rules = write_rules(tmp_path / "rules.json", relative)

    save_standard(tmp_path / "both", {"params": params, "opt_state": state, "step": 1})
    status, out, _ = check(tmp_path / "both", rules=rules)
    assert (status, "opt_state" in out) == (0, False)
    assert check(tmp_path / "both", "--state", "opt_state", rules=rules)[0] == 0
    moved = {"kernel": 2 * jnp.eye(3), "bias": jnp.ones(3)}
    train_state = {"params": moved, "opt_state": state}
    (tmp_path / "moved").write_bytes(flax.serialization.to_bytes(train_state))
    status, out, _ = check(tmp_path / "moved", rules=rules)
    assert (status, "2 of 2 constrained" in out) == (1, True)

    refused(check(tmp_path / "both", "--prefix", "", rules=rules), "opt_state/1/memory/bias")
    refused(check(tmp_path / "both", "--prefix", "model"), "no 'model'; the keys are 'opt_state'")
    save_standard(tmp_path / "alone", {"params": params})
    refused(check(tmp_path / "alone", rules=rules), "Save the optimizer's state beside")
    kernels = write_rules(tmp_path / "kernels.json", {"/params/kernel": oc.max_norm(9.0)})
    everything = check(tmp_path / "both", "--prefix", "", rules=kernels)[1]
    assert "opt_state/0/0/mu/kernel" in everything


def test_nnx_paths_are_without_value(check, tmp_path):
    class Model(nnx.Module):
        def __init__(self):
            self.dense = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    save_standard(tmp_path / "nnx", nnx.state(Model()))
    rules = write_rules(tmp_path / "rules.json", {"/dense/kernel": oc.max_norm(9.0)})
    status, out, _ = check(tmp_path / "nnx", rules=rules)
    assert (status, "dense/kernel/value" in out) == (0, False)


def test_a_step_of_several(check, tmp_path):
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(1, args=ocp.args.StandardSave(INSIDE))
        manager.save(12, args=ocp.args.StandardSave(OUTSIDE))
    status, out, _ = check(tmp_path / "run")
    assert (status, out.splitlines()[0]) == (1, str(tmp_path / "run" / "12"))
    assert check(tmp_path / "run", "--step", "1")[0] == 0
    refused(check(tmp_path / "run", "--step", "2"), "no step 2, but 1, 12")


def test_numbers_are_in_their_order():
    leaf = _checkpoints.Leaf("x", (1,), np.dtype(np.float32), lambda: np.zeros(1))
    tree = _checkpoints.nested({("layers", str(i)): leaf for i in (10, 2, 1)})
    paths = [keys[-1].key for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]
    assert paths == ["1", "2", "10"]
    with pytest.raises(_checkpoints.CheckpointError, match="has others below it"):
        _checkpoints.nested({("a",): leaf, ("a", "b"): leaf})


def test_as_json(check, tmp_path):
    kernel = jnp.full((2, 2), jnp.nan)
    safetensors.flax.save_file({"a/kernel": kernel, "a/bias": jnp.ones(2)}, tmp_path / "file")
    status, out, _ = check(tmp_path / "file", "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (status, found["inside"], found["outside"]) == (1, False, ["a/kernel"])
    bias, kernel = found["rows"]
    assert (bias["path"], bias["outside"], bias["allowed"], bias["units"]) == ("a/bias", 0, 0, 2)
    assert (kernel["shape"], kernel["outside"]) == ([2, 2], "NaN")


def test_the_tolerance(check, tmp_path):
    kernel = jnp.zeros((2, 2)).at[0].set(2 * (1 + 3e-6))  # 25 epsilons
    safetensors.flax.save_file({"kernel": kernel, "bias": jnp.ones(2)}, tmp_path / "file")
    assert check(tmp_path / "file")[0] == 1
    assert check(tmp_path / "file", "--tolerance", "100")[0] == 0
    for wrong in ("-1", "nan", "inf", "many"):
        refused(check(tmp_path / "file", "--tolerance", wrong), "no number from 0")


def test_float64_is_checked_as_such(check, tmp_path):
    np.savez(tmp_path / "file.npz", kernel=np.eye(2), bias=np.array([-1e-60, 1.0]))
    status, out, _ = check(tmp_path / "file.npz")
    assert status == 1
    assert re.search(r"bias +2 +float64 .* 1e-60$", out, re.MULTILINE)
    assert jnp.zeros(1).dtype == jnp.result_type(float)


def test_groups_and_arguments(check, tmp_path):
    rules = {oc.joint("kernel", "bias"): oc.max_norm(oc.arg("cap")), "free": None}
    rules = write_rules(tmp_path / "rules.json", list(rules.items()))
    arrays = {"a/kernel": jnp.array([[3.0]]), "a/bias": jnp.array([4.0]), "free": jnp.ones(1)}
    safetensors.flax.save_file(arrays, tmp_path / "file")
    assert check(tmp_path / "file", "--extra", "cap=5", rules=rules)[0] == 0
    status, out, _ = check(tmp_path / "file", "--extra", "cap=4.5", rules=rules)
    assert (status, "2 of 2 constrained" in out) == (1, True)
    refused(check(tmp_path / "file", rules=rules), "needs the argument 'cap'")
    refused(check(tmp_path / "file", "--extra", "cap", rules=rules), "'cap' is not NAME=VALUE")
    refused(check(tmp_path / "file", "--extra", "cap=x", rules=rules), "'x' is no number")


def test_sets_of_ones_own(check, tmp_path, registry, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = "import optax_constraints as oc\n@oc.register\ndef halved(w):\n    return w / 2\n"
    Path("own_sets_of_a_test.py").write_text(module)
    Path("rules.json").write_text('{"kernel": "halved"}')
    safetensors.flax.save_file({"kernel": jnp.eye(2)}, "file")
    monkeypatch.setattr(sys, "path", list(sys.path))
    refused(check("file", rules="rules.json"), "identifier: 'halved'")
    own = ("--import", "own_sets_of_a_test")
    assert check("file", *own, rules="rules.json")[0] == 1
    refused(check("file", "--import", "no_such", rules="rules.json"), "--import no_such: Module")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with one checkpoint in each format, for tests that damage copies."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in ("orbax", "orbax files", "safetensors", "npz", "msgpack"):
        WRITERS[kind](folder / kind, INSIDE)
    return folder


@pytest.mark.parametrize("kind", ["safetensors", "npz", "msgpack"])
def test_files_that_were_cut_off(kind, whole, check, tmp_path):
    content = (whole / kind).read_bytes()
    lengths = {0, 1, 7, 8, 9, 20, len(content) // 2, len(content) - 1}
    for length in sorted(lengths):
        (tmp_path / "cut").write_bytes(content[:length])
        refused(check(tmp_path / "cut"), "")
    refused(check(whole / "none"), "There is no ")


def test_damaged_folders(whole, check, tmp_path):
    def copy(kind, name):
        return Path(shutil.copytree(whole / kind, tmp_path / name))

    metadata = copy("orbax", "no metadata")
    (metadata / "_METADATA").unlink()
    refused(check(metadata), "_METADATA is neither in it")
    for text in ("", "{", "[]", '{"tree_metadata": {"a": 1}}'):
        (metadata / "_METADATA").write_text(text)
        refused(check(metadata), "cannot be read, and may be damaged")
    manifest = copy("orbax", "no manifest")
    (manifest / "manifest.ocdbt").unlink()
    refused(check(manifest), "its save did not end")
    parts = copy("orbax files", "no part")
    (parts / "dense.kernel" / "0.0").unlink()
    refused(check(parts), "dense/kernel' cannot be read")
    (parts / "dense.kernel" / "0.0").write_bytes(b"x")
    refused(check(parts), "dense/kernel' cannot be read")
    for data in (folder := copy("orbax", "cut")).rglob("d/*"):
        os.truncate(data, data.stat().st_size // 2)
    refused(check(folder), "cannot be read")
    refused(check(copy("orbax", "12.orbax-checkpoint-tmp-3")), "of a save that did not end")
    refused(check(tmp_path / "no metadata" / "d"), "is no checkpoint")


def test_pickles_and_other_files_are_refused(check, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(pickle.dumps({"kernel": 1}))
    refused(check(path), "is a pickle, which is never read")
    np.savez(path.with_suffix(".npz"), kernel=np.array([object()]), bias=np.ones(1))
    refused(check(path.with_suffix(".npz")), "only floating-point arrays can be constrained")
    np.savez(path.with_suffix(".npz"), kernel=np.asarray(INSIDE["dense"]["bias"]))
    refused(check(path.with_suffix(".npz")), "does not save bfloat16")
    path.write_text("kernel: 1")
    refused(check(path), "is no safetensors, .npz or msgpack")
    header = b'{"kernel":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(check(path), "shape .2,. in bytes 0 to 4")
    entry = b'"kernel":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + entry + b"," + entry + b"}"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(check(path), "the key 'kernel' is there twice")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "holds no JSON: Expecting value"),
        ('{"kernel": ', "holds no JSON"),
        ('{"kernel": "no_such_set"}', "holds no rules: .*'no_such_set'"),
        ('{"kernel": "max_norm", "kernel": null}', "the key 'kernel' is there twice"),
        ('{"kernel": 3}', "holds no rules"),
        ("3", "holds no rules"),
        ("null", "constrain none of the 4 arrays"),
        ('{"kernel": null}', "constrain none of the 4 arrays"),
        ('{"kernle": "max_norm"}', "'kernle' matches no leaf of the 4 .*pass --no-strict"),
        ('[[{"of_layer": ["Dense", "kernel"]}, "max_norm"]]', "which a checkpoint does not tell"),
        ("[" * 100000, "holds no rules"),
        ('"\\ud800"', "holds no rules"),
    ],
)
def test_rules_that_are_wrong(content, what, whole, check, tmp_path):
    (tmp_path / "rules.json").write_text(content)
    refused(check(whole / "safetensors", rules=tmp_path / "rules.json"), what)
    refused(check(whole / "safetensors", rules=tmp_path / "none.json"), "No such file")


def test_usage(capsys):
    for arguments, what in [
        ([], "required: COMMAND. See optax-constraints --help"),
        (["check", "x"], "required: --rules. See optax-constraints check --help"),
        (["check", "x", "--rules", "y", "--step", "z"], "--step: invalid int value: 'z'"),
        (["show"], "required: RULES.json"),
    ]:
        refused((main(arguments), *capsys.readouterr()), what)
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])
    assert "Exit status: 0" in capsys.readouterr().out


def test_warnings_take_a_line(whole, tmp_path):
    rules = {"kernel": oc.max_norm(2.0), "dense/kernel": oc.unit_norm()}
    rules = write_rules(tmp_path / "rules.json", rules)
    command = [sys.executable, "-m", "optax_constraints", "check"]
    command += [str(whole / "safetensors"), "--rules", str(rules)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0
    assert re.fullmatch(
        r"optax-constraints: warning: The rule 'dense/kernel' does nothing[^\n]*\n", run.stderr
    )


def test_what_nobody_foresaw_is_not_status_1(check, whole, registry, tmp_path):
    @oc.register
    def broken(w):
        return {}["no such key"]

    rules = write_rules(tmp_path / "rules.json", {"kernel": broken})
    refused(check(whole / "safetensors", rules=rules), "KeyError: 'no such key'")


def test_the_guide(capsys, tmp_path, monkeypatch):
    """Each command of docs/checking.md prints what is shown there."""
    text = (Path(__file__).parents[1] / "docs" / "checking.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], {})
    (console,) = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    printed = ""
    for command in re.findall(r"^\$ optax-constraints (.*)$", console, re.MULTILINE):
        main(shlex.split(command))
        printed += f"$ optax-constraints {command}\n{capsys.readouterr().out}"
    assert printed == console
