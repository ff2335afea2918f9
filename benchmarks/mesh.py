"""How the work of matrix sets is shared on a mesh of eight devices, from compiled programs.

For each set and each way in which sixteen matrices are sharded: how much of the work one device
has, beside an eighth of what one device alone would have; what moves between devices; and the
temporaries, in leaves. Once as the compiler shares the work by itself, and once with `mesh=`.
Nothing runs. Work is counted in products, and in decompositions of LAPACK by the cubes of their
sizes; the body of a loop counts once.

Usage:
    python benchmarks/mesh.py [--matrices 16] [--size 256]
"""

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from compiled import collectives, entries_of

import optax_constraints as oc

SETS = {
    "orthogonal": oc.orthogonal(),
    "max_spectral_norm": oc.max_spectral_norm(1.0),
    "nuclear_norm_ball": oc.nuclear_norm_ball(4.0),
    "low_rank": oc.low_rank(8),
    "positive_semidefinite": oc.positive_semidefinite(),
    "doubly_stochastic": oc.doubly_stochastic(),
}
PLACES = {"whole": P(), "rows": P("x", None), "columns": P(None, "x"), "both": P("x", "y")}


def work(compiled: Any) -> float:
    """Products, and decompositions by the cubes of their sizes."""
    program: str = compiled.as_text() or ""
    shapes = dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", program))
    total = 0.0
    for line in program.splitlines():
        if " dot(" in line:
            out, *_ = entries_of(line)
            left = re.search(r"dot\((?:\w+\[([\d,]*)\]\S* )?(%[\w.-]+)", line)
            axis = re.search(r"lhs_contracting_dims=\{(\d+)", line)
            if left and axis:
                sizes = (left[1] or shapes.get(left[2], "")).split(",")
                total += 2 * out * int(sizes[int(axis[1])])
        elif "lapack_" in line or 'custom_call_target="Cholesky"' in line:
            first = [int(n) for n in re.findall(r"\w\[([\d,]*)\]", line)[0].split(",") if n]
            total += math.prod(first[:-2]) * max(first[-2:]) ** 3
    return total


def main() -> None:
    """Prints a table of each set and sharding."""
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_platforms", "cpu")
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--matrices", type=int, default=16)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    shape = (given.size, given.size)
    like = jax.ShapeDtypeStruct(shape, np.float32)
    print("| set | sharded | mesh= | work, by 1/8 | collectives, entries | temporaries, leaves |")
    print("|---|---|---|---|---|---|")
    for name, constraint in SETS.items():
        alone = jax.jit(lambda w, c=constraint: oc.constrain(w, c)).lower(like).compile()
        part = work(alone) * given.matrices / 8
        for place, spec in PLACES.items():
            at = NamedSharding(mesh, spec)
            params = [jax.ShapeDtypeStruct(shape, np.float32, sharding=at)] * given.matrices
            for over in (None, mesh):

                def constrain(params: Any, over: Any = over, constraint: Any = constraint) -> Any:
                    return oc.constrain(params, constraint, mesh=over)

                program = jax.jit(constrain, out_shardings=at).lower(params).compile()
                moved: Any = Counter()
                for kind, result, _ in collectives(program.as_text() or ""):
                    moved[kind] += sum(entries_of(result))
                memory: Any = program.memory_analysis()
                leaves = memory.temp_size_in_bytes / 4 / math.prod(shape)
                shown = ", ".join(f"{kind} {n:,}" for kind, n in sorted(moved.items()))
                print(
                    f"| {name} | {place} | {'yes' if over else 'no'} | {work(program) / part:.2f} "
                    f"| {shown or 'none'} | {leaves:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
