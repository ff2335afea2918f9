"""Libraries that take an Optax optimizer, with `project` in it: each row of docs/ecosystem.md.

The packages are those of the extra `ecosystem`; a test whose package is missing, or does not
import, is skipped and says so.
"""

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_constraints as oc

ROWS = {
    "Dynamax": ("works with `keep_params`", "test_dynamax"),
    "GPJax": ("works", "test_gpjax"),
    "Haliax, as marin-haliax": ("works", "test_haliax"),
    "jaxopt": ("works", "test_jaxopt"),
    "NetKet": ("works", "test_netket"),
    "NumPyro": ("works", "test_numpyro"),
    "Optimistix": ("works", "test_optimistix"),
    "OTT-JAX": ("works", "test_ott"),
    "Treescope": ("shows all", "test_treescope"),
}


def test_each_row_of_the_page_has_its_test():
    page = (Path(__file__).parent.parent / "docs" / "ecosystem.md").read_text()
    rows = re.findall(r"^\| (.*?) \| \d[\d.]* \| (.*?) \| .* \|$", page, re.MULTILINE)
    assert dict(rows) == {name: result for name, (result, _) in ROWS.items()}
    tree = ast.parse(Path(__file__).read_text())
    functions = {f.name for f in tree.body if isinstance(f, ast.FunctionDef)}
    assert {test for _, test in ROWS.values()} <= functions


def package(name: str) -> Any:
    """A module of another library, or a skipped test."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        pytest.skip(f"{name} does not import: {type(error).__name__}: {error}")


@pytest.fixture(autouse=True)
def precision():
    """Some of them turn float64 on when they are imported, for all that comes after."""
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


in_float64 = pytest.fixture(lambda precision: jax.config.update("jax_enable_x64", True))


# Least squares without negative entries, which SciPy solves by an active set.

RNG = np.random.default_rng(0)
A = RNG.normal(size=(12, 5))
B = A @ np.array([1.0, 0.0, 2.0, -1.0, 0.5])


def least_squares(x, *_):
    return jnp.mean(jnp.square(jnp.asarray(A) @ x - jnp.asarray(B))) / 2


def solution() -> np.ndarray:
    optimize = package("scipy.optimize")
    x, _ = optimize.nnls(A, B)
    assert np.any(x == 0)
    return x


def bounded(value: Any, start: np.ndarray, lower: Any, upper: Any) -> np.ndarray:
    """The minimum of a function between bounds, by SciPy."""
    both = jax.jit(jax.value_and_grad(value))
    found = package("scipy.optimize").minimize(
        lambda x: tuple(map(np.asarray, both(x))),
        start,
        jac=True,
        bounds=list(zip(lower, upper, strict=True)),
        method="L-BFGS-B",
        options={"ftol": 1e-14, "gtol": 1e-8},
    )
    return found.x


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_optimistix():
    optimistix = package("optimistix")
    tx = optax.chain(optax.sgd(0.3), oc.project(oc.non_neg()))
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-9, atol=1e-9)
    found = optimistix.minimise(least_squares, solver, jnp.ones(5), max_steps=2000)
    np.testing.assert_allclose(found.value, solution(), atol=1e-6)
    assert np.min(found.value) >= 0


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_jaxopt():
    jaxopt = package("jaxopt")
    tx = optax.chain(optax.sgd(0.3), oc.project(oc.non_neg()))
    solver = jaxopt.OptaxSolver(least_squares, tx, maxiter=500)
    np.testing.assert_allclose(solver.run(jnp.ones(5)).params, solution(), atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_haliax():
    haliax, equinox = package("haliax"), package("equinox")
    features, outputs, rows = haliax.make_axes(features=5, outputs=1, rows=12)
    x, y = haliax.named(jnp.asarray(A), (rows, features)), haliax.named(jnp.asarray(B), rows)
    layer = haliax.nn.Linear.init(features, outputs, key=jax.random.key(0), use_bias=False)
    # The array of a named array is its part 0.
    rules = {"weight/0": oc.non_neg()}
    layer = oc.constrain(layer, rules)
    tx = optax.chain(optax.sgd(0.3), oc.project(rules))
    state = tx.init(layer)

    @equinox.filter_jit
    def step(layer, state):
        def loss(layer):
            return haliax.mean(haliax.square(layer(x)["outputs", 0] - y)).scalar() / 2

        updates, state = tx.update(equinox.filter_grad(loss)(layer), state, layer)
        return equinox.apply_updates(layer, updates), state

    for _ in range(500):
        layer, state = step(layer, state)
    np.testing.assert_allclose(layer.weight.array.ravel(), solution(), atol=1e-6)


# Statistics.


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_numpyro():
    numpyro, infer = package("numpyro"), package("numpyro.infer")
    counts, seen = jnp.array([60, 30, 10]), numpyro.distributions.Multinomial

    def model():
        shares = numpyro.param("shares", jnp.full(3, 1 / 3))
        numpyro.sample("counts", seen(total_count=100, probs=shares), obs=counts)

    tx = optax.chain(optax.sgd(1e-4), oc.project({"shares": oc.simplex()}))
    optimizer = package("numpyro.optim").optax_to_numpyro(tx)
    svi = infer.SVI(model, lambda: None, optimizer, infer.Trace_ELBO())
    found = svi.run(jax.random.key(0), 1500, progress_bar=False).params["shares"]
    # Of a multinomial distribution, the likeliest shares are those that were seen.
    np.testing.assert_allclose(found, counts / 100, atol=1e-6)


@pytest.mark.slow
def test_dynamax():
    ssm, parameters = package("dynamax.linear_gaussian_ssm"), package("dynamax.parameters")
    seen = np.random.default_rng(0).normal([1.0, -0.2, 0.1], 0.5, size=(40, 3)).astype(np.float32)
    model = ssm.LinearGaussianSSM(1, 3)
    params, properties = model.initialize(
        jax.random.key(0),
        emission_weights=jnp.zeros((3, 1)),
        emission_bias=jnp.zeros(3),
        emission_covariance=jnp.eye(3),
    )
    for own in jax.tree.leaves(
        properties, is_leaf=lambda p: isinstance(p, parameters.ParameterProperties)
    ):
        own.trainable = own is properties.emissions.bias

    def fit(**options):
        project = oc.project({"emissions/bias": oc.box(-0.5, 0.5)}, **options)
        tx = optax.chain(optax.sgd(0.5), project)
        return model.fit_sgd(
            params, properties, jnp.asarray(seen), optimizer=tx, num_epochs=60, shuffle=False
        )[0]

    with pytest.raises(ValueError, match="keep_params=True"):
        fit()
    # Of white noise around a bias, the likeliest bias between bounds is the mean, clipped.
    mean = seen.mean(0)
    assert np.max(np.abs(mean)) > 0.5
    found = fit(keep_params=True).emissions.bias
    np.testing.assert_allclose(found, np.clip(mean, -0.5, 0.5), atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_gpjax():
    gpjax, equinox, paramax = package("gpjax"), package("equinox"), package("paramax")
    x = jnp.linspace(0, 1, 20)[:, None]
    y = 2 + jnp.sin(6 * x) + 0.1 * jax.random.normal(jax.random.key(0), x.shape)
    data = gpjax.Dataset(X=x, y=y)
    mean, kernel = gpjax.mean_functions.Constant(), gpjax.kernels.RBF()
    model = gpjax.gps.Prior(mean_function=mean, kernel=kernel) * gpjax.likelihoods.Gaussian()

    def loss(model, data):
        return -gpjax.objectives.conjugate_mll(model, data)

    # Positive parameters are free numbers inside, below `_unconstrained`; the mean is one itself.
    tx = optax.chain(optax.adam(0.05), oc.project({"mean_function/constant": oc.box(-0.5, 0.5)}))
    found, _ = gpjax.fit(
        model=model, objective=loss, train_data=data, optim=tx, num_iters=1500, verbose=False
    )

    arrays, rest = equinox.partition(model, equinox.is_array)
    flat, unflatten = jax.flatten_util.ravel_pytree(arrays)

    def value(flat):
        return loss(paramax.unwrap(equinox.combine(unflatten(flat), rest)), data)

    place = int(unflatten(jnp.arange(float(flat.size))).prior.mean_function.constant)
    limit = np.full(flat.size, np.inf)
    limit[place] = 0.5
    wanted = bounded(value, np.asarray(flat), -limit, limit)
    assert wanted[place] == 0.5
    reached, _ = jax.flatten_util.ravel_pytree(equinox.filter(found, equinox.is_array))
    assert reached[place] == 0.5
    np.testing.assert_allclose(reached, wanted, atol=0.05)
    assert float(value(reached)) == pytest.approx(float(value(wanted)), abs=1e-4)


# Physics, transport, display.


@pytest.mark.slow
@pytest.mark.usefixtures("in_float64")
def test_netket():
    netket, nn = package("netket"), package("flax.linen")

    class Jastrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            zeros = nn.initializers.zeros
            near = self.param("near", zeros, (6,), float)
            field = self.param("field", zeros, (6,), float)
            return (x * jnp.roll(x, 1, -1)) @ near + x @ field

    space = netket.hilbert.Spin(0.5, 6)
    energy = netket.operator.Ising(space, netket.graph.Chain(6), h=1.0)
    state = netket.vqs.FullSumState(space, Jastrow(), seed=0)
    lower = -np.array([0.05, 0.1, 0.15, 0.2, 0.4, 0.6])
    rules = {"near": oc.box(jnp.asarray(lower), 0.6), "field": oc.box(0.05, 0.1)}
    tx = optax.chain(optax.sgd(0.05), oc.project(rules))
    driver = netket.driver.VMC(energy, tx, variational_state=state)
    driver.run(400, out=None, show_progress=False)

    matrix, spins = jnp.asarray(energy.to_dense()), jnp.asarray(space.all_states())

    def expected(w):
        psi = jnp.exp((spins * jnp.roll(spins, 1, -1)) @ w[:6] + spins @ w[6:])
        return (psi @ matrix @ psi / (psi @ psi)).real

    upper = np.concatenate([np.full(6, 0.6), np.full(6, 0.1)])
    lower = np.concatenate([lower, np.full(6, 0.05)])
    wanted = bounded(expected, np.zeros(12), lower, upper)
    assert 0 < np.sum((wanted == lower) | (wanted == upper)) < 12
    reached = np.concatenate([state.parameters["near"], state.parameters["field"]])
    np.testing.assert_allclose(reached, wanted, atol=1e-4)


@pytest.mark.slow
def test_ott():
    neuraldual, icnn = package("ott.neural.methods.neuraldual"), package("ott.neural.networks.icnn")

    class Unclipped(neuraldual.W2NeuralDual):
        @staticmethod
        def _clip_weights_icnn(params):
            return params

    def batches(seed, shift):
        rng = np.random.default_rng(seed)
        while True:
            yield jnp.asarray(rng.normal(shift, size=(16, 2)), jnp.float32)

    def trained(method, optimizer_f):
        f, g = (icnn.ICNN(dim_data=2, dim_hidden=(6, 6)) for _ in range(2))
        dual = method(
            *(2, f, g),
            optimizer_f=optimizer_f,
            optimizer_g=optax.adam(1e-2),
            num_train_iters=20,
            pos_weights=False,
            conjugate_solver=None,
            rng=jax.random.key(0),
        )
        start = jax.tree.map(np.array, dual.state_f.params)
        dual(batches(0, 0.0), batches(1, 1.0), batches(2, 0.0), batches(3, 1.0))
        return start, dual.state_f.params, dual.state_g.params

    theirs = trained(neuraldual.W2NeuralDual, optax.adam(1e-2))
    rules = {"w_z*/kernel": oc.non_neg()}
    ours = trained(Unclipped, optax.chain(optax.adam(1e-2), oc.project(rules)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    # It starts outside, further than 20 steps of 0.01 lead.
    start, end, _ = ours
    assert all(np.min(start[name]["kernel"]) < -0.25 for name in ("w_zs_0", "w_zs_1"))
    assert all(np.min(end[name]["kernel"]) >= 0 for name in ("w_zs_0", "w_zs_1"))


@pytest.mark.slow
def test_treescope():
    treescope = package("treescope")
    params = {"dense": {"kernel": jnp.full((4, 3), 2.0), "bias": jnp.ones(3)}}
    rules = {"kernel": oc.max_norm("2x init"), "bias": oc.soft(oc.non_neg(), 0.5)}
    things = oc.constrain(params, rules), rules, oc.project(rules).init(params)
    text = treescope.render_to_text(things)
    for part in (
        "'kernel': <jax.Array float32(4, 3)",
        "MaxNorm(axis_name=None, max_value='2x init', axis=0)",
        "Soft(constraint=NonNeg(), rate=0.5)",
        "ProjectState(",
        "'dense/kernel': <jax.Array([[4., 4., 4.]]",
    ):
        assert part in text
    assert treescope.render_to_html(things).startswith("<script>")
