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

A run that was stopped goes on from its last checkpoint when the same command is given again,
and ends with the same bits. `tensorboard --logdir lm` shows the losses and the constraints.
"""

import argparse
import dataclasses
import functools
import json
import math
import sysconfig
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import optax_constraints as oc

REGIMES = ("adamw", "ngpt", "hyperball")
VOCABULARY = 256

# Where the axes of each matrix are split. Along `model` each device has some heads, hidden units
# and bytes to itself; along `data` it keeps only a part of what all of them need, and gathers
# the rest for the layer at hand. What is not listed is small, and whole on each device.
PLACES = {
    "embedding": P("model", "data"),  # (vocabulary, width)
    "qkv": P(None, "data", None, "model"),  # (layers, width, 3, heads, depth)
    "out": P(None, "model", None, "data"),  # (layers, heads, depth, width)
    "up": P(None, "data", "model"),  # (layers, width, hidden)
    "down": P(None, "model", "data"),  # (layers, hidden, width)
    "head": P("data", "model"),  # (width, vocabulary)
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled: the regime and the sizes."""

    regime: str = "hyperball"
    inner: str = "muon"
    compute: str = "bfloat16"
    batch: int = 32
    context: int = 256
    width: int = 384
    layers: int = 6
    heads: int = 6


# The model. Weights are float32, and are cast where they are used.


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
    """Attention and two dense layers; after each the hidden state takes a step."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, heads, hidden = config.width, config.heads, 4 * config.width
        self.qkv = normal(rngs, width, 3, heads, width // heads, fan_in=width)
        self.out = normal(rngs, heads, width // heads, width, fan_in=width)
        self.up = normal(rngs, width, hidden, fan_in=width)
        self.down = normal(rngs, hidden, width, fan_in=hidden)
        self.sharpness = nnx.Param(jnp.ones(heads))
        self.on_sphere = config.regime == "ngpt"
        step = 1 / config.layers if self.on_sphere else 1 / math.sqrt(2 * config.layers)
        self.steps = nnx.Param(jnp.full((2, width), step, jnp.float32))

    def attention(self, x):
        q, k, v = jnp.einsum("btd,dchk->cbthk", x, self.qkv[...].astype(x.dtype))
        q, k = rotate(rms_norm(q)), rotate(rms_norm(k))
        q = q * self.sharpness[...][:, None].astype(x.dtype)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return jnp.einsum("bthk,hkd->btd", mixed, self.out[...].astype(x.dtype))

    def dense(self, x):
        return jax.nn.gelu(x @ self.up[...].astype(x.dtype)) @ self.down[...].astype(x.dtype)

    def __call__(self, h):
        """The hidden state (batch, time, width) one layer further."""
        attention, dense = self.steps[...].astype(h.dtype)
        for part, step in ((self.attention, attention), (self.dense, dense)):
            if self.on_sphere:
                h = rms_norm(h + step * (rms_norm(part(h)) - h))
            else:
                h = h + step * part(rms_norm(h))
        return h


class LanguageModel(nnx.Module):
    """A transformer over bytes. Its layers are stacked, and one compiled loop runs them."""

    def __init__(self, config: Config, mesh: Mesh, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=0)
        def stack(rngs):
            return Block(config, rngs)

        self.embedding = normal(rngs, VOCABULARY, config.width, fan_in=config.width)
        self.layers = stack(rngs)
        self.head = normal(rngs, config.width, VOCABULARY, fan_in=config.width)
        self.gain = nnx.Param(jnp.ones(VOCABULARY))
        self.dtype = jnp.dtype(config.compute)
        self.rows = NamedSharding(mesh, P("data"))

    def __call__(self, tokens):
        """Logits (batch, time, vocabulary) of the byte that follows each of (batch, time)."""

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(block, h):
            return block(h)

        # As a product, an embedding that is split by bytes moves only hidden states.
        chosen = jax.nn.one_hot(tokens, VOCABULARY, dtype=self.dtype)
        h = rms_norm(chosen @ self.embedding[...].astype(self.dtype))
        h = through(self.layers, jax.lax.with_sharding_constraint(h, self.rows))
        logits = rms_norm(h) @ self.head[...].astype(self.dtype)
        return logits.astype(jnp.float32) * self.gain[...]


# The regimes.


def rules_of(regime: str) -> dict[str, oc.Constraint]:
    """The sets in which the weights of a regime live."""
    if regime == "ngpt":  # vectors as wide as the hidden state
        from_hidden = dict.fromkeys(("qkv", "up"), oc.unit_norm(axis=1))
        to_hidden = dict.fromkeys(("embedding", "out", "down"), oc.unit_norm(axis=-1))
        return {**from_hidden, **to_hidden, "head": oc.unit_norm(axis=0)}
    if regime == "hyperball":
        # Tokens each by itself: the tangent of one norm for all of them would give those that a
        # batch lacks a tiny gradient, of which Adam makes a step as long as any.
        tokens, matrix = oc.fixed_norm("init", axis=-1), oc.fixed_norm("init")
        layers = dict.fromkeys(("qkv", "out", "up", "down"), oc.stacked(matrix))
        return {"embedding": tokens, **layers, "head": matrix}
    return {}


def map_by_name(function, params, *rest):
    """Calls a function with the name of each leaf and the leaf."""
    return jax.tree.map_with_path(lambda keys, *x: function(name_of(keys), *x), params, *rest)


def name_of(keys) -> str:
    names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
    return [name for name in names if isinstance(name, str) and name != "value"][-1]


def are_matrices(params):
    return map_by_name(lambda name, _: name in PLACES, params)


def relative_step() -> optax.GradientTransformation:
    """Gives the update of each matrix the norm of the matrix, layer by layer."""

    def scaled(u, w):
        axes = tuple(range(int(w.ndim > 2), w.ndim))
        of_u, of_w = (jnp.sqrt(jnp.sum(x**2, axes, keepdims=True)) for x in (u, w))
        return u * of_w / jnp.maximum(of_u, 1e-10)

    return optax.masked(optax.stateless(lambda u, w: jax.tree.map(scaled, u, w)), are_matrices)


def muon() -> optax.GradientTransformation:
    """Muon for the layers, each matrix of a stack by itself; Adam for the rest."""
    axes = {"qkv": (1, (3, 4)), "out": ((1, 2), 3), "up": (1, 2), "down": (1, 2)}
    numbers = {name: optax.contrib.MuonDimensionNumbers(*own) for name, own in axes.items()}
    matrices = functools.partial(map_by_name, lambda name, _: numbers.get(name))
    return optax.contrib.muon(1.0, muon_weight_dimension_numbers=matrices)


def optimizer(config: Config, rate: Any) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a regime. The rate may be traced, so that another one compiles nothing."""
    rules, clip = rules_of(config.regime), optax.clip_by_global_norm(1.0)
    adam = optax.chain(clip, optax.scale_by_adam(b2=0.95), optax.scale(-1.0))
    if config.regime == "hyperball":
        step = optax.chain(clip, muon()) if config.inner == "muon" else adam
        step = optax.chain(step, relative_step(), optax.scale(rate))
        return oc.projected(step, rules, stats=True)
    decay = 0.1 if config.regime == "adamw" else 0.0
    step = optax.chain(adam, optax.add_decayed_weights(-decay, are_matrices), optax.scale(rate))
    return optax.chain(step, oc.project(rules, stats=True))


# The training.


class Programs(NamedTuple):
    """What is compiled for a model on a mesh."""

    create: Any
    update: Any
    step: Any
    evaluate: Any
    abstract: Any
    """Shapes and places of the state of a training, into which a checkpoint is restored."""


@functools.cache
def programs(config: Config, mesh: Mesh) -> Programs:
    """Compiles nothing yet; seed and rate are arguments of what it returns."""
    rules = rules_of(config.regime)

    def build(seed):
        return LanguageModel(config, mesh, nnx.Rngs(jax.random.key(seed)))

    graph, shapes = nnx.split(nnx.eval_shape(lambda: build(0)))

    def create(seed):
        params = oc.constrain(nnx.state(build(seed)), rules)
        return {"params": params, "state": optimizer(config, 0.0).init(params)}

    def loss_of(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    def update(now, grads, rate):
        updates, state = optimizer(config, rate).update(grads, now["state"], now["params"])
        return {"params": optax.apply_updates(now["params"], updates), "state": state}

    def step(now, tokens, rate):
        loss, grads = jax.value_and_grad(loss_of)(now["params"], tokens)
        new = update(now, grads, rate)
        outside = oc.violations(new["params"], rules, state=new["state"]).values()
        binding = {path: leaf._asdict() for path, leaf in oc.stats(new["state"]).items()}
        numbers = {"loss": loss, "gradient": optax.tree.norm(grads), "stats": binding}
        return new, {**numbers, "outside": functools.reduce(jnp.maximum, outside, jnp.zeros(()))}

    def place(name, x):  # moments lie where their weights do, found by name and shape
        split = name in PLACES and x.shape == sizes[name]
        return NamedSharding(mesh, PLACES[name] if split else P())

    sizes = {name_of(keys): w.shape for keys, w in jax.tree.leaves_with_path(shapes)}
    abstract, whole = jax.eval_shape(create, 0), NamedSharding(mesh, P())
    places = map_by_name(place, abstract)
    return Programs(
        create=jax.jit(create, out_shardings=places),
        update=jax.jit(update, out_shardings=places),
        step=jax.jit(step, donate_argnums=0, out_shardings=(places, whole)),
        evaluate=jax.jit(loss_of, out_shardings=whole),
        abstract=jax.tree.map(
            lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), abstract, places
        ),
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


def rows(data: np.ndarray, starts: np.ndarray, config: Config, mesh: Mesh) -> jax.Array:
    """Rows of a text, split along `data`. Each process feeds its own devices."""
    tokens = data[starts[:, None] + np.arange(config.context + 1)].astype(np.int32)
    place = NamedSharding(mesh, P("data"))
    return jax.make_array_from_callback(tokens.shape, place, lambda index: tokens[index])


class Log:
    """Numbers of a run, as JSON lines and for TensorBoard."""

    def __init__(self, directory: Path, start: int, tensorboard: bool):
        path = directory / "log.jsonl"
        # What a stopped run wrote after its last checkpoint happens again.
        lines = path.read_text().splitlines(keepends=True) if start else []
        path.write_text("".join(line for line in lines if json.loads(line)["step"] <= start))
        self.file, self.writer = path.open("a", buffering=1), None
        if tensorboard:
            from tensorboardX import SummaryWriter

            name = f".from{start}"
            self.writer = SummaryWriter(str(directory), purge_step=start + 1, filename_suffix=name)

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


def checkpoints_of(directory: Path, settings: dict[str, Any], every: int) -> Any:
    """The newest states of a run. Each process writes what its devices hold."""
    known = directory / "settings.json"
    if known.exists() and (theirs := json.loads(known.read_text())) != settings:
        raise SystemExit(
            f"{directory} holds a run with {theirs}, not {settings}: give the same settings to go "
            "on with it, or another --directory."
        )
    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=every)
    manager = ocp.CheckpointManager((directory / "checkpoints").resolve(), options=options)
    if jax.process_index() == 0:
        known.write_text(json.dumps(settings))
    return manager


class Result(NamedTuple):
    """What a training ends with; losses are nats a byte."""

    losses: dict[int, float]
    """By step, of the batches that were logged."""
    held_out: float
    now: Any


def train(
    config: Config,
    mesh: Mesh,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    directory: Path | None = None,
    log_every: int = 10,
    checkpoint_every: int = 100,
    tensorboard: bool = True,
    progress: bool = True,
) -> Result:
    """Trains a model; with a directory, goes on from the last checkpoint there, and logs."""
    program, data, first = programs(config, mesh), text(), jax.process_index() == 0
    start, now, checkpoints, log = 0, None, None, None
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        run = {"steps": steps, "learning_rate": learning_rate, "seed": seed}
        settings = {**dataclasses.asdict(config), **run, "text": zlib.crc32(data[0].tobytes())}
        checkpoints = checkpoints_of(directory, settings, checkpoint_every)
        if latest := checkpoints.latest_step():
            start, like = latest, ocp.args.StandardRestore(program.abstract)
            now = checkpoints.restore(start, args=like)
        log = Log(directory, start, tensorboard) if first else None
    now = program.create(seed) if now is None else now

    losses, warmup = {}, math.ceil(0.1 * steps)
    shown = {"desc": config.regime, "unit": "step", "disable": not (progress and first)}
    with tqdm(total=steps, initial=start, **shown) as bar:
        for done in range(start + 1, steps + 1):
            # The number of a step decides its batch and its rate, also in a run that goes on.
            at = np.random.default_rng((seed, done)).integers(
                len(data[0]) - config.context, size=config.batch
            )
            rate = learning_rate * min(done / warmup, (steps + 1 - done) / (steps + 1 - warmup))
            now, numbers = program.step(now, rows(data[0], at, config, mesh), rate)
            if done % log_every == 0 or done == steps:
                numbers = jax.tree.map(lambda x: x.item(), jax.device_get(numbers))
                losses[done] = numbers["loss"]
                bar.set_postfix(loss=f"{numbers['loss']:.4f}", refresh=False)
                if log is not None:
                    log(done, {**numbers, "rate": rate})
            bar.update()
            if checkpoints is not None:
                checkpoints.save(done, args=ocp.args.StandardSave(now), force=done == steps)
    last = len(data[1]) - config.context - 1
    at = np.linspace(0, last, 8 * config.batch).astype(int).reshape(8, -1)
    held_out = [program.evaluate(now["params"], rows(data[1], own, config, mesh)) for own in at]
    for opened in (checkpoints, log):
        if opened is not None:
            opened.close()
    return Result(losses, float(np.mean(held_out)), now)


def mesh_of(shape: str | None, config: Config) -> Mesh:
    """The mesh `data` x `model`, written as 4x2."""
    data, model = map(int, shape.split("x")) if shape else (jax.device_count(), 1)
    if data * model != jax.device_count():
        raise SystemExit(f"--mesh {data}x{model} is not all of the {jax.device_count()} devices.")
    splits = {"batch": data, "width": data, "heads": model}
    for name, parts in splits.items():
        if (size := getattr(config, name)) % parts:
            raise SystemExit(f"--mesh {data}x{model} cannot split --{name} {size} by {parts}.")
    kinds = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((data, model), ("data", "model"), axis_types=kinds)


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--regime", nargs="+", choices=REGIMES, default=REGIMES)
    parser.add_argument("--inner", choices=("adam", "muon"), default="muon", help="of hyperball")
    parser.add_argument("--compute", choices=("bfloat16", "float32"), default="bfloat16")
    sizes = ("batch", "context", "width", "layers", "heads")
    for name in sizes:
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mesh", help="data x model, such as 4x2; all along data if left out")
    parser.add_argument("--devices", type=int, help="simulate so many devices on the CPU")
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, or auto on a cluster")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    parser.add_argument("--directory", type=Path, default=Path("lm"), help="of logs, checkpoints")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    if args.coordinator == "auto":  # Slurm, Kubernetes and TPUs say the rest themselves
        jax.distributed.initialize()
    elif args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)

    numbers = ("steps", "learning_rate", "seed", "log_every", "checkpoint_every", "tensorboard")
    lines, reports = ["regime     last batches   held out   (nats a byte)"], []
    for regime in args.regime:
        names = ("inner", "compute", *sizes)
        config = Config(regime, **{name: getattr(args, name) for name in names})
        given = {name: getattr(args, name) for name in numbers}
        mesh, directory = mesh_of(args.mesh, config), args.directory / regime
        losses, held_out, now = train(config, mesh, directory=directory, **given)
        last = np.mean(list(losses.values())[-3:]) if losses else math.nan
        lines.append(f"{regime:10} {last:12.4f} {held_out:10.4f}")
        report = oc.report(now["params"], rules_of(regime), state=now["state"])
        reports.append(f"{regime}:\n{report}")
    if jax.process_index() == 0:
        print("\n".join(lines), *reports, sep="\n\n")


if __name__ == "__main__":
    main()
