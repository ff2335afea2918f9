"""The demo runs, says the same twice, and shows what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[1] / "notebooks" / "demo.py"
WAYS = ("no constraint", "max-norm kernels", "max-norm kernels, non-negative output bias")
BOUND = 1.5


def run(directory):
    done = subprocess.run(
        [sys.executable, DEMO, "--plot", directory / "norms.png"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    return directory, run(directory)


@pytest.mark.slow
def test_demo_says_the_same_twice(demo):
    directory, first = demo
    plot = directory / "norms.png"
    plot.unlink(missing_ok=True)
    assert run(directory).stdout == first.stdout
    assert plot.exists()


@pytest.mark.slow
def test_demo_shows_what_it_promises(demo):
    directory, done = demo
    plot = directory / "norms.png"
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [path.name for path in directory.iterdir()] == [plot.name]
    assert str(plot) in done.stdout
    assert "epoch" in done.stderr

    found = re.findall(r"^(\S.*?) +(\d\.\d{4}) +(\d+\.\d{4})$", done.stdout, re.MULTILINE)
    assert [way for way, _, _ in found] == list(WAYS)
    assert all(float(accuracy) >= 0.95 for _, accuracy, _ in found)
    free, *constrained = [float(norm) for _, _, norm in found]
    assert free > 1.5 * BOUND
    assert constrained == [BOUND, BOUND]

    rows = re.findall(r"^(Dense_\d/\w+) .*(?:MaxNorm|NonNeg)\(.* (\S+)$", done.stdout, re.MULTILINE)
    assert [path for path, _ in rows] == [
        "Dense_0/kernel",
        "Dense_1/kernel",
        "Dense_2/bias",
        "Dense_2/kernel",
    ]
    assert all(float(outside) == 0 for _, outside in rows)
    assert "none outside" in done.stdout
    binding = re.search(r"([\d,]+) of ([\d,]+) units at their bound", done.stdout)
    assert binding
    assert 0 < int(binding[1]) < int(binding[2])
