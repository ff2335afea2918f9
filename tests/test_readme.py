"""Each code block of README.md runs as pasted, and prints what the README shows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# A block of Python, and the block of text right after it, if there is one.
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n?```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("code", "output"), BLOCKS, ids=range(len(BLOCKS)))
def test_code_block(code, output, tmp_path):
    # README shows results in float32.
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == output


def test_the_first_example_stands_at_the_top():
    assert BLOCKS
    assert README.splitlines().index("```python") < 10
    assert BLOCKS[0][1]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 110


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"demo", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
