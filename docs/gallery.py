"""Cards for the notebooks, with the first picture of each."""

import base64
import json
import re
from pathlib import Path
from typing import Any

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
        lines += [f":::{{grid-item-card}} {title}", f":link: notebooks/{path.stem}", ":link-type: doc"]
        found = picture(notebook)
        if found:
            images.mkdir(parents=True, exist_ok=True)
            (images / f"{path.stem}.png").write_bytes(found)
            lines.append(f":img-top: {images.name}/{path.stem}.png")
        lines += ["", sentence, ":::", ""]
    return "\n".join([*lines, "::::", ""])
