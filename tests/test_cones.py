"""Tangent cones: against cvxpy, and by what makes a point the nearest one of a cone."""

from collections.abc import Callable

import cvxpy as cp
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import CASES, Case, bits, float64

import optax_constraints as oc

WIDE = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
CONES = [case for case in CASES if case.constraint.has_tangent]
N, SHAPE = 8, (5, 5)
NORMAL = np.linspace(-1, 2, N)
SIGNS = np.array([1, -1, 0, 1, -1, -1, 1, 0])
CENTER = np.linspace(-0.5, 0.75, N)
ROWS = np.random.default_rng(0).normal(size=(6, N))
BENDS = np.diff(np.diff(np.eye(N), axis=0) / (NORMAL + 2)[1:, None], axis=0)


def normal(shape, seed: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), WIDE)


# By what makes it the nearest point.


@pytest.mark.parametrize("case", CONES, ids=str)
def test_moreau(case: Case):
    # Two programs; what is between them is NumPy's, which compiles nothing.
    tangent, project = compiled(case.constraint.tangent), compiled(case.constraint)
    for scale in (0.3, 2.0):
        left = taken = 0.0
        for seed in range(3):
            w = project(normal(case.shape, seed, scale))
            v = np.asarray(normal(case.shape, seed + 10)) + w
            along = tangent(w, v)
            away = v - along
            size = np.linalg.norm(v)
            left, taken = max(left, off(along, 0)), max(taken, off(away, 0))
            assert abs(np.vdot(along, away)) <= 2e-5 * size**2
            np.testing.assert_allclose(tangent(w, along), along, atol=1e-5 * size)
            np.testing.assert_allclose(tangent(w, away), 0, atol=1e-5 * size)
            # To first order the set goes on along the one, and ends across the other.
            # Some bound may be nearer than the longest step, and the shortest is half rounding.
            steps = [(h, w + h * along, w + h * away) for h in w.dtype.type([1e-3, 1e-4, 2e-5])]
            assert min(off(project(on), on) / h for h, on, _ in steps) < 0.05
            assert min(off(project(out), w) / h for h, _, out in steps) < 0.05
        assert left > 0.02
        assert taken > 0.02 or scale < 1  # most small weights are inside of the balls


def compiled(function) -> Callable[..., np.ndarray]:
    program = jax.jit(lambda *args: function(*args))
    return lambda *args: np.asarray(program(*args))


def off(a, b) -> float:
    return float(np.max(np.abs(a - b)))


def test_every_convex_set_has_a_cone():
    assert not [case for case in CASES if case.constraint.convex and case not in CONES]
    assert len({type(case.constraint) for case in CONES}) >= 27


# Against cvxpy.


def spectral_rows(w, at_bound):
    u, s, vt = np.linalg.svd(w)
    keep = at_bound(s)
    return u[:, : len(s)][:, keep], vt[: len(s)][keep], u, vt, int(np.sum(keep))


def of_spectral_norm(w, d):
    u, vt, *_ = spectral_rows(w, lambda s: s > 1 - 1e-4)
    inner = u.T @ d @ vt.T
    return [(inner + inner.T) / 2 << 0] if len(vt) else []


def of_nuclear_norm(w, d):
    u1, v1, u, vt, rank = spectral_rows(w, lambda s: s > 1e-4)
    rest = u[:, rank:].T @ d @ vt[rank:].T
    inside = np.sum(np.linalg.svd(w)[1]) < 2 - 1e-4
    return [] if inside else [cp.trace((u1 @ v1).T @ d) + cp.normNuc(rest) <= 0]


def of_semidefinite(w, d):
    values, vectors = np.linalg.eigh(w)
    low = vectors[:, values < 0.1 + 1e-4]
    inner = low.T @ ((d + d.T) / 2) @ low
    return [d == d.T, inner >> 0] if low.size else [d == d.T]


def of_l1(w, d):
    zero = w == 0
    if np.sum(np.abs(w)) < 1 - 1e-5:
        return []
    return [np.sign(w) @ d + (cp.norm1(d[zero]) if zero.any() else 0) <= 0]


def signs(d, up, down=None):
    """Entries that may not fall, and those that may not rise."""
    pairs = ((up, 1), (down, -1))
    return [
        s * d[tuple(i)] >= 0 for where, s in pairs if where is not None for i in np.argwhere(where)
    ]


ORACLES = {
    "non_neg": (oc.non_neg(), N, lambda w, d: signs(d, w == 0)),
    "box": (
        oc.box(-0.25, 0.5),
        N,
        lambda w, d: signs(d, w == -0.25, w == 0.5),
    ),
    "max_norm": (oc.max_norm(1.5), N, lambda w, d: [w @ d <= 0] if w @ w > 2.2499 else []),
    "max_rms": (oc.max_rms(0.5), N, lambda w, d: [w @ d <= 0] if w @ w > 1.9999 else []),
    "simplex": (oc.simplex(), N, lambda w, d: [cp.sum(d) == 0, *signs(d, w == 0)]),
    "l1_ball": (oc.l1_ball(), N, of_l1),
    "sum_to": (oc.sum_to(1.0), N, lambda w, d: [cp.sum(d) == 0]),
    "hyperplane": (oc.hyperplane(NORMAL), N, lambda w, d: [NORMAL @ d == 0]),
    "affine": (
        oc.affine([NORMAL, NORMAL**2], [1.0, 2.0]),
        N,
        lambda w, d: [NORMAL @ d == 0, NORMAL**2 @ d == 0],
    ),
    "box_section": (
        oc.box_section(-0.25, 0.5, NORMAL, 0.5),
        N,
        lambda w, d: [NORMAL @ d == 0, *signs(d, w == -0.25, w == 0.5)],
    ),
    "box_section_below": (
        oc.box_section(None, np.linspace(0, 0.5, N), NORMAL, 0.5, equality=False),
        N,
        lambda w, d: [
            *([NORMAL @ d <= 0] if NORMAL @ w > 0.5 - 1e-5 else []),
            *signs(d, np.zeros(N, bool), np.abs(w - np.linspace(0, 0.5, N)) < 1e-7),
        ],
    ),
    "half_space": (
        oc.half_space(NORMAL, -1.0),
        N,
        lambda w, d: [NORMAL @ d <= 0] if NORMAL @ w > -1 - 1e-5 else [],
    ),
    "monotone": (
        oc.monotone(),
        N,
        lambda w, d: [d[i + 1] >= d[i] for i in np.flatnonzero(np.diff(w) < 1e-6)],
    ),
    "decreasing": (
        oc.monotone(increasing=False),
        N,
        lambda w, d: [d[i + 1] <= d[i] for i in np.flatnonzero(np.diff(w) > -1e-6)],
    ),
    "lattice": (
        oc.monotone(axis=(0, 1)),
        SHAPE,
        lambda w, d: [
            *(d[i + 1, j] >= d[i, j] for i, j in np.argwhere(np.diff(w, axis=0) < 1e-6)),
            *(d[i, j + 1] >= d[i, j] for i, j in np.argwhere(np.diff(w, axis=1) < 1e-6)),
        ],
    ),
    "unimodal": (
        oc.unimodal(peak=3),
        N,
        lambda w, d: [
            (d[i + 1] - d[i]) * (1 if i < 3 else -1) >= 0
            for i in np.flatnonzero(np.abs(np.diff(w)) < 1e-6)
        ],
    ),
    "polyhedron": (
        oc.polyhedron(ROWS, 0.5),
        N,
        lambda w, d: [row @ d <= 0 for row in ROWS if row @ w > 0.5 - 1e-5],
    ),
    "convex_sequence": (
        oc.convex_sequence(),
        N,
        lambda w, d: [
            d[i + 2] - 2 * d[i + 1] + d[i] >= 0 for i in np.flatnonzero(np.diff(w, 2) < 1e-5)
        ],
    ),
    "concave_sequence": (
        oc.concave_sequence(knots=np.cumsum(NORMAL + 2)),
        N,
        lambda w, d: [bend @ d <= 0 for bend in BENDS if bend @ w > -1e-5],
    ),
    "doubly_stochastic": (
        oc.doubly_stochastic(),
        SHAPE,
        lambda w, d: [cp.sum(d, 0) == 0, cp.sum(d, 1) == 0, *signs(d, w < 1e-6)],
    ),
    "transport": (
        oc.transport([1.0, 2.0, 0.0], [1.0, 0.5, 1.0, 0.5]),
        (3, 4),
        lambda w, d: [cp.sum(d, 0) == 0, cp.sum(d, 1) == 0, *signs(d, w < 1e-6)],
    ),
    "positive_semidefinite": (oc.positive_semidefinite(0.1), SHAPE, of_semidefinite),
    "max_spectral_norm": (oc.max_spectral_norm(1.0), (6, 4), of_spectral_norm),
    "nuclear_norm_ball": (oc.nuclear_norm_ball(2.0), (4, 6), of_nuclear_norm),
    "symmetric": (oc.symmetric(), SHAPE, lambda w, d: [d == d.T]),
    "intersection": (
        oc.intersection(oc.sum_to(1.0), oc.box(0.0, 0.3)),
        N,
        lambda w, d: [cp.sum(d) == 0, *signs(d, w < 1e-5, w > 0.3 - 1e-5)],
    ),
    "compose": (
        oc.compose(oc.non_neg(), oc.max_norm(1.0)),
        N,
        lambda w, d: [*signs(d, w == 0), *([w @ d <= 0] if w @ w > 0.9999 else [])],
    ),
    "sign": (
        oc.sign(SIGNS),
        N,
        lambda w, d: signs(d, (w == 0) & (SIGNS > 0), (w == 0) & (SIGNS < 0)),
    ),
    "tied": (
        oc.tied([0, 1, 2, 0, 1, 0, 3, 2]),
        N,
        lambda w, d: [d[0] == d[3], d[0] == d[5], d[1] == d[4], d[2] == d[7]],
    ),
    "around a ball": (
        oc.around(oc.max_norm(0.5), CENTER),
        N,
        lambda w, d: [(w - CENTER) @ d <= 0] if np.linalg.norm(w - CENTER) > 0.49999 else [],
    ),
    "around a simplex": (
        oc.around(oc.simplex(), CENTER),
        N,
        lambda w, d: [cp.sum(d) == 0, *signs(d, w - CENTER < 1e-6)],
    ),
    "around a box": (
        oc.around(oc.box(-0.3, 0.2), CENTER),
        N,
        lambda w, d: signs(d, w - CENTER < -0.3 + 1e-6, w - CENTER > 0.2 - 1e-6),
    ),
    "part": (
        oc.part(oc.simplex(), ":3"),
        N,
        lambda w, d: [cp.sum(d[:3]) == 0, *signs(d, w[:3] == 0)],
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_against_cvxpy(name):
    constraint, shape, cone = ORACLES[name]
    seen = set()

    @jax.jit
    def tangent(x, v):
        w = constraint(x)
        return w, constraint.tangent(w, v)

    for seed in range(8):
        v = normal(shape, seed + 100)
        w, along = tangent(normal(shape, seed, (0.3, 1.0, 3.0)[seed % 3]), v)
        d = cp.Variable(shape)
        conditions = cone(float64(w), d)
        distance = cp.sum_squares(d - float64(v))
        cp.Problem(cp.Minimize(distance), conditions).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(along, d.value, atol=1e-4)
        seen.add(len(conditions))
    assert max(seen) > 0


# At, just inside and just outside of a boundary.


def at_a_boundary() -> dict[str, tuple]:
    """Sets, with points of their boundaries, and a direction outwards."""
    ones = np.ones(4)
    eye = np.eye(4)
    return {
        "non_neg": (oc.non_neg(), 0 * ones, -ones),
        "box": (oc.box(-1.0, 1.0), ones, ones),
        "max_norm": (oc.max_norm(2.0), ones, ones),
        "max_rms": (oc.max_rms(1.0), ones, ones),
        "l1_ball": (oc.l1_ball(4.0), ones, ones),
        "half_space": (oc.half_space(ones, 4.0), ones, ones),
        "simplex": (oc.simplex(2.0), np.array([1.0, 1.0, 0, 0]), np.array([1.0, 1, -1, -1])),
        "monotone": (oc.monotone(), ones, np.array([1.0, 1, -1, -1])),
        "max_spectral_norm": (oc.max_spectral_norm(1.0), eye, eye),
        "nuclear_norm_ball": (oc.nuclear_norm_ball(4.0), eye, eye),
        "positive_semidefinite": (oc.positive_semidefinite(1.0), eye, -eye),
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", at_a_boundary())
def test_at_inside_and_outside_of_a_boundary(name, dtype):
    constraint, point, out = at_a_boundary()[name]
    eps = float(jnp.finfo(dtype).eps)
    tangent = jax.jit(constraint.tangent)

    def kept(distance: float) -> float:
        """The share of the direction outwards that is left so far out."""
        w, v = (jnp.asarray(x, dtype) for x in (point + distance * out, out))
        return float(np.linalg.norm(float64(tangent(w, v))) / np.linalg.norm(out))

    assert kept(0) < 4 * eps
    assert kept(eps) < 4 * eps
    # Well inside, by more than rounding, nothing is taken away; nor by ever so little where
    # entries say to the bit whether they are at a bound.
    exact = name in ("non_neg", "simplex")
    assert abs(kept(-1e-30 if exact else -64 * eps) - 1) < 4 * eps or name == "simplex"
    if name in ("max_norm", "max_rms", "half_space", "l1_ball"):
        assert kept(-eps / 2) < 4 * eps


def test_entries_near_a_bound_count_as_at_it_with_slack():
    w, v = jnp.array([1e-3, 0.5, 0.999]), jnp.array([-1.0, 1.0, 1.0])
    assert np.array_equal(oc.box(0, 1).tangent(w, v), v)
    assert np.array_equal(oc.box(0, 1).tangent(w, v, slack=1e-2), [0, 1, 0])


def test_one_matrix_alone_has_no_directions():
    zero, v = jnp.zeros((3, 3)), normal((3, 3), 0).astype(jnp.float32)
    for constraint in (
        oc.max_norm(0.0),
        oc.max_rms(0.0),
        oc.fixed_norm(0.0),
        oc.l1_ball(0.0),
        oc.simplex(0.0),
        oc.box(0.0, 0.0),
        oc.max_spectral_norm(0.0),
        oc.nuclear_norm_ball(0.0),
        oc.orthogonal(0.0),
        oc.low_rank(0),
    ):
        np.testing.assert_allclose(
            constraint.tangent(zero, v), 0, atol=1e-6, err_msg=str(constraint)
        )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("case", CONES, ids=str)
def test_half_precision_has_the_cone_of_the_weights_it_holds(case: Case, dtype):

    @jax.jit
    def parts(x, v):
        w = case.constraint(x)
        along = case.constraint.tangent(w, v)
        return along, case.constraint.tangent(w, along)

    x, v = (jnp.asarray(normal(case.shape, seed), dtype) for seed in (0, 10))
    along, again = parts(x, v)
    assert along.dtype == dtype
    again = float64(again)
    eps = float(jnp.finfo(dtype).eps)
    size = float(np.linalg.norm(float64(v)))
    np.testing.assert_allclose(again, float64(along), atol=2 * eps * size)
    away = float64(v) - float64(along)
    assert abs(np.vdot(away, float64(along))) <= 4 * eps * size**2


# Through the verb.


def bowl(seed: int, n: int):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2 * n, n)), 2 * rng.normal(size=2 * n)
    return a.T @ a / n, a.T @ b / n


@pytest.mark.parametrize("name", ["simplex", "half_space", "l1_ball", "monotone", "intersection"])
def test_adam_arrives(name):
    constraint, n, _ = ORACLES[name]
    q, c = bowl(3, n)

    def run(front):
        tx = optax.chain(
            *front, optax.adam(optax.cosine_decay_schedule(0.02, 3000)), oc.project(constraint)
        )

        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jnp.asarray(q, WIDE) @ w - c, state, w)
            return (jnp.asarray(optax.apply_updates(w, updates)), state), None

        w = constraint(jnp.zeros(n, WIDE))
        return float64(jax.lax.scan(step, (w, tx.init(w)), length=3000)[0][0])

    w = cp.Variable(n)
    sets = {
        "simplex": lambda: [w >= 0, cp.sum(w) == 1],
        "half_space": lambda: [NORMAL @ w <= -1],
        "l1_ball": lambda: [cp.norm1(w) <= 1],
        "monotone": lambda: [cp.diff(w) >= 0],
        "intersection": lambda: [w >= 0, w <= 0.3, cp.sum(w) == 1],
    }
    cp.Problem(cp.Minimize(cp.quad_form(w, cp.psd_wrap(q)) / 2 - c @ w), sets[name]()).solve()
    start = float64(constraint(jnp.zeros(n, WIDE)))

    def loss(x):
        return x @ q @ x / 2 - c @ x

    def missed(x):
        return (loss(x) - loss(w.value)) / (loss(start) - loss(w.value))

    assert missed(run([oc.tangent(constraint)])) < 1e-3
    assert missed(run([])) > 1e-2


def test_gradients_are_taken_downhill():
    # Of a cone -P(-g) is not P(g): at a bound a gradient that points in would lead out.
    params = {"w": jnp.array([0.0, 0.0, 1.0])}
    tx = oc.tangent({"w": oc.non_neg()})
    updates, _ = tx.update({"w": jnp.array([1.0, -1.0, 1.0])}, tx.init(params), params)
    assert np.array_equal(updates["w"], [0, -1, 1])


@pytest.mark.parametrize(("seen", "left"), [(0, 0.0), (1, 0.0), (2, 1.0)])
def test_a_schedule_is_at_the_last_projection(seen, left):
    w = jnp.array([0.6, 0.8])
    tx = oc.tangent(oc.max_norm(lambda step: 1.0 + step))
    state = tx.init(w)._replace(updates_seen=jnp.int32(seen))
    updates, _ = tx.update(-w, state, w)
    np.testing.assert_allclose(updates, -left * w, atol=1e-6)


def test_a_bound_that_is_relative_to_init_is_kept_in_the_state():
    rules = {"w": oc.compose(oc.non_neg(), oc.max_norm("2x init"))}
    params = {"w": jnp.array([0.6, 0.8])}
    tx = oc.tangent(rules)
    state = tx.init(params)
    for factor, left in ((1.0, [-1, -1]), (1.99, [-1, -1]), (2.0, [0, 0])):
        now = {"w": factor * params["w"]}
        updates, state = tx.update({"w": -params["w"]}, state, now)
        want = [-0.6, -0.8] if left == [-1, -1] else [0, 0]
        np.testing.assert_allclose(updates["w"], want, atol=1e-6)
    # By hand, weights are those at init, so that they are inside.
    bound = oc.max_norm("2x init")
    np.testing.assert_array_equal(bound.tangent(params["w"], params["w"]), params["w"])


@pytest.mark.parametrize(
    "constraint",
    [
        oc.max_norm(1.0, axis=None),
        oc.simplex(axis=None),
        oc.l1_ball(axis=None),
        oc.sum_to(1.0, axis=None),
        oc.box_section(-0.25, 0.5, np.linspace(-1, 2, 11), 0.5, axis=None),
        oc.affine([np.linspace(-1, 2, 11), np.ones(11)], axis=None),
    ],
)
def test_groups_have_the_cone_of_their_vector(constraint):
    parts = {"a": normal((3, 2), 0), "b": normal((5,), 1)}
    rules = [(oc.across("*"), constraint)]
    params = oc.constrain(parts, rules)
    grads = {"a": normal((3, 2), 2), "b": normal((5,), 3)}
    tx = oc.tangent(rules)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)

    def vector(tree):
        return jnp.concatenate([tree["a"].ravel(), tree["b"]])

    want = -constraint.tangent(vector(params), -vector(grads))
    np.testing.assert_allclose(vector(updates), want, atol=1e-6)
    assert np.max(np.abs(vector(updates) - vector(grads))) > 0.01


def test_joint_leaves_have_the_cone_of_their_array():
    layer = {"kernel": normal((4, 3), 0), "bias": normal((3,), 1)}
    rules = [(oc.joint("kernel", "bias"), oc.max_norm(0.5))]
    params = oc.constrain(layer, rules)
    grads = jax.tree.map(jnp.negative, params)
    tx = oc.tangent(rules)
    updates, _ = tx.update(grads, tx.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_allclose(leaf, 0, atol=1e-6)


def test_stacks_go_slice_by_slice():
    constraint = oc.stacked(oc.simplex(axis=None))
    w = constraint(normal((3, 2, 4), 0))
    v = normal((3, 2, 4), 1)
    want = jnp.stack([oc.simplex(axis=None).tangent(a, b) for a, b in zip(w, v, strict=True)])
    np.testing.assert_allclose(constraint.tangent(w, v), want, atol=1e-6)


@pytest.mark.parametrize(
    "constraint",
    [
        oc.grid([-1, 0, 1]),
        oc.top_k(2),
        oc.top_k(2, axis=0, of="units"),
        oc.around(oc.top_k(2)),
        oc.nm(2, 4),
        oc.min_max_norm(0.5, 1.0),
        oc.soft(oc.max_norm(1.0), 0.5),
        oc.soft(oc.unit_norm(), 0.5),
        oc.compose(oc.unit_norm(), oc.non_neg()),
        oc.compose(oc.mask(np.ones(4)), oc.simplex()),
        oc.compose(oc.box(-0.5, 1.0), oc.max_norm(1.0)),
        oc.compose(oc.grid([0, 1]), oc.non_neg()),
        oc.stacked(oc.top_k(1)),
        oc.scale(2.0),
        pytest.param(jnp.tanh, id="tanh"),
    ],
    ids=str,
)
def test_others_are_refused(constraint):
    message = r"on 'a/kernel' is not known to be a smooth set, nor .* straight_through\(params"
    with pytest.raises(ValueError, match=message):
        oc.tangent({"a/kernel": constraint}).init({"a": {"kernel": jnp.ones((4, 4))}})


def test_a_convex_set_of_ones_own():
    class AtLeastTwo(oc.Constraint):
        convex = True

        def __call__(self, w):
            return jnp.maximum(w, 2)

        def tangent(self, w, v):  # pyright: ignore[reportIncompatibleMethodOverride]
            return jnp.where(w > 2, v, jnp.maximum(v, 0))

    w, g = jnp.array([2.0, 3.0]), jnp.array([1.0, 1.0])
    for constraint in (AtLeastTwo(), oc.intersection(AtLeastTwo(), oc.box(None, 5.0))):
        updates, _ = (tx := oc.tangent(constraint)).update(g, tx.init(w), w)
        np.testing.assert_allclose(updates, [0, 1], atol=1e-6)


@pytest.mark.parametrize("constraint", [oc.simplex(), oc.l1_ball(0.5)], ids=str)
def test_what_leads_straight_out_comes_to_an_end(constraint):
    # As the gradient at an optimum: the threshold is what all free entries have, up to rounding,
    # so that some pass it in one step and not in the next.
    w = constraint(normal((3, 2000), 0))
    v = normal((3, 2000), 1) + w
    out = v - constraint.tangent(w, v)
    assert np.max(np.abs(out)) > 0.1
    np.testing.assert_allclose(constraint.tangent(w, out), 0, atol=1e-6)


def test_another_number_compiles_nothing():
    tangent = jax.jit(lambda c, w, v: c.tangent(w, v))
    w, v = normal((4, 3), 0), normal((4, 3), 1)
    for make in (oc.max_norm, oc.simplex, oc.l1_ball, oc.max_spectral_norm, oc.nuclear_norm_ball):
        tangent(make(1.0), w, v)
        count = tangent._cache_size()
        tangent(make(2.0), w, v)
        assert tangent._cache_size() == count


def test_inside_nothing_changes_to_the_bit():
    v = normal((4, 4), 1)
    for constraint in (
        oc.max_norm(10.0),
        oc.l1_ball(100.0),
        oc.box(-9, 9),
        oc.half_space(np.ones(4), 99.0),
        oc.max_spectral_norm(99.0),
        oc.nuclear_norm_ball(99.0),
        oc.monotone(),
    ):
        w = jnp.cumsum(jnp.ones((4, 4), WIDE), axis=0)
        assert bits(constraint.tangent(w, v)) == bits(v), constraint


@pytest.mark.parametrize(
    "constraint",
    [
        oc.max_norm(0.5),
        oc.box(-0.5, 0.5),
        oc.simplex(),
        oc.l1_ball(),
        oc.monotone(),
        oc.box_section(-0.25, 0.5, np.linspace(-1, 2, 7), 0.5),
        oc.box_section(0.0, 0.5, equality=False),
        oc.monotone(axis=(0, 1)),
        oc.polyhedron(ROWS[:, :7], 0.5),
        oc.convex_sequence(),
        oc.unimodal(peak=3),
        oc.doubly_stochastic(),
        oc.sign(np.sign(np.linspace(-1, 1, 7))[:, None]),
        oc.tied(np.arange(21).reshape(7, 3) % 4),
        oc.around(oc.box(-0.5, 0.5), np.ones((7, 3))),
        oc.around(oc.l1_ball(), np.ones((7, 3))),
    ],
    ids=str,
)
def test_derivatives_through_a_tangent_part(constraint):
    shape = (4, 4) if isinstance(constraint, oc.DoublyStochastic) else (7, 3)

    @jax.jit
    def derivatives(x, v, u):
        w = constraint(x)

        def tangent(v):
            return constraint.tangent(w, v)

        along, forward = jax.jvp(tangent, (v,), (u,))
        return along, forward, jax.jvp(tangent, (v,), (v,))[1], jax.vjp(tangent, v)[1](u)[0]

    along, forward, radial, backward = derivatives(*(normal(shape, seed) for seed in range(3)))
    # Of a projection it is one onto a face, which is its own transpose; and cones have no scale.
    np.testing.assert_allclose(backward, forward, atol=1e-5)
    np.testing.assert_allclose(radial, along, atol=1e-5)


def test_a_state_that_was_restored_without_its_type():
    rules, w = oc.max_norm("1x init"), jnp.array([0.6, 0.8])
    tx = oc.tangent(rules)
    state = tx.init(w)
    want, _ = tx.update(-w, state, w)
    for back in (jax.device_get(state), jax.device_get(state)._asdict()):
        updates, after = tx.update(-w, back, w)
        assert bits(updates) == bits(want)
        assert after.updates_seen == 1
