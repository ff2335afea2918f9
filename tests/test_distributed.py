"""Several devices, and several processes: `distributed_worker.py` runs on them and reports."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import compiled
import jax
import pytest

WORKER = Path(__file__).with_name("distributed_worker.py")


def run(*arguments: tuple[object, ...], timeout: float) -> list[dict]:
    """What a worker for each of some arguments reports; all of them end."""
    env = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_X64"}
    # What LLVM makes of the program is not what is looked at, and takes half of the time.
    env.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # JAX 0.6 starts programs from a cache so quickly that devices with few cores between them can
    # wait for one another for ever.
    env["JAX_ENABLE_COMPILATION_CACHE"] = "0"
    # Devices that wait for one another take a thread each, and those of XLA are as many as cores.
    env["NPROC"] = "16"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), *map(str, a)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for a in arguments
    ]
    try:
        # Nobody waits for the second worker while the first fills its pipe: they say little.
        said = [worker.communicate(timeout=timeout) for worker in workers]
    except subprocess.TimeoutExpired:
        for worker in workers:
            stop(worker)
        texts = [worker.communicate()[1] for worker in workers]
        pytest.fail(f"not done after {timeout} s:\n" + "\n".join(text[-3000:] for text in texts))
    finally:
        for worker in workers:
            stop(worker)
    for worker, (_, stderr) in zip(workers, said, strict=True):
        assert worker.returncode == 0, "\n".join(stderr[-3000:] for _, stderr in said)
    assert not any("Involuntary" in stderr for _, stderr in said)  # what is gathered in vain
    return [json.loads(stdout.splitlines()[-1]) for stdout, _ in said]


def stop(worker: subprocess.Popen) -> None:
    """Ends a worker and what it started, if it still runs."""
    if worker.poll() is None:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def check(report: dict, *kinds: str) -> None:
    assert not report["failed"], "\n".join(report["failed"])
    assert set(report["passed"]) == set(kinds)


without_x64 = pytest.mark.skipif(
    jax.config.jax_enable_x64, reason="the worker looks at float32, which it does without x64"
)


def test_what_moves_in_long_tuples_is_seen():
    arrays = ", ".join(["/*index=5*/bf16[4,2]{1,0}" if i == 5 else "f32[8]{0}" for i in range(6)])
    program = f"  %sum.1 = ({arrays}) all-reduce(%a, %b), replica_groups={{}}"
    (found,) = compiled.collectives(program)
    assert found.kind == "all-reduce"
    assert compiled.entries_of(found.result) == [8] * 6
    assert compiled.size_of(found.result) == 5 * 32 + 16


@without_x64
def test_two_groups_on_eight_devices():
    """Norms and elementwise sets, which stand for all five groups."""
    (report,) = run(("norms of leaves", "elementwise"), timeout=300)
    kinds = ["self-test", "every set", "equality", "shardings", "donation", "compilations"]
    check(report, *kinds, "collectives", "constrain and violations", "groups", "fused")
    assert report["passed"]["donation"] == 2
    # Of groups of leaves, the worst is among others.
    assert set(report["worst"]) == {"norms of leaves", "elementwise", "others"}
    assert report["passed"]["equality"] > 100


@without_x64
def test_matrices_are_divided():
    """No device projects a matrix that another one does; two sets stand for all of them."""
    (report,) = run(("matrices",), timeout=300)
    check(report, "matrices")
    assert report["passed"]["matrices"] > 300


@pytest.mark.slow
@without_x64
def test_eight_devices():
    """Norms and sums move vectors only, elementwise sets nothing; all equal a single device."""
    (report,) = run((), timeout=900)
    explicit = ["explicit axes", "groups on explicit axes", "matrices on explicit axes"]
    check(
        report,
        "self-test",
        "every set",
        "equality",
        "shardings",
        "donation",
        "compilations",
        "collectives",
        "constrain and violations",
        "groups",
        "fused",
        "matrices",
        *(explicit if hasattr(jax.sharding, "auto_axes") else []),
    )
    # One group of sets for each of these.
    assert report["passed"]["donation"] == len(report["worst"]) == 5
    assert report["passed"]["equality"] > 1000


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_processes(count):
    """Each process has its shards of what a single device has."""
    port = free_port()
    reports = run(*((port, count, process) for process in range(count)), timeout=600)
    kinds = ["equality", "shardings", "donation", "compilations", "collectives", "matrices"]
    for report in reports:
        check(report, *kinds, *(["hyperparameters", "texts"] if count == 2 else []))
        assert report["passed"]["equality"] > 20
