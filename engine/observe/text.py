"""Format tables for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def visible(text: str) -> str:
    """Escape control characters, which a terminal would obey."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shortened(text: str, width: int) -> str:
    """Return ``text`` on one line of at most ``width`` characters. It is cut anywhere: some scripts have no spaces."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table: first column left-aligned, others right-aligned."""
    cells = [list(head), *([visible(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        first, *others = (
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([first, *others]).rstrip()
