"""How errors show what was given."""


def shown(value: object) -> str:
    """The repr of a value, cut to a line; also of one that is too deep or too long for it."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."


def describe(path: str | None, shape: tuple[int, ...]) -> str:
    """A leaf: its path, where there is one, and its shape."""
    return f"{path!r} of shape {shape}" if path else f"an array of shape {shape}"
