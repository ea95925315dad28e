"""Values in error messages, and tables."""

from collections.abc import Collection, Sequence
from typing import Any


def aligned(table: Sequence[Sequence[str]], numbers: Collection[str] = ()) -> list[str]:
    """Lines of columns, the first line the headings; those headed by `numbers` to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    right = [heading in numbers for heading in table[0]]
    return [
        "  ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in table
    ]


def shown(value: Any) -> str:
    """Returns the `repr` of a value for a message, cut after 500 characters."""
    try:
        text = repr(value)
    except Exception:  # Of lists in lists in lists ..., for one, and of integers of 5,000 digits.
        return object.__repr__(value)
    return text if len(text) <= 500 else f"{text[:500]} ..."
