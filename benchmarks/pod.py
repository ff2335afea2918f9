"""What `project` moves between the 256 chips of a TPU v5e pod, beside the sum of the gradients.

A step of a language model of 1.3 billion parameters (24 layers, width 2048) is compiled for a pod
that is not there, as in `accelerators.py`, and in its environment for TPUs. Kernels are split over
both axes of a mesh of 16 by 16 chips; each row of chips has a gradient of its own, and their sum is
split like the kernels. Then come Adam and `project`. Collectives are counted with the bytes that
one chip sends, for rings: of an all-reduce of n bytes over k chips that is 2n (k - 1) / k, of
the others n (k - 1) / k, with n the larger of what comes in and goes out.

Usage:
    python benchmarks/pod.py [--layers 24] [--only TEXT]
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from accelerators import tpu_devices

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from compiled import collectives, size_of, uncommented

WIDTH, HIDDEN, VOCABULARY = 2048, 8192, 32768
KERNELS = {
    **dict.fromkeys(("query", "key", "value"), (WIDTH, WIDTH)),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}


def sent(program: str) -> dict[str, float]:
    """The bytes that a chip sends, by the kind of collective."""
    types = dict(re.findall(r"(%[\w.-]+) = (\([^=]*?\)|\S+) ", uncommented(program)))
    moved: Any = Counter()
    for kind, result, rest in collectives(program):
        operands = rest.split("), ", 1)[0]
        came = size_of(operands) or sum(
            size_of(types.get(n, "")) for n in re.findall("%[\\w.-]+", operands)
        )
        groups = re.search(r"replica_groups=(?:\{\{([\d,]+)|\[(\d+),(\d+)\])", rest)
        count = 2
        if groups:
            count = int(groups[3]) if groups[3] else len(groups[1].split(","))
        number = max(size_of(result), came) * (count - 1) / count
        moved[kind] += 2 * number if kind == "all-reduce" else number
    return moved


def _compiled(tx: Any, params: Any, grads: Any) -> Any:
    """A step compiled for parameters that are not there; the state is split like them."""
    import jax
    import jax.numpy as jnp
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    places = jax.tree.map(lambda p: p.sharding, params)
    everywhere = NamedSharding(jax.tree.leaves(places)[0].mesh, PartitionSpec())

    def step(params: Any, state: Any, grads: Any) -> Any:
        summed = jax.tree.map(lambda g: jnp.sum(g, axis=0), grads)
        grads = jax.tree.map(jax.lax.with_sharding_constraint, summed, places)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def placed(x: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state = jax.eval_shape(tx.init, params)
    state = optax.tree.map_params(
        tx, placed, state, places, transform_non_params=lambda x: placed(x, everywhere)
    )
    ends = jax.tree.map(lambda x: x.sharding, (params, state))
    program = jax.jit(step, donate_argnums=(0, 1), out_shardings=ends)
    return program.lower(params, state, grads).compile()


def main() -> None:
    """Prints what each of some steps moves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--only", default="", help="steps whose name has this text")
    given = parser.parse_args()
    devices = tpu_devices(16, 16)
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    import optax_constraints as oc

    mesh = Mesh(np.array(devices).reshape(16, 16), ("data", "model"))
    # What a layer writes to is split the other way round.
    places = {
        name: P("model", "data") if name in ("out", "down") else P("data", "model")
        for name in KERNELS
    }
    shapes: dict[str, Any] = {
        f"layer_{i}": {n: {"kernel": s} for n, s in KERNELS.items()} for i in range(given.layers)
    }
    shapes["embed"] = {"embedding": (VOCABULARY, WIDTH)}

    def place(path: Any, shape: tuple[int, ...]) -> P:
        return places.get(path[1].key, P("data", "model"))

    params = jax.tree_util.tree_map_with_path(
        lambda path, s: jax.ShapeDtypeStruct(
            s, jnp.float32, sharding=NamedSharding(mesh, place(path, s))
        ),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    grads = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(
            (16, *p.shape),
            jnp.float32,
            sharding=NamedSharding(
                mesh, P("data", *(None if a == "data" else a for a in p.sharding.spec))
            ),
        ),
        params,
    )
    alike = {f"{name}/kernel": oc.orthogonal() for name in ("query", "key", "value")}
    rules = {
        "none": {},
        "max_norm of all kernels": {"kernel": oc.max_norm(1.0, axis=0)},
        "orthogonal queries, keys and values": alike,
        "orthogonal attention, of which out is split otherwise": alike
        | {"out/kernel": oc.orthogonal()},
    }
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(params))
    print(f"{count / 1e9:.2f} billion parameters on 256 chips; megabytes that a chip sends")
    for name, own in rules.items():
        if given.only not in name:
            continue
        start = time.perf_counter()
        compiled = _compiled(
            optax.chain(optax.adam(1e-3), oc.project(own, mesh=mesh)), params, grads
        )
        text: str = compiled.as_text() or ""
        moved = sent(text)
        kinds = ", ".join(f"{kind} {n / 2**20:.2f}" for kind, n in sorted(moved.items()))
        memory: Any = compiled.memory_analysis()
        print(
            f"  {name}: {kinds}; temporaries {memory.temp_size_in_bytes / 2**20:.0f} MB "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
