"""Writes docs/catalogue.md from the docstrings and the classes of the sets.

`python docs/catalogue.py` writes it again; a test compares.
"""

import inspect
import re
from pathlib import Path

import optax_constraints as oc
from optax_constraints._config import snake_case
from optax_constraints._constraint import own_classes

PAGE = Path(__file__).with_suffix(".md")

# Families as readers look for them, and their modules in optax_constraints/sets/.
FAMILIES = {
    "Norms": ("norm",),
    "Entry by entry": ("elementwise", "pattern"),
    "Sums and inequalities": ("simplex", "section", "linear", "affine", "polyhedron"),
    "Order and sparsity": ("order", "sparsity", "sequence", "unimodal"),
    "Matrices": ("matrix", "transport"),
    "Singular values": ("spectral", "scaled", "operator"),
    "Sets made of sets": ("combinators", "part", "intersection", "around"),
}

MARKS = {"convex": "C", "smooth": "S", "elementwise": "E"}

INTRODUCTION = """\
# Catalogue of sets

Every set, family by family. If you know what you want but not what it is called, start with
[Which set?](choosing.md).

Each set has two names: `max_norm` is `MaxNorm`. Call one on an array to project it. To hold it in
training, write it into [rules](rules.md). A **unit** is one slice along `axis`: an int, several
ints, `None` for the whole array, or `"fan_in"`, which stands for the axes of a unit's incoming
weights. The default `axis=0` is right for a Dense kernel (in, out). A Conv2D kernel (height,
width, in, out) needs `axis=(0, 1, 2)` or `"fan_in"`. Words are explained in the
[glossary](glossary.md).

| mark | the set is | what follows |
|---|---|---|
| C | convex | The projection is the one nearest point. The set may be part of an `intersection`. |
| S | smooth, such as a sphere or a plane | `tangent` gives the tangent space. |
| E | held entry by entry | No weight is ever outside after a step, in any float dtype. |
| L | made so that small steps are lost | [Train with `straight_through`](choosing.md). |

A mark in parentheses depends on the arguments, or on the set inside. For C and S, the optimizer
to write is [`projected(optimizer, rules)`](training.md). What all sets promise, and how accurate
each one is, stands in [trust](trust.md).

Cost is what one step adds to the optimizer. A **pass** reads or writes the weights once; Adam
takes about five.
"""

CLOSING = """\
## Numbers and axes

Every number may be a Python number, a JAX scalar (also a traced one), an Optax schedule, text
such as `"sqrt(fan_out / fan_in)"`, or `arg("name")`, which is read from the extra arguments of
`tx.update`. See [rules](rules.md). Constraints are pytrees: pass one to a compiled function, and
a new number compiles nothing.

`"fan_in"` is settled for each leaf by its name and rank, or by the `layout` of a model. If
neither is certain, that is an error, and the error says which axis to write. An axis that
contradicts the layout, or the name and rank, warns once.

Weights that are allowed come back bit for bit. Sums are taken in float32 or wider. A NaN stays in
its own unit.
"""

_SYMBOLS = {
    "||": "‖",
    "<=": "≤",
    ">=": "≥",
    "^T": "ᵀ",
    "^2": "²",
    "_2": "₂",
    "_1": "₁",
    "_0": "₀",
    "lambda": "λ",
    " in values": " ∈ values",
    " in S": " ∈ S",
    " in A": " ∈ A",
    " in B": " ∈ B",
    "...": "…",
}


def paragraphs(cls: type) -> list[str]:
    """The paragraphs of a docstring, each on one line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    return [" ".join(part.split()) for part in text.split("\n\n")]


def mathematics(cls: type) -> str:
    """The set in symbols, or nothing for what is no set."""
    found = re.search(r"``(\{.*?\})``", " ".join(paragraphs(cls)))
    text = found[1] if found else ""
    for written, shown in _SYMBOLS.items():
        text = text.replace(written, shown)
    return text


def summary(cls: type) -> str:
    """The first line of the docstring, without its formula."""
    return re.sub(r"[:,] ``\{.*?\}``", "", paragraphs(cls)[0]).replace("``", "`")


def cost(cls: type) -> str:
    """The first sentence of the section `Cost` of the docstring."""
    found = [part for part in paragraphs(cls) if part.startswith("Cost: ")]
    if not found:
        raise ValueError(
            f"Write a section `Cost:` above `Args:` in the docstring of {cls.__name__}."
        )
    return re.split(r"(?<=[^.]\.) ", found[0].removeprefix("Cost: ").replace("``", "`"))[0]


def marks(cls: type) -> str:
    """What is known of the class; in parentheses what only its objects know."""
    found = ((mark, inspect.getattr_static(cls, flag)) for flag, mark in MARKS.items())
    shown = [f"({mark})" if isinstance(value, property) else mark for mark, value in found if value]
    return " ".join([*shown, "L"] if loses_steps(cls) else shown)


def loses_steps(cls: type) -> bool:
    """Whether the docstring says that small steps are lost, at some of the weights or at all."""
    return bool(re.search(r"mall steps [\w ]*\bare lost", " ".join(paragraphs(cls))))


def call(cls: type) -> str:
    """How the set is written, with its defaults."""
    given = inspect.signature(cls).parameters.values()
    shown = [
        str(p.replace(annotation=p.empty)).replace(" = ", "=").replace("'", '"')
        for p in given
        if p.name != "axis_name"
    ]
    return f"{snake_case(cls.__name__)}({', '.join(shown)})"


def families() -> dict[str, list[type]]:
    """The sets of each family, in the order in which its files have them."""
    sets = [cls for cls in own_classes if cls is not oc.Constraint]
    return {
        title: [cls for module in modules for cls in sets if cls.__module__.endswith("." + module)]
        for title, modules in FAMILIES.items()
    }


def table(sets: list[type]) -> str:
    """One row for each set."""
    rows = ["| set | allows | marks | cost |", "|---|---|---|---|"]
    for cls in sets:
        symbols = mathematics(cls).replace("|", r"\|")
        allows = summary(cls) + (f"<br>`{symbols}`" if symbols else "")
        rows.append(f"| `{call(cls)}` | {allows} | {marks(cls)} | {cost(cls)} |")
    return "\n".join(rows)


def page() -> str:
    """The whole page."""
    sections = [f"## {title}\n\n{table(sets)}\n" for title, sets in families().items()]
    return "\n".join([INTRODUCTION, *sections, CLOSING])


if __name__ == "__main__":
    PAGE.write_text(page())
