"""Format facts and tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from ...engine.observe.text import table_lines as table_lines
from ...engine.observe.text import visible as visible


def fact_lines(facts: Mapping[str, str]) -> list[str]:
    """Return a line for each name and value."""
    return [f"{name:<21} {visible(value)}" for name, value in facts.items()]
