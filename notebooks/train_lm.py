"""A language model on one device or on many, trained under three regimes.

A byte-level transformer learns the sources and the documentation that come with Python. The
regimes differ in what holds the weights:

    adamw      nothing: AdamW with weight decay
    ngpt       every vector that meets the hidden state has norm 1, and so has the hidden state
               (I. Loshchilov et al., "nGPT", arXiv:2410.01131)
    hyperball  each matrix keeps the norm it has at init, and steps are relative to that norm:
               Muon or Adam inside of `projected`

The same program runs on one CPU, on simulated devices, and in several processes:

    python notebooks/train_lm.py --regime hyperball --steps 300
    python notebooks/train_lm.py --devices 8 --mesh 4x2
    python notebooks/train_lm.py --mesh 2x1 --coordinator HOST:PORT --processes 2 --process 0

Each process loads the same text and feeds its own devices. A run that was stopped goes on from
its last checkpoint when the same command is given again, and ends with the same bits.
"""

import argparse
import dataclasses
import functools
import json
import math
import sysconfig
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optax_constraints as oc

REGIMES = ("adamw", "ngpt", "hyperball")
VOCABULARY = 256

# Where the axes of each weight are split. Along `model` each device has some heads, hidden units
# and bytes of its own; along `data` it keeps only a part of what all of them need. What is not
# listed is small, and whole on each device. The layers are stacked along the first axis.
PLACES = {
    "embedding": P("model", "data"),  # (vocabulary, width)
    "qkv": P(None, "data", None, "model"),  # (layers, width, 3, heads, depth)
    "out": P(None, "model", None, "data"),  # (layers, heads, depth, width)
    "up": P(None, "data", "model"),  # (layers, width, hidden)
    "down": P(None, "model", "data"),  # (layers, hidden, width)
    "head": P("data", "model"),  # (width, vocabulary)
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """All that decides what comes out, but for the order of sums on another mesh."""

    regime: str = "hyperball"
    inner: str = "muon"
    learning_rate: float = 0.01
    seed: int = 0
    steps: int = 300
    batch: int = 32
    context: int = 256
    width: int = 384
    layers: int = 6
    heads: int = 6
    compute: str = "bfloat16"


def rms_norm(x):
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def rotate(x):
    """Rotary positions (arXiv:2104.09864) of (batch, time, heads, depth)."""
    time, depth = x.shape[1], x.shape[-1]
    angles = jnp.arange(time)[:, None] * 1e4 ** -jnp.linspace(0, 1, depth // 2, endpoint=False)
    cos, sin = (f(angles)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def normal(rngs, *shape, fan_in):
    return nnx.Param(jax.random.normal(rngs.params(), shape) / math.sqrt(fan_in))


class Block(nnx.Module):
    """Attention and a network of two layers, each followed by a step of the hidden state."""

    def __init__(self, s: Settings, rngs: nnx.Rngs):
        depth, hidden = s.width // s.heads, 4 * s.width
        self.qkv = normal(rngs, s.width, 3, s.heads, depth, fan_in=s.width)
        self.out = normal(rngs, s.heads, depth, s.width, fan_in=s.width)
        self.up = normal(rngs, s.width, hidden, fan_in=s.width)
        self.down = normal(rngs, hidden, s.width, fan_in=hidden)
        self.sharpness = nnx.Param(jnp.ones(s.heads))
        self.on_sphere = s.regime == "ngpt"
        size = 1 / s.layers if self.on_sphere else 1 / math.sqrt(2 * s.layers)
        self.sizes = nnx.Param(jnp.full((2, s.width), size, jnp.float32))

    def attend(self, x):
        q, k, v = jnp.einsum("btd,dchk->cbthk", x, self.qkv[...].astype(x.dtype))
        q, k = rotate(rms_norm(q)), rotate(rms_norm(k))
        q = q * self.sharpness[...][:, None].astype(x.dtype)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.einsum("bthk,hkd->btd", mixed, self.out[...].astype(x.dtype))

    def think(self, x):
        return jax.nn.gelu(x @ self.up[...].astype(x.dtype)) @ self.down[...].astype(x.dtype)

    def __call__(self, h):
        """The hidden state (batch, time, width) one layer further."""
        for f, size in zip((self.attend, self.think), self.sizes[...].astype(h.dtype), strict=True):
            if self.on_sphere:
                h = rms_norm(h + size * (rms_norm(f(h)) - h))
            else:
                h = h + size * f(rms_norm(h))
        return h


class LanguageModel(nnx.Module):
    """A transformer over bytes whose layers are stacked, and run by one compiled loop."""

    def __init__(self, s: Settings, mesh: Mesh, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=s.layers)
        @nnx.vmap(in_axes=0)
        def stack(rngs):
            return Block(s, rngs)

        self.embedding = normal(rngs, VOCABULARY, s.width, fan_in=s.width)
        self.layers = stack(rngs)
        self.head = normal(rngs, s.width, VOCABULARY, fan_in=s.width)
        self.gain = nnx.Param(jnp.ones(VOCABULARY))
        self.dtype = jnp.dtype(s.compute)
        self.rows = NamedSharding(mesh, P("data"))

    def __call__(self, tokens):
        """Logits (batch, time, vocabulary) for the byte that follows each of (batch, time)."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, h):
            return block(h)

        # As a product, an embedding that is split by bytes moves only hidden states.
        chosen = jax.nn.one_hot(tokens, VOCABULARY, dtype=self.dtype)
        h = rms_norm(chosen @ self.embedding[...].astype(self.dtype))
        h = through(self.layers, jax.lax.with_sharding_constraint(h, self.rows))
        logits = rms_norm(h) @ self.head[...].astype(self.dtype)
        return logits.astype(jnp.float32) * self.gain[...]


def rules_of(regime: str) -> dict[str, oc.Constraint]:
    """The sets in which the weights of a regime live."""
    if regime == "ngpt":  # a vector as wide as the hidden state for each byte, head or hidden unit
        from_hidden = {name: oc.unit_norm(axis=1) for name in ("qkv", "up")}
        to_hidden = {name: oc.unit_norm(axis=-1) for name in ("embedding", "out", "down")}
        return {**from_hidden, **to_hidden, "head": oc.unit_norm(axis=0)}
    if regime == "hyperball":
        matrix, layers = oc.fixed_norm("init"), oc.stacked(oc.fixed_norm("init"))
        # Each token by itself: the tangent of one norm for all of them gives tokens that a batch
        # lacks a tiny gradient, and Adam makes it as large as any.
        tokens = oc.fixed_norm("init", axis=-1)
        return {"embedding": tokens, "layers/[qoud]*": layers, "head": matrix}
    return {}


def name_of(keys) -> str:
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    return [name for name in names if isinstance(name, str) and name != "value"][-1]


def map_by_name(function, params):
    return jax.tree.map_with_path(lambda keys, w: function(name_of(keys), w), params)


def are_matrices(params):
    return map_by_name(lambda name, _: name in PLACES, params)


def relative_step() -> optax.GradientTransformation:
    """Scales the update of each matrix to the matrix' norm, each layer by itself."""

    def scaled(u, w):
        axes = tuple(range(int(w.ndim > 2), w.ndim))
        norm_w, norm_u = (jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (w, u))
        return u * norm_w / jnp.maximum(norm_u, 1e-10)

    return optax.masked(
        optax.stateless(lambda updates, params: jax.tree.map(scaled, updates, params)),
        are_matrices,
    )


def muon() -> optax.GradientTransformation:
    """Muon for the matrices of the layers, each layer and each of q, k, v by itself; else Adam."""
    dimensions = {"qkv": (1, (3, 4)), "out": ((1, 2), 3), "up": (1, 2), "down": (1, 2)}
    dimensions = {
        name: optax.contrib.MuonDimensionNumbers(*axes) for name, axes in dimensions.items()
    }
    return optax.contrib.muon(
        1.0,
        muon_weight_dimension_numbers=lambda params: map_by_name(
            lambda name, _: dimensions.get(name), params
        ),
        adam_b1=0.9,
    )


def optimizer(regime: str, inner: str, rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a regime. The rate may be traced: another one compiles nothing."""
    rules, clip = rules_of(regime), optax.clip_by_global_norm(1.0)
    adam = optax.chain(clip, optax.scale_by_adam(b2=0.95))
    if regime == "adamw":
        decay = optax.add_decayed_weights(0.1, mask=are_matrices)
        step = optax.chain(adam, decay, optax.scale_by_learning_rate(rate))
        return optax.chain(step, oc.project(rules, stats=True))
    if regime == "ngpt":
        step = optax.chain(adam, optax.scale_by_learning_rate(rate))
        return optax.chain(step, oc.project(rules, stats=True))
    inside = optax.chain(clip, muon()) if inner == "muon" else optax.chain(adam, optax.scale(-1.0))
    step = optax.chain(inside, relative_step(), optax.scale(rate))
    return oc.projected(step, rules, stats=True)


class Programs(NamedTuple):
    """The compiled parts of a training, and where their arrays are."""

    create: Any
    step: Any
    evaluate: Any
    outside: Any
    update: Any
    abstract: Any
    rules: dict[str, oc.Constraint]


@functools.cache
def programs(s: Settings, mesh: Mesh) -> Programs:
    """What is compiled for a regime, its sizes and a mesh; seed, rate and steps are arguments."""

    def build(seed):
        return LanguageModel(s, mesh, nnx.Rngs(jax.random.key(seed)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(0)))
    rules = rules_of(s.regime)
    no_rate = optimizer(s.regime, s.inner, 0.0)

    def create(seed):
        params = oc.constrain(nnx.state(build(seed)), rules)
        return {"params": params, "state": no_rate.init(params)}

    def loss_of(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def update(grads, state, params, rate):
        updates, state = optimizer(s.regime, s.inner, rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def step(now, tokens, rate):
        loss, grads = jax.value_and_grad(loss_of)(now["params"], tokens)
        params, state = update(grads, now["state"], now["params"], rate)
        seen = {"loss": loss, "gradient": optax.tree.norm(grads)}
        seen["stats"] = {k: v._asdict() for k, v in oc.stats(state).items()}
        return {"params": params, "state": state}, seen

    def outside(now):
        distances = oc.violations(now["params"], rules, state=now["state"])
        return jnp.stack([jnp.float32(0.0), *distances.values()]).max()

    def place(name, x):  # moments lie where their weights do: each is found by name and shape
        split = name in PLACES and x.shape == sizes[name]
        return NamedSharding(mesh, PLACES[name] if split else P())

    sizes = {name_of(keys): w.shape for keys, w in jax.tree.leaves_with_path(shapes)}
    abstract, whole = jax.eval_shape(create, 0), NamedSharding(mesh, P())
    now = map_by_name(place, abstract)
    return Programs(
        create=jax.jit(create, out_shardings=now),
        step=jax.jit(step, donate_argnums=0, out_shardings=(now, whole)),
        evaluate=jax.jit(loss_of, out_shardings=whole),
        outside=jax.jit(outside, out_shardings=whole),
        update=jax.jit(update, out_shardings=(now["params"], now["state"])),
        abstract=jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, now
        ),
        rules=rules,
    )


@functools.cache
def text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and one file in sixteen held out: what comes with this Python."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [*sorted(library.glob("[a-z]*.py")), library / "pydoc_data" / "topics.py"]
    parts: tuple[list[bytes], list[bytes]] = [], []
    for file in files:
        parts[zlib.crc32(file.name.encode()) % 16 == 0].append(file.read_bytes())
    train, held_out = (np.frombuffer(b"\n".join(part), np.uint8) for part in parts)
    return train, held_out


def rows(data: np.ndarray, starts: np.ndarray, s: Settings, mesh: Mesh) -> jax.Array:
    """Rows of a text, split along `data`. Each process gives its devices their part."""
    tokens = data[starts[:, None] + np.arange(s.context + 1)].astype(np.int32)
    place = NamedSharding(mesh, P("data"))
    return jax.make_array_from_callback(tokens.shape, place, lambda index: tokens[index])


def batch_of(step: int, s: Settings, mesh: Mesh) -> jax.Array:
    """What a step learns: its number and the seed decide, so that a resumed run sees the same."""
    starts = np.random.default_rng((s.seed, step)).integers(
        len(text()[0]) - s.context, size=s.batch
    )
    return rows(text()[0], starts, s, mesh)


def held_out_loss(params: Any, s: Settings, mesh: Mesh) -> float:
    """The loss on 8 batches that cover the held-out text evenly."""
    starts = np.linspace(0, len(text()[1]) - s.context - 1, 8 * s.batch).astype(int).reshape(8, -1)
    evaluate = programs_of(s, mesh).evaluate
    return float(np.mean([evaluate(params, rows(text()[1], own, s, mesh)) for own in starts]))


def rate_at(step: int, s: Settings) -> float:
    """Up in a tenth of the steps, then down to zero."""
    warmup = math.ceil(0.1 * s.steps)
    return s.learning_rate * min((step + 1) / warmup, (s.steps - step) / max(s.steps - warmup, 1))


class Log:
    """Numbers of a run, as JSON lines and for TensorBoard. One process writes."""

    def __init__(self, directory: Path, start: int, tensorboard: bool):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "log.jsonl"
        # What a stopped run wrote after its last checkpoint happens again.
        lines = path.read_text().splitlines() if start else []
        kept = [line + "\n" for line in lines if json.loads(line)["step"] <= start]
        path.write_text("".join(kept))
        self.file, self.writer = path.open("a", buffering=1), None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(directory), purge_step=start + 1)

    def __call__(self, step: int, record: dict[str, Any]):
        print(json.dumps({"step": step, **record}), file=self.file)
        if self.writer is not None:
            for keys, value in jax.tree.leaves_with_path(record):
                tag = jax.tree_util.keystr(keys, simple=True, separator="/")
                self.writer.add_scalar(tag, value, step)

    def close(self):
        self.file.close()
        if self.writer is not None:
            self.writer.close()


class Checkpoints:
    """The newest states of a run, each device's part written by its own process."""

    def __init__(self, directory: Path, s: Settings, every: int):
        import orbax.checkpoint as ocp

        self.args, told = ocp.args, directory / "settings.json"
        own = {**dataclasses.asdict(s), "text": zlib.crc32(text()[0])}
        theirs = json.loads(told.read_text()) if told.exists() else own
        if other := sorted(key for key in own if own[key] != theirs.get(key)):
            raise ValueError(
                f"{directory} holds a run with "
                + ", ".join(f"{key}={theirs.get(key)!r} (now {own[key]!r})" for key in other)
                + "; give the same settings to go on with it, or another --directory."
            )
        options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=every)
        self.manager = ocp.CheckpointManager((directory / "checkpoints").resolve(), options=options)
        if jax.process_index() == 0:
            told.write_text(json.dumps(own))

    def restore(self, abstract: Any) -> tuple[int, Any]:
        """The number of steps done and the state after them; 0 and None at the beginning."""
        latest = self.manager.latest_step()
        if latest is None:
            return 0, None
        return latest, self.manager.restore(latest, args=self.args.StandardRestore(abstract))

    def save(self, done: int, now: Any, last: bool):
        self.manager.save(done, args=self.args.StandardSave(now), force=last)

    def close(self):
        self.manager.close()


def programs_of(s: Settings, mesh: Mesh) -> Programs:
    return programs(dataclasses.replace(s, seed=0, learning_rate=0.0, steps=0), mesh)


class Result(NamedTuple):
    """What a training ends with."""

    loss: float
    """Mean of the last tenth of the training losses, in nats a byte."""
    held_out: float
    losses: dict[int, float]
    now: Any


def train(
    s: Settings,
    mesh: Mesh,
    directory: Path | None = None,
    *,
    log_every: int = 10,
    checkpoint_every: int = 100,
    tensorboard: bool = True,
    progress: bool = True,
) -> Result:
    """Trains, with checkpoints and a log if there is a directory for them."""
    program, first, checkpoints, log = programs_of(s, mesh), jax.process_index() == 0, None, None
    start, now = 0, None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        checkpoints = Checkpoints(directory, s, checkpoint_every)
        start, now = checkpoints.restore(program.abstract)
        log = Log(directory, start, tensorboard) if first else None
    now = program.create(s.seed) if now is None else now
    losses, before = {}, time.perf_counter()
    shown = {"desc": s.regime, "unit": "step", "disable": not (progress and first)}
    with tqdm(total=s.steps, initial=start, **shown) as bar:
        for done in range(start + 1, s.steps + 1):
            rate = rate_at(done - 1, s)
            now, seen = program.step(now, batch_of(done - 1, s, mesh), rate)
            if done % log_every == 0 or done == s.steps:
                outside = program.outside(now)  # by all processes: it sums over their devices
                seen = jax.tree.map(lambda x: x.item(), jax.device_get(seen))
                losses[done] = seen["loss"]
                seconds = (time.perf_counter() - before) / (done - start)
                if log is not None:
                    extra = {"rate": rate, "outside": outside.item(), "seconds": seconds}
                    log(done, seen | extra)
                bar.set_postfix(loss=f"{seen['loss']:.4f}", refresh=False)
            bar.update()
            if checkpoints is not None:
                checkpoints.save(done, now, last=done == s.steps)
    held_out = held_out_loss(now["params"], s, mesh)
    for opened in (checkpoints, log):
        if opened is not None:
            opened.close()
    tail = [loss for done, loss in losses.items() if done > 0.9 * s.steps]
    return Result(float(np.mean(tail)) if tail else math.nan, held_out, losses, now)


def mesh_of(shape: str, s: Settings) -> Mesh:
    """The mesh `data` x `model`, written as 4x2."""
    data, model = map(int, shape.split("x")) if shape else (jax.device_count(), 1)
    if data * model != jax.device_count():
        raise SystemExit(f"--mesh {data}x{model} does not use all of {jax.device_count()} devices.")
    for axis, parts, sizes in (
        ("data", data, {"batch": s.batch, "width": s.width}),
        ("model", model, {"heads": s.heads, "vocabulary": VOCABULARY}),
    ):
        for name, size in sizes.items():
            if size % parts:
                raise SystemExit(f"{name} {size} does not split into {parts} parts of {axis}.")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, model), ("data", "model"), axis_types=kinds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--inner", choices=("adam", "muon"), default="muon", help="of hyperball")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16")
    for field in dataclasses.fields(Settings):
        if isinstance(field.default, (int, float)):
            flag = f"--{field.name.replace('_', '-')}"
            parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument(
        "--mesh", help="data x model, such as 4x2; all devices along data if absent"
    )
    parser.add_argument("--devices", type=int, help="simulate so many devices on the CPU")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, or 'auto' on a cluster")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    parser.add_argument("--directory", type=Path, default=Path("lm"), help="for logs, checkpoints")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", options.devices)
    if options.coordinator == "auto":  # Slurm, Kubernetes and TPUs say the rest themselves
        jax.distributed.initialize()
    elif options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)

    names = [field.name for field in dataclasses.fields(Settings) if field.name != "regime"]
    given = {name: getattr(options, name) for name in names}
    lines, reports = [], []
    for regime in options.regime:
        s = Settings(regime=regime, **given)
        mesh = mesh_of(options.mesh, s)
        result = train(
            s,
            mesh,
            options.directory / regime,
            log_every=options.log_every,
            checkpoint_every=options.checkpoint_every,
            tensorboard=options.tensorboard,
        )
        lines.append(f"{regime:10} {result.loss:10.4f} {result.held_out:10.4f}")
        now, rules = result.now, programs_of(s, mesh).rules
        reports.append(f"{regime}:\n{oc.report(now['params'], rules, state=now['state'])}")
    if jax.process_index() == 0:
        size = sum(w.size for w in jax.tree.leaves(now["params"]))
        print(f"\n{size:,} parameters, {mesh.shape['data']}x{mesh.shape['model']} devices")
        print("\n".join(["regime       training   held out  (nats a byte)", *lines]))
        print("\n" + "\n\n".join(reports))


if __name__ == "__main__":
    main()
