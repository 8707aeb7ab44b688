"""Decide what a terminal shows: bars that redraw themselves, and colors."""

from __future__ import annotations

import os
import re
from typing import Literal, Protocol

_RESET = "\x1b[0m"
_STYLES = (
    (re.compile(r"^(?:note|warning): .*", re.MULTILINE), "\x1b[33m"),  # yellow
    (re.compile(r"^(?:\[rank \d+\] )?error: .*", re.MULTILINE), "\x1b[31m"),  # red
    (re.compile(r"^-- .+ -+$", re.MULTILINE), "\x1b[1m"),  # bold
)
_HEADING_WIDTH = 72


class Terminal(Protocol):
    """A stream that may be a terminal."""

    def isatty(self) -> bool:
        """Return whether it is one."""
        ...


def heading(title: str) -> str:
    """Return the line above a section of the log."""
    return f"-- {title} ".ljust(_HEADING_WIDTH, "-")


def shows_bars(stream: Terminal, setting: Literal["auto", "on", "off"] = "auto") -> bool:
    """Return whether ``stream`` gets bars that redraw themselves; ``setting`` is ``logging.progress_bar``."""
    return setting == "on" or (setting == "auto" and stream.isatty() and not _is_dumb())


def shows_colors(stream: Terminal) -> bool:
    """Return whether ``stream`` gets colors: a terminal does, unless NO_COLOR is set (https://no-color.org)."""
    return stream.isatty() and not _is_dumb() and not os.environ.get("NO_COLOR")


def colored(text: str) -> str:
    """Return ``text`` with colored notes and errors, and bold headings."""
    for pattern, style in _STYLES:
        text = pattern.sub(lambda found, style=style: f"{style}{found[0]}{_RESET}", text)  # type: ignore[misc]
    return text


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"
