"""Breaks the core in many small ways, and counts how many of them the tests notice.

Each mutant changes one place of one module: a comparison, an operator, a number, a condition, a
default, a returned value. It is imported in place of the module, in a process of its own, and the
tests of that module run until one fails. A mutant that no test notices survives. Texts of errors
and docstrings are left alone.

    python benchmarks/mutants.py [--sample N] [--seed S] [MODULE ...]
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

# Imported once, before any process is made of this one. None of them starts a device.
import equinox
import flax.linen
import flax.nnx
import haiku
import jax
import optax
import pytest

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 240  # seconds; a mutant that does not end is noticed, too
NORMS = "(Norm or RMS) and not Soft and not Part and not Compose and not Intersection"
ELEMENTWISE = "NonNeg or Box or Mask or ZeroDiagonal or Grid"
NORM_TESTS = [
    "test_memory.py",
    "test_project.py",
    f"test_numerics.py -k {NORMS} or test_the or turns or rate_goes",
    "test_report.py",
    "test_tangent.py -k Norm or every_kind",
    "test_configs.py -k equal or identity",
    "test_keras_parity.py -k defaults",
]
TESTS = {
    "_axes": ["test_axes.py", "test_layout.py", "test_first_steps.py -k axis or warn"],
    "_expressions": ["test_numbers.py"],
    "_args": ["test_args.py -k not shard"],
    "_numbers": [
        "test_numbers.py",
        "test_args.py -k not shard",
        "test_project.py -k checked or schedule",
        "test_order.py -k number",
        "test_configs.py -k refused or values",
    ],
    "_patterns": [
        "test_rules.py",
        "test_groups.py -k not mesh and not temporaries",
        "test_first_steps.py -k rule or pattern or leads",
        "test_configs.py -k rules or pattern",
    ],
    "_groups": ["test_groups.py -k not mesh", "test_cones.py -k groups or joint"],
    "_trees": ["test_trees.py", "test_rules.py", "test_first_steps.py", "test_memory.py"],
    "_walk": [
        "test_project.py",
        "test_memory.py",
        "test_groups.py -k not mesh and not temporaries",
        "test_args.py -k not shard",
        "test_trees.py",
    ],
    "_rules": [
        "test_rules.py",
        "test_trees.py",
        "test_groups.py -k not mesh and not temporaries",
        "test_report.py",
        "test_layout.py",
        "test_first_steps.py",
    ],
    "_project": [
        "test_project.py",
        "test_stats.py -k train or optimizer",
        "test_memory.py",
        "test_rules.py -k verb or masked",
        "test_feasible.py -k not promise",
        "test_args.py -k not shard",
        "test_wrappers.py",
    ],
    "_constrain": [
        "test_memory.py",
        "test_rules.py -k verb or masked",
        "test_first_steps.py",
        "test_feasible.py -k not promise",
        "test_args.py -k not shard",
        "test_stats.py -k train or optimizer",
        "test_straight_through.py",
    ],
    "_tangent": [
        "test_tangent.py",
        "test_cones.py -k schedule or downhill or relative or refused",
        "test_args.py -k tangent",
        "test_groups.py -k tangent",
    ],
    "_projected": ["test_projected.py"],
    "_moments": ["test_projected.py"],
    "_unit_adam": ["test_unit_adam.py"],
    "_numerics": [f"test_numerics.py -k {NORMS} or test_norm"],
    "sets._norms": NORM_TESTS,
    "sets.norm": NORM_TESTS,
    "sets.pattern": ["test_pattern.py", "test_elementwise.py", "test_tangent.py -k Mask or Zero"],
    "sets.around": ["test_around.py", "test_cones.py -k around"],
    "sets.elementwise": [
        "test_elementwise.py",
        f"test_numerics.py -k {ELEMENTWISE}",
        "test_tangent.py -k Mask or Zero or every_kind",
        "test_configs.py -k equal or identity",
        "test_report.py",
    ],
}
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Mod: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}


class Change(ast.NodeTransformer):
    """Counts the places that can be changed, and changes one of them."""

    def __init__(self, index: int = -1):
        """Takes the number of the place; -1 for none."""
        self.index, self.count, self.what = index, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        """Changes what is inside first; leaves texts of errors and annotations alone."""
        if isinstance(node, ast.Raise | ast.JoinedStr | ast.arg):
            return node
        if isinstance(node, ast.AnnAssign):
            node.value = node.value and self.visit(node.value)  # pyright: ignore
            return node
        returns, node_ = getattr(node, "returns", None), node
        if returns is not None:
            node.returns = None  # pyright: ignore[reportAttributeAccessIssue]
        node = self.generic_visit(node)
        if returns is not None:
            node_.returns = returns  # pyright: ignore[reportAttributeAccessIssue]
        changed = self.changed(copy.copy(node))
        if changed is None:
            return node
        self.count += 1
        if self.count - 1 != self.index:
            return node
        ast.fix_missing_locations(ast.copy_location(changed, node))
        texts = (ast.unparse(tree).splitlines()[0] for tree in (node, changed))
        self.what = f"{getattr(node, 'lineno', 0)}: {' -> '.join(texts)}"
        return changed

    @staticmethod
    def changed(node: ast.AST) -> ast.AST | None:
        """Another node in its place, or None if there is no change for it."""
        match node:
            case ast.Compare() if type(node.ops[0]) in COMPARISONS:
                node.ops = [COMPARISONS[type(node.ops[0])](), *node.ops[1:]]
            case ast.BinOp() if type(node.op) in OPERATORS:
                node.op = OPERATORS[type(node.op)]()
            case ast.BoolOp():
                node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
            case ast.UnaryOp():
                return node.operand
            case ast.If() | ast.IfExp() | ast.While():
                node.test = ast.UnaryOp(ast.Not(), node.test)
            case ast.Constant(value=bool(value)):
                node.value = not value
            case ast.Constant(value=int(value) | float(value)):
                node.value = value + 1
            case ast.Return() if not isinstance(node.value, ast.Constant | None):
                node.value = ast.Constant(None)
            case _:
                return None
        return node


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from another source."""

    def __init__(self, name: str, source: str):
        """Takes the name of the module and what to import."""
        self.name, self.source = name, source

    def find_spec(self, fullname, path, target=None):
        """Finds this one module."""
        del path, target
        if fullname == self.name:
            return importlib.util.spec_from_loader(fullname, self)
        return None

    def exec_module(self, module):
        """Runs the other source."""
        exec(compile(self.source, f"<mutant of {self.name}>", "exec"), module.__dict__)


def survives(module: str, source: str) -> bool:
    """Whether all tests of a module pass on another source."""
    child = os.fork()
    if child == 0:
        os.setsid()
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.meta_path.insert(0, Finder(f"optax_constraints.{module}", source))
        os.chdir(ROOT)
        options = ["-x", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist"]
        failed = 0
        for tests in TESTS[module]:
            file, _, only = tests.partition(" -k ")
            failed = failed or pytest.main([*options, f"tests/{file}", "-k", only])
        os._exit(1 if failed else 0)
    end = time.time() + TIME_LIMIT
    while time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    # A mutant compiles only what it changes.
    cache = tempfile.TemporaryDirectory()
    jax.config.update("jax_compilation_cache_dir", cache.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    parser = argparse.ArgumentParser(description="How many small breaks the tests notice.")
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="MODULE")
    parser.add_argument("--sample", type=int, help="so many mutants a module; all by default")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    total = killed = 0
    for module in options.modules:
        path = ROOT / "optax_constraints" / (module.replace(".", "/") + ".py")
        tree = ast.parse(path.read_text())
        if not survives(module, ast.unparse(tree)):
            raise SystemExit(f"The tests of {module} fail as it stands.")
        places = Change()
        places.visit(copy.deepcopy(tree))
        chosen = list(range(places.count))
        random.Random(options.seed).shuffle(chosen)
        chosen = sorted(chosen[: options.sample])
        found = 0
        for index in chosen:
            change = Change(index)
            mutant = ast.unparse(change.visit(copy.deepcopy(tree)))
            if survives(module, mutant):
                print(f"survived: {module}:{change.what}", flush=True)
            else:
                found += 1
        print(
            f"{module}: {found} of {len(chosen)} noticed, of {places.count} that there are",
            flush=True,
        )
        total, killed = total + len(chosen), killed + found
    print(f"{killed} of {total} noticed: {100 * killed / max(total, 1):.1f}%")


if __name__ == "__main__":
    assert all((equinox, flax, haiku, jax, optax))
    main()
