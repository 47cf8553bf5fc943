"""How what a file says is shown: on one line, quoted, and not longer than a line."""

from collections.abc import Collection
from typing import Any

__all__ = ["listed", "quoted"]

_LONGEST = 120


def quoted(name: Any) -> str:
    """A name from a file, with line breaks, escape sequences and the like spelled out."""
    text = str(name)
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def listed(names: Collection[Any], most: int = 8) -> str:
    """The first names, and how many there are."""
    first = [quoted(name) for name, _ in zip(names, range(most), strict=False)]
    rest = [f"… ({len(names)} in all)"] if len(names) > most else []
    return ", ".join(first + rest) or "none"
