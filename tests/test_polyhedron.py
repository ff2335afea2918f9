"""Polyhedra, against SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import bits, float64
from cases.polyhedron import by_nnls

import optax_constraints as oc

DTYPE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
RNG = np.random.default_rng(0)
SIMPLEX = np.array([1.0, -1.0, *np.zeros(10)])


def kinds() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rows, eye = RNG.normal(size=(8, 12)), np.eye(10)
    return {
        "more entries than rows": (RNG.normal(size=(16, 32)), RNG.uniform(0, 1, 16)),
        "more rows than entries": (RNG.normal(size=(40, 8)), RNG.uniform(0.1, 1, 40)),
        "repeated rows": (np.concatenate([rows, 2 * rows]), np.repeat([1.0, 2.0], 8)),
        "box": (np.concatenate([eye, -eye]), np.repeat([0.5, 0.25], 10)),
        "simplex": (np.concatenate([np.ones((1, 10)), -np.ones((1, 10)), -eye]), SIMPLEX),
        "sorted": (-np.diff(np.eye(16), axis=0), np.zeros(15)),
        "rows that are much alike": (RNG.normal(size=(20, 12)) + 2, RNG.uniform(-1, 1, 20)),
    }


@pytest.mark.parametrize("name", kinds())
def test_against_scipy(name):
    g, h = kinds()[name]
    constraint = oc.polyhedron(g, h)
    project = jax.jit(constraint)
    for scale in (1.0, 30.0):
        w = float64(jnp.asarray(scale * RNG.normal(size=(g.shape[1], 4)), DTYPE))
        got = project(jnp.asarray(w, DTYPE))
        want = by_nnls(w, g, h)
        np.testing.assert_allclose(float64(got), want, atol=1e-6 * np.max(np.abs(w)))
        assert bits(project(got)) == bits(got)


def test_units_are_alone():
    g, h = kinds()["more rows than entries"]
    w = jnp.asarray(RNG.normal(size=(8, 3)), DTYPE)
    constraint = oc.polyhedron(g, h)
    got = constraint(w)
    for other in (0, 100, jnp.nan, jnp.inf):
        assert bits(constraint(w.at[:, 1:].set(other))[:, 0]) == bits(got[:, 0])


def test_units_along_several_axes():
    g, h = RNG.normal(size=(5, 6)), np.ones(5)
    w = jnp.asarray(RNG.normal(size=(2, 4, 3)), DTYPE)
    got = oc.polyhedron(g, h, axis=(0, 2))(w)
    flat = jnp.transpose(w, (0, 2, 1)).reshape(6, 4)
    want = oc.polyhedron(g, h)(flat).reshape(2, 3, 4).transpose(0, 2, 1)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_other_inequalities_compile_nothing():
    traces = []

    @jax.jit
    def project(constraint, w):
        traces.append(None)
        return constraint(w)

    w = jnp.asarray(RNG.normal(size=(6, 4)), DTYPE)
    for seed in range(3):
        g = np.random.default_rng(seed).normal(size=(4, 6))
        got = project(oc.polyhedron(g, np.full(4, 0.1)), w)
        assert np.max(g @ float64(got)) < 0.1 + 1e-5
    assert len(traces) == 1


def test_a_contradiction_that_is_not_known_before_comes_to_an_end():
    @jax.jit
    def project(h):
        return oc.polyhedron(np.array([[1.0, 0], [-1, 0]]), h)(jnp.ones((2, 1), DTYPE))

    assert project(jnp.array([0.5, 0.5], DTYPE)).ravel().tolist() == [0.5, 1]
    assert project(jnp.array([-0.5, -0.5], DTYPE))[1, 0] == 1


def test_derivatives_by_the_inequalities():
    g, h = jnp.asarray(RNG.normal(size=(3, 5)), DTYPE), jnp.asarray([0.1, 0.2, -0.1], DTYPE)
    w, dh = jnp.asarray(RNG.normal(size=(5, 2)), DTYPE), jnp.asarray([0.3, -0.2, 0.5], DTYPE)
    _, got = jax.jvp(lambda h: oc.polyhedron(g, h)(w), (h,), (dh,))
    step = 1e-2
    ends = [float64(oc.polyhedron(g, h + s * step * dh)(w)) for s in (1, -1)]
    assert np.max(np.abs(got)) > 0.01
    np.testing.assert_allclose(got, (ends[0] - ends[1]) / (2 * step), atol=1e-3)


@pytest.mark.parametrize(
    ("g", "h", "error", "message"),
    [
        ([1.0, 2.0], 0.0, ValueError, r"g has shape \(2,\); write a matrix with a row"),
        (np.ones((0, 2)), 0.0, ValueError, r"g has shape \(0, 2\)"),
        (np.eye(2), [1.0], ValueError, r"h has shape \(1,\) and g has 2 rows"),
        ([[1.0, 0], [0, 0]], 0.0, ValueError, r"row 1 of g is zero and bounds nothing"),
        ([[1.0, np.nan]], 0.0, ValueError, r"g=.* has an infinite entry or a NaN"),
        ([[1.0, 2.0]], np.inf, ValueError, r"h=.* has an infinite entry.* leave out the rows"),
        ([[1.0, 2.0], [1.0]], 0.0, ValueError, r"g=.* is ragged"),
        ([["a"]], 0.0, TypeError, r"g=.* is not an array of real numbers"),
        (
            [[1.0, 0], [0, 1], [-1, 0]],
            [-0.5, 0, -0.5],
            ValueError,
            r"no point satisfies all inequalities; rows 0 and 2 of g are among those",
        ),
    ],
)
def test_arguments_are_checked(g, h, error, message):
    with pytest.raises(error, match=message):
        oc.polyhedron(g, h)


def test_units_that_do_not_fit():
    constraint = oc.polyhedron(np.ones((1, 3)), 1.0)
    with pytest.raises(ValueError, match=r"of shape \(4, 2\): a unit along axis=0 has 4 e"):
        constraint(jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"on 'a/w' of shape \(4, 2\).* g has 3 columns; write a"):
        oc.project({"w": constraint}).init({"a": {"w": jnp.ones((4, 2))}})
    with pytest.raises(TypeError, match="floating-point"):
        constraint(jnp.ones((3, 2), int))


def test_on_bound_and_configs():
    constraint = oc.polyhedron([[1.0, 1.0]], [1.0], axis=-1)
    assert constraint.on_bound(jnp.array([[0.5, 0.5], [0.5, 0.25]])).tolist() == [[True], [False]]
    assert oc.deserialize(oc.serialize(constraint)) == constraint
