"""How cases are chained, and what is said of them."""

from __future__ import annotations

import fault_mounts as mounts
from fault_cases import KINDS, Case
from fault_lineage import Result

CASES_IN_LINEAGE = 8
MARKS = ("<!-- faults: begin -->", "<!-- faults: end -->")
VERDICTS = ("exact", "refused", "wrong", "not reached")
_SWEEP = "damage found without a launch: every file x every form"
WRONG = VERDICTS[2:]


def lineages(cases: list[Case]) -> list[list[Case]]:
    """Cases that share a command, in chains."""
    by_options: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        by_options.setdefault(case.options, []).append(case)
    return [
        group[first : first + CASES_IN_LINEAGE]
        for group in by_options.values()
        for first in range(0, len(group), CASES_IN_LINEAGE)
    ]


def describe(result: Result) -> str:
    """A case that went wrong, in some lines."""
    head = f"{result.verdict}: {result.case.name} ({result.case.note}), {result.lineage}"
    return "\n".join([head, *(f"    {problem}" for problem in result.problems)])


def table(results: list[Result], swept: tuple[int, list[str]] | None) -> str:
    """What was tried and what came of it, in Markdown."""
    rows = ["| Fault | tried | exact | refused, as it should | wrong | not reached |", "|---|--:|--:|--:|--:|--:|"]
    for kind, (_, title, _) in KINDS.items():
        mine = [result.verdict for result in results if result.case.kind == kind]
        if not mounts.can_mount():
            title = title.replace("a small tmpfs", "hooked calls: nothing can be mounted")
        if mine:
            rows.append(f"| {title} | {len(mine)} | " + " | ".join(str(mine.count(v)) for v in VERDICTS) + " |")
    every = [result.verdict for result in results]
    rows.append(f"| all, by real launches | {len(every)} | " + " | ".join(str(every.count(v)) for v in VERDICTS) + " |")
    if swept is not None:
        count, wrong = swept
        rows.append(f"| {_SWEEP} | {count} | {count - len(wrong)} | 0 | {len(wrong)} | 0 |")
    return "\n".join(rows)
