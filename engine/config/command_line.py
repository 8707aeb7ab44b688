"""Parse command lines: errors like those of every command, and paths with ``~`` and ``$VARIABLE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..files.paths import expand_path, is_url

_PATH_WORDS = frozenset({"FILE", "DIR", "PATH", "PREFIX", "GLOB", "PATTERN", "FOLDER", "RUN_FOLDER"})
"""Metavars, or parts of one like FILE|DIR, of options whose value is a path."""


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line like every other :class:`UserError`, without printing the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of exiting."""
        raise UserError(f"{message}; see --help")

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
                name = (action.option_strings or [str(action.metavar)])[-1]
                setattr(found, action.dest, _expanded(value, name, "URL" in _metavar_words(action)))
        return found, rest


def names_path(action: argparse.Action) -> bool:
    """Return whether an option's value is a path, or a name that can be one, by its type or its metavar.

    With the word URL in the metavar, the value may also be a URL, which is not changed.
    """
    return action.type is Path or not _metavar_words(action).isdisjoint(_PATH_WORDS)


def _metavar_words(action: argparse.Action) -> set[str]:
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
    return {word for metavar in metavars for word in metavar.split("|")}


def _expanded(value: Any, name: str, may_be_url: bool) -> Any:
    if isinstance(value, list):
        return [_expanded(each, name, may_be_url) for each in value]
    if may_be_url and is_url(str(value)):
        return value
    return type(value)(expand_path(str(value), name)) if isinstance(value, (str, Path)) else value
