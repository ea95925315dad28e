"""Tables in plain text."""

from collections.abc import Collection, Sequence


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
