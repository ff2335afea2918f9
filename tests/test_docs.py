"""The site's sources, without building it: `make docs` does that, and fails on a warning."""

import importlib
import inspect
import json
import re
import sys
import tomllib
from pathlib import Path

import pytest

import optax_constraints as oc
from optax_constraints._constraint import own_classes

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
api = importlib.import_module("api")
catalogue = importlib.import_module("catalogue")
gallery = importlib.import_module("gallery")
llms = importlib.import_module("llms")

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
PAGES += sorted(DOCS.glob("*.md"))


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    words = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_page_and_a_heading(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\((?!https?:)(\S*?)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_each_public_name_is_in_the_reference():
    pages = api.pages()
    text = "\n".join(pages.values())
    documented = set(re.findall(r"auto(?:function|class):: (\w+)|py:data:: (\w+)", text))
    documented = {function or alias for function, alias in documented}
    modules = [oc, *api.modules()]
    assert {"optax_constraints.flax.linen", "optax_constraints.flax.nnx"} < {
        module.__name__ for module in modules
    }
    for module in modules:
        own = module is oc or f".. automodule:: {module.__name__}\n" in text
        assert own, f"{module.__name__} has no page"
        missing = set(api.public(module)) - documented
        assert not missing, f"{module.__name__}: {missing} are on no page of the reference"


def test_public_names_are_those_that_a_module_exports():
    names = {
        name
        for name, thing in vars(oc).items()
        if not name.startswith("_") and not inspect.ismodule(thing)
    }
    assert set(api.public(oc)) == names


def test_each_set_has_a_page_that_a_table_of_contents_names():
    pages = api.pages()
    sets = [cls for cls in own_classes if cls is not oc.Constraint]
    for cls in sets:
        alias = catalogue.snake_case(cls.__name__)
        (family,) = (
            title
            for title, modules in catalogue.FAMILIES.items()
            if cls.__module__.rpartition(".")[2] in modules
        )
        assert f"   {alias}\n" in pages[f"sets/{api.slug(family)}"]
        assert f".. autoclass:: {cls.__name__}(" in pages[f"sets/{alias}"]


def test_the_catalogue_is_that_of_the_sets():
    assert catalogue.PAGE.read_text() == catalogue.page(), "run `python docs/catalogue.py`"


def test_a_row_of_the_catalogue_says_what_the_class_says():
    row = next(line for line in catalogue.page().splitlines() if "`max_norm(" in line)
    assert "max_norm(max_value=2, axis=0)" in row
    assert r"`{w : ‖unit‖₂ ≤ max_value}` | C | Two passes" in row.replace(r"\|", "|")
    assert catalogue.marks(oc.ZeroDiagonal) == "C S E"
    assert catalogue.marks(oc.MinMaxNorm) == "(C)"
    assert catalogue.marks(oc.Grid) == "E L"


def test_what_is_no_set_has_no_formula_and_all_else_has_one():
    sets = [cls for cls in own_classes if cls is not oc.Constraint]
    without = {cls for cls in sets if not catalogue.mathematics(cls)}
    assert without == {oc.Scale, oc.Soft, oc.Compose}


def test_a_set_without_a_cost_is_told_to_say_it():
    class Silent(oc.Constraint):
        """A set: ``{w}``."""

    with pytest.raises(ValueError, match=r"Write a section `Cost:` .* docstring of Silent"):
        catalogue.cost(Silent)


PIXEL = "iVBORw0KGgo="


def test_cards_of_notebooks(tmp_path):
    assert gallery.cards(tmp_path, tmp_path / "images") == ""
    cells = [
        {"cell_type": "markdown", "source": ["# Ternary\n", "\n", "Train it. Then deploy it.\n"]},
        {"cell_type": "code", "source": [], "outputs": [{"data": {"text/plain": ["1"]}}]},
        {"cell_type": "code", "source": [], "outputs": [{"data": {"image/png": PIXEL}}]},
    ]
    (tmp_path / "ternary.ipynb").write_text(json.dumps({"cells": cells}))
    found = gallery.cards(tmp_path, tmp_path / "images")
    assert "{grid-item-card} Ternary\n:link: notebooks/ternary\n" in found
    assert ":img-top: images/ternary.png\n\nTrain it.\n" in found
    assert (tmp_path / "images/ternary.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_drawn_of_the_sets_that_have_one(tmp_path):
    class Figure:
        def savefig(self, path, **kwargs):
            path.write_text("svg")

    def plot_set(constraint):
        if not constraint.elementwise:
            raise ValueError("not in the plane")
        return Figure()

    found = gallery.draw(plot_set, tmp_path)
    assert found["box"] == f"{tmp_path.name}/box.svg"
    assert "max_norm" not in found
    assert {path.stem for path in tmp_path.iterdir()} == set(found)


def test_llms_txt_has_a_line_for_each_guide():
    names = [path.stem for path in sorted(DOCS.glob("*.md"))]
    text = llms.index(DOCS, names, ["verbs"])
    assert all(f"](_sources/{name}.md): " in text for name in names)
    assert "- [Glossary](_sources/glossary.md): " in text
    assert llms.first_sentence("# A\n\nSee [it](it.md). Then more.\n\nMore.") == "See it."


def workflows():
    return sorted((ROOT / ".github/workflows").glob("*.yml"))


@pytest.mark.parametrize("path", workflows(), ids=lambda path: path.name)
def test_workflows_run_what_the_makefile_has(path):
    text = path.read_text()
    jobs = yaml.safe_load(text)["jobs"]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([\w-]+)(?= |$)", text, re.MULTILINE))
    for job in jobs.values():
        matrix = job.get("strategy", {}).get("matrix", {})
        targets |= set(matrix.get("target", []))
    assert targets or path.name == "release.yml"
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_workflows_try_the_versions_of_python_that_are_declared():
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        found[1]
        for line in project["classifiers"]
        if (found := re.search(r"Python :: (3\.\d+)", line))
    ]
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == declared


def test_only_the_job_that_publishes_may_ask_for_an_identity():
    for path in workflows():
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
        for name, job in workflow["jobs"].items():
            asks = job.get("permissions", {}).get("id-token") == "write"
            assert asks == (path.name == "release.yml" and name == "publish")


def test_hooks_are_the_commands_of_make_lint():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = {hook["entry"] for repo in config["repos"] for hook in repo["hooks"]}
    makefile = (ROOT / "Makefile").read_text()
    lint = re.search(r"^LINT := (.*)$", makefile, re.MULTILINE)
    assert lint
    commands = [command.replace("$(BIN)", ".venv/bin") for command in lint[1].split(" && ")]
    assert {entry.replace(" --force-exclude", "") for entry in hooks} == {
        command.removesuffix(" .") for command in commands
    }


def test_forms_ask_for_what_answers_need():
    forms = {
        path.stem: yaml.safe_load(path.read_text())
        for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    }
    bug = {field.get("id") for field in forms["bug"]["body"]}
    assert {"report", "versions"} < bug
    assert {"definition", "oracle"} < {field.get("id") for field in forms["set"]["body"]}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert citation["version"] == oc.__version__
    assert f"## [{oc.__version__}] - {citation['date-released']}" in changelog


def test_no_page_links_to_a_repository_of_ours():
    """No address of the repository or of the site is known, so none is written."""
    for path in [*PAGES, ROOT / "CITATION.cff", *workflows()]:
        text = path.read_text()
        assert not re.search(
            r"(github\.com|readthedocs\.io|pypi\.org)/[\w./-]*optax.constraints", text
        )
        assert "shields.io" not in text
