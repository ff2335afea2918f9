"""Each code block of README.md and docs/ runs as pasted, and prints what is shown there."""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {page.name: page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))}


def blocks(text: str) -> list[tuple[str, str]]:
    """Blocks of Python, each with the block of text right after it, if there is one."""
    return re.findall(r"```python\n(.*?)```\n(?:\n?```text\n(.*?)```)?", text, re.DOTALL)


BLOCKS = blocks(README)

# Runs blocks of code, each with names of its own. What they print, or how they fail, is a list
# on the last line.
RUNNER = """
import contextlib, gc, io, json, sys, traceback
gc.set_threshold(50_000, 20, 20)
outputs = []
for code in json.load(sys.stdin):
    failed = ""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(compile(code, code, "exec"), {"__name__": "__main__"})
        except Exception:
            failed = traceback.format_exc()
    outputs.append(failed or output.getvalue())
print(json.dumps(outputs))
"""
PAGES = {page: blocks(text) for page, text in DOCS.items() if blocks(text)}


@functools.cache
def outputs(*own: tuple[str, str]) -> dict[tuple[str, str], str]:
    """What blocks print: one process imports JAX and compiles for all of them."""
    # README shows results in float32.
    environment = {**os.environ, "JAX_ENABLE_X64": "0"}
    # A warning, such as for a rule that does nothing, would be an example of what not to write.
    command = [sys.executable, "-W", "error", "-c", RUNNER]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            command,
            input=json.dumps([code for code, _ in own]),
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
        )
    assert run.returncode == 0, run.stderr
    return dict(zip(own, json.loads(run.stdout.splitlines()[-1]), strict=True))


def check(pages: dict[str, list[tuple[str, str]]], page: str) -> None:
    every = [block for own in pages.values() for block in own]
    together = [block for block in every if "os.environ" not in block[0]]
    for block in pages[page]:
        # A block that starts JAX in its own way has a process for itself.
        printed = outputs(*(together if block in together else [block]))[block]
        assert printed == block[1], block[0]


def test_code_blocks_of_the_readme():
    check({"README.md": BLOCKS}, "README.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_blocks(page):
    check(PAGES, page)


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
