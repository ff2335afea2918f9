"""Constraints as pytrees, in JAX' transformations, and as static values."""

import copy
import dataclasses
import functools
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, Case, bits, float64
from test_conformance import ALL

import optax_constraints as oc

WIDEST = DTYPES[0]
each_case = pytest.mark.parametrize("case", ALL, ids=str)


def normal(case: Case, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=case.shape), WIDEST)


def near(got: Any, want: Any) -> None:
    np.testing.assert_allclose(float64(got), float64(want), rtol=2e-6, atol=2e-6)


@each_case
def test_a_constraint_is_an_argument_of_jit_and_another_number_compiles_nothing(case: Case):
    constraint, traces = case.constraint, []

    @jax.jit
    def apply(constraint, w):
        traces.append(constraint)
        return constraint(w)

    w = normal(case)
    near(apply(constraint, w), constraint(w))
    # All numbers and arrays a quarter smaller, where that is still a number of its kind.
    other = jax.tree.map(lambda x: x * type(x)(0.75) if is_float(x) else x, constraint)
    near(apply(other, w), other(w))
    near(apply(copy.deepcopy(constraint), w), constraint(w))
    assert len(traces) == 1
    (traced,) = traces
    assert jax.tree.structure(traced) == jax.tree.structure(constraint)
    assert str(traced.settle("w", case.shape))


def is_float(x: Any) -> bool:
    return isinstance(x, float)


@each_case
def test_leaves_are_numbers_and_the_rest_is_structure(case: Case):
    leaves, structure = jax.tree.flatten(case.constraint)
    assert {jnp.result_type(leaf).kind for leaf in leaves} <= set("fib")
    again = structure.unflatten(leaves)
    assert again == case.constraint
    assert hash(again) == hash(case.constraint)
    hash(structure)
    # JAX fills trees with what is no number, and looks at them again.
    for placeholder in (object(), jax.ShapeDtypeStruct((), WIDEST), np.zeros(3)):
        filled = structure.unflatten([placeholder] * len(leaves))
        assert jax.tree.structure(filled) == structure
        assert all(leaf is placeholder for leaf in jax.tree.leaves(filled))
    assert jax.tree.leaves(jax.tree.map(lambda _: None, again)) == []
    paths = [jax.tree_util.keystr(k) for k, _ in jax.tree_util.tree_leaves_with_path(again)]
    assert len(set(paths)) == len(leaves)


@each_case
def test_copies_are_equal(case: Case):
    for again in (copy.deepcopy(case.constraint), pickle.loads(pickle.dumps(case.constraint))):
        assert again == case.constraint
        assert hash(again) == hash(case.constraint)
        assert bits(again(normal(case))) == bits(case.constraint(normal(case)))


def test_one_constraint_for_each_of_a_batch():
    w = jnp.ones((3, 4), WIDEST)
    caps = jax.vmap(oc.max_norm)(jnp.array([0.5, 1.0, 9.0], WIDEST))
    got = jax.vmap(lambda constraint, w: constraint(w))(caps, w)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [0.5, 1, 2], rtol=1e-6)
    got = jax.vmap(lambda constraint, w: constraint(w), in_axes=(0, None))(caps, w[0])
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [0.5, 1, 2], rtol=1e-6)
    _, got = jax.lax.scan(lambda _, c: (None, c(w[0])), None, caps)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), [0.5, 1, 2], rtol=1e-6)


def test_a_condition_chooses_between_two_of_a_kind():
    @jax.jit
    def apply(first, w):
        a, b = oc.box(-1.0, jnp.ones(3)), oc.box(-2.0, jnp.zeros(3))
        return jax.lax.cond(first, lambda: a, lambda: b)(w)

    w = jnp.array([-3.0, 0.5, 3.0])
    np.testing.assert_array_equal(apply(True, w), [-1, 0.5, 1])
    np.testing.assert_array_equal(apply(False, w), [-2, 0, 0])


def test_a_bound_can_be_learned():
    # From the constraint alone, as an argument of grad.
    w = jnp.array([3.0, 4.0])
    gradient = jax.grad(lambda constraint: jnp.sum(constraint(w)))(oc.max_norm(1.0))
    assert isinstance(gradient, oc.MaxNorm)
    np.testing.assert_allclose(gradient.max_value, 1.4, rtol=1e-6)


@pytest.mark.parametrize(
    ("constraint", "paths"),
    [
        (oc.max_norm(2.0), [".max_value"]),
        (oc.max_norm("2x init"), []),
        (oc.max_norm(lambda step: 1.0), []),
        (oc.min_max_norm("0.5x init", 3.0), [".max_value", ".rate"]),
        (oc.box(upper=np.ones(3)), [".upper"]),
        (oc.mask(np.eye(2)), [".mask"]),
        (oc.mask(lambda shape: np.tri(*shape)), []),
        (oc.soft(oc.max_norm(1.0), 0.5), [".constraint.max_value", ".rate"]),
        (oc.compose("non_neg", oc.max_norm(1.0)), [".constraints[1].max_value"]),
        (oc.low_rank(2), [".rank"]),
        (oc.nm(2, 4), [".n"]),
        (oc.Constraint(), []),
    ],
    ids=str,
)
def test_which_fields_are_leaves(constraint, paths):
    found = jax.tree_util.tree_leaves_with_path(constraint)
    assert [jax.tree_util.keystr(keys) for keys, _ in found] == paths


# Classes of a user's own.


class Plain(oc.Constraint):
    """No dataclass: its attributes count."""

    def __init__(self, bound, name="plain"):
        self.bound, self.name = bound, name

    def __call__(self, w):
        return jnp.minimum(w, self.bound)


@dataclasses.dataclass(frozen=True, eq=False)
class Own(oc.Constraint):
    """A dataclass; its checks need a number."""

    bound: Any
    low: float = 0.0

    def __post_init__(self):
        if float(self.low) > 1:
            raise ValueError("low is too high")

    def __call__(self, w):
        return jnp.clip(w, self.low, self.bound)


class Module(eqx.Module, oc.Constraint):
    """A pytree by itself."""

    bound: jax.Array

    def __call__(self, w):
        return jnp.minimum(w, self.bound)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Registered(oc.Constraint):
    """Registered by the user."""

    bound: Any

    def __call__(self, w):
        return jnp.minimum(w, self.bound)


@pytest.mark.parametrize("make", [Plain, Own, Module, Registered])
def test_a_class_of_ones_own_is_a_pytree(make):
    traces = []

    @jax.jit
    def apply(constraint, w):
        traces.append(None)
        return constraint(w)

    w = jnp.array([0.5, 3.0])
    for bound in (1.0, 2.0):
        np.testing.assert_array_equal(apply(make(jnp.array(bound)), w), [0.5, bound])
    assert len(traces) == 1
    both = oc.stacked(make(jnp.ones(())))
    np.testing.assert_array_equal(apply(both, w[None]), [[0.5, 1]])
    updates, _ = oc.project(both).update(w[None], oc.project(both).init(w[None]), w[None])
    np.testing.assert_array_equal(updates, [[0.5, -2]])


def test_only_arrays_of_a_users_class_are_leaves():
    assert jax.tree.leaves(Plain(1.0)) == []
    assert jax.tree.leaves(Own(jnp.ones(()), 0.5)) == [1.0]
    (leaf,) = jax.tree.leaves(Plain([jnp.ones(2)], name="list"))
    assert leaf.shape == (2,)
    assert jax.tree.leaves(Plain((jnp.ones(2), "text"))) == []


class Concrete(oc.Constraint):
    """Counts on what it has to be concrete."""

    convex = True

    def __init__(self):
        self.free, self.options = np.array([True, False, True]), {"most": 1.0}

    def __call__(self, w):
        for i in np.flatnonzero(self.free):
            w = w.at[i].min(self.options["most"])
        return w


@dataclasses.dataclass(frozen=True, eq=False)
class Derived(oc.Constraint):
    """Has an attribute that is no field."""

    size: int
    convex = True

    def __post_init__(self):
        object.__setattr__(self, "table", jnp.ones(self.size))

    def __call__(self, w):
        return jnp.minimum(w, self.table)  # pyright: ignore[reportAttributeAccessIssue]


class Slots(oc.Constraint):
    __slots__ = ("most",)
    convex = True

    def __init__(self):
        self.most = 1.0

    def __call__(self, w):
        return jnp.minimum(w, self.most)


class Scaled(oc.MaxNorm):
    """One of the library's, with more to it."""

    def __init__(self, bound, factor):
        super().__init__(bound)
        object.__setattr__(self, "factor", factor)

    def __call__(self, w):
        return super().__call__(w / self.factor) * self.factor  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("make", [Concrete, lambda: Derived(3), Slots, lambda: Scaled(9.0, 2.0)])
def test_classes_of_ones_own_inside_others(make):
    w = jnp.array([3.0, -1.0, 2.0])
    constraint = make()
    want = jnp.maximum(constraint(w), 0)
    np.testing.assert_allclose(oc.intersection(constraint, oc.non_neg())(w), want, atol=1e-5)
    np.testing.assert_array_equal(oc.compose(constraint, oc.non_neg())(w), want)
    mapped = jax.tree.map(lambda x: x, constraint)
    np.testing.assert_array_equal(mapped(w), constraint(w))


def test_attributes_that_are_no_fields_count():
    assert Scaled(1.0, 2.0) == Scaled(1.0, 2.0) != Scaled(1.0, 3.0)


@pytest.mark.parametrize("through", ["jit", "tree.map"])
def test_a_schedule_is_evaluated_after_a_round_trip(through):
    constraint, w = oc.max_norm(lambda step: 1.0 + step), jnp.array([3.0, 4.0])
    if through == "jit":
        got = jax.jit(lambda c, step: c.at(step))(constraint, 1.0)
    else:
        got = jax.vmap(jax.tree.map(lambda x: x, constraint).at)(jnp.array([1.0]))
        got = jax.tree.map(lambda x: x[0], got)
    assert jax.tree.leaves(got) == [2.0]
    np.testing.assert_allclose(got(w), [1.2, 1.6], rtol=1e-6)


def test_what_cannot_be_compared_is_not_equal():
    deleted = jnp.ones(3)
    one, other = oc.box(upper=deleted), oc.box(upper=jnp.ones(3))
    deleted.delete()
    assert one != other
    assert one == one  # to itself it is
    keys = [Plain(jax.random.key(0)), Plain(jax.random.key(0))]
    assert jax.tree.structure(keys[0]) == jax.tree.structure(keys[1])


def test_a_class_without_a_constructor_takes_no_arguments():
    class Nothing(oc.Constraint):
        pass

    for make in (oc.Constraint, Nothing):
        with pytest.raises(TypeError, match=r"takes no arguments"):
            make(3)
        with pytest.raises(TypeError, match=r"takes no arguments"):
            make(bound=3)


# Static values: fields of modules, keys of caches.


@pytest.mark.parametrize("bound", [1.0, np.ones(3), jnp.ones(3), [1.0, 2.0, 3.0]], ids=str)
def test_a_set_with_an_array_is_a_static_argument(bound):
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def apply(constraint, w):
        traces.append(None)
        return constraint(w)

    w = jnp.full(3, 5.0)
    for again in (oc.box(upper=bound), oc.box(upper=copy.deepcopy(bound))):
        np.testing.assert_array_equal(apply(again, w), np.broadcast_to(np.asarray(bound), 3))
    apply(oc.box(upper=np.full(3, 4.0)), w)
    assert len(traces) == 2


def test_hashing_does_not_read_the_array():
    # A module hashes its constraints on each call, and a mask may be as large as its leaf.
    mask = np.ones((64, 64), bool)
    one, other = oc.mask(mask), oc.mask(~mask)
    assert one != other
    assert hash(one) == hash(other)


@pytest.mark.parametrize(
    ("make", "shape"), [(lambda a: oc.box(upper=a), (3,)), (oc.mask, (3,)), (oc.hyperplane, (3,))]
)
def test_an_array_that_its_owner_changes_later(make, shape):
    array = np.ones(shape)
    constraint = make(array)
    w = jnp.arange(3.0) + 2
    before = bits(constraint(w))
    array[:] = -5.0
    assert bits(constraint(w)) == before
    assert constraint == make(np.ones(shape))


def test_a_number_that_its_owner_changes_later():
    bound = np.array(1.0)
    constraint = oc.max_norm(bound)
    bound[()] = 7.0
    np.testing.assert_allclose(constraint(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-6)
