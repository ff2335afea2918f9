"""The API reference by verb, family and framework: pages that autodoc fills."""

import importlib
import inspect
import pkgutil
import types
from collections.abc import Iterable
from pathlib import Path

import catalogue

import optax_constraints as oc
from optax_constraints._config import snake_case
from optax_constraints._constraint import own_classes

# By page: its title, and its names in order. Names that are on no page come last on the first.
GROUPS = {
    "verbs": (
        "Verbs",
        [
            *("project", "projected", "constrain", "tangent", "straight_through", "violations"),
            *("report", "assert_feasible", "stats", "scale_by_unit_adam"),
        ],
    ),
    "rules": ("Rules", ["across", "joint", "of_layer", "rules_from_tree", "arg"]),
    "configs": ("Names and configs", ["get", "serialize", "deserialize", "register"]),
    "classes": (
        "Base class, states and results",
        [
            *("Constraint", "Report", "LeafStats"),
            *("ProjectState", "TangentState", "ScaleByUnitAdamState"),
        ],
    ),
}

# What the files of optax_constraints.flax share with each other.
INTERNAL = {"Leaf", "Parameter", "declarations", "leaves", "parameters"}

HEADER = ".. currentmodule:: {module}\n"
# Members of a NamedTuple are told in its docstring.
WITH_MEMBERS = {"Constraint", "Report", "TrainState", "Optimizer"}


def title(text: str, line: str = "=") -> str:
    """A heading."""
    return f"{text}\n{line * len(text)}\n"


def public(module: types.ModuleType) -> list[str]:
    """The names that a module is for: its own, and those it re-exports as `X as X`."""
    source = inspect.getsource(module)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and name not in INTERNAL
        and (inspect.isclass(thing) or inspect.isroutine(thing))
        and (thing.__module__ == module.__name__ or f"import {name} as {name}" in source)
    ]


def modules() -> list[types.ModuleType]:
    """Every public module but `optax_constraints.sets`, whose names are in `optax_constraints`."""
    found = pkgutil.walk_packages(oc.__path__, f"{oc.__name__}.")
    names = [m.name for m in found if "._" not in m.name and ".sets" not in m.name]
    return [importlib.import_module(name) for name in names]


def entry(module: types.ModuleType, name: str) -> str:
    """A heading, and the directive that fills it."""
    thing = getattr(module, name)
    if not inspect.isclass(thing):
        return f"{title(name, '-')}\n.. autofunction:: {name}\n"
    members = "   :members:\n" if name in WITH_MEMBERS else ""
    return f"{title(name, '-')}\n.. autoclass:: {name}\n{members}"


def entries(module: types.ModuleType, heading: str, names: Iterable[str]) -> str:
    """A page of several names."""
    header = HEADER.format(module=module.__name__)
    return "\n".join([title(heading), header, *(entry(module, name) for name in names)])


def signature(cls: type) -> str:
    """The arguments of a set, which autodoc does not find behind `Constraint.__new__`."""
    given = inspect.signature(cls)
    plain = [p.replace(annotation=p.empty) for p in given.parameters.values()]
    return str(given.replace(parameters=plain, return_annotation=given.empty))


def set_page(cls: type, picture: str | None) -> str:
    """A page for one set."""
    alias = snake_case(cls.__name__)
    marks = {flag: inspect.getattr_static(cls, flag) for flag in catalogue.MARKS}
    words = {"convex": "convex", "smooth": "smooth", "elementwise": "exact in every dtype"}
    promises = [words[flag] for flag, value in marks.items() if value is True]
    depends = [words[flag] for flag, value in marks.items() if isinstance(value, property)]
    lines = [
        title(alias),
        HEADER.format(module="optax_constraints"),
        f".. py:data:: {alias}\n   :no-typesetting:\n",
    ]
    if promises:
        lines.append(f"{', '.join(promises).capitalize()}.\n")
    if depends:
        lines.append(f"*Depending on its arguments:* {', '.join(depends)}.\n")
    if catalogue.loses_steps(cls):
        lines.append("*Small steps are lost:* train with `straight_through`.\n")
    if picture:
        alt = f"Points, and their projections onto {alias}"
        lines.append(f".. image:: /{picture}\n   :alt: {alt}\n   :class: set\n")
    lines.append(f".. autoclass:: {cls.__name__}{signature(cls)}\n")
    return "\n".join(lines)


def toctree(names: Iterable[str], options: str = "   :maxdepth: 1\n") -> str:
    """A table of contents."""
    return f".. toctree::\n{options}\n" + "".join(f"   {name}\n" for name in names)


def module_page(module: types.ModuleType) -> str:
    """A page for a module that is imported on request."""
    names = public(module)
    layers = [name for name in names if "_takes_constraints" in dir(getattr(module, name))]
    others = [name for name in names if name not in layers]
    header = f"{title(module.__name__)}\n.. automodule:: {module.__name__}\n"
    text = "\n".join([header, HEADER.format(module=module.__name__)])
    text += "\n" + "\n".join(entry(module, name) for name in others)
    if layers:
        text += "\n" + title("Layers", "-") + "\n"
        text += "Each is Flax's layer of that name with a keyword for each of its parameters.\n\n"
        text += "\n".join(f".. autoclass:: {name}\n" for name in sorted(layers))
    return text


def slug(text: str) -> str:
    """A title as a file name."""
    return text.lower().replace(" ", "-")


def pages(pictures: dict[str, str] | None = None) -> dict[str, str]:
    """The reStructuredText of every page, by file name in docs/reference/."""
    pictures = pictures or {}
    sets = {name for cls in own_classes for name in (cls.__name__, snake_case(cls.__name__))}
    placed = {name for _, names in GROUPS.values() for name in names} | sets
    more = [name for name in public(oc) if name not in placed]
    made = {
        page: entries(oc, heading, [*names, *(more if page == "verbs" else [])])
        for page, (heading, names) in GROUPS.items()
    }
    for heading, classes in catalogue.families().items():
        aliases = [snake_case(cls.__name__) for cls in classes]
        made |= {
            f"sets/{alias}": set_page(cls, pictures.get(alias))
            for alias, cls in zip(aliases, classes, strict=True)
        }
        made[f"sets/{slug(heading)}"] = "\n".join(
            [
                title(heading),
                HEADER.format(module="optax_constraints"),
                *(f"* `{snake_case(cls.__name__)}`: {catalogue.summary(cls)}" for cls in classes),
                "",
                toctree(aliases, "   :hidden:\n"),
            ]
        )
    others = {module.__name__: module_page(module) for module in modules()}
    made |= others
    tops = [*GROUPS, *(f"sets/{slug(heading)}" for heading in catalogue.FAMILIES), *others]
    made["index"] = f"{title('API reference')}\n{toctree(tops)}"
    return made


def write(folder: Path, pictures: dict[str, str] | None = None) -> None:
    """Writes the pages; what has not changed keeps its time, so that Sphinx does not read it."""
    made = {folder / f"{name}.rst": text for name, text in pages(pictures).items()}
    for old in set(folder.rglob("*.rst")) - set(made):
        old.unlink()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
