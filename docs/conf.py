"""The site: guides, notebooks, the API reference and the catalogue of sets.

`make docs` builds it without a network. With DOCS_INVENTORIES=1 names of Python, JAX and Optax
link to their documentation, for which their inventories are fetched.
"""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))
os.environ.setdefault("KERAS_BACKEND", "jax")  # optax_constraints.keras has no other

import api  # noqa: E402
import gallery  # noqa: E402
import llms  # noqa: E402

import optax_constraints  # noqa: E402

project = "optax_constraints"
release = version = optax_constraints.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "myst_nb",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "_generated"]

if os.environ.get("DOCS_INVENTORIES"):
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }

# Names in single backticks link to the reference where they are in it, and are code elsewhere.
default_role = "py:obj"
add_module_names = False
toc_object_entries = False
autodoc_typehints = "none"  # "Args" says it in words
napoleon_custom_sections = ["Cost"]
python_maximum_signature_line_length = 88

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "cache"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_execution_cache_path = str(DOCS / "_build" / "notebooks")

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_theme_options = {
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "footer_content_items": [],
}

# Files outside of docs/ that guides link to, and where the site has them.
ELSEWHERE = {
    "../README.md": "index.md",
    "../CHANGELOG.md": "project/changelog.md",
    "../CONTRIBUTING.md": "project/contributing.md",
    "../SECURITY.md": "project/security.md",
    "../notebooks/": "notebooks/",
}


def pictures() -> dict[str, str]:
    """Draws every set that `plot_set` can draw: alias -> path in docs/."""
    plot_set = getattr(optax_constraints, "plot_set", None)
    if plot_set is None or not importlib.util.find_spec("matplotlib"):
        return {}
    return gallery.draw(plot_set, DOCS / "_generated")


def copy(source: Path, target: Path, links: dict[str, str]) -> None:
    """Copies a page into docs/ with links that lead from there."""
    text = source.read_text()
    for old, new in links.items():
        text = text.replace(f"]({old}", f"]({new}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def generate(app: Any) -> None:
    """Writes what is not written by hand, before Sphinx looks for files."""
    api.write(DOCS / "reference", pictures())
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for old in (DOCS / "notebooks").glob("*.ipynb"):
        if old.name not in {path.name for path in notebooks}:
            old.unlink()
    for path in notebooks:
        copy(
            path, DOCS / "notebooks" / path.name, {"../docs/": "../", "../README.md": "../index.md"}
        )
    for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY"):
        links = {"docs/": "../", "README.md": "../index.md"}
        copy(ROOT / f"{name}.md", DOCS / "project" / f"{name.lower()}.md", links)


def guides(index: str) -> list[str]:
    """Guides that the front page does not name yet."""
    named = set(re.findall(r"^([\w-]+)$", index, re.MULTILINE)) | {"index"}
    return sorted(path.stem for path in DOCS.glob("*.md") if path.stem not in named)


def set_cell(match: re.Match[str]) -> str:
    """The first cell of a row of the catalogue, with a link and, if there is one, a picture."""
    call, alias = match.groups()
    found = next((DOCS / "_generated").glob(f"{alias}.svg"), None)
    shown = f"<br>![{alias}](_generated/{alias}.svg)" if found else ""
    return f"| [{call}](reference/sets/{alias}.rst){shown} |"


def read(app: Any, name: str, source: list[str]) -> None:
    """Links of a page as the site has them; on the front page also the gallery and all guides."""
    text = source[0]
    if "/" not in name:
        for old, new in ELSEWHERE.items():
            text = text.replace(f"]({old}", f"]({new}")
    if name == "catalogue":
        text = re.sub(r"^\| (`(\w+)\(.*?`) \|", set_cell, text, flags=re.MULTILINE)
    if name == "index":
        text = text.replace("<!-- more guides -->", "\n".join(guides(text)))
        notebooks = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
        text = text.replace("<!-- notebooks -->", "\n".join(f"notebooks/{n}" for n in notebooks))
        text = text.replace(gallery.MARKER, gallery.cards(ROOT / "notebooks", DOCS / "_generated"))
    source[0] = text


def write_llms(app: Any, exception: Exception | None) -> None:
    """Writes llms.txt beside the pages."""
    if exception is None and app.builder.name == "html":
        order = re.findall(r"^([\w-]+)$", (DOCS / "index.md").read_text(), re.MULTILINE)
        names = [name for name in order if (DOCS / f"{name}.md").exists()]
        names += guides((DOCS / "index.md").read_text())
        text = llms.index(DOCS, names, sorted(set(api.pages()) - {"index"}))
        (Path(app.outdir) / "llms.txt").write_text(text)


def setup(app: Any) -> None:
    """Connects the above."""
    app.connect("build-finished", write_llms)
    app.connect("builder-inited", generate)
    app.connect("source-read", read)
