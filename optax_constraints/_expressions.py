"""Numbers as text: `"sqrt(fan_out / fan_in)"`, `"2x init"`.

Python's own parser reads the text, its syntax is checked against a list of what may stand in it,
and it is evaluated here. Nothing in it is ever run.
"""

import ast
import copy
import functools
import math
import operator
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_constraints._text import shown

_LONGEST, _DEEPEST = 200, 20
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
# Python's parser would warn of some of what is no expression.
_WORD = re.compile(
    r"\s*(?:(?:fan_in|fan_out|size|init|sqrt)\b"
    r"|(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?(?!\w)"
    r"|[-+*/()])",
    re.ASCII,
)
_MULTIPLE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)x init", re.ASCII)


def check(text: str) -> None:
    """Raises a ValueError that says in half a sentence why a text is no expression."""
    if len(text) > _LONGEST:
        raise ValueError(f"it is longer than {_LONGEST} characters")
    try:
        _check(_parsed(text), 0)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("it is no expression") from None


@functools.lru_cache(maxsize=512)
def _parsed(text: str) -> ast.expr:
    multiple = _MULTIPLE.fullmatch(text)
    text = f"{multiple[1]} * init" if multiple else text.strip()
    end = 0
    while end < len(text):
        if not (word := _WORD.match(text, end)):
            raise ValueError(f"{shown(text[end:].strip())} is none of its words")
        end = word.end()
    return ast.parse(text, mode="eval").body


def _check(node: ast.AST, depth: int) -> None:
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
    match node:
        case ast.Constant(value=int() | float()):
            return
        case ast.Name(id="fan_in" | "fan_out" | "size" | "init"):
            return
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            _check(left, depth + 1)
            _check(right, depth + 1)
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            _check(operand, depth + 1)
        case ast.Call(func=ast.Name(id="sqrt"), args=[operand], keywords=[]):
            _check(operand, depth + 1)
        case _:
            raise ValueError("it is no expression")


def names_in(text: str) -> frozenset[str]:
    """What of a leaf an expression needs, by name."""
    nodes = ast.walk(_parsed(text))
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name)) - {"sqrt"}


def evaluate(what: str, text: str, known: Mapping[str, Any]) -> Any:
    """The value of an expression.

    Args:
        what: The hyperparameter, for errors.
        text: The expression, checked.
        known: A number, or an array, for each of its names that is known.

    Returns:
        A float; an array if it is made with one; None if one of its names is not known. What
        does not depend on that name is evaluated all the same, and so are its errors found.

    Raises:
        ValueError: If a number in it overflows, is divided by zero, or is negative under a root.
    """

    def value(node: ast.AST) -> Any:
        match node:
            case ast.Constant(value=number):
                return finite(number)
            case ast.Name(id=name):
                return known.get(name)
            case ast.BinOp(left=left, op=op, right=right):
                x, y = value(left), value(right)
                if isinstance(op, ast.Div) and isinstance(y, (int, float)) and y == 0:
                    raise ZeroDivisionError  # beside an array it would be infinite
                return None if x is None or y is None else finite(_OPERATORS[type(op)](x, y))
            case ast.UnaryOp(op=op, operand=operand):
                x = value(operand)
                return None if x is None else _OPERATORS[type(op)](x)
            case ast.Call(args=[operand]):
                x = value(operand)
                if x is None or isinstance(x, jax.Array):
                    return x if x is None else jnp.sqrt(x)
                return math.sqrt(x)

    def finite(x: Any) -> Any:
        if isinstance(x, jax.Array):
            return x
        if not math.isfinite(x):
            raise OverflowError
        return float(x)

    try:
        found = value(_parsed(text))
        return found if found is None or isinstance(found, jax.Array) else float(found)
    except ZeroDivisionError:
        problem = "divides by zero"
    except OverflowError:
        problem = "is too large for a float"
    except ValueError:
        problem = "takes the square root of a negative number"
    where = ", ".join(f"{name} = {known[name]}" for name in sorted(names_in(text) & {*known}))
    raise ValueError(f"{what} {problem}" + (f" with {where}." if where else "."))


def substitute(text: str, known: Mapping[str, float]) -> str:
    """An expression with numbers in the place of what is known."""

    class Substitute(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:  # the name is Python's
            return ast.Constant(known[node.id]) if node.id in known else node

    return ast.unparse(Substitute().visit(copy.deepcopy(_parsed(text))))
