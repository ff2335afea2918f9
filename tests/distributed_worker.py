"""Training on many devices, compared with the same training on one of them.

`test_distributed.py` runs this as a program, since devices are counted when JAX starts. It prints
what it checked and what failed as one line of JSON.
"""

import collections
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import compiled
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_constraints as oc
from optax_constraints import recipes

STEPS = 3
MATRICES = {
    "in": ((128, 32), P("x", None)),
    "out": ((128, 32), P(None, "x")),
    "both": ((128, 32), P("x", "y")),
    "stack": ((4, 32, 16), P("x", None, None)),
    "stack and out": ((4, 32, 16), P("y", None, "x")),
}
SMALL = {"both": ((32, 8), P("x", "y"))}
SQUARES = {"both": ((16, 16), P("x", "y"))}
WINDOWS = {"both": ((3, 3, 8, 8), P(None, None, "x", "y"))}

# Units are the columns of a matrix, of which a stack has 4 * 16. The smallest shard of a leaf has
# 256 entries, so that no shard passes for a vector.
UNITS = 64
# Sums in another order differ by a few eps in each step, relative to the weights before and after
# it: these start with about 1. Factorisations of matrices add up more of it.
ULPS, MATRIX_ULPS = 16, 64

_FREE = np.random.default_rng(1).random((128, 32)) < 0.5

UNIT_NORMS = {
    "max_norm": oc.max_norm(optax.linear_schedule(5.0, 3.0, STEPS)),
    "min_max_norm": oc.min_max_norm(0.5, 1.0, rate=0.5),
    "unit_norm": oc.unit_norm(),
    "fixed_norm": oc.fixed_norm("init", axis=0),
    "fixed_rms": oc.fixed_rms("init", axis=0),
    "around norms": oc.around(oc.max_norm("0.01x init")),
    "max_rms": oc.max_rms(0.2, axis=0),
    "soft": oc.soft(oc.max_norm(1.0), 0.5),
    "compose": oc.compose(oc.non_neg(), oc.max_norm(1.0)),
    "intersection": oc.intersection(oc.non_neg(), oc.max_norm(1.0), iterations=20),
}
LEAF_NORMS = {
    "max_norm": oc.max_norm(1.0, axis=None),
    "fixed_norm": oc.fixed_norm("2x init"),
    "max_rms": oc.max_rms(0.2),
}
ELEMENTWISE = {
    "non_neg": oc.non_neg(),
    "box": oc.box(-0.01, 0.5),
    "grid": oc.grid([-1, 0, 1]),
    "mask": oc.mask(_FREE),
    "mask of init": oc.mask("init"),
    "sign": oc.sign(),
    "signs of rows": oc.sign(np.sign(np.linspace(-1, 1, 128))[:, None]),
    "around": oc.around(oc.box(-0.005, 0.005)),
    "nm": oc.nm(2, 4),
    "zero_diagonal": oc.zero_diagonal(),
}
SUMS = {
    "simplex": oc.simplex(),
    "l1_ball": oc.l1_ball(),
    "sum_to": oc.sum_to(1.0),
    "center_around": oc.center_around(0.5, axis=0),
    "hyperplane": oc.hyperplane(np.linspace(1, 2, 128), 1.0),
    "half_space": oc.half_space(np.linspace(1, 2, 128), -1.0),
    "box_section": oc.box_section(-0.5, 0.5, np.linspace(1, 2, 128), 1.0),
    "top_k": oc.top_k(0.25, axis=0),
}
OTHERS = {
    "monotone": oc.monotone(),
    "lattice": oc.monotone(axis=(0, 1)),
    "unimodal": oc.unimodal(),
    "convex_sequence": oc.convex_sequence(),
    "concave_sequence": oc.concave_sequence(),
    "affine": oc.affine(np.stack([np.linspace(-1, 2, 32), np.ones(32)]), 0.5),
    "polyhedron": oc.polyhedron(np.stack([np.linspace(-1, 2, 32), np.ones(32)]), 0.5),
    "top_k": oc.top_k(5),
    "top_k of units": oc.top_k(5, axis=0, of="units"),
    "tied": oc.tied(lambda shape: np.subtract.outer(*map(np.arange, shape))),
    "part": oc.part(oc.non_neg(), "..., :3"),
    "orthogonal": oc.orthogonal(),
    "max_spectral_norm": oc.max_spectral_norm(1.0),
    "max_spectral_norm by scaling": oc.max_spectral_norm(1.0, method="scale"),
    "fixed_spectral_norm": oc.fixed_spectral_norm(1.0),
    "max_operator_norm": oc.max_operator_norm(1.0, strides=1, padding="SAME", dilation=1, groups=1),
    "nuclear_norm_ball": oc.nuclear_norm_ball(2.0),
    "low_rank": oc.low_rank(3),
    "symmetric": oc.symmetric(),
    "skew_symmetric": oc.skew_symmetric(),
    "positive_semidefinite": oc.positive_semidefinite(),
    "doubly_stochastic": oc.doubly_stochastic(),
    "transport": oc.transport(np.linspace(0.5, 1.5, 32) / 4, np.ones(8)),
    "radial": oc.radial(),
}
SQUARE = (
    "zero_diagonal",
    "symmetric",
    "skew_symmetric",
    "positive_semidefinite",
    "doubly_stochastic",
)
PROCESSES = {
    "max_norm": oc.max_norm(optax.linear_schedule(5.0, 3.0, STEPS), axis="fan_in"),
    "fixed_norm": oc.fixed_norm("init", axis="fan_in"),
    "l1_ball": oc.l1_ball(),
    "non_neg": oc.non_neg(),
}
GROUPS = {
    "norms of units": (UNIT_NORMS, UNITS),
    "norms of leaves": (LEAF_NORMS, 4),
    "elementwise": (ELEMENTWISE, 0),
    "sums": (SUMS, UNITS),
    "others": (OTHERS, None),
    "processes": (PROCESSES, UNITS),
}
"""The sets, and the largest array that may go between devices; None for any."""


# All places for a set of each kind.
PLACES = {
    **dict.fromkeys(("max_norm", "fixed_norm", "box", "simplex"), MATRICES),
    **dict.fromkeys(("min_max_norm", "unit_norm", "max_rms"), ("in", "out", "stack and out")),
}


def leaves_of(group: str, name: str) -> dict[str, tuple[tuple[int, ...], P]]:
    """For each place the shape of a leaf, and its spec."""
    if name in ("radial", "max_operator_norm"):
        return WINDOWS
    if name in SQUARE:
        return SQUARES
    if group == "others":
        return SMALL
    return {place: MATRICES[place] for place in PLACES.get(name, ("both",))}


def rules_of(group: str) -> dict[str, Any]:
    return {
        f"/{name}/{place}/kernel": oc.stacked(c) if place.startswith("stack") else c
        for name, c in GROUPS[group][0].items()
        for place in leaves_of(group, name)
    }


class Checks:
    """What was checked, and what failed."""

    def __init__(self):
        self.passed = collections.Counter()
        self.failed: list[str] = []
        self.worst: dict[str, float] = {}

    def that(self, ok: Any, kind: str, what: str) -> None:
        if ok:
            self.passed[kind] += 1
        else:
            self.failed.append(f"{kind}: {what}")

    def close(self, kind: str, group: str, got: Any, want: Any) -> None:
        """Whether the shards that this process has are parts of the arrays wanted."""
        limit = MATRIX_ULPS if GROUPS[group][1] is None else ULPS
        for (keys, g), w in zip(
            jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
        ):
            w = np.asarray(w, np.float64)
            for shard in g.addressable_shards:
                error = np.max(
                    np.abs(np.asarray(shard.data, np.float64) - w[shard.index]), initial=0
                )
                ulps = float(error / np.finfo(np.float32).eps / max(1, np.max(np.abs(w))))
                self.worst[group] = max(self.worst.get(group, 0), ulps)
                self.that(ulps <= limit, kind, f"{group}{jax.tree_util.keystr(keys)}: {ulps} ulps")


def collectives(program: str) -> set[tuple[str, int]]:
    """The kinds of collectives in a compiled program, with the entries of what they make.

    For an all-reduce that is what it takes, too.
    """
    found = compiled.collectives(program)
    return {(own.kind, size) for own in found for size in compiled.entries_of(own.result)}


compilations = 0


def _count(event: str, *_: Any, **__: Any) -> None:
    global compilations
    compilations += event == "/jax/core/compile/backend_compile_duration"


def start(group: str) -> tuple[Any, Any, Any]:
    """Weights outside their sets, one gradient, and their specs."""
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name in GROUPS[group][0]:
        for place, (shape, spec) in leaves_of(group, name).items():
            w, g = rng.normal(size=(2, *shape)).astype(np.float32)
            made.setdefault(name, {})[place] = {"kernel": (w, g, spec)}

    def part(i: int) -> Any:
        return jax.tree.map(lambda x: x[i], made, is_leaf=lambda x: isinstance(x, tuple))

    return part(0), part(1), part(2)


def programs(group: str) -> tuple[Any, Any, Any]:
    rules = rules_of(group)
    tx = optax.chain(optax.adam(1e-2), oc.project(rules))

    def step(params, state, grads):
        # The same in all runs, to the bit, so that Adam does not blow up small differences.
        grads = jax.tree.map(lambda g: g * jnp.cos(state[1].updates_seen.astype(g.dtype)), grads)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def look(params, state):
        return (
            oc.constrain(params, rules, state=state, step=STEPS),
            oc.violations(params, rules, state=state, step=STEPS),
        )

    return tx, jax.jit(step, donate_argnums=(0, 1)), jax.jit(look)


def put(x: Any, mesh: Mesh, spec: P) -> jax.Array:
    """An array over all processes, of which each has the whole as a host array."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def placed(state: Any, mesh: Mesh) -> Any:
    """A state in which the counts are on all devices, as after a step."""
    return jax.tree.map(
        lambda x: x if isinstance(x.sharding, NamedSharding) else put(x, mesh, P()), state
    )


def shardings(tree: Any) -> list[Any]:
    return [(x.sharding, x.ndim) for x in jax.tree.leaves(tree)]


def train(checks: Checks, group: str, mesh: Mesh) -> None:
    """Some steps on the mesh and on one device, and what can be told of them."""
    weights, gradients, specs = start(group)
    tx, step, look = programs(group)
    most = GROUPS[group][1]
    audited = "norms" in group

    params, grads = jax.device_put((weights, gradients), jax.local_devices()[0])
    state = jax.jit(tx.init)(params)
    seen = look(params, state) if audited else None
    for _ in range(STEPS):
        params, state = step(params, state, grads)
    want = params, state

    def spread(tree):
        return jax.tree.map(lambda w, spec: put(w, mesh, spec), tree, specs)

    params, grads = spread(weights), spread(gradients)
    before = params
    by_jit = group == "processes"
    state = jax.jit(tx.init)(params) if by_jit else placed(tx.init(params), mesh)
    where = shardings(params if by_jit else (params, state))
    moved = {}
    if audited:
        program = look.lower(params, state).compile()
        checks.close("constrain and violations", group, program(params, state), seen)
        moved["constrain and violations"] = collectives(program.as_text())
    program = step.lower(params, state, grads).compile()
    moved["step"] = collectives(program.as_text())
    if most is not None:
        check_moved(checks, group, moved, most)

    for i in range(STEPS):
        count = compilations
        params, state = step(params, state, grads)
        # Adam's moments start out whole on each device where init is compiled: one more.
        if i > by_jit:
            checks.that(compilations == count, "compilations", f"{group}: once more in step {i}")
    checks.that(
        all(x.is_deleted() for x in jax.tree.leaves(before)), "donation", f"{group}: not taken"
    )
    checks.close("equality", group, (params, state), want)
    after = shardings(params if by_jit else (params, state))
    for (old, ndim), (new, _) in zip(where, after, strict=True):
        checks.that(new.is_equivalent_to(old, ndim), "shardings", f"{group}: {old} became {new}")


def check_moved(checks: Checks, group: str, moved: dict[str, Any], most: int) -> None:
    for verb, found in moved.items():
        checks.that(bool(found) == bool(most), "collectives", f"{group}, {verb}: {found}")
        for kind, size in found:
            checks.that(
                kind == "all-reduce" and size <= most,
                "collectives",
                f"{group}, {verb}: {kind} of {size} entries",
            )


def self_test(checks: Checks, mesh: Mesh) -> None:
    """What moves a parameter has to show up among the collectives."""
    w = put(np.ones((128, 32), np.float32), mesh, P("x", "y"))
    for name, f, spec in (
        ("all-gather", lambda w: 2 * w, P()),
        ("all-to-all", lambda w: 2 * w, P("y")),
        ("all-reduce", lambda w: w.T @ w, P()),
    ):
        program = jax.jit(f, out_shardings=NamedSharding(mesh, spec)).lower(w).compile()
        found = collectives(program.as_text())
        checks.that(max((n for _, n in found), default=0) > UNITS, "self-test", f"{name}: {found}")


def explicit_axes(checks: Checks) -> None:
    """Each set on a mesh of the type that `jax.make_mesh` makes, as on one device."""
    sets, places, weights = {}, {}, {}
    rng = np.random.default_rng(0)
    for group in (group for group in GROUPS if group != "processes"):
        for name, constraint in GROUPS[group][0].items():
            shape, places[name] = next(iter(leaves_of(group, name).values()))
            weights[name] = rng.normal(size=shape).astype(np.float32)
            sets[name] = constraint
    for name, constraint, (shape, place) in (
        ("stacked", oc.stacked(oc.orthogonal()), MATRICES["stack and out"]),
        (
            "stacked top_k",
            oc.stacked(oc.compose(oc.non_neg(), oc.top_k(3, axis=0))),
            MATRICES["stack and out"],
        ),
        ("top_k of rows", oc.top_k(3, axis=1), MATRICES["both"]),
        # Groups of 4, of which a device has 2 entries.
        ("split groups", oc.nm(2, 4), ((8, 32), P("x", "y"))),
        # More than 32 values are searched.
        ("large grid", oc.grid(np.arange(-40, 41) / 20), MATRICES["both"]),
        (
            "stacked norms",
            oc.stacked(oc.compose(oc.non_neg(), oc.max_norm(1.0))),
            MATRICES["stack and out"],
        ),
        (
            "stacked norms at init",
            oc.stacked(oc.compose(oc.non_neg(), oc.max_norm("0.5x init"))),
            MATRICES["stack and out"],
        ),
    ):
        sets[name], places[name] = constraint, place
        weights[name] = rng.normal(size=shape).astype(np.float32)

    @jax.jit
    def step(params, bound):
        rules = {f"/{name}": c for name, c in sets.items()}
        rules["/max_spectral_norm"] = oc.max_spectral_norm(bound)
        tx = optax.chain(optax.sgd(0.1), oc.project(rules))
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    want = step(weights, 0.7)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        params = {name: put(w, mesh, places[name]) for name, w in weights.items()}
        bound = put(np.float32(0.7), mesh, P())
        got = step(params, bound)
        checks.close("explicit axes", "others", got, want)
        for name, w in got.items():
            same = w.sharding.is_equivalent_to(params[name].sharding, w.ndim)
            checks.that(same, "explicit axes", f"{name} is now {w.sharding}")
        # What says which matrices are at their bound takes products, too.
        reported = (
            "monotone",
            "part",
            "max_spectral_norm",
            "nuclear_norm_ball",
            "orthogonal",
            "split groups",
        )
        rules = {f"/{name}": sets[name] for name in reported}
        rules["/max_spectral_norm"] = oc.max_spectral_norm(bound)
        params = {name: got[name] for name in reported}
        for row in oc.report(oc.constrain(params, rules), rules).rows:
            checks.that(row.at_bound and (row.outside or 0) < 1e-5, "explicit axes", str(row))
        # By hand, and their derivatives.
        flat = oc.intersection(oc.sum_to(0.0), oc.box(-1.0, 1.0))
        for name in ("large grid", "stacked norms"):
            for constraint in (sets[name], flat):
                w = put(weights[name], mesh, places[name])
                checks.close("explicit axes", "others", constraint(w), constraint(weights[name]))
                _, dw = jax.jvp(constraint, (w,), (w,))
                _, want = jax.jvp(constraint, (weights[name],), (weights[name],))
                checks.close("explicit axes", "others", dw, want)
    # Like what is not compiled elsewhere, a report needs no mesh around it.
    own = {"w": put(weights["large grid"], mesh, places["large grid"])}
    (row,) = oc.report(own, oc.max_norm(1.0)).rows
    checks.that(row.histogram, "explicit axes", str(row))


ACROSS = {
    "a": ((64, 32), P("x", "y")),
    "b": ((32, 16), P("y", None)),
    "c": ((128,), P(("x", "y"))),
    "d": ((4, 8, 8), P(None, "x", None)),
    "e": ((), P()),
}
IN_PARTS = {
    "max_norm": oc.max_norm(1.0),
    "max_rms": oc.max_rms(0.1),
    "fixed_norm": oc.fixed_norm("init"),
    "top_k": oc.top_k(0.1),
    "simplex": oc.simplex(),
    "l1_ball": oc.l1_ball(),
}


def groups_of_leaves(checks: Checks, mesh: Mesh, kind: str) -> None:
    """Leaves under one constraint: only scalars move, and the results are those of one device."""
    rng = np.random.default_rng(0)
    weights, gradients = (
        {n: rng.normal(size=shape).astype(np.float32) for n, (shape, _) in ACROSS.items()}
        for _ in range(2)
    )
    for name, constraint in IN_PARTS.items():
        rules = {oc.across("*"): constraint}
        tx = optax.chain(optax.sgd(0.1), oc.project(rules))

        def step(params, state, grads, tx=tx):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates)

        def constrain(params, state, grads, rules=rules):
            del grads
            return oc.constrain(params, rules, state=state)

        params, grads = (
            {n: put(w, mesh, ACROSS[n][1]) for n, w in tree.items()}
            for tree in (weights, gradients)
        )
        given = tx.init(weights)
        state = tx.init(params)
        for verb in (step, constrain):
            program = jax.jit(verb).lower(params, state, grads).compile()
            moved = collectives(program.as_text())
            checks.that(moved == {("all-reduce", 1)}, kind, f"{name}, {verb.__name__}: {moved}")
            got, want = program(params, state, grads), verb(weights, given, gradients)
            checks.close(kind, "others", got, want)
            for n, w in got.items():
                same = w.sharding.is_equivalent_to(params[n].sharding, w.ndim)
                checks.that(same, kind, f"{name}: {n} is now {w.sharding}")
    layer = {"kernel": (weights["b"], P("x", "y")), "bias": (weights["b"][0], P("y"))}
    plain = {n: w for n, (w, _) in layer.items()}
    placed = {n: put(w, mesh, spec) for n, (w, spec) in layer.items()}
    for constraint in (oc.unit_norm(), oc.fixed_norm("2x init", axis=0), oc.monotone()):
        for pattern in (oc.joint("kernel", "bias"), oc.across("*")):
            rules = {pattern: constraint}
            tx = oc.project(rules)

            def apply(params, tx=tx):
                return tx.update(params, tx.init(params), params)[0]

            checks.close(kind, "others", jax.jit(apply)(placed), apply(plain))
            rows = oc.report(placed, rules, state=tx.init(placed)).rows
            checks.that(rows[0].units, kind, str(rows))


DIVIDED = {
    "orthogonal": (oc.orthogonal(), P("x", "y")),
    "around": (oc.around(oc.nuclear_norm_ball(0.5)), P("x", None)),
    "max_spectral_norm": (oc.max_spectral_norm(lambda step: 2.0 - step), P()),
    "transport": (oc.transport(np.linspace(0.5, 1.5, 32) / 4, np.ones(8)), P(None, ("x", "y"))),
    "stacked": (oc.stacked(oc.low_rank(2)), P(None, "x", "y")),
}


class Cubes(oc.Constraint):
    """A map with as much work for each matrix, which a compiled program counts."""

    spreads = True

    def __call__(self, w: Any, /) -> jax.Array:
        return w @ (w.T @ w)


def matrices(
    checks: Checks, mesh: Mesh, kind: str, given: Mesh | None, names: Iterable[str] = DIVIDED
) -> None:
    """Matrices of one shape, divided over a mesh that is given or that of `jax.set_mesh`."""
    rng = np.random.default_rng(0)

    def inside() -> Any:
        return contextlib.nullcontext() if given is not None else jax.set_mesh(mesh)

    for name in names:
        constraint, spec = DIVIDED[name]
        shape = (3, 32, 8) if name == "stacked" else (32, 8)
        many = 3 if name == "stacked" else 9
        weights = {f"{i}": rng.normal(size=shape).astype(np.float32) for i in range(many)}

        def step(params, mesh=None, constraint=constraint):
            tx = oc.project(constraint, mesh=mesh, stats=True)
            updates, state = tx.update(params, tx.init(params), params)
            return optax.apply_updates(params, updates), state

        want = jax.jit(step)(jax.device_put(weights, jax.local_devices()[0]))
        params = {n: put(w, mesh, spec) for n, w in weights.items()}
        with inside():
            program = jax.jit(step, static_argnums=1).lower(params, given).compile()
        moved = collectives(program.as_text())
        checks.that(moved, kind, f"{name}: nothing is divided")
        if name in ("orthogonal", "stacked", "transport"):  # which are split over all devices
            gathers = [n for what, n in moved if what == "all-gather" and n > math.prod(shape)]
            checks.that(not gathers, kind, f"{name}: {moved}")
        got, state = program(params)
        checks.close(kind, "others", (got, state), want)
        for n, w in got.items():
            same = w.sharding.is_equivalent_to(params[n].sharding, w.ndim)
            checks.that(same, kind, f"{name}: {n} is now {w.sharding}")
        # What is inside is the projection of itself, also outside of `jit`.
        if name == "around":
            with inside():
                again = oc.constrain(got, constraint, mesh=given, state=state)
            checks.close(kind, "others", again, want[0])
    weights = {f"{i}": rng.normal(size=(32, 32)).astype(np.float32) for i in range(16)}
    params = {n: put(w, mesh, P("x", "y")) for n, w in weights.items()}
    work = jax.jit(Cubes()).lower(np.zeros((32, 32), np.float32)).compile()

    def cubes(params):
        return oc.constrain(params, Cubes(), mesh=given)

    with inside():
        program = jax.jit(cubes).lower(params).compile()
    flops = [cast(Any, p.cost_analysis())["flops"] for p in (program, work)]
    part = flops[0] / (16 / mesh.size * flops[1])
    checks.that(part < 1.1, kind, f"{part} of a part of the work")

    def frozen(params):  # half of the leaves
        updates = {n: w if int(n) % 2 else optax.MaskedNode() for n, w in params.items()}
        tx = oc.project(Cubes(), mesh=given)
        return tx.update(updates, tx.init(params), params)

    with inside():
        program = jax.jit(frozen).lower(params).compile()
    less = cast(Any, program.cost_analysis())["flops"] / flops[0]
    checks.that(less < 0.6, kind, f"{less} of the work with half of the leaves frozen")
    # Also where they are sharded in different ways, a leaf stays where it is.
    ways = P("x", "y"), P("y", "x")
    params = {n: put(w, mesh, ways[int(n) % 2]) for n, w in weights.items()}
    with inside():
        got = jax.jit(cubes)(params)
    for n, w in got.items():
        same = w.sharding.is_equivalent_to(params[n].sharding, w.ndim)
        checks.that(same, kind, f"mixed: {n} is now {w.sharding}")


def fused(checks: Checks, mesh: Mesh) -> None:
    """The kernel of `fused_adam`, as the interpreter runs it: each device takes its rows."""
    rng = np.random.default_rng(0)
    rules = {"max": oc.max_norm(2.0, axis=-1), "init": oc.fixed_norm("init", axis=-1)}
    adam = recipes.fused_adam(0.1, rules, interpret=True)
    step = jax.jit(adam.step, donate_argnums=(0, 1))
    weights = {name: rng.normal(size=(16, 24)).astype(np.float32) for name in rules}
    grads = jax.tree.map(np.sin, weights)
    one = jax.device_put(weights, jax.local_devices()[0])
    want = step(one, adam.init(one), grads)
    # Of rows that are split, the squares are summed and the largest norm is found.
    for spec, most in (P(), 0), (P(("x", "y")), 0), (P(None, "x"), 16), (P("x", "y"), 4):
        params, moved = (
            {n: put(x, mesh, spec) for n, x in tree.items()} for tree in (weights, grads)
        )
        state = placed(adam.init(params), mesh)
        program = step.lower(params, state, moved).compile()
        check_moved(checks, f"fused, {spec}", {"step": collectives(program.as_text())}, most)
        got = program(params, state, moved)
        checks.close("fused", "others", got, want)
        for w in got[0].values():
            same = w.sharding.is_equivalent_to(NamedSharding(mesh, spec), w.ndim)
            checks.that(same, "fused", f"{spec} is now {w.sharding}")


def every_set(checks: Checks) -> None:
    """Each exported set is in one of the groups."""
    used = {type(c) for sets, _ in GROUPS.values() for c in sets.values()} | {oc.Stacked}
    for name, thing in vars(oc).items():
        if isinstance(thing, type) and issubclass(thing, oc.Constraint):
            checks.that(
                thing in used or thing in (oc.Constraint, oc.Scale),
                "every set",
                f"{name} is in none",
            )


def hyperparameters(checks: Checks, mesh: Mesh) -> None:
    """Numbers and arrays of which no process has all: outside jit, and as arguments of it."""
    w, _ = np.random.default_rng(0).normal(size=(2, 32, 8)).astype(np.float32)
    half, row, count = np.float32(0.5), np.linspace(1, 2, 32, dtype=np.float32), np.int32(5)
    sets: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "max_norm": (oc.max_norm, (half,)),
        "min_max_norm": (oc.min_max_norm, (half, 2 * half)),
        "box of numbers": (oc.box, (-half, half)),
        "box of arrays": (oc.box, (-row[:, None], row[:, None])),
        "mask": (oc.mask, ((row > 1.5)[:, None],)),
        "simplex": (oc.simplex, (half,)),
        "hyperplane": (oc.hyperplane, (row, half)),
        "half_space": (oc.half_space, (row, half)),
        "top_k": (oc.top_k, (count,)),
        "max_spectral_norm": (oc.max_spectral_norm, (half,)),
        "soft": (lambda rate: oc.soft(oc.max_norm(1.0), rate), (half,)),
        "intersection": (lambda most: oc.intersection(oc.non_neg(), oc.max_norm(most)), (half,)),
    }

    @jax.jit
    def step(params, numbers):
        rules = {f"/{name}": make(*numbers[name]) for name, (make, _) in sets.items()}
        tx = optax.chain(optax.sgd(0.0), oc.project(rules))
        updates, _ = tx.update(params, tx.init(params), params)
        return optax.apply_updates(params, updates)

    numbers = {
        name: tuple(put(x, mesh, P("x") if np.ndim(x) else P()) for x in given)
        for name, (_, given) in sets.items()
    }
    params = {name: put(w, mesh, P("x", "y")) for name in sets}
    want = {name: make(*given)(w) for name, (make, given) in sets.items()}
    checks.close("hyperparameters", "others", step(params, numbers), want)
    for name, (make, _) in sets.items():
        try:
            constraint = make(*numbers[name])
            if name in ("max_norm", "box of arrays", "mask", "hyperplane"):
                got = oc.constrain(params[name], constraint)
                checks.close("hyperparameters", "others", got, want[name])
            checks.that(len(f"{constraint}{constraint!r}") > 10, "texts", name)
        except Exception as error:
            checks.that(False, "hyperparameters", f"{name}: {type(error).__name__}: {error}")


def main() -> None:
    jax.monitoring.register_event_duration_secs_listener(_count)
    jax.config.update("jax_platforms", "cpu")
    # The default of newer versions. The partitioner before it gives some outputs of a step other
    # shardings than the inputs have, with Adam alone, too.
    jax.config.update("jax_use_shardy_partitioner", True)
    checks = Checks()
    every = [group for group in GROUPS if group != "processes"]
    if sys.argv[1:] == ["matrices"]:
        jax.config.update("jax_num_cpu_devices", 8)
        mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
        matrices(checks, mesh, "matrices", mesh, ["orthogonal", "around"])
        print(json.dumps({"failed": checks.failed, "passed": checks.passed}))
        return
    if not sys.argv[1:] or sys.argv[1] in every:
        jax.config.update("jax_num_cpu_devices", 8)
        shape, groups = (4, 2), sys.argv[1:] or every
    else:
        port, count, process = map(int, sys.argv[1:])
        jax.config.update("jax_num_cpu_devices", 2)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, process, initialization_timeout=60)
        shape, groups = (count, 2), ["processes"]
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("x", "y"))
    if groups != ["processes"]:
        self_test(checks, mesh)
        every_set(checks)
        groups_of_leaves(checks, mesh, "groups")
        fused(checks, mesh)
        if groups == every:
            matrices(checks, mesh, "matrices", mesh)
        if groups == every and hasattr(jax.sharding, "auto_axes"):  # since JAX 0.7
            explicit_axes(checks)
            kinds = (jax.sharding.AxisType.Explicit,) * 2
            explicit = jax.make_mesh(shape, ("x", "y"), axis_types=kinds)
            with jax.set_mesh(explicit):
                groups_of_leaves(checks, explicit, "groups on explicit axes")
            matrices(checks, explicit, "matrices on explicit axes", None)
    else:
        matrices(checks, mesh, "matrices", mesh, ["orthogonal", "around"])
        if jax.process_count() == 2:
            hyperparameters(checks, mesh)
    for group in groups:
        train(checks, group, mesh)
    print(json.dumps({"failed": checks.failed, "passed": checks.passed, "worst": checks.worst}))


if __name__ == "__main__":
    main()
