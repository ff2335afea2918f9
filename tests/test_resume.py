"""Training that was stopped, saved with Orbax and continued in another process.

Run as a program, this file is that other process: it restores a checkpoint, takes the rest of
the steps and prints what it has, to the bit.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import optax_constraints as oc

# An odd number: with every=2, the saved weights are between two projections.
SAVED, STEPS = 7, 16

X = np.random.default_rng(0).normal(size=(16, 5)).astype(np.float32)
Y = np.random.default_rng(1).normal(size=(16, 2)).astype(np.float32)


def bound() -> optax.Schedule:
    """The bound of the kernels: it is still on its way when the checkpoint is made."""
    return optax.linear_schedule(1.0, 0.4, 12)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(8)(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def chain() -> optax.GradientTransformationExtraArgs:
    """Adam, a scheduled bound on every second step, and a set without memory."""
    return optax.chain(
        optax.adam(0.1),
        oc.project({"kernel": oc.max_norm(bound())}, every=2),
        oc.project({"bias": oc.non_neg()}),
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A training from its start: a tree that a checkpoint holds, and one step of it."""

    start: Any
    step: Callable[[Any], Any]
    params: Callable[[Any], Any]


def mean_square(prediction):
    return jnp.mean((prediction - Y) ** 2)


def by_hand(params, predict) -> Run:
    """Parameters and the state of the chain, in a dict."""
    tx = chain()

    def step(tree):
        gradient = jax.grad(lambda params: mean_square(predict(params)))(tree["params"])
        updates, state = tx.update(gradient, tree["state"], tree["params"])
        return {"params": optax.apply_updates(tree["params"], updates), "state": state}

    start = {"params": params, "state": tx.init(params)}
    return Run(start, step, lambda tree: tree["params"])


def linen() -> Run:
    model = LinenNet()
    params = model.init(jax.random.key(0), X)["params"]
    return by_hand(params, lambda params: model.apply({"params": params}, X))


def nnx_split() -> Run:
    graph, params = nnx.split(NNXNet(nnx.Rngs(0)), nnx.Param)
    return by_hand(params, lambda params: nnx.merge(graph, params)(X))


def linen_train_state() -> Run:
    """Flax' train state, which projects after it has applied the updates."""
    from optax_constraints.flax import linen as cl

    model = LinenNet()
    tx = optax.chain(optax.adam(0.1), oc.project({"bias": oc.non_neg()}, every=2))
    state = cl.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), X)["params"],
        tx=tx,
        rules={"kernel": oc.max_norm(bound())},
    )

    def step(state):
        return state.apply_gradients(
            grads=jax.grad(lambda params: mean_square(state.apply_fn({"params": params}, X)))(
                state.params
            )
        )

    return Run(state, step, lambda state: state.params)


def nnx_optimizer() -> Run:
    """The library's NNX optimizer, together with its model."""
    from optax_constraints.flax import nnx as cx

    model = NNXNet(nnx.Rngs(0))
    tx = optax.chain(optax.adam(0.1), oc.project({"bias": oc.non_neg()}, every=2))
    optimizer = cx.Optimizer(model, tx, wrt=nnx.Param, rules={"kernel": oc.max_norm(bound())})
    graph, start = nnx.split((model, optimizer))

    def step(tree):
        model, optimizer = nnx.merge(graph, tree)
        optimizer.update(model, nnx.grad(lambda model: mean_square(model(X)))(model))
        return nnx.state((model, optimizer))

    return Run(start, step, lambda tree: nnx.state(nnx.merge(graph, tree)[0], nnx.Param))


RUNS: dict[str, Callable[[], Run]] = {
    "linen": linen,
    "nnx split": nnx_split,
    "linen train state": linen_train_state,
    "nnx optimizer": nnx_optimizer,
}


def digests(tree: Any) -> dict[str, str]:
    """For each leaf its shape, its dtype and a hash of its bytes."""
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    described = {}
    for keys, leaf in found:
        w = np.asarray(leaf)
        digest = hashlib.sha256(w.tobytes()).hexdigest()
        described[jax.tree_util.keystr(keys)] = f"{w.shape} {w.dtype} {digest}"
    assert len(described) == len(found)
    return described


def take(run: Run, tree: Any, steps: int) -> Any:
    step = jax.jit(run.step)
    for _ in range(steps):
        tree = step(tree)
    return tree


def save(path: Path, tree: Any) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()


def restore(path: Path, like: Any) -> Any:
    """A tree from a checkpoint, of which only the structure is known."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, jax.eval_shape(lambda: like))


def resume(name: str, path: Path) -> dict[str, str]:
    """What there is at the end of a run that goes on from a checkpoint."""
    run = RUNS[name]()
    return digests(take(run, restore(path, run.start), STEPS - SAVED))


def norms_of(params: Any) -> np.ndarray:
    """The norms of all units of the kernels, in float64."""
    found = jax.tree_util.tree_flatten_with_path(params)[0]
    kernels = [np.asarray(w, np.float64) for keys, w in found if "kernel" in str(keys)]
    assert len(kernels) == 2
    return np.concatenate([np.linalg.norm(w, axis=0) for w in kernels])


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_that_never_stopped(name, tmp_path):
    run = RUNS[name]()
    saved = take(run, run.start, SAVED)
    save(tmp_path / "checkpoint", saved)
    through = take(run, saved, STEPS - SAVED)

    # The schedule, and every=2, make a difference to what comes after.
    limit = bound()(STEPS - 1)
    n = norms_of(run.params(through))
    assert np.all(n <= limit * (1 + 1e-6))
    assert np.mean(n > limit * (1 - 1e-5)) > 0.5
    assert np.max(norms_of(run.params(saved))) > 1.2 * limit

    result = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path / "checkpoint")],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == digests(through)


@pytest.mark.parametrize("lost", ["count", "adam"])
def test_without_the_saved_state_a_run_takes_another_course(lost):
    run = linen()
    saved = take(run, run.start, SAVED)
    adam, *projects = saved["state"]
    if lost == "count":
        state = (adam, *(oc.ProjectState(jnp.zeros_like(p.updates_seen)) for p in projects))
    else:
        state = (run.start["state"][0], *projects)
    wanted = digests(run.params(take(run, saved, STEPS - SAVED)))
    again = digests(run.params(take(run, {**saved, "state": state}, STEPS - SAVED)))
    assert again.keys() == wanted.keys()
    assert all(again[path] != wanted[path] for path in wanted if "kernel" in path)


if __name__ == "__main__":
    print(json.dumps(resume(sys.argv[1], Path(sys.argv[2]))))
