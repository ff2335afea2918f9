"""Reports and sets as HTML, and the histograms in them."""

import dataclasses
import re
from html.parser import HTMLParser
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES

import optax_constraints as oc
from optax_constraints import _constraint, _html
from optax_constraints._gauge import sample


class Page(HTMLParser):
    """Reads HTML, and checks that what is opened is closed."""

    VOID = ("col",)

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        # An element such as <path/> is told here, too.
        if self.open and self.open[-1] == tag:
            self.open.pop()
        else:
            assert (self.get_starttag_text() or "").endswith("/>")

    def handle_data(self, data):
        if "style" not in self.open[-1:]:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


def page(params, rules, **keywords) -> Page:
    return Page(oc.report(params, rules, **keywords)._repr_html_())


def test_small_report():
    params = {
        "net": {"kernel": jnp.diag(jnp.array([3.0, 0.5, 0.0])), "bias": jnp.array([-1.0, 1.0])},
        "gain": jnp.ones(()),
    }
    html = page(params, {"kernel": oc.max_norm(1.0), "bias": oc.non_neg()})
    assert "2 of 3 leaves constrained · 2 of 5 units at their bound" in html.text
    assert "⚠ 2 outside, furthest 2 in net/kernel" in html.text
    assert "MaxNorm(1)" in html.text
    assert "1 of 3" in html.text  # units at their bound
    assert "norms 0 to 3" in html.text
    assert "entries -1 to 1" in html.text
    # The gain is folded, the module is open.
    assert "1 free leaf" in html.text
    assert html.count("details", **{"class": "free"}) == 1
    assert next(a for t, a in html.tags if t == "details") == {"open": None}
    assert html.count("svg", role="img") == 2
    assert html.count("path", fill="#e5484d") == 2  # bars of what is outside
    assert not html.count("script")


def test_nothing_is_outside_after_constrain():
    rules = {"kernel": oc.max_norm(1.0), "bias": oc.unit_norm()}
    params = {"kernel": 3 * jnp.eye(3), "bias": jnp.zeros(3)}
    html = page(oc.constrain(params, rules), rules)
    assert "none outside" in html.text
    assert "inside" in html.text
    # Nor a unit of zeros, which has no direction and stays.
    assert not html.count("path", fill="#e5484d")


def test_names_are_escaped():
    class Evil(oc.Constraint):
        def __call__(self, w):
            return jnp.minimum(w, 0)

        def __str__(self):
            return "<script>alert(1)</script>"

    tree = {"<img src=x>": {'"&': jnp.ones(2)}, "free <b>": jnp.ones(2)}
    html = page(tree, {'"&': Evil()})
    assert not html.count("script")
    assert not html.count("img")
    assert '<img src=x>/"&' in html.text
    assert "<script>alert(1)</script>" in html.text
    assert "free <b>" in html.text


def many(blocks: int) -> dict:
    return {
        f"block_{i}": {
            **{f"dense_{j}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for j in range(12)},
            "norm": {"scale": jnp.ones(2)},
        }
        for i in range(blocks)
    }


def test_500_leaves_by_module():
    tree = many(20)
    tree["block_7"]["dense_3"]["kernel"] = jnp.full((2, 2), 9.0)
    report = oc.report(tree, {"kernel": oc.max_norm(2.0)})
    assert len(report.rows) == 500
    text = report._repr_html_()
    html = Page(text)
    assert len(text) < 600_000
    # Modules are closed, but for those in which something is outside.
    opened = re.findall(r"<details open><summary><b>([\w/]+)</b>", text)
    assert opened == ["block_7", "dense_3"]
    assert html.text.count("25 leaves, 13 free") == 20
    assert "norm 1 leaf, free" in html.text


def test_groups_state_arguments_and_odd_trees():
    """One report over all that a row may be."""
    params = {
        "a": {"kernel": jnp.full((2, 3), 2.0, jnp.bfloat16), "bias": jnp.ones(3, jnp.bfloat16)},
        "b": {"w": jnp.ones((2, 2))},
        "c": {"w": jnp.full((2, 2), 3.0)},
        "init": jnp.array([[3.0, 0.0], [4.0, 0.0]]),
        "scheduled": jnp.array([0.5, 2.0]),
        "given": jnp.array([0.5, 2.0]),
        "stack": jnp.stack([jnp.eye(2), 4 * jnp.eye(2)]),
        "nan": jnp.array([jnp.nan, jnp.inf, 1.0]),
        "empty": jnp.zeros((0, 3)),
        "mask": jnp.array([0.0, 2.0]),
        "step": jnp.int32(3),
        "none": None,
    }
    rules = [
        (oc.joint("kernel", "bias"), oc.max_norm(1.0)),
        (oc.across("*/w"), oc.max_norm(5.0)),
        ("init", oc.max_norm("0.5x init")),
        ("scheduled", oc.box(upper=optax.linear_schedule(4.0, 1.0, 3))),
        ("given", oc.box(upper=oc.arg("cap"))),
        ("stack", oc.stacked(oc.max_spectral_norm(2.0))),
        ("nan", oc.max_norm(1.0)),
        ("empty", oc.non_neg()),
        ("mask", oc.mask("init")),
    ]
    state = oc.project(rules).init(params)
    moved = params | {"mask": jnp.ones(2)}
    report = oc.report(moved, rules, step=3, state=state, extra={"cap": 1.0})
    rows: dict[str, Any] = {row.path: row for row in report.rows}
    html = Page(report._repr_html_())
    assert "as above" in html.text
    assert "a/kernel+bias" in html.text
    assert "across('*/w')" in html.text

    def seen(path):
        found = rows[path].histogram
        least, largest = round(found.least, 2), round(found.largest, 2)
        return found.name, least, largest, found.bounds, sum(found.outside)

    assert seen("a/kernel") == ("norms", 3.0, 3.0, (1.0,), 3)
    assert rows["a/bias"].histogram is None
    assert seen("b/w") == ("norms", 6.32, 6.32, (5.0,), 1)
    # Of two units with bounds of their own, as parts of these; one has the norm 0.
    assert seen("init") == ("norms / bound", 0.0, 2.0, (), 1)
    assert seen("scheduled") == ("entries", 0.5, 2.0, (1.0,), 1)
    assert seen("given") == ("entries", 0.5, 2.0, (1.0,), 1)
    assert seen("stack") == ("singular values", 1.0, 4.0, (2.0,), 2)
    assert seen("mask") == ("entries", 1.0, 1.0, (0.0,), 1)
    assert rows["nan"].histogram.not_finite == 1
    assert not rows["nan"].inside
    assert rows["empty"].histogram is None
    assert "1 not finite" in html.text
    assert "NaN" not in html.text
    assert "no leaves" in page({}, oc.non_neg()).text


def test_large_leaves_are_sampled_and_large_spectra_left_out():
    rows = oc.report({"w": jnp.linspace(-1.0, 1.0, 200_001)}, {"w": oc.box(-0.5, 0.5)}).rows
    found = rows[0].histogram
    assert found
    assert 40_000 < sum(found.counts) < 2**16
    np.testing.assert_allclose(sum(found.outside) / sum(found.counts), 0.5, atol=1e-3)
    # The shape alone decides: no program runs.
    from optax_constraints._report import _histogram

    large = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    assert _histogram(oc.max_spectral_norm(1.0), large, (), True) is None


def test_sharded_weights():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    w = jax.device_put(jnp.diag(jnp.array([3.0, 0.5])), sharding)
    for constraint, name in ((oc.max_norm(1.0), "norms"), (oc.low_rank(1), "singular values")):
        found = oc.report({"w": w}, constraint).rows[0].histogram
        assert found
        assert (found.name, found.least, found.largest) == (name, 0.5, 3.0)


def test_repr_and_dicts():
    report = oc.report({"a": {"w": 2 * jnp.eye(3)}, "b": jnp.ones(2)}, {"w": oc.max_norm(1.0)})
    assert repr(report) == str(report)
    constrained, free = report.to_dicts()
    assert constrained == {
        "path": "a/w",
        "shape": (3, 3),
        "dtype": "float32",
        "constraint": "MaxNorm(1)",
        "axis": (0,),
        "units": 3,
        "at_bound": 3,
        "outside": pytest.approx(3**0.5),
        "layer": None,
        "group": None,
        "inside": False,
    }
    assert free["constraint"] is None
    assert free["inside"] is None


# Sets in symbols.

SETS = [cls for cls in _constraint.own_classes if cls is not oc.Constraint]
MADE = {type(case.constraint): case.constraint for case in CASES}
MADE |= {oc.Scale: oc.scale(0.5)}


def test_each_set_has_symbols_of_its_own():
    formulas: dict[str, type] = {}
    for cls in SETS:
        constraint = MADE[cls]
        assert type(constraint).formula is not oc.Constraint.formula, (
            f"write formula = ... in {cls.__name__}: the set in symbols"
        )
        # Without its values, which may differ.
        other = formulas.setdefault(constraint.formula, cls)
        assert other is cls, f"{cls.__name__} has the formula of {other.__name__}"
        html = Page(constraint._repr_html_())
        assert cls.__name__ in html.text
        assert " ".join(_html.symbols(constraint).split()) in html.text
        # Each field that is named is there.
        assert not re.search(
            r"\{\w+\}", _html.symbols(constraint).replace("{\N{MINUS SIGN}1, 0, 1}", "")
        )


@pytest.mark.parametrize(
    ("constraint", "symbols"),
    [
        (oc.max_norm("2x init"), "{ w : ‖u‖₂ ≤ 2x init }"),
        (oc.max_norm(optax.constant_schedule(1.0)), "{ w : ‖u‖₂ ≤ max_value(t) }"),
        (oc.max_norm(oc.arg("cap")), "{ w : ‖u‖₂ ≤ arg('cap') }"),
        (oc.max_norm(jnp.float32(0.5)), "{ w : ‖u‖₂ ≤ 0.5 }"),
        (oc.box(-1.0), "{ w : \N{MINUS SIGN}1 ≤ w }"),
        (oc.box(upper=[1.0, 2.0]), "{ w : w ≤ upper }"),
        (oc.grid(range(9)), "{ w : each entry ∈ {0, 1, 2, …, 8} }"),
        (oc.orthogonal(2.0), "{ W : WᵀW = 2² I }, or WWᵀ = 2² I if W is wide"),
        (oc.top_k(0.1), "{ w : ‖u‖₀ ≤ 0.1 n }"),
        (oc.sign(), "{ w : w · sign(w₀) ≥ 0 }"),
        (oc.around(oc.non_neg()), "{ w : w \N{MINUS SIGN} w₀ ∈ { w : w ≥ 0 } }"),
        (
            oc.intersection(oc.non_neg(), oc.sum_to(1.0)),
            "{ w : w ≥ 0 } ∩ { w : Σᵢ uᵢ = 1 }",
        ),
    ],
)
def test_symbols(constraint, symbols):
    assert _html.symbols(constraint) == symbols


def test_what_letters_stand_for():
    text = Page(oc.max_norm(1.0, axis=(0, 1))._repr_html_()).text
    assert text == "MaxNorm · convex { w : ‖u‖₂ ≤ 1 } u: each slice along axes 0, 1"
    assert "u: the incoming weights of one unit" in oc.unit_norm("fan_in")._repr_html_()
    assert "W: the last two axes" in oc.stacked(oc.low_rank(2))._repr_html_()


def test_sets_of_users():
    class NonPositive(oc.Constraint):
        """No weight is above <zero>."""

        def __call__(self, w):
            return jnp.minimum(w, 0)

    assert Page(NonPositive()._repr_html_()).text == (
        "NonPositive { w : P(w) = w } No weight is above <zero>."
    )

    @dataclasses.dataclass(frozen=True, eq=False)
    class Below(oc.Constraint):
        bound: float
        formula = "{ w : w < {bound}, non-strictly }"

        def __call__(self, w):
            return jnp.minimum(w, self.bound)

    assert Page(Below(-0.5)._repr_html_()).text == (
        "Below { w : w < \N{MINUS SIGN}0.5, non-strictly } P: the projection"
    )


# Some gauges that tell a bound by themselves, and the numbers they have to show.
w = np.array([[3.0, 0.0], [1.0, 2.0]])
GAUGES = [
    (oc.max_rms(1.0, axis=0), "root mean squares", np.sqrt([5.0, 2.0]), 2),
    (oc.min_max_norm(2.5, 4.0), "norms", [10**0.5, 2.0], 1),
    (oc.simplex(), "entries", [3, 0, 1, 2], 0),
    (oc.l1_ball(3.0), "sums of magnitudes", [4, 2], 1),
    (oc.sum_to(2.0), "sums", [4, 2], 1),
    (oc.center_around(1.5), "means", [1.5], 0),
    (oc.hyperplane([1.0, -1.0], 2.0), "inner products", [2, -2], 1),
    (oc.half_space([1.0, -1.0], 0.0), "inner products", [2, -2], 1),
    (oc.affine([[1.0, -1.0]], 2.0), "residuals", [0, -4], 1),
    (oc.polyhedron([[1.0, 0.0], [0.0, 1.0]], [3.0, 1.0]), "products less bounds", [0, -3, 0, 1], 1),
    (oc.box_section(0.0, 2.5, value=3.0), "entries", [3, 0, 1, 2], 1),
    (oc.monotone(), "steps", [-2, 2], 1),
    (oc.monotone(axis=(0, 1), increasing=False), "steps", [2, -2, 3, -1], 2),
    (oc.top_k(2), "nonzeros", [3], 1),
    (oc.top_k(1, axis=0, of="units"), "nonzero units", [2], 1),
    (oc.nm(1, 2), "nonzeros of each group", [2, 1], 1),
    (oc.mask([[1, 0], [1, 0]]), "entries", [3, 0, 1, 2], 1),
    (oc.zero_diagonal(), "entries of the diagonal", [3, 2], 2),
    (oc.sign([[-1], [1]]), "entries", [3, 0, 1, 2], 1),
    (oc.symmetric(), "entries of W - Wᵀ", [0, -1, 1, 0], 2),
    (oc.skew_symmetric(), "entries of W + Wᵀ", [6, 1, 1, 4], 4),
    (oc.tied([[0, 0], [1, 2]]), "differences from the mean of the label", [1.5, -1.5, 0, 0], 2),
    (oc.positive_semidefinite(2.0), "eigenvalues", np.linalg.eigvalsh((w + w.T) / 2), 1),
    (oc.orthogonal(), "singular values", np.linalg.svd(w)[1], 2),
    (oc.max_spectral_norm(3.0), "singular values", np.linalg.svd(w)[1], 1),
    (oc.low_rank(1), "singular values", np.linalg.svd(w)[1], 1),
    (oc.doubly_stochastic(), "entries", [3, 0, 1, 2], 0),
    (oc.part(oc.max_norm(1.0), ":, :1"), "norms", [10**0.5], 1),
    (
        oc.around(oc.box(-1, 1), np.add(w, [[0, 2], [0, 0]])),
        "entries of the difference",
        [0, -2, 0, 0],
        1,
    ),
    (oc.compose(oc.non_neg(), oc.max_norm(3.0)), "norms", [10**0.5, 2.0], 1),
    (oc.convex_sequence(axis=0), "changes of slope", None, 0),
]


@pytest.mark.parametrize(
    ("constraint", "name", "values", "outside"), GAUGES, ids=[type(g[0]).__name__ for g in GAUGES]
)
def test_gauge(constraint, name, values, outside):
    array = jnp.asarray(w if values is not None else [[0.0], [1.0], [3.0]], jnp.float32)
    found = sample(constraint.settle("w", array.shape), array)
    assert found is not None
    assert found.name == name
    np.testing.assert_allclose(found.values, [1] if values is None else values, atol=1e-6)
    assert found.outside.sum() == outside
