"""The command `optax-constraints`: checks a checkpoint against rules."""

import argparse
import contextlib
import functools
import importlib
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from optax_constraints import __version__
from optax_constraints._checkpoints import CheckpointError, mapping, open_checkpoint
from optax_constraints._config import deserialize, strict_json
from optax_constraints._patterns import needs_layout, parse
from optax_constraints._report import Report, Row, allowance, rows_of
from optax_constraints._rules import Binder
from optax_constraints._walk import Bindings, Visit, memory_in, states_in

INSIDE, OUTSIDE, UNKNOWN = 0, 1, 2
_STOPPED = 130

# So many arrays are listed.
_WORST = 10


class _CommandError(Exception):
    """What is wrong with a command, in one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: What follows its name; by default those that this process was given.

    Returns:
        The exit status: 0 if all is inside, 1 if something is outside, 2 if that cannot be told.
    """
    try:
        options = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return options.run(options)
    except (_CommandError, CheckpointError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _STOPPED
    except BrokenPipeError:  # somebody read enough, as `head` does
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # Python flushes it as it ends
        return UNKNOWN
    except (TypeError, ValueError) as error:  # the library's own, of rules and leaves
        return _fail(str(error).replace("pass strict=False", "pass --no-strict"))
    except Exception as error:
        # Python's own status for an error is 1, which would say that weights are outside.
        return _fail(f"{type(error).__name__}: {error}")


def _fail(text: str) -> int:
    print(f"optax-constraints: error: {' '.join(text.split())}", file=sys.stderr)
    return UNKNOWN


def _show_warning(message: Any, *_: Any) -> None:
    print(f"optax-constraints: warning: {' '.join(str(message).split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _CommandError(f"{message}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("optax-constraints", description="Weight constraints for JAX.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser(
        "check",
        help="check a checkpoint against rules",
        description="Checks a checkpoint against rules, one array at a time.",
        epilog="Exit status: 0 if all constrained arrays are inside their sets, 1 if one is "
        "outside, 2 if that cannot be told.",
    )
    check.set_defaults(run=_check)
    check.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a folder of Orbax or of numbered steps; a file of safetensors, .npz, Flax msgpack",
    )
    check.add_argument(
        "--rules", type=Path, required=True, metavar="RULES.json", help="what serialize returned"
    )
    check.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which step of a folder of steps (default: the last); schedules see it",
    )
    check.add_argument(
        "--tolerance",
        type=_tolerance,
        default=16.0,
        metavar="T",
        help="machine epsilons of the norm of an array by which rounding may lead outside "
        "(default: %(default)g)",
    )
    check.add_argument(
        "--prefix",
        metavar="KEYS",
        help="where the parameters are, as in params or model/state; '' for everything "
        "(default: params, if the checkpoint has it)",
    )
    check.add_argument(
        "--state",
        default="",
        metavar="KEYS",
        help="where the optimizer's state is, for bounds relative to init (default: it is found)",
    )
    check.add_argument(
        "--extra",
        type=_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="what arg(NAME) reads, a number or a list in JSON; may be repeated",
    )
    check.add_argument(
        "--no-strict",
        dest="strict",
        action="store_false",
        help="let rules match nothing, as long as one matches something",
    )
    check.add_argument("--json", action="store_true", help="print the report as JSON")

    show = commands.add_parser("show", help="print rules", description="Prints rules, in order.")
    show.set_defaults(run=_show)
    show.add_argument("rules", type=Path, metavar="RULES.json", help="what serialize returned")

    for command in (check, show):
        command.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="import a module that registers sets of your own; may be repeated",
        )
    return parser


def _tolerance(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 <= (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0")


def _argument(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no number and no list in JSON") from None


# Rules.


def _rules(path: Path, modules: list[str]) -> Any:
    """Rules out of a file, with the sets that modules register."""
    if modules:
        sys.path.append(os.getcwd())  # as with `python -m`
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise _CommandError(f"--import {module}: {type(error).__name__}: {error}") from error
    try:
        rules = deserialize(json.loads(path.read_text("utf-8"), object_pairs_hook=mapping))
        parse(rules)
    except OSError as error:
        raise _CommandError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except (TypeError, ValueError, RecursionError) as error:
        kind = "JSON" if isinstance(error, json.JSONDecodeError) else "rules"
        raise _CommandError(f"{str(path)!r} holds no {kind}: {error}") from error
    return rules


def _show(options: argparse.Namespace) -> int:
    rules = parse(_rules(options.rules, options.modules))
    patterns = ["every parameter" if rule.pattern is None else str(rule) for rule in rules]
    width = max(map(len, patterns), default=0)
    for pattern, rule in zip(patterns, rules, strict=True):
        print(f"{pattern:{width}}  {'free' if rule.constraint is None else rule.constraint!r}")
    return INSIDE


# The check.


class _Found(NamedTuple):
    """A row of the report, and how far outside rounding may have led."""

    row: Row
    allowed: float | None

    @property
    def is_outside(self) -> bool:
        """Whether it is further outside than that, or holds a NaN."""
        return self.allowed is not None and not _number(self.row.outside) <= self.allowed


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _check(options: argparse.Namespace) -> int:
    if not jax.config.jax_platforms:  # pyright: ignore[reportAttributeAccessIssue]  # set by JAX
        # An accelerator may be busy with the training that wrote the checkpoint.
        jax.config.update("jax_platforms", "cpu")
    rules = _rules(options.rules, options.modules)
    for rule in parse(rules):
        if rule.pattern is not None and needs_layout(rule.pattern):
            raise _CommandError(
                f"The rule {rule} goes by types of layers, which a checkpoint does not tell. Write "
                "patterns of paths, or assert_feasible(..., layout=layout(model)) in Python."
            )
    checkpoint = open_checkpoint(options.checkpoint, options.step)
    prefix = options.prefix
    if prefix is None:
        has_params = isinstance(checkpoint.tree, Mapping) and "params" in checkpoint.tree
        prefix = "params" if has_params else ""
    params = _below(checkpoint.tree, prefix, "--prefix")
    step = next((n for n in (options.step, checkpoint.step) if n is not None), 0)
    with _x64_for(params):
        bound = Binder(rules, strict=options.strict)(params)
        memory = _memory(bound, _below(checkpoint.tree, options.state, "--state"))
        visits = bound.visits(params, memory, step=step, extra=dict(options.extra))
        found = list(_measure(visits, _bytes_to_read(bound), options.tolerance))
    constrained = [one for one in found if one.allowed is not None]
    if not constrained:
        raise _CommandError(
            f"The rules in {str(options.rules)!r} constrain none of the {len(found)} arrays in "
            f"{str(checkpoint.path)!r}."
        )
    outside = [one for one in constrained if one.is_outside]
    table = Report(tuple(one.row for one in found))
    if options.json:
        result = {
            "checkpoint": str(checkpoint.path),
            "prefix": prefix,
            "step": step,
            "inside": not outside,
            "outside": [one.row.path for one in outside],
            "rows": [
                {**row, "allowed": one.allowed}
                for row, one in zip(table.to_dicts(), found, strict=True)
            ],
        }
        print(json.dumps(strict_json(result), indent=1))
    else:
        print(f"{checkpoint.path}{f' ({prefix})' if prefix else ''}")
        print(table)
        print(*_verdict(constrained, outside), sep="\n")
    sys.stdout.flush()
    return OUTSIDE if outside else INSIDE


def _below(tree: Any, keys: str, option: str) -> Any:
    """The part of a tree at a path."""
    for key in filter(None, keys.split("/")):
        if not isinstance(tree, Mapping) or key not in tree:
            known = ", ".join(map(repr, list(tree)[:10])) if isinstance(tree, Mapping) else "none"
            raise _CommandError(f"{option} {keys}: there is no {key!r}; the keys are {known}.")
        tree = tree[key]
    return tree


@contextlib.contextmanager
def _x64_for(params: Any) -> Iterator[None]:
    """Lets JAX compute in float64, if there are parameters in that."""
    before: bool = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
    wide = any(leaf.dtype == np.float64 for leaf in jax.tree.leaves(params))
    jax.config.update("jax_enable_x64", before or wide)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


def _memory(bound: Bindings, tree: Any) -> dict[str, Any]:
    """What constraints remember of the weights at init, out of the checkpoint."""
    own = [(one.path, one.constraint) for one in bound if one.constraint is not None]
    needy = [(path, set_) for path, set_ in own if set_.remembers and not set_.starts_anew]
    if not needy:
        return {}
    states = states_in(tree)
    if not states:
        path, constraint = needy[0]
        raise _CommandError(
            f"{constraint} on {path!r} is relative to what the weights were at init, which only "
            "the state of project knows, and there is none in this checkpoint. Save the "
            "optimizer's state beside the parameters."
        )
    return bound.recall(memory_in([jax.tree.map(np.asarray, state) for state in states]))


def _bytes_to_read(bound: Bindings) -> int:
    leaves = [leaf for one in bound if one.constraint is not None for leaf in one.leaves]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves if leaf is not None)


def _measure(visits: Iterator[Visit], total: int, tolerance: float) -> Iterator[_Found]:
    with _progress(total) as advance:
        for visit in visits:
            rows = rows_of(visit, _compiled, tolerance=tolerance, frugal=True)
            allowed = None
            if visit.constraint is not None:
                arrays = jax.tree.leaves(visit.weights)
                allowed = allowance(visit.constraint, arrays, tolerance, _compiled)
                advance(sum(array.nbytes for array in arrays))
                del arrays
            del visit  # lest its array be there when the next one is read
            for row in rows:
                yield _Found(row, allowed)


def _compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a compiled function, which makes fewer arrays of the size of a leaf on its way."""
    return _jit(function)(*arguments)


_jit = functools.cache(jax.jit)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], Any]]:
    """A progress bar of bytes, where somebody looks at it."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda size: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        yield bar.update


def _verdict(constrained: list[_Found], outside: list[_Found]) -> Iterator[str]:
    if not outside:
        yield f"inside: all {len(constrained)} constrained arrays"
        return
    yield f"OUTSIDE: {len(outside)} of {len(constrained)} constrained arrays" + (
        ":" if len(outside) <= _WORST else f", of which the worst {_WORST}:"
    )

    def goodness(one: _Found) -> float:  # a NaN is the worst there is, and compares as nothing
        away = _number(one.row.outside)
        return -math.inf if math.isnan(away) else -away

    worst = sorted(outside, key=goodness)
    for row, allowed in worst[:_WORST]:
        yield f"  {row.path or '(root)'} is {row.outside:.3g} from {row.constraint}" + (
            f", and rounding allows {allowed:.3g}" if allowed else ""
        )
