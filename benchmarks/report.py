"""The one form of all results: a JSON file, and Markdown tables."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from ..engine.files.outputs import write_json_report
from .machine import commit


def command_line(script: str, arguments: Sequence[str] | None = None) -> str:
    """Return the command that a reader can repeat, without names of folders; by default that of this process."""
    words = sys.argv[1:] if arguments is None else arguments
    return shlex.join(["python", script, *(re.sub(r"^(--[\w-]+=)?/.*/", r"\1", word) for word in words)])


@dataclass
class BenchmarkReport:
    """The results of one benchmark. All files in benchmarks/results/ have these keys."""

    command: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    """What was measured, and how often."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The measurements, one entry for each thing that was measured."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Figures that are computed from all rows."""
    date: str = field(default_factory=lambda: date.today().isoformat())
    commit: str = field(default_factory=commit)

    def write(self, path: Path | None, option: str = "--json") -> None:
        """Write the results as JSON, if ``path`` is given.

        Raises:
            UserError: the file cannot be written, or is not a report.
        """
        if path is not None:
            write_json_report(option, path, asdict(self))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table, with the columns after the first aligned to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return [line(header), rule, *map(line, rows)]
