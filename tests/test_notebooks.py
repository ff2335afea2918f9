"""The notebooks show what they promise, and run as they stand."""

import base64
import json
import re
import resource
import struct
import time
from pathlib import Path

import nbclient
import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
BYTES = 2**18
SECONDS = 120
"""The most that a notebook may take, in seconds of one core; other work on them does not count."""


def load(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text())


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell["outputs"]]


def text(source):
    return source if isinstance(source, str) else "".join(source)


def complaints(notebook):
    """Errors, and what was written to stderr: warnings that a reader would see."""
    shown = outputs(notebook)
    errors = [text(own["traceback"]) for own in shown if own["output_type"] == "error"]
    return errors + [text(own["text"]) for own in shown if own.get("name") == "stderr"]


@pytest.fixture(scope="module")
def own_fonts(tmp_path_factory):
    """A list of fonts that this run makes: one that lacks fonts makes Matplotlib complain."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path_factory.mktemp("matplotlib")))
        yield


def test_there_are_notebooks():
    assert {"quickstart", "what-can-go-wrong", "mixtures", "ternary", "pruning"} <= set(NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_committed_with_small_outputs(name):
    raw = (FOLDER / f"{name}.ipynb").read_text()
    notebook = json.loads(raw)
    assert len(raw) < BYTES
    assert complaints(notebook) == []
    # Executed in one go, from the first cell to the last.
    assert [cell["execution_count"] for cell in code(notebook)] == [
        *range(1, len(code(notebook)) + 1)
    ]
    data = [own["data"] for own in outputs(notebook) if "data" in own]
    pictures = [text(own.pop("image/png")) for own in data if "image/png" in own]
    assert pictures, "no picture"
    for picture in pictures:
        width, height = struct.unpack(">II", base64.b64decode(picture)[16:24])
        assert width <= 1000, f"a picture of {width} x {height}"
    path = re.search(r"/(home|root|Users|tmp|work|opt|usr)/|ipykernel_\d", json.dumps(notebook))
    assert path is None
    assert all("execution" not in cell["metadata"] for cell in notebook["cells"])
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_says_what_it_is_for_and_where_to_go(name):
    first, *_, last = load(name)["cells"]
    assert first["cell_type"] == last["cell_type"] == "markdown"
    # The front page of the site shows the title and the first sentence.
    opening = re.match(r"# .+\n\n([A-Z][^#|]*?[.?!])\s", text(first["source"]) + "\n")
    assert opening
    assert 8 <= len(opening[1].split()) <= 40
    assert "## Where to go next" in text(last["source"])
    assert "](../docs/" in text(last["source"])


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_links_of_notebook_lead_somewhere(name):
    cells = [c for c in load(name)["cells"] if c["cell_type"] == "markdown"]
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(text(cell["source"]) for cell in cells))
    for link in links:
        path, _, anchor = link.partition("#")
        if path.startswith("http"):
            continue
        target = FOLDER / path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in [slug(heading) for heading in headings], link


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.slow
@pytest.mark.usefixtures("own_fonts")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs(name, capsys):
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    for cell in code(notebook):
        cell["outputs"] = []
    start, spent = time.perf_counter(), cpu_seconds()
    nbclient.NotebookClient(
        notebook, timeout=900, coalesce_streams=True, resources={"metadata": {"path": str(FOLDER)}}
    ).execute()
    spent, passed = cpu_seconds() - spent, time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{name}: {spent:.0f} s of {SECONDS} s of one core, {passed:.0f} s passed")
    assert complaints(notebook) == []
    kinds = [[kind(own) for own in cell["outputs"]] for cell in code(notebook)]
    assert kinds == [[kind(own) for own in cell["outputs"]] for cell in code(load(name))]
    assert spent < SECONDS


def cpu_seconds():
    """What children that have ended spent, such as a kernel that was shut down."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def kind(output):
    """Of what kind an output is, such as a picture."""
    return sorted(output.get("data", {})) or output["output_type"]
