"""What a constraint adds to a step on an accelerator, read off the programs compiled for one.

XLA compiles for GPUs and TPUs that are not there. Adam steps on given gradients, float32, with
weights and moments donated, are compiled for an H100 and for a TPU v5e, on one device and on
eight; the table has the bytes that the kernels read and write, a parameter, temporary memory in
leaves, kernels and collectives. Adam moves 28 bytes at least: it reads four numbers and writes
three. A norm needs two passes: the first reads those, writes the moments and the candidate, and
sums; the second reads the candidate and writes the weights: 36. In a chain the update is a
difference, for which the second pass reads the old weights, too: 40. The kernel of `fused_adam`
takes one pass over rows: 28.

Each platform takes an environment of its own: with jax, optax and
`jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12 nvidia-cuda-runtime-cu12
nvidia-cuda-cupti-cu12 nvidia-nvjitlink-cu12` (the plugin in the version of jax) for GPUs, and with
`libtpu` for TPUs.

    python benchmarks/accelerators.py cuda|tpu [--quick] [--only TEXT] [--target FILE]
"""

import argparse
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from compiled import size_of

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 10 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84942979072
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""
"""What XLA asks of a GPU that it compiles for, as NVIDIA gives it."""

DEVICES = 8


class Program(NamedTuple):
    """What a compiled step does."""

    bytes: float
    """A parameter of one device."""
    leaves: float
    """Temporary memory."""
    kernels: int
    collectives: dict[str, int]


# The text of a program.

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier"}
_COLLECTIVES = {"all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"}


def instructions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, operation and operands of what the entry computation consists of."""
    entry = text[text.index("\nENTRY ") :]
    for line in entry[: entry.index("\n}")].splitlines():
        if found := _INSTRUCTION.match(line):
            yield found.groups()  # pyright: ignore[reportReturnType]


def traffic(text: str) -> tuple[int, int, dict[str, int]]:
    """Bytes that kernels read and write, their number, and collectives by kind."""
    total, kernels = 0, 0
    sizes: dict[str, int] = {}
    collectives: Counter[str] = Counter()
    for name, kind, operation, rest in instructions(text):
        sizes[name] = size_of(kind)
        collective = operation.removesuffix("-start")
        if collective in _COLLECTIVES:
            collectives[collective] += 1
        if operation in _FREE or operation.endswith("-done"):
            continue
        operands = re.split(r"\), |\)$", rest)[0]
        kernels += collective not in _COLLECTIVES
        total += sizes[name] + sum(sizes.get(x, 0) for x in re.findall(r"%([\w.-]+)", operands))
    return total, kernels, dict(collectives)


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps compiled for accelerators.")
    parser.add_argument("platform", choices=["cuda", "tpu"])
    parser.add_argument("--quick", action="store_true", help="one size, as a smoke test")
    parser.add_argument("--only", default="", help="what the names of variants have in them")
    parser.add_argument("--target", type=Path, help="the figures of another GPU, as a text proto")
    parser.add_argument("--text", type=Path, help="a folder to write the programs to")
    args = parser.parse_args()
    topology = devices_of(args.platform, args.target)
    # On a TPU small leaves stay on the chip, and bytes there would count, too.
    sizes = [(4, 4096), (2, 16384)] if args.platform == "cuda" else [(2, 16384)]
    if args.quick:
        sizes = sizes[:1]
    print(f"{'':44}{'bytes':>8}{'leaves':>8}{'kernels':>9}  collectives")
    for leaves, size in sizes:
        for sharding in ("one device", "columns split", "rows split"):
            print(f"{leaves} leaves of {size}x{size}, {sharding}", flush=True)
            for name, variant in variants().items():
                if args.only not in name:
                    continue
                start = time.perf_counter()
                text, one = compiled(topology, args.platform, leaves, size, sharding, variant)
                kinds = ", ".join(f"{n} {kind}" for kind, n in one.collectives.items())
                print(
                    f"  {name:42}{one.bytes:8.1f}{one.leaves:8.2f}{one.kernels:9}  {kinds}"
                    f"  ({time.perf_counter() - start:.1f} s)",
                    flush=True,
                )
                if args.text:
                    file = f"{args.platform} {leaves} {size} {sharding} {name}.txt"
                    (args.text / file.replace(" ", "_").replace(",", "")).write_text(text)


def devices_of(platform: str, target: Path | None) -> Any:
    """Eight devices that are not there."""
    if platform == "tpu":
        return tpu_devices(2, 4)
    os.environ.update(JAX_PLATFORMS="", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
    from jax.experimental.topologies import get_topology_desc

    return get_topology_desc(
        platform="cuda",
        topology_name="",
        topology=f"1x1x{DEVICES}",
        target_config=target.read_text() if target else H100,
    ).devices


class Variant(NamedTuple):
    """A way to take a step."""

    init: Callable[[Any], Any]
    step: Callable[[Any, Any, Any], Any]
    """From parameters, state and gradients to new parameters and state."""


def tpu_devices(rows: int, columns: int) -> Any:
    """The chips of a TPU v5e that is not there."""
    os.environ.update(
        JAX_PLATFORMS="cpu",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"v5litepod-{rows * columns}",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )
    from jax.experimental.topologies import get_topology_desc

    return get_topology_desc(platform="tpu", topology_name=f"v5e:{rows}x{columns}").devices


def variants() -> dict[str, Variant]:
    """The ways by name."""
    import jax
    import jax.numpy as jnp
    import optax

    import optax_constraints as oc
    from optax_constraints.recipes import fused_adam

    def by_hand(axis: int | None) -> Variant:
        def formula(w: jax.Array) -> jax.Array:
            norm = jnp.sqrt(jnp.sum(w * w, axis=axis, keepdims=True))
            return w * (jnp.clip(norm, 0, 2) / (1e-7 + norm))

        return stepping(adam, lambda params: jax.tree.map(formula, params))

    def stepping(tx: Any, after: Callable[[Any], Any] = lambda params: params) -> Variant:
        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return after(optax.apply_updates(params, updates)), state

        return Variant(tx.init, step)

    def chain(constraint: oc.Constraint) -> Variant:
        return stepping(optax.chain(adam, oc.project(constraint)))

    def after(constraint: oc.Constraint) -> Variant:
        return stepping(adam, lambda params: oc.constrain(params, constraint))

    adam = optax.adam(1e-3)
    found = {"none": stepping(adam)}
    found |= {"chain, non_neg": chain(oc.non_neg()), "constrain, box": after(oc.box(-1.0, 1.0))}
    for name, axis in {"columns": 0, "rows": 1, "whole tensor": None}.items():
        bound = oc.max_norm(2.0, axis=axis)
        found[f"by hand, {name}"] = by_hand(axis)
        found[f"constrain, max_norm, {name}"] = after(bound)
        found[f"chain, max_norm, {name}"] = chain(bound)
        found[f"fused_adam, max_norm, {name}"] = Variant(*fused_adam(1e-3, bound))
    found["constrain, fixed_norm, whole tensor"] = after(oc.fixed_norm(2.0))
    found["chain, fixed_norm, whole tensor"] = chain(oc.fixed_norm(2.0))
    return found


def compiled(
    devices: Any,
    platform: str,
    leaves: int,
    size: int,
    sharding: str,
    variant: Variant,
) -> tuple[str, Program]:
    """A step compiled for these devices: its text, and what it does."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(devices[: 1 if sharding == "one device" else DEVICES]), ("x",))
    split = {"one device": P(), "columns split": P(None, "x"), "rows split": P("x", None)}[sharding]

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        spec = split if x.shape == (size, size) else P()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    params = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * leaves
    args = jax.tree.map(placed, (params, jax.eval_shape(variant.init, params), params))
    step = jax.jit(variant.step, donate_argnums=(0, 1))
    program: Any = step.lower(*args).compile()
    text = program.as_text()
    total, kernels, collectives = traffic(text)
    if platform == "tpu":
        total = program.cost_analysis()["bytes accessed"]
    numbers = leaves * size * size // len(mesh.devices)
    temporary = program.memory_analysis().temp_size_in_bytes
    return text, Program(total / numbers, temporary * leaves / (4 * numbers), kernels, collectives)


if __name__ == "__main__":
    main()
