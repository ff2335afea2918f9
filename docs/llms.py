"""llms.txt: the pages of the site, one a line, for readers that take plain text."""

import re
from pathlib import Path

SUMMARY = """\
# optax_constraints

> Weight constraints for JAX. `project(rules)`, last in an Optax chain, puts parameters back into
> their sets after each update. `rules` map patterns of parameter paths to sets. It works for any
> tree of arrays. Flax layers also take `kernel_constraint=` and the like, as in Keras.
"""


def first_sentence(text: str) -> str:
    """The first sentence below the title of a page, without its links."""
    below = text.partition("\n\n")[2].partition("\n\n")[0]
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(below.split()))
    found = re.match(r".*?[.?!](?= |$)", plain)
    return found[0] if found else plain


def index(docs: Path, names: list[str], reference: list[str]) -> str:
    """The text of llms.txt.

    Args:
        docs: The folder with the guides.
        names: The guides, without `.md`, in order.
        reference: The pages of the API reference.

    Returns:
        Markdown, with links to the sources of the guides beside the site.
    """
    lines = [SUMMARY, "## Guides", ""]
    for name in names:
        text = (docs / f"{name}.md").read_text()
        title = text.splitlines()[0].removeprefix("# ")
        lines.append(f"- [{title}](_sources/{name}.md): {first_sentence(text)}")
    lines += ["", "## API reference", ""]
    lines += [f"- [{name}](reference/{name}.html)" for name in reference]
    return "\n".join([*lines, ""])
