"""The table of model types in docs/models.md: what ``tests/models/check.py --all --write-docs`` has found."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from model_check import Checked

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
DOCUMENTS = {"packed": "packed", "one_by_one": "one at a time", "library_attention": "one at a time, own attention"}
"""Words of the table for ``TransformersArchitecture.documents``."""
_HEADER = "| model_type | implementation | documents | axes |\n|---|---|---|---|\n"
_ROW = re.compile(r"^\| `([\w.-]+)` \| (.*?) \| (.*?) \| (.*?) \|$", re.MULTILINE)


class Row(NamedTuple):
    """A row of the table."""

    model_type: str
    implementation: str
    documents: str
    axes: str


def row_of(found: Checked) -> Row:
    """Return the row about a type. A refusal has its reason instead of the way that documents are computed."""
    if found.problem:
        return Row(found.model_type, "not exact", _one_line(found.problem), "")
    if found.refusal:
        return Row(found.model_type, "refused", _one_line(found.refusal), "")
    return Row(found.model_type, found.implementation, DOCUMENTS[found.documents], ", ".join(found.axes))


def _one_line(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:200]


def read_table() -> list[Row]:
    """Return the rows of the page."""
    return [Row(*found) for found in _ROW.findall(PAGE.read_text(encoding="utf-8"))]


def write_table(results: Sequence[Checked]) -> None:
    """Replace the table of the page."""
    before, _, after = PAGE.read_text(encoding="utf-8").partition(_HEADER)
    _, _, after = f"\n{after}".partition("\n\n")
    rows = "".join(
        f"| `{row.model_type}` | {row.implementation} | {row.documents} | {row.axes} |\n"
        for row in map(row_of, results)
    )
    PAGE.write_text(f"{before}{_HEADER}{rows}\n{after}", encoding="utf-8")
