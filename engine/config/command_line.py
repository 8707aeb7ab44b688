"""Parse command lines: errors like those of every command, and paths with ``~`` and ``$VARIABLE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..files.paths import expand_path

_PATH_WORDS = frozenset({"FILE", "DIR", "PATH", "PREFIX", "GLOB", "PATTERN", "FOLDER", "RUN_FOLDER"})
"""Metavars, or parts of one like FILE|DIR, of options whose value is a path."""


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line like every other :class:`UserError`, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of exiting."""
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse's own method ignores errors of the output."""
        print(self.format_help(), end="", file=file)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and expand ``~`` and ``$VARIABLE`` in every option that is a path according to :func:`names_path`.

        ``parse_args`` and the parsers of subcommands call this method as well.
        """
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if names_path(action) and value is not None and value is not action.default:
                setattr(found, action.dest, _expanded(value, (action.option_strings or [str(action.metavar)])[-1]))
        return found, rest


def names_path(action: argparse.Action) -> bool:
    """Return whether an option's value is a path, or a name that can be one, by its type or its metavar."""
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
    words = {word for metavar in metavars for word in metavar.split("|")}
    return action.type is Path or not words.isdisjoint(_PATH_WORDS)


def _expanded(value: Any, name: str) -> Any:
    if isinstance(value, list):
        return [_expanded(each, name) for each in value]
    return type(value)(expand_path(str(value), name)) if isinstance(value, (str, Path)) else value
