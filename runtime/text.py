"""Tables as text."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int] = (0,), rule: bool = True) -> str:
    """Lines of cells as a table; the columns numbered in `left` are aligned to the left, the others to the right.

    The first line holds the column titles; `rule` draws a line below it.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]] if rule else text)


def code(value: object) -> str:
    """A value from somebody's file as a code span in Markdown: one line that is no heading, link, table or HTML."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(value))
    return f"`{' '.join(text.replace('`', chr(39)).replace('|', '/').split()) or '-'}`"


def quoted(path: object) -> str:
    """A path as it can be pasted into a shell."""
    return shlex.quote(str(path))


def spread(values: Sequence[float], decimals: int = 2, sign: str = "") -> str:
    """Mean and, for two or more values, standard deviation (divisor n - 1); an empty text without values.

    With `sign` "+" a positive mean has its sign.
    """
    if not values:
        return ""
    return f"{statistics.mean(values):{sign}.{decimals}f}" + (
        f" ± {statistics.stdev(values):.{decimals}f}" if len(values) > 1 else ""
    )
