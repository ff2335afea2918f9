"""Each code block of README.md and docs/ runs as pasted, and prints what is shown there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text: str) -> list[tuple[str, str]]:
    """Blocks of Python, each with the block of text right after it, if there is one."""
    return re.findall(r"```python\n(.*?)```\n(?:\n?```text\n(.*?)```)?", text, re.DOTALL)


BLOCKS = blocks(README)
ALL_BLOCKS = [block for text in (README, *DOCS.values()) for block in blocks(text)]


@pytest.mark.parametrize(("code", "output"), ALL_BLOCKS, ids=range(len(ALL_BLOCKS)))
def test_code_block(code, output, tmp_path):
    # README shows results in float32.
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    # A warning, such as for a rule that does nothing, would be an example of what not to write.
    command = [sys.executable, "-W", "error", "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
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
