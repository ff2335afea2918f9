"""Pictures of constraints."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_constraints as oc

pytest.importorskip("matplotlib")


def drawn(panel, colour: str) -> np.ndarray:
    """The numbers that a panel draws in one colour."""
    lines = [line.get_ydata() for line in panel.lines if line.get_color() == colour]
    return np.concatenate([np.ravel(y) for y in lines]) if lines else np.zeros(0)


INSIDE, OUTSIDE, BOUND = "#3e7bfa", "#e5484d", "0.5"


def bounds(panel) -> set[float]:
    return {float(line.get_ydata()[0]) for line in panel.lines if line.get_linestyle() == "--"}


def test_a_panel_for_each_constrained_leaf():
    params = {
        "a": {"kernel": jnp.diag(jnp.array([3.0, 0.5])), "bias": jnp.array([-1.0, 2.0])},
        "b": {"kernel": jnp.diag(jnp.array([0.25, 4.0])), "bias": jnp.zeros(2, jnp.bfloat16)},
        "init": jnp.array([3.0, 4.0]),
        "none": None,
        "step": jnp.int32(1),
    }
    rules = [
        (oc.joint("kernel", "bias"), oc.max_norm(oc.arg("cap"))),
        ("init", oc.fixed_norm("init")),
    ]
    single = {"a/kernel": oc.max_norm(1.0), "bias": oc.non_neg(), "b/kernel": oc.low_rank(1)}
    state = oc.project(rules).init(params)
    figure = oc.plot(params, single)
    titles = [panel.get_title() for panel in figure.axes]
    assert titles == [
        "a/bias\nNonNeg()",
        "a/kernel\nMaxNorm(1)",
        "b/bias\nNonNeg()",
        "b/kernel\nLowRank(1)",
    ]
    bias, kernel, _, spectrum = figure.axes
    assert drawn(bias, OUTSIDE) == [-1]
    assert drawn(bias, INSIDE) == [2]
    assert (drawn(kernel, INSIDE), drawn(kernel, OUTSIDE)) == ([0.5], [3])
    assert bounds(kernel) == {1.0}
    assert [panel.get_ylabel() for panel in (bias, kernel, spectrum)] == [
        *("entries", "norms", "singular values")
    ]
    # From the largest on; the second is outside.
    assert (drawn(spectrum, INSIDE), drawn(spectrum, OUTSIDE)) == ([4], [0.25])
    # Groups, what is remembered and arguments.
    moved = params | {"init": jnp.array([6.0, 8.0])}
    figure = oc.plot(moved, rules, state=state, extra={"cap": 4.0}, step=3)
    joint_a, _, norm = figure.axes
    assert joint_a.get_title() == "a/kernel+bias\nMaxNorm(4)"
    np.testing.assert_allclose(drawn(joint_a, INSIDE), [2.0615528, 3.1622777], rtol=1e-6)
    assert drawn(norm, OUTSIDE) == [2.0]
    assert bounds(norm) == {1.0}
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_large_leaves_nan_and_no_leaves():
    params = {"w": jnp.linspace(-1.0, 1.0, 100_000), "nan": jnp.array([jnp.nan, 1.0])}
    wide, nan = oc.plot(params, oc.box(-0.999, 2.0)).axes[::-1]
    assert wide.get_ylabel() == "entries (sample)"
    assert len(drawn(wide, INSIDE)) < 1100
    assert 0 < len(drawn(wide, OUTSIDE)) <= 200
    assert nan.get_title().endswith("1 not finite")
    for empty in ({}, {"w": jnp.zeros((0, 2))}):
        figure = oc.plot(empty, oc.non_neg())
        assert [text.get_text() for text in figure.texts] == ["no constrained leaves"]
        assert figure._repr_png_()


def test_names_are_not_mathematics():
    name = r"_$\frac$"  # Matplotlib does not parse it, and leaves it out of a legend of its own
    assert oc.plot({name: jnp.ones(2)}, oc.non_neg())._repr_png_()
    one = oc.LeafStats(*map(jnp.asarray, (2.0, 1.0, 4, 1)))
    figure = oc.plot_stats([{name: one, "b": one}])
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {name, "b"}
    assert figure._repr_png_()


def test_more_leaves_than_panels():
    params = {f"w{i:02}": jnp.ones(2) for i in range(70)} | {"x": -jnp.ones(2)}
    figure = oc.plot(params, oc.non_neg())
    assert len(figure.axes) == 60
    assert figure.axes[0].get_title().startswith("w00")
    assert figure.axes[-1].get_title().startswith("x")  # outside
    assert "60 of 71 constrained leaves" in figure.get_suptitle()
    width, height = figure.get_size_inches()
    assert width < 18
    assert height < 30
    assert len(oc.plot(params, oc.non_neg(), panels=2).axes) == 2


def test_errors_of_plot():
    params = {"w": jnp.ones(2)}
    with pytest.raises(ValueError, match="'v' matches no leaf"):
        oc.plot(params, {"v": oc.non_neg()})
    with pytest.raises(ValueError, match="panels=0 shows nothing"):
        oc.plot(params, oc.non_neg(), panels=0)
    with pytest.raises(TypeError, match="those of 'w' are traced here"):
        jax.jit(lambda params: oc.plot(params, oc.non_neg()))(params)
    with pytest.raises(ValueError, match=r"plot\(params, rules, state=state\)"):
        oc.plot(params, oc.fixed_norm("init"))


CHECK = """
import sys
import optax_constraints as oc
import jax.numpy as jnp
assert "matplotlib" not in sys.modules
oc.report({"w": jnp.ones(2)}, oc.non_neg())._repr_html_()
assert "matplotlib" not in sys.modules
oc.plot({"w": jnp.ones(2)}, oc.non_neg())._repr_png_()
assert "matplotlib.pyplot" not in sys.modules
for name in [name for name in sys.modules if name.startswith("matplotlib")]:
    del sys.modules[name]
sys.modules["matplotlib"] = None
oc._plot._figure_class.cache_clear()
oc.plot({"w": jnp.ones(2)}, oc.non_neg())
"""


def test_matplotlib_is_imported_by_pictures_alone():
    run = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last == (
        "ImportError: Pictures need Matplotlib, which is not installed here; write pip install "
        "matplotlib."
    )


def test_statistics_over_steps():
    params = {"a": jnp.array([1.0, 0.0]), "b": jnp.array([1.0, 2.0])}
    rules = {"a": oc.max_norm(1.0), "b": oc.non_neg()}
    tx = optax.chain(optax.sgd(1.0), oc.project(rules, stats=True))
    grads = {"a": jnp.array([-1.0, 0.0]), "b": jnp.array([0.5, 0.0])}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), oc.stats(state)

    start = (params, tx.init(params))
    _, stacked = jax.lax.scan(step, start, None, length=4)
    listed = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(4)]
    for history in (stacked, listed):
        figure = oc.plot_stats(history, steps=[10, 20, 30, 40])
        top, bottom = figure.axes
        lost, _ = top.lines
        # All of each update of "a" is taken away: that is the worst.
        assert lost.get_label() == "a"
        np.testing.assert_allclose(lost.get_ydata(), [1, 1, 1, 1])
        np.testing.assert_allclose(top.lines[1].get_ydata(), [0, 0, 1, 1])
        np.testing.assert_allclose(bottom.lines[0].get_ydata(), [1, 1, 1, 1])
        np.testing.assert_allclose(bottom.lines[1].get_ydata(), [0, 0.5, 0.5, 0.5])
        np.testing.assert_array_equal(lost.get_xdata(), [10, 20, 30, 40])


def test_statistics_of_many_leaves_and_of_sets_that_do_not_say():
    one = oc.LeafStats(*map(jnp.asarray, (2.0, 1.0, 0, -1)))
    never = oc.LeafStats(*map(jnp.asarray, (0.0, 0.0, 4, 1)))
    history = [{f"w{i}": one for i in range(12)} | {"late": never}, {"late": never}]
    figure = oc.plot_stats(history, lines=10)
    assert len(figure.axes[0].lines) == 10
    assert "3 more" in figure.legends[0].get_title().get_text()
    figure = oc.plot_stats([{"w": one}])
    assert figure.axes[1].texts[0].get_text() == "these sets do not say"
    assert figure._repr_png_()


def test_errors_of_plot_stats():
    one = oc.LeafStats(*map(jnp.asarray, (2.0, 1.0, 0, -1)))
    with pytest.raises(ValueError, match="the history is empty; write a list"):
        oc.plot_stats([])
    with pytest.raises(TypeError, match=r"'w' is 1\.0; write a list"):
        oc.plot_stats([{"w": 1.0}])
    with pytest.raises(TypeError, match="history=3 is not a history;"):
        oc.plot_stats(3)
    with pytest.raises(ValueError, match=r"steps has shape \(2,\), and there are 1 steps"):
        oc.plot_stats([{"w": one}], steps=[1, 2])
    with pytest.raises(ValueError, match="lines=-1 shows nothing"):
        oc.plot_stats([{"w": one}], lines=-1)


def projected(figure) -> tuple[np.ndarray, np.ndarray]:
    """The random points of a picture, and their projections."""
    *_, points, onto = figure.axes[0].lines
    return points.get_xydata(), onto.get_xydata()


@pytest.mark.parametrize(
    ("constraint", "distance"),
    [
        (oc.max_norm(2.0, axis="fan_in"), lambda p: np.maximum(np.hypot(*p) - 2, 0)),
        (oc.stacked(oc.simplex()), lambda p: abs(p.sum(0) - 1) + np.maximum(-p, 0).sum(0)),
        (oc.box(-0.5, optax.constant_schedule(1.0)), lambda p: np.abs(p - p.clip(-0.5, 1)).sum(0)),
        (oc.max_spectral_norm(1.0), lambda p: np.maximum(np.abs(p).max(0) - 1, 0)),
        (oc.symmetric(), lambda p: abs(p[0] - p[1])),
        (oc.doubly_stochastic(), lambda p: abs(p.sum(0) - 1) + np.maximum(-p, 0).sum(0)),
        (oc.zero_diagonal(), lambda p: abs(p[0])),
        (oc.radial(), lambda p: abs(p[0] - p[1])),
        (oc.max_operator_norm(1.0), lambda p: np.maximum(np.abs(p).sum(0) - 1, 0)),
        (oc.top_k(1, axis=0, of="units"), lambda p: np.abs(p).min(0)),
        (oc.nm(2, 4), lambda p: np.abs(p).min(0)),
    ],
    ids=[
        "norm",
        "simplex",
        "box",
        "spectral",
        "symmetric",
        "plan",
        "diagonal",
        "ring",
        "conv",
        "units",
        "nm",
    ],
)
def test_points_are_projected_into_the_set(constraint, distance):
    points, onto = projected(oc.plot_set(constraint, points=9, seed=1))
    assert points.shape == onto.shape == (9, 2)
    assert distance(points.T).max() > 0.1
    np.testing.assert_allclose(distance(onto.T), 0, atol=2e-4)


def test_the_picture_reaches_beyond_the_set():
    panel = oc.plot_set(oc.unit_norm()).axes[0]
    np.testing.assert_allclose(panel.get_xlim(), (-1.6, 1.6), rtol=1e-3)
    assert oc.plot_set(oc.non_neg(), extent=3.0).axes[0].get_xlim() == (-3, 3)


def test_sequences():
    figure = oc.plot_set(oc.monotone(axis=0))
    assert len(figure.axes) == 4
    for panel in figure.axes:
        before, after = (line.get_ydata() for line in panel.lines)
        assert np.any(np.diff(before) < 0)
        assert np.all(np.diff(after) >= 0)


def test_errors_of_plot_set():
    with pytest.raises(ValueError, match=r"Hyperplane.*no picture in the plane.*normal has shape"):
        oc.plot_set(oc.hyperplane([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="since it projects points of W"):
        oc.plot_set(oc.transport([1.0, 2.0], [1.5, 1.5]))
    with pytest.raises(ValueError, match="is relative to the weights at init"):
        oc.plot_set(oc.fixed_norm("init"))
    with pytest.raises(ValueError, match="None allows everything"):
        oc.plot_set(None)
    for wrong in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match=r"extent=.* is no picture; write a number above 0"):
            oc.plot_set(oc.non_neg(), extent=wrong)
