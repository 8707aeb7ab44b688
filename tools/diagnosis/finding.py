"""Describe what a check found, and format all findings as lines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Literal

from ...engine.errors import UserError

Status = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    group: str
    name: str
    status: Status
    text: str
    remedy: str = ""
    """What to do; empty if there is nothing to do."""

    def to_dict(self) -> dict[str, str]:
        """Return the fields as plain values."""
        return asdict(self)


def ok(group: str, name: str, text: str) -> Finding:
    """Return the finding of a check that passed."""
    return Finding(group, name, "ok", text)


def note(group: str, name: str, text: str, remedy: str = "") -> Finding:
    """Return a finding that does not prevent a run."""
    return Finding(group, name, "note", text, remedy)


def problem(group: str, name: str, text: str, remedy: str) -> Finding:
    """Return a finding that prevents a run."""
    return Finding(group, name, "problem", text, remedy)


def checked(group: str, name: str, check: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Return the findings of ``check``; an error of the user is a problem, whose message contains its remedy."""
    try:
        return [*check()]
    except UserError as error:
        return [problem(group, name, str(line), "") for line in error.args]


def format_findings(findings: Sequence[Finding]) -> str:
    """Return one line for each finding below the title of its group, and a line with the counts."""
    lines = []
    for group, members in groupby(findings, key=lambda finding: finding.group):
        lines += ["", group, *_lines(members)]
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "note", "ok")}
    lines += ["", f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok"]
    return "\n".join(lines[1:])


def _lines(findings: Iterable[Finding]) -> list[str]:
    return [
        f"  {finding.status:<8} {finding.name:<16} {finding.text}{f'; {finding.remedy}' if finding.remedy else ''}"
        for finding in findings
    ]
