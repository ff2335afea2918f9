"""The language model in notebooks/: rules hold, runs resume, and any mesh trains the same."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from distributed_worker import collectives
from test_distributed import free_port

SCRIPT = Path(__file__).parents[1] / "notebooks" / "train_lm.py"
sys.path.insert(0, str(SCRIPT.parent))
import train_lm  # noqa: E402

TINY = {"compute": "float32", "batch": 4, "context": 8, "width": 16, "layers": 2, "heads": 2}
REGIMES = {
    "adamw": {"regime": "adamw"},
    "ngpt": {"regime": "ngpt"},
    "hyperball, Adam": {"regime": "hyperball", "inner": "adam"},
    "hyperball, Muon": {"regime": "hyperball", "inner": "muon"},
}
without_x64 = pytest.mark.skipif(
    jax.config.jax_enable_x64, reason="the model is about float32 and bfloat16"
)


def config_of(way, **others):
    return train_lm.Config(**{**TINY, **REGIMES[way], **others})


def weights(params):
    leaves = jax.tree.leaves_with_path(params)
    return {train_lm.name_of(keys): np.asarray(w, np.float64) for keys, w in leaves}


def norms(way, params):
    """Of each unit of each matrix, with the axes that the regime is about."""
    own = weights(params)
    if way == "ngpt":
        axes = {"embedding": 1, "qkv": 1, "out": 3, "up": 1, "down": 2, "head": 0}
    else:
        axes = {"embedding": 1, "qkv": (1, 2, 3, 4), "out": (1, 2, 3), "up": (1, 2), "down": (1, 2)}
        axes["head"] = (0, 1)
    return {name: np.sqrt(np.sum(own[name] ** 2, axis)) for name, axis in axes.items()}


def steps_of(way, count):
    """The states of a training, beginning with that at init."""
    config = config_of(way)
    mesh = train_lm.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    program = train_lm.programs(config, mesh)
    now = program.create(3)
    yield now, {}
    for step in range(count):
        at = np.random.default_rng(step).integers(10**6, size=config.batch)
        tokens = train_lm.rows(train_lm.text()[0], at, config, mesh)
        now, numbers = program.step(now, tokens, 0.05)
        yield now, numbers


@without_x64
@pytest.mark.parametrize(
    "way",
    ["ngpt", *(pytest.param(f"hyperball, {x}", marks=pytest.mark.slow) for x in ("Adam", "Muon"))],
)
def test_rules_hold_after_each_step(way):
    steps = steps_of(way, 3)
    now, _ = next(steps)
    start, before = norms(way, now["params"]), weights(now["params"])
    wanted = {name: np.ones_like(x) if way == "ngpt" else x for name, x in start.items()}
    for now, numbers in steps:
        for name, found in norms(way, now["params"]).items():
            # The norm at init and that of each step are sums in float32: a few eps (1.2e-7).
            np.testing.assert_allclose(found, wanted[name], rtol=1e-6, err_msg=name)
        assert numbers["outside"] < 1e-4
        for own in numbers["stats"].values():
            assert own["at_bound"] == own["units"] > 0
        after = weights(now["params"])
        assert all(np.any(after[name] != before[name]) for name in wanted)
        before = after


@without_x64
@pytest.mark.slow
def test_a_resumed_run_is_equal_to_the_bit(tmp_path):
    config = config_of("hyperball, Adam")
    mesh = train_lm.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    def run(**others):
        given = {"steps": 4, "learning_rate": 0.05, "directory": tmp_path, "log_every": 1}
        given |= {"checkpoint_every": 2, "tensorboard": False, "progress": False, **others}
        result = train_lm.train(config, mesh, **given)
        return result, [json.loads(x) for x in (tmp_path / "log.jsonl").read_text().splitlines()]

    whole, log = run()
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # as if it had been stopped before
    resumed, again = run()
    assert set(resumed.losses) == {3, 4}
    assert again == log
    assert resumed.held_out == whole.held_out
    pairs = zip(*map(jax.tree.leaves, (whole.now, resumed.now)), strict=True)
    assert all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)
    with pytest.raises(SystemExit, match=r"'seed': 0.*'seed': 1.*another --directory"):
        run(seed=1)


def test_logs_go_on_from_a_step(tmp_path):
    for start in (0, 2):
        log = train_lm.Log(tmp_path, start, tensorboard=True)
        for step in range(start + 1, 5):
            log(step, {"loss": 5.0 - start, "stats": {"layers/up": {"at_bound": 2}}})
        log.close()
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [
        (1, 5),
        (2, 5),
        (3, 3),
        (4, 3),
    ]
    events = b"".join(path.read_bytes() for path in tmp_path.glob("events.out.tfevents.*"))
    assert events.count(b"stats/layers/up/at_bound") == events.count(b"loss") == 6


def start(directory, *args):
    env = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    env.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # See tests/test_distributed.py.
    env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    sizes = [f"--{name}={value}" for name, value in TINY.items()]
    run = ["--directory", directory, "--steps=4", "--log-every=1", "--learning-rate=0.02"]
    command = [sys.executable, SCRIPT, *sizes, *run, "--inner=adam", "--no-tensorboard", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, command)), env=env, **pipes)


def ended(*processes):
    try:
        said = [process.communicate(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    assert not any(codes), "\n".join(stderr[-3000:] for _, stderr in said)
    return [stdout for stdout, _ in said]


@pytest.mark.slow
def test_any_mesh_trains_the_same(tmp_path):
    one, eight, two = (tmp_path / name for name in ("one", "eight", "two"))
    (said,) = ended(start(one, "--devices=1"))
    for regime in train_lm.REGIMES:
        assert f"\n{regime} " in said
    assert said.count("free") == 9 + 3 + 3
    ended(start(eight, "--devices=8", "--mesh=4x2"))
    place = [f"--coordinator=127.0.0.1:{free_port()}", "--processes=2", "--mesh=2x1", "--devices=1"]
    _, silent = ended(*(start(two, *place, f"--process={process}") for process in range(2)))
    assert "hyperball" not in silent
    for regime in train_lm.REGIMES:
        logs = [
            [json.loads(line) for line in (d / regime / "log.jsonl").read_text().splitlines()]
            for d in (one, eight, two)
        ]
        assert all([record["step"] for record in log] == [1, 2, 3, 4] for log in logs)
        for name in ("loss", "gradient"):
            a, *others = ([record[name] for record in log] for log in logs)
            for b in others:
                # Sums of 32 losses in another order differ by some eps (1.2e-7), and Adam gives
                # the rounding of a gradient near zero a step as long as any.
                np.testing.assert_allclose(b, a, rtol=2e-6, err_msg=f"{regime}: {name}")
        assert all(record["outside"] < 1e-4 for log in logs for record in log)


@pytest.mark.slow
def test_norms_gather_no_parameter():
    (said,) = ended(
        subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    report = json.loads(said.splitlines()[-1])
    assert set(report) == {"ngpt", "hyperball, Adam"}
    for largest, smallest_shard, units in report.values():
        # Norms of units that are split in four: partial ones of four devices at the most.
        assert 0 < largest <= 4 * units < smallest_shard


def main():
    """What moves in the update of a training on 4 x 2 devices, by regime."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    report = {}
    for way in ("ngpt", "hyperball, Adam"):
        config = config_of(way, width=128)
        program = train_lm.programs(config, train_lm.mesh_of("4x2", config))
        params = program.abstract["params"]
        text = program.update.lower(program.abstract, params, 0.1).compile().as_text()
        shards = [
            math.prod(w.sharding.shard_shape(w.shape))
            for keys, w in jax.tree.leaves_with_path(params)
            if train_lm.name_of(keys) in train_lm.PLACES
        ]
        units = max(512 * config.layers // 2, 256)  # of `up` and `down`, split in two
        report[way] = max(size for _, size in collectives(text)), min(shards), units
    print(json.dumps(report))


if __name__ == "__main__":
    main()
