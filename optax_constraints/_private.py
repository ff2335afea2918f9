"""What is used of other libraries beyond their public names."""

import sys


def called_from_optax(*functions: str) -> bool:
    """Whether one of these functions of Optax, or what it defines, is among the callers."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_qualname.partition(".<locals>")[0]
        if module.startswith("optax.") and name in functions:
            return True
        frame = frame.f_back
    return False
