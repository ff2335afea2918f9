"""The page on other libraries, beside the benchmark that makes its tables; no peer is imported."""

import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
peers = importlib.import_module("peers")
PAGE = (ROOT / "docs/peers.md").read_text()
RATIO = 5  # the column


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(title: str) -> list[list[str]]:
    """The cells of each row, its head and rule aside."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


@pytest.mark.parametrize("title", peers.TABLES)
def test_the_page_has_the_rows_of_the_benchmark(title):
    compared, rows = peers.TABLES[title]
    lines = table(title)
    assert [line[:3] for line in lines] == [[row.peer, row.ours, row.on] for row in rows]
    assert all(len(line) == RATIO + 1 + len(compared) for line in lines)


@pytest.mark.parametrize("title", peers.TABLES)
def test_the_page_says_why_where_ours_is_slower(title):
    why = section("Where ours is slower")
    named = set(re.findall(r"\*\*(\w+)\*\*", why))
    assert named
    for line in table(title):
        alias = re.findall(r"(\w+)\(", line[1])[-1]  # inside of project, projected, constrain
        # What is nearer to 1 may be noise.
        assert float(line[RATIO]) >= 0.95 or alias in named, f"{line[0]} and {alias}"
