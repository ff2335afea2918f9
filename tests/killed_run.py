"""A training that is killed again and again, and the same one undisturbed.

Run as a program, this file imports everything once and forks a process for each attempt, so
that a restart costs a fraction of a second. It prints what it saw as JSON.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_constraints as oc

KEEP, EVERY = 3, 2
"""How many checkpoints there are at a time, and after how many steps each."""

MORE = 10
"""The steps that are left after the last kill."""


def rules() -> dict[str, oc.Constraint]:
    """Two that depend on the state: a norm relative to init, and a bound on its way down."""
    return {
        "first/kernel": oc.fixed_norm("0.5x init"),
        "recurrent/kernel": oc.max_spectral_norm(optax.linear_schedule(1.0, 0.2, 300)),
        "last/kernel": oc.unit_norm(),
        "bias": oc.non_neg(),
    }


def start() -> Any:
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=shape), "bias": np.zeros(shape[1])}
        for name, shape in {"first": (5, 8), "recurrent": (8, 8), "last": (8, 2)}.items()
    }
    params = jax.tree.map(jnp.float32, params)
    return {"params": params, "state": optimizer().init(params)}


def optimizer() -> optax.GradientTransformationExtraArgs:
    return optax.chain(optax.adam(0.05), oc.project(rules()))


@jax.jit
def step(tree: Any, number: jax.Array) -> Any:
    """One step on data that the number of the step determines."""
    key_x, key_y = jax.random.split(jax.random.key(number))
    x, y = jax.random.normal(key_x, (16, 5)), jax.random.normal(key_y, (16, 2))

    def loss(params):
        h = x
        for layer in (params["first"], params["recurrent"]):
            h = jnp.tanh(h @ layer["kernel"] + layer["bias"])
        return jnp.mean((h @ params["last"]["kernel"] + params["last"]["bias"] - y) ** 2)

    gradient = jax.grad(loss)(tree["params"])
    updates, state = optimizer().update(gradient, tree["state"], tree["params"])
    return {"params": optax.apply_updates(tree["params"], updates), "state": state}


def digest(tree: Any) -> str:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    texts = (f"{keys} {w.shape} {w.dtype} {np.asarray(w).tobytes().hex()}" for keys, w in found)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def train(directory: Path, until: int | None, say: Callable[..., None]) -> None:
    """Goes on from the latest checkpoint, to a step or until it is killed."""
    options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, save_interval_steps=EVERY)
    with ocp.CheckpointManager(directory, options=options) as manager:
        tree, done = start(), 0
        if (latest := manager.latest_step()) is not None:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
            tree = manager.restore(latest, args=ocp.args.StandardRestore(like))
            done = latest
        step(tree, done)  # Compiles, before anybody kills.
        say(training_from=done)
        while done != until:
            tree, done = step(tree, done), done + 1
            manager.save(done, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
    say(digest=digest(tree))


def undisturbed(until: int, say: Callable[..., None]) -> None:
    tree = start()
    for number in range(until):
        tree = step(tree, number)
    say(digest=digest(tree))


class Child:
    """A function in a process of its own, and what it says."""

    def __init__(self, function: Callable[..., None], *args: Any):
        read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(read)
            code = 1
            try:
                with os.fdopen(write, "w") as out:
                    function(*args, lambda **what: print(json.dumps(what), file=out, flush=True))
                code = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(code)
        os.close(write)
        self.out = os.fdopen(read)

    def hear(self) -> dict[str, Any]:
        line = self.out.readline()
        if not line:
            raise RuntimeError(f"The process ended: {self.end()}")
        return json.loads(line)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        if self.end() != -signal.SIGKILL:
            raise RuntimeError("The process ended before it was killed.")

    def end(self) -> int:
        self.out.close()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def checkpoints(directory: Path) -> tuple[list[int], list[str]]:
    """The steps of the committed ones, and the names of those that were on their way."""
    names = [path.name for path in directory.glob("*")]
    whole = sorted(int(name) for name in names if name.isdigit())
    return whole, [name for name in names if "tmp" in name]


def main(directory: Path, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    # Each process would compile the same programs.
    jax.config.update("jax_compilation_cache_dir", str(directory / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    directory = directory / "checkpoints"
    report = {"resumed": [], "latest": [0], "unfinished": []}
    for _ in range(kills):
        child = Child(train, directory, None)
        report["resumed"].append(child.hear()["training_from"])
        time.sleep(rng.uniform(0.05, 0.5))
        child.kill()
        whole, unfinished = checkpoints(directory)
        report["latest"].append(max(whole, default=0))
        report["unfinished"].append(len(unfinished))
    until = report["latest"][-1] + MORE
    last, never_stopped = Child(train, directory, until), Child(undisturbed, until)
    report["resumed"].append(last.hear()["training_from"])
    report |= {"steps": until, "killed": last.hear(), "undisturbed": never_stopped.hear()}
    report["exit codes"] = [last.end(), never_stopped.end()]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
