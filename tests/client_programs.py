"""Programs that hold weights in sets by hand: the update of each, and the same with our rules.

Each is written anew from its formulas. What a program does by hand is one function, which the rules
replace; the optimizer around it is the same on both sides.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import optax_constraints as oc
from optax_constraints import recipes
from optax_constraints.flax import layout


class Program(NamedTuple):
    """A training loop without its loss: it is given gradients."""

    init: Callable[[Any], Any]
    """From parameters to what a loop carries."""
    step: Callable[[Any, Any], Any]
    """From that and the inputs of a step, which are gradients or begin with them, to the next."""
    params: Callable[[Any], Any] = lambda carry: carry[0]


class Client(NamedTuple):
    """A program beside ours."""

    rule: str
    """The rules, as a table shows them."""
    by_hand: Callable[..., Any]
    """What the rules replace."""
    like: Any
    """Shapes and dtypes of the parameters."""
    theirs: Program
    ours: Program
    start: Callable[[Any], Any] = lambda params: params
    """Parameters, from normal numbers."""
    inputs: Callable[[Any, np.random.Generator], Any] = lambda grads, rng: grads
    """Inputs of a step, from normal gradients."""
    loop: str = "scan"
    tolerance: float | None = None
    """Of a difference by the largest weight; None for that of rounding."""
    grows: bool = True
    """Whether it also works on other sizes."""

    @property
    def lines(self) -> int:
        """How many lines the program's own code has for it, as it is written here."""
        lines = inspect.getsource(self.by_hand).splitlines()
        return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)

    def grown(self, factor: int) -> "Client":
        """The same on larger arrays: stacks, windows and heads stay as they are."""

        def larger(x: Any) -> Any:
            shape = tuple(factor * size if size > 4 else size for size in x.shape)
            return jax.ShapeDtypeStruct(shape, x.dtype)

        return self._replace(like=jax.tree.map(larger, self.like)) if self.grows else self

    def given(self, steps: int, seed: int = 0) -> tuple[Any, Any]:
        """Parameters to start from, and inputs of all steps."""
        rng = np.random.default_rng(seed)
        start = self.start(noise(rng, self.like))
        return start, self.inputs(noise(rng, self.like, steps), rng)


def noise(rng: np.random.Generator, like: Any, *first: int) -> Any:
    """Normal numbers, like a tree of arrays, with first axes in front."""
    return jax.tree.map(lambda x: rng.normal(size=(*first, *x.shape)).astype(np.float32), like)


def arrays(**shapes: Any) -> Any:
    """Abstract arrays of these shapes, in nested dicts."""
    return jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def by_hand(optimizer: Any, put_back: Any, at_init: bool = True) -> Program:
    """The optimizer, and then what the program does to the parameters."""

    def init(params: Any) -> Any:
        params = put_back(params) if at_init else params
        return params, optimizer.init(params)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(grads, state, params)
        return put_back(optax.apply_updates(params, updates)), state

    return Program(init, step)


def by_rules(
    optimizer: Any, rules: Any, layout: Any = None, at_init: bool = True, chained: bool = False
) -> Program:
    """The optimizer with our rules, which are in it already if it is `chained`."""
    tx = optimizer if chained else optax.chain(optimizer, oc.project(rules, layout=layout))

    def init(params: Any) -> Any:
        params = oc.constrain(params, rules, layout=layout) if at_init else params
        return params, tx.init(params)

    def step(carry: Any, grads: Any) -> Any:
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Program(init, step)


def with_target(program: Program, rate: float = 0.1) -> Program:
    """With a target network, which is the critic's at init, and follows it."""

    def init(params: Any) -> Any:
        carry = program.init(params)
        return carry, program.params(carry)["critic"]

    def step(carry: Any, grads: Any) -> Any:
        own = program.step(carry[0], grads)
        critic = program.params(own)["critic"]
        return own, optax.incremental_update(critic, carry[1], rate)

    return Program(init, step, lambda carry: {**program.params(carry[0]), "target": carry[1]})


# Ways to go through steps, from parameters and inputs to the parameters after steps.


def scan(program: Program, start: Any, inputs: Any) -> Any:
    def step(carry: Any, given: Any) -> Any:
        return program.step(carry, given), program.params(carry)

    carry, way = jax.lax.scan(step, program.init(start), inputs)
    return program.params(carry), way


def fori_loop(program: Program, start: Any, inputs: Any) -> Any:
    steps = len(jax.tree.leaves(inputs)[0])

    def step(i: jax.Array, carry: Any) -> Any:
        return program.step(carry, jax.tree.map(lambda x: x[i], inputs))

    return program.params(jax.lax.fori_loop(0, steps, step, program.init(start))), ()


def trained(client: Client, steps: int) -> tuple[Any, Any]:
    """What both programs come to, and the ways there, in one compiled program."""

    def both(loop: Callable[..., Any], *given: Any) -> Any:
        return loop(client.theirs, *given), loop(client.ours, *given)

    if client.loop == "fori_loop under vmap":
        seeds = [client.given(steps, seed) for seed in range(2)]
        given = jax.tree.map(lambda *own: np.stack(own), *seeds)
        return jax.jit(jax.vmap(lambda *given: both(fori_loop, *given)))(*given)
    if client.loop == "pmap":
        given = jax.tree.map(lambda x: x[None], client.given(steps))
        return jax.pmap(lambda *given: both(scan, *given))(*given)
    return jax.jit(lambda *given: both(scan, *given))(*client.given(steps))


# SimbaV2: kernels of hyper_dense on spheres, of actor and of two critics.


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, use_bias=False, name="hyper_dense")(x)
        return nn.relu(x * self.param("scaler", nn.initializers.ones, (8,)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Block(name="block")(x))


CRITICS = nn.vmap(
    Net, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
)


def simba_by_hand(params):
    def unit(path, w):
        names = [k.key for k in path]
        if names[-2:] != ["hyper_dense", "kernel"]:
            return w
        axis = 1 if "critic" in names else 0  # (2, in, out) by nn.vmap
        return w / jnp.maximum(jnp.linalg.norm(w, axis=axis, keepdims=True), 1e-8)

    return jax.tree_util.tree_map_with_path(unit, params)


def simba() -> Client:
    x = jnp.ones((1, 6))
    models = {"actor": Net(), "critic": CRITICS()}
    layouts = {f"{n}/{k}": v for n, m in models.items() for k, v in layout(m, x).items()}
    optimizer = optax.adam(optax.linear_schedule(1e-1, 1e-3, 100))
    rules = {"hyper_dense/kernel": oc.unit_norm("fan_in")}
    return Client(
        '{"hyper_dense/kernel": unit_norm("fan_in")}',
        simba_by_hand,
        {n: jax.eval_shape(m.init, jax.random.key(0), x)["params"] for n, m in models.items()},
        with_target(by_hand(optimizer, simba_by_hand)),
        with_target(by_rules(optimizer, rules, layouts)),
    )


# XQC: kernel and bias of a unit together on a sphere, of an actor that waits and of two critics.

XQC_NET = {
    "MLP_0": {"Dense_0": {"kernel": (5, 8), "bias": (8,)}},
    "predictor_0": {"kernel": (8, 3), "bias": (3,)},
}
DELAY = 3


def xqc_by_hand(params, last=True):
    def layer(path, own):
        if "MLP_0" in path and "Dense" in path:
            kernel, bias = own["kernel"], own["bias"]
            n = jnp.sqrt(jnp.sum(kernel**2, axis=-2) + bias**2)
            return {"kernel": kernel / n[..., None, :], "bias": bias / n}
        if "predictor" in path and last:
            kernel = own["kernel"]
            return {**own, "kernel": kernel / jnp.linalg.norm(kernel, axis=-2, keepdims=True)}
        return own

    def walk(path, tree):
        if "kernel" in tree:
            return layer(path, tree)
        return {name: walk(f"{path}/{name}", child) for name, child in tree.items()}

    return walk("", params)


def xqc_rules(in_layer: oc.Constraint) -> dict[Any, Any]:
    return {
        oc.joint("MLP_0/Dense_*/kernel", "MLP_0/Dense_*/bias"): in_layer,
        "predictor*/kernel": in_layer,
    }


def xqc() -> Client:
    critics = jax.tree.map(lambda s: (2, *s), XQC_NET, is_leaf=lambda x: type(x) is tuple)
    adam = optax.adamw(0.05, weight_decay=0.01)
    rules = {
        "actor": xqc_rules(oc.unit_norm()),
        "critic": xqc_rules(oc.stacked(oc.unit_norm())),
    }

    def optimizer(actor: Any, critic: Any) -> Any:
        waits = optax.conditionally_mask(actor, lambda step: jnp.asarray(step) % DELAY == 0)
        labels = {"actor": "actor", "critic": "critic"}
        return optax.partition({"actor": waits, "critic": critic}, labels)

    ours = [optax.chain(adam, oc.project({name: own})) for name, own in rules.items()]
    return Client(
        '{joint("MLP_0/Dense_*/kernel", "MLP_0/Dense_*/bias"): unit_norm(), '
        '"predictor*/kernel": unit_norm()}',
        xqc_by_hand,
        arrays(actor=XQC_NET, critic=critics),
        with_target(by_hand(optimizer(adam, adam), xqc_by_hand)),
        with_target(by_rules(optimizer(*ours), rules, chained=True)),
        loop="fori_loop under vmap",
    )


# nGPT in Equinox: what reads the residual stream by rows, what writes to it by columns.


class Scale(eqx.Module):
    weight: jax.Array


class Part(eqx.Module):
    """Attention or an MLP: what it reads with, what it writes with, and a scale."""

    qkv: eqx.nn.Linear
    proj: eqx.nn.Linear
    s_qk: Scale


class NGPT(eqx.Module):
    wte: eqx.nn.Embedding
    attn: list[Part]
    mlp: list[Part]

    def __init__(self, key: jax.Array, width: int = 8, layers: int = 1):
        keys = iter(jax.random.split(key, 1 + 4 * layers))

        def parts(hidden: int, ratio: int) -> list[Part]:
            def linear(*sizes: int) -> eqx.nn.Linear:
                return eqx.nn.Linear(*sizes, use_bias=False, key=next(keys))

            return [
                Part(linear(width, ratio * hidden), linear(hidden, width), Scale(jnp.ones(hidden)))
                for _ in range(layers)
            ]

        self.wte = eqx.nn.Embedding(11, width, key=next(keys))
        self.attn, self.mlp = parts(width, 3), parts(4 * width, 1)


def ngpt_by_hand(model):
    def reads(m):
        return [m.wte.weight, *(part.qkv.weight for part in [*m.attn, *m.mlp])]

    def writes(m):
        return [part.proj.weight for part in [*m.attn, *m.mlp]]

    def along(axis):
        return lambda w: w / jnp.linalg.norm(w, axis=axis, keepdims=True)

    model = eqx.tree_at(reads, model, replace_fn=along(1))
    return eqx.tree_at(writes, model, replace_fn=along(0))


def ngpt() -> Client:
    model = jax.eval_shape(NGPT, jax.random.key(0))
    optimizer = optax.adam(0.03)
    return Client(
        'ngpt_rules(model, writes=["proj/weight"])',
        ngpt_by_hand,
        model,
        by_hand(optimizer, ngpt_by_hand),
        by_rules(optimizer, recipes.ngpt_rules(model, ["proj/weight"])),
    )


# EDM2: weights (out, in, ...) with a root mean square of 1 for each output.


def edm2_by_hand(params, eps=1e-4):
    def scaled(w):
        if w.ndim < 2:
            return w
        axes = tuple(range(1, w.ndim))
        norm = jnp.sqrt(jnp.sum(w**2, axis=axes, keepdims=True))
        return w / (eps + norm / np.sqrt(w[0].size))

    return jax.tree.map(scaled, params)


def edm2(eps: float = 1e-4) -> Client:
    optimizer = optax.adam(0.01)
    return Client(
        '{"weight": fixed_rms(1.0, "fan_in")}',
        edm2_by_hand,
        arrays(conv={"weight": (6, 4, 3, 3)}, linear={"weight": (5, 6)}, emb={"gain": (6,)}),
        by_hand(optimizer, lambda params: edm2_by_hand(params, eps)),
        by_rules(optimizer, {"weight": oc.fixed_rms(1.0, "fan_in")}),
        loop="pmap",
        # Its weights are smaller by eps, and its steps larger by that.
        tolerance=5 * eps or None,
    )


# AdamH and MuonH: steps as long as the weights, and norms that stay.


def adamh_by_hand(params, updates, learning_rate):
    def moved(p, u):
        axes = (-2, -1)  # of a stack, each matrix

        def norm(x):
            return jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=True))

        q = p - learning_rate * u * norm(p) / jnp.maximum(norm(u), 1e-10)
        return q * norm(p) / norm(q)

    return jax.tree.map(moved, params, updates)


def adamh() -> Client:
    b1, b2, eps, rate = 0.9, 0.95, 1e-8, 0.05

    def init(params: Any) -> Any:
        zeros = optax.tree.zeros_like(params)
        return params, zeros, zeros, 0

    def step(carry: Any, grads: Any) -> Any:
        params, m, v, t = carry
        t = t + 1
        m = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, m, grads)
        v = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, v, grads)
        u = jax.tree.map(lambda m, v: m / (1 - b1**t) / (jnp.sqrt(v / (1 - b2**t)) + eps), m, v)
        return adamh_by_hand(params, u, rate), m, v, t

    tx = recipes.hyperball(optax.adam(1.0, b1, b2, eps), rate, axis=(-2, -1))
    return Client(
        "hyperball(adam(1.0), learning_rate, axis=(-2, -1))",
        adamh_by_hand,
        arrays(kernel=(12, 8), layers=(3, 8, 8)),
        Program(init, step),
        by_rules(tx, {}, at_init=False, chained=True),
    )


def newton_schulz(m):
    wide = m.T if m.shape[0] > m.shape[1] else m
    x = wide / (jnp.linalg.norm(wide) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def muonh() -> Client:
    beta, rate = 0.95, 0.05

    def init(params: Any) -> Any:
        return params, optax.tree.zeros_like(params)

    def step(carry: Any, grads: Any) -> Any:
        params, m = carry
        m = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, m, grads)
        return adamh_by_hand(params, jax.tree.map(newton_schulz, m), rate), m

    tx = recipes.hyperball(optax.contrib.muon(1.0, beta=beta, nesterov=False), rate)
    return Client(
        "hyperball(muon(1.0), learning_rate)",
        adamh_by_hand,
        arrays(tall={"kernel": (12, 8)}, square={"kernel": (8, 8)}),
        Program(init, step),
        by_rules(tx, {}, at_init=False, chained=True),
    )


# MuonSphere: the largest singular value is c sqrt(out / in).


def muon_sphere_by_hand(params, c=2.0):
    def scaled(w):
        fan_in, fan_out = w.shape
        # What their power iteration comes to.
        sigma = jnp.linalg.svd(w, compute_uv=False)[0]
        return w * (c * np.sqrt(fan_out / fan_in) / sigma)

    return jax.tree.map(scaled, params)


def muon_sphere() -> Client:
    optimizer = optax.contrib.muon(0.02)
    rules = {"kernel": oc.fixed_spectral_norm("2 * sqrt(fan_out / fan_in)")}
    return Client(
        '{"kernel": fixed_spectral_norm("2 * sqrt(fan_out / fan_in)")}',
        muon_sphere_by_hand,
        arrays(up={"kernel": (16, 24)}),
        by_hand(optimizer, muon_sphere_by_hand),
        by_rules(optimizer, rules),
        # Of matrices with sides above 12 the set estimates the norm, usually to 0.01%.
        tolerance=1e-3,
    )


# QK-clip in multi-head latent attention.

NOPE, ROPE, HEADS, THRESHOLD = 3, 2, 4, 100.0


def qk_clip_by_hand(params, logits):
    new = dict(params)
    for name, layer in params.items():
        if name not in logits:
            continue
        attention = layer["self_attention"]
        own = logits[name]["self_attention"]["max_logits"]
        largest = jnp.max(own, axis=tuple(range(own.ndim - 1)))
        gamma = jnp.minimum(1.0, THRESHOLD / (largest + 1e-6))[:, None]
        q, kv = attention["wq_b"]["kernel"], attention["wkv_b"]["kernel"]
        q = jnp.concatenate([q[..., :NOPE] * jnp.sqrt(gamma), q[..., NOPE:] * gamma], axis=-1)
        kv = jnp.concatenate([kv[..., :NOPE] * jnp.sqrt(gamma), kv[..., NOPE:]], axis=-1)
        clipped = {"wq_b": {"kernel": q}, "wkv_b": {"kernel": kv}}
        new[name] = {**layer, "self_attention": {**attention, **clipped}}
    return new


def qk_rules() -> dict[str, oc.Constraint]:
    return recipes.qk_clip(THRESHOLD, query="wq_b/kernel", key="wkv_b/kernel", nope=NOPE)


def qk_clip() -> Client:
    layer = {
        "self_attention": {
            "wq_b": {"kernel": (6, HEADS, NOPE + ROPE)},
            "wkv_b": {"kernel": (6, HEADS, NOPE + 4)},
        }
    }
    optimizer = optax.adamw(0.03)
    tx = optax.chain(optimizer, oc.project({"dense/**": None, **qk_rules()}))

    def inputs(grads: Any, rng: np.random.Generator) -> Any:
        steps = len(jax.tree.leaves(grads)[0])
        logits = THRESHOLD * np.exp(0.1 * rng.normal(size=(steps, 2, HEADS))).astype(np.float32)
        return grads, {"layer_0": {"self_attention": {"max_logits": logits}}}

    def theirs(carry: Any, given: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(given[0], state, params)
        return qk_clip_by_hand(optax.apply_updates(params, updates), given[1]), state

    def ours(carry: Any, given: Any) -> Any:
        params, state = carry
        largest = jax.tree.map(lambda own: own.max(axis=0), given[1])
        updates, state = tx.update(given[0], state, params, max_logits=largest)
        return optax.apply_updates(params, updates), state

    def program(tx: Any, step: Any) -> Program:
        return Program(lambda params: (params, tx.init(params)), step)

    return Client(
        'qk_clip(100.0, query="wq_b/kernel", key="wkv_b/kernel", nope=3)',
        qk_clip_by_hand,
        arrays(layer_0=layer, dense=layer),
        program(optimizer, theirs),
        program(tx, ours),
        inputs=inputs,
    )


# Modula and Lipschitz transformers: singular values and embeddings by their sizes.


def modula_by_hand(params):
    def dualized(path, w):
        if "embed" in str(path):
            return w / jnp.linalg.norm(w, axis=1, keepdims=True) * np.sqrt(w.shape[1])
        u, _, vt = jnp.linalg.svd(w, full_matrices=False)
        return u @ vt * np.sqrt(w.shape[0] / w.shape[1])  # (out, in)

    return jax.tree_util.tree_map_with_path(dualized, params)


def modula() -> Client:
    optimizer = optax.adam(0.02)
    rules = {
        "embed/weight": oc.fixed_rms(1.0, axis=1),
        "weight": oc.orthogonal("sqrt(fan_out / fan_in)"),
    }
    return Client(
        '{"embed/weight": fixed_rms(1.0, axis=1), "weight": orthogonal("sqrt(fan_out / fan_in)")}',
        modula_by_hand,
        arrays(embed={"weight": (11, 8)}, up={"weight": (12, 8)}),
        by_hand(optimizer, modula_by_hand),
        by_rules(optimizer, rules),
    )


def lipschitz_by_hand(params, cap=1.5):
    def capped(path, w):
        if "embed" in str(path):
            rms = jnp.sqrt(jnp.mean(w**2, axis=0))  # of each column
            return w / jnp.maximum(rms, 1.0)
        u, s, vt = jnp.linalg.svd(w, full_matrices=False)
        return (u * jnp.minimum(s, cap * np.sqrt(w.shape[0] / w.shape[1]))) @ vt

    return jax.tree_util.tree_map_with_path(capped, params)


def lipschitz() -> Client:
    optimizer = optax.adamw(0.05)
    rules = {
        # (width, vocabulary)
        "embed/table": oc.max_rms(1.0, axis=0),
        "weight": oc.max_spectral_norm("1.5 * sqrt(fan_out / fan_in)"),
    }
    return Client(
        '{"embed/table": max_rms(1.0, axis=0), '
        '"weight": max_spectral_norm("1.5 * sqrt(fan_out / fan_in)")}',
        lipschitz_by_hand,
        arrays(embed={"table": (8, 11)}, up={"weight": (12, 8)}),
        by_hand(optimizer, lipschitz_by_hand),
        by_rules(optimizer, rules),
    )


# OTT's neural dual: an input-convex potential by projection, its conjugate by a penalty.

ICNN = {
    "w_xs_0": {"kernel": (3, 6), "bias": (6,)},
    "w_zs_0": {"kernel": (6, 6)},
    "w_zs_1": {"kernel": (6, 1)},
}
ICNN_RULES = {"w_zs_*/kernel": oc.non_neg()}
BETA = 0.5


def ott_by_hand(f):
    return {
        name: {"kernel": jnp.maximum(layer["kernel"], 0)} if name.startswith("w_z") else layer
        for name, layer in f.items()
    }


def ott_penalty(g):
    kernels = [layer["kernel"] for name, layer in g.items() if name.startswith("w_z")]
    return BETA * sum(jnp.linalg.norm(jax.nn.relu(-kernel)) for kernel in kernels)


def our_penalty(g):
    return BETA * sum(oc.violations(g, ICNN_RULES).values())


def ott() -> Client:
    optimizer = optax.adam(0.05)

    def program(own: Program, penalty: Any) -> Program:
        plain = by_hand(optimizer, lambda params: params)

        def step(carry: Any, grads: Any) -> Any:
            f, g = carry
            pull = jax.grad(penalty)(plain.params(g))
            return own.step(f, grads["f"]), plain.step(g, optax.tree.add(grads["g"], pull))

        return Program(
            lambda params: (own.init(params["f"]), plain.init(params["g"])),
            step,
            lambda carry: {"f": carry[0][0], "g": carry[1][0]},
        )

    return Client(
        '{"w_zs_*/kernel": non_neg()}; violations(g, rules)',
        ott_by_hand,
        arrays(f=ICNN, g=ICNN),
        program(by_hand(optimizer, ott_by_hand, at_init=False), ott_penalty),
        program(by_rules(optimizer, ICNN_RULES, at_init=False), our_penalty),
    )


# MPO: log temperatures of at least -18, in an optimizer of their own.


def mpo_by_hand(dual):
    return jax.tree.map(lambda x: jnp.maximum(-18.0, x), dual)


def mpo() -> Client:
    optimizer = optax.adam(1e-2)
    return Client(
        "box(-18.0)",
        mpo_by_hand,
        arrays(log_temperature=(1,), log_alpha_mean=(4,), log_alpha_stddev=(4,)),
        by_hand(optimizer, mpo_by_hand),
        by_rules(optimizer, oc.box(-18.0)),
        start=lambda dual: jax.tree.map(lambda x: np.float32(-18.0 + 0.02 * x), dual),
    )


# Sparse autoencoders: rows of the decoder of norm 1, and updates along the sphere.


def sae_by_hand(params):
    rows = params["W_dec"]
    return {**params, "W_dec": rows / jnp.linalg.norm(rows, axis=1, keepdims=True)}


def sae() -> Client:
    adam = optax.adam(0.03)
    rules = {"W_dec": oc.unit_norm(axis=1)}

    def along(updates: Any, state: Any, params: Any) -> Any:
        updates, state = adam.update(updates, state)
        u, rows = updates["W_dec"], params["W_dec"]
        radial = jnp.sum(u * rows, axis=1, keepdims=True) * rows
        return {**updates, "W_dec": u - radial}, state

    theirs = optax.GradientTransformation(adam.init, along)
    return Client(
        'chain(adam, tangent(rules), project(rules)), {"W_dec": unit_norm(axis=1)}',
        sae_by_hand,
        arrays(W_enc=(6, 12), W_dec=(12, 6), b_enc=(12,)),
        by_hand(theirs, sae_by_hand),
        by_rules(optax.chain(adam, oc.tangent(rules)), rules),
    )


def sae_ball_by_hand(params):
    rows = params["W_dec"]
    norms = jnp.linalg.norm(rows, axis=1, keepdims=True)
    return {**params, "W_dec": jnp.where(norms > 1, rows / norms, rows)}


def sae_ball() -> Client:
    adam = optax.adam(0.03)
    return Client(
        '{"W_dec": max_norm(1.0, axis=1)}',
        sae_ball_by_hand,
        arrays(W_enc=(6, 12), W_dec=(12, 6), b_enc=(12,)),
        by_hand(adam, sae_ball_by_hand),
        by_rules(adam, {"W_dec": oc.max_norm(1.0, axis=1)}),
    )


# A recurrent network under Dale's law in Equinox, whose loop does not pass its parameters.

UNITS = 60
SIGNS = np.where(np.arange(UNITS) < 0.8 * UNITS, 1.0, -1.0)


class Recurrent(eqx.Module):
    cell: eqx.nn.Linear
    out: eqx.nn.Linear

    def __init__(self, key: jax.Array):
        keys = jax.random.split(key)
        self.cell = eqx.nn.Linear(UNITS, UNITS, key=keys[0])
        self.out = eqx.nn.Linear(UNITS, 2, key=keys[1])


def dale_by_hand(model):
    def law(w):
        w = jnp.where(SIGNS > 0, jnp.maximum(w, 0), jnp.minimum(w, 0))
        return w * (1 - jnp.eye(UNITS))

    return eqx.tree_at(lambda m: m.cell.weight, model, replace_fn=law)


def dale() -> Client:
    optimizer = optax.adam(0.02)
    rules = {"cell/weight": oc.compose(oc.sign(SIGNS), oc.zero_diagonal())}
    tx = optax.chain(optimizer, oc.project(rules, keep_params=True))

    def init(model: Any) -> Any:
        model = oc.constrain(model, rules)
        return model, tx.init(model)

    def step(carry: Any, grads: Any) -> Any:
        model, state = carry
        updates, state = tx.update(grads, state)
        return eqx.apply_updates(model, updates), state

    return Client(
        '{"cell/weight": compose(sign(signs), zero_diagonal())}, keep_params=True',
        dale_by_hand,
        jax.eval_shape(Recurrent, jax.random.key(0)),
        by_hand(optimizer, dale_by_hand),
        Program(init, step),
        grows=False,
    )


# Bounds that come as trees.


def bounds_by_hand(params, lower, upper):
    return jax.tree.map(jnp.clip, params, lower, upper)


def bounds() -> Client:
    optimizer = optax.adam(0.05)
    shapes = {"tau": (7,), "layer": {"gain": (3, 4), "offset": ()}}
    lower = {"tau": 0.1, "layer": {"gain": np.full((3, 4), -0.5, np.float32), "offset": -1.0}}
    upper = {"tau": 1.0, "layer": {"gain": np.full((3, 4), 0.25, np.float32), "offset": 1.0}}
    return Client(
        "rules_from_tree(jax.tree.map(box, lower, upper))",
        bounds_by_hand,
        arrays(**shapes),
        by_hand(optimizer, lambda params: bounds_by_hand(params, lower, upper)),
        by_rules(optimizer, oc.rules_from_tree(jax.tree.map(oc.box, lower, upper))),
    )


CLIENTS: dict[str, Callable[[], Client]] = {
    "SimbaV2": simba,
    "XQC": xqc,
    "nGPT": ngpt,
    "EDM2": edm2,
    "EDM2 without its eps": functools.partial(edm2, eps=0.0),
    "AdamH": adamh,
    "MuonH": muonh,
    "MuonSphere": muon_sphere,
    "QK-clip": qk_clip,
    "modula": modula,
    "Lipschitz transformer": lipschitz,
    "OTT neural dual": ott,
    "MPO": mpo,
    "sparse autoencoder": sae,
    "sparse autoencoder, at most 1": sae_ball,
    "Dale's law": dale,
    "bounds as trees": bounds,
}
