"""Checks the column names of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..records.errors import Where
from ..records.reading import ReadContext
from ..records.text_choice import suggested_key

_SHOWN = 8


def usable_columns(names: Sequence[str], where: Where, context: ReadContext) -> bool:
    """Return whether rows with these columns can be records; if not, refuse the table as one record at ``where``.

    At least one needed column must exist, and none twice. Columns may have no name.
    """
    wanted = None if context.columns is None else set(context.columns)
    counts = Counter(name for name in names if name and (wanted is None or name in wanted))
    repeated = next((name for name, count in counts.items() if count > 1), None)
    if repeated is not None:
        context.refuse(where, f"two columns are called {repeated!r}; rename one of them", "malformed", None)
        return False
    if not counts and wanted:
        there = ", ".join(map(repr, list(filter(None, names))[:_SHOWN])) or "none with a name"
        reason = f"no column {' or '.join(map(repr, context.columns or ()))} (columns there: {there})"
        context.refuse(
            where, f"{reason}; name the text's column with --json-key{suggested_key(names)}", "malformed", None
        )
        return False
    return True
