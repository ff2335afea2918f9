"""What Flax keeps in static attributes: it has to hash, and to compare by what it says."""

import functools
from collections.abc import Hashable
from typing import Any

from optax_constraints._axes import Layout
from optax_constraints._rules import Binder, Rules, parse


class _Held:
    """A value that is equal to another of the same key.

    JAX and Flax compile anew for each static value that they have not seen, and refuse to
    combine trees in which they differ.
    """

    def __init__(self, value: Any, key: Hashable):
        self.value = value
        try:
            self._hash = hash(key)
        except TypeError:  # A constraint or a pattern that does not hash: equal to itself alone.
            key = object()
            self._hash = hash(key)
        self._key = key

    def __eq__(self, other: object) -> bool:
        return self is other or (type(self) is type(other) and self._key == vars(other)["_key"])

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return repr(self.value)

    def __deepcopy__(self, memo: Any) -> "_Held":
        return self

    def __reduce__(self) -> Any:
        # Hashes of strings are others in another process.
        return type(self), (self.value,)


class HeldRules(_Held):
    """Rules; their order counts."""

    def __init__(self, rules: Rules):
        super().__init__(rules, tuple(parse(rules)))


class HeldLayout(_Held):
    """What a model says of its parameters, or None."""

    def __init__(self, layout: Layout | None):
        key = None if layout is None else tuple(sorted(layout.items(), key=lambda item: item[0]))
        super().__init__(layout, key)


@functools.lru_cache(maxsize=64)
def binder(rules: HeldRules, layout: HeldLayout) -> Binder:
    """Rules with a layout, as one binder for all that are equal: it remembers the trees it saw."""
    return Binder(rules.value, layout=layout.value)
