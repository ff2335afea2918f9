"""Pictures of the sets, and cards for the notebooks with the first picture of each."""

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import catalogue

import optax_constraints as oc
from optax_constraints._config import snake_case

MARKER = "<!-- gallery -->"


def _text(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def heading(notebook: dict[str, Any], name: str) -> tuple[str, str]:
    """The title of a notebook, and the first sentence below it."""
    text = "\n\n".join(_text(cell) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    below = text[title.end() :] if title else text
    blocks = (" ".join(block.split()) for block in below.split("\n\n"))
    plain = next((block for block in blocks if block and block[0] not in "#<!|-*`>"), "")
    sentence = re.match(r".*?[.?!](?= |$)", plain)
    return (title[1] if title else name), (sentence[0] if sentence else plain)


def picture(notebook: dict[str, Any]) -> bytes | None:
    """The first PNG among the outputs, or that of a cell tagged `thumbnail`."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    cells.sort(key=lambda cell: "thumbnail" not in cell.get("metadata", {}).get("tags", []))
    for cell in cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                return base64.b64decode("".join(output["data"]["image/png"]))
    return None


def cards(notebooks: Path, images: Path) -> str:
    """A section with a card for each notebook; nothing if there is none.

    Args:
        notebooks: The folder with the notebooks.
        images: The folder for their pictures, inside of that of the site.

    Returns:
        Markdown for the front page.
    """
    paths = sorted(notebooks.glob("*.ipynb"))
    if not paths:
        return ""
    lines = ["## Notebooks", "", "::::{grid} 1 2 2 3", ":gutter: 3", ""]
    for path in paths:
        notebook = json.loads(path.read_text())
        title, sentence = heading(notebook, path.stem)
        lines += [
            f":::{{grid-item-card}} {title}",
            f":link: notebooks/{path.stem}",
            ":link-type: doc",
        ]
        found = picture(notebook)
        if found:
            images.mkdir(parents=True, exist_ok=True)
            (images / f"{path.stem}.png").write_bytes(found)
            lines.append(f":img-top: {images.name}/{path.stem}.png")
        lines += ["", sentence, ":::", ""]
    return "\n".join([*lines, "::::", ""])


# What is drawn of sets that have no defaults, or none that shows in two dimensions.
EXAMPLES: dict[str, Any] = {
    "max_rms": {"max_value": 1.0},
    "fixed_norm": {"value": 1.0},
    "fixed_rms": {"value": 1.0},
    "min_max_norm": {"min_value": 0.5},
    "box": {"lower": -1.0, "upper": 0.5},
    "grid": {"values": (-1.0, 0.0, 1.0)},
    "mask": {"mask": [1.0, 0.0]},
    "sign": {"pattern": [1.0, -1.0]},
    "tied": {"labels": [0, 0]},
    "box_section": {"lower": 0.0, "upper": 0.7},
    "sum_to": {"value": 1.0},
    "center_around": {"ref_value": 0.5},
    "hyperplane": {"normal": [1.0, 2.0], "offset": 1.0},
    "half_space": {"normal": [1.0, 2.0], "offset": 1.0},
    "affine": {"a": [[1.0, 2.0]], "b": [1.0]},
    "polyhedron": {"g": [[1.0, 1.0], [-1.0, 0.0]], "h": [1.0, 0.5]},
    "top_k": {"k": 1},
    "nm": {"n": 1, "m": 2},
    "soft": {"constraint": oc.max_norm(1.0), "rate": 0.5},
    "around": {"constraint": oc.max_norm(0.7), "center": [0.5, 0.5]},
    "scale": {"factor": 0.5},
}


def draw(plot_set: Callable[[oc.Constraint], Any], folder: Path) -> dict[str, str]:
    """Draws the sets that `plot_set` can draw.

    Args:
        plot_set: A function from a constraint to a Matplotlib figure, which raises for sets that
            do not show in two dimensions.
        folder: Where the pictures go.

    Returns:
        The path of each picture in docs/, by alias.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for cls in (cls for family in catalogue.families().values() for cls in family):
        alias = snake_case(cls.__name__)
        path = folder / f"{alias}.svg"
        if not path.exists():
            try:
                plot_set(cls(**EXAMPLES.get(alias, {}))).savefig(path, bbox_inches="tight")
            except (TypeError, ValueError):  # no defaults, or not in two dimensions
                continue
        found[alias] = f"{folder.name}/{path.name}"
    return found
