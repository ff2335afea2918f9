"""Each code block of README.md and docs/ runs as pasted, and prints what is shown there."""

import json
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

# Runs blocks of code, each with names of its own. What they print is a list on the last line.
RUNNER = """
import contextlib, io, json, sys
outputs = []
for code in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compile(code, code, "exec"), {"__name__": "__main__"})
    outputs.append(output.getvalue())
print(json.dumps(outputs))
"""


def processes() -> dict[str, list[tuple[str, str]]]:
    """Blocks that run in one process: those of a page, but for what starts JAX in its own way."""
    found = {}
    for page, text in {"README.md": README, **DOCS}.items():
        alone = {f"{page} {i}": [b] for i, b in enumerate(blocks(text)) if "os.environ" in b[0]}
        found |= {page: [b for b in blocks(text) if [b] not in alone.values()], **alone}
    return {name: own for name, own in found.items() if own}


@pytest.mark.parametrize("name", processes())
def test_code_blocks(name, tmp_path):
    codes, outputs = zip(*processes()[name], strict=True)
    # README shows results in float32.
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    # A warning, such as for a rule that does nothing, would be an example of what not to write.
    command = [sys.executable, "-W", "error", "-c", RUNNER]
    run = subprocess.run(
        command,
        input=json.dumps(codes),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == list(outputs)


def test_the_first_example_stands_at_the_top():
    assert BLOCKS
    assert README.splitlines().index("```python") < 10
    assert BLOCKS[0][1]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 90


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"make ([\w-]+)", README + (ROOT / "CONTRIBUTING.md").read_text())
    assert {"demo", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
