"""What the text of a compiled program says: arrays, and what moves between devices."""

import math
import re
from typing import NamedTuple

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_SIZES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (\([^=]*?\)|\S+) "
    r"((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter|collective-\w+)(?:-start)?"
    r"\((.*)"
)


class Collective(NamedTuple):
    """An operation that moves numbers between devices."""

    kind: str
    result: str
    """The type of what it makes: an array, or a tuple of arrays."""
    rest: str
    """Its operands and attributes."""


def uncommented(program: str) -> str:
    """A program without the numbers that stand in long tuples."""
    return re.sub(r"/\*.*?\*/", "", program)


def collectives(program: str) -> list[Collective]:
    """All collectives of a program, those in loops and branches once."""
    found = _COLLECTIVE.findall(uncommented(program))
    return [Collective(kind, result, rest) for result, kind, rest in found]


def entries_of(types: str) -> list[int]:
    """How many entries each array in a text of types has."""
    return [math.prod(map(int, filter(None, s.split(",")))) for _, s in _ARRAY.findall(types)]


def size_of(types: str) -> int:
    """The bytes of all arrays in a text of types."""
    kinds = [_SIZES.get(kind, 0) for kind, _ in _ARRAY.findall(types)]
    return sum(size * n for size, n in zip(kinds, entries_of(types), strict=True))
