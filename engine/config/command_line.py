"""Parse command lines: errors like those of every command, paths with ``~`` and ``$VARIABLE``, and help of two sizes.

``--help`` shows the usual options on one screen, ``--help-all`` all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError
from ..files.paths import expand_path

_PATH_WORDS = frozenset({"FILE", "DIR", "PATH", "PREFIX", "GLOB", "PATTERN", "FOLDER", "RUN_FOLDER"})
"""Metavars, or parts of one like FILE|DIR, of options whose value is a path."""
_OTHER_OPTIONS = argparse.Action([], dest="", metavar="[OPTIONS]")
"""Stands for all optional arguments in the usage."""


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line like every other :class:`UserError`, without printing the usage."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("formatter_class", _Formatter)
        super().__init__(*args, **kwargs)
        self._usual: frozenset[str] | None = None
        self.build_settings_parser: Callable[[], argparse.ArgumentParser] | None = None
        if self.add_help:
            self.add_argument("--help-all", action=_HelpAll)

    def mark_usual(self, *options: str) -> None:
        """Make ``--help`` show only these options, and the positional arguments. ``--help-all`` shows all of them."""
        unknown = {*options} - {*self._option_string_actions}
        assert not unknown, unknown
        self._usual = frozenset(options)

    def take_settings(self, build_parser: Callable[[], argparse.ArgumentParser]) -> None:
        """Show the options of another parser too, in ``--help-all`` and completion: the command takes all settings."""
        self.build_settings_parser = build_parser

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of exiting."""
        raise UserError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        """Print the help; argparse's own method ignores errors of the output."""
        print(self.format_help(), end="", file=file)

    def format_help(self) -> str:
        """Return the help without the rare options."""
        left_out = [action for action in self._actions if self._is_rare(action)]
        shown = self._format(left_out)
        if self.build_settings_parser is not None:
            return f"{shown}\nmore options, and all settings of a run: {self.prog} --help-all\n"
        return f"{shown}\n{len(left_out)} more options: {self.prog} --help-all\n" if left_out else shown

    def format_help_all(self) -> str:
        """Return the help with the rare options."""
        if self.build_settings_parser is None:
            return self._format(())
        # Without its usage, which has a line for each of about 90 options.
        settings = self.build_settings_parser().format_help().partition("\n\n")[2]
        return f"{self._format(())}\n{settings}"

    def _is_rare(self, action: argparse.Action) -> bool:
        if self._usual is None or not action.option_strings or _asks_for_help(action):
            return False
        return self._usual.isdisjoint(action.option_strings)

    def _format(self, left_out: Collection[argparse.Action]) -> str:
        formatter = self._get_formatter()
        self._add_usage(formatter)
        formatter.add_text(self.description)
        for group in self._action_groups:
            shown = [action for action in group._group_actions if action not in left_out and not _asks_for_help(action)]
            formatter.start_section(group.title)
            formatter.add_text(group.description)
            formatter.add_arguments(shown)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()

    def _add_usage(self, formatter: argparse.HelpFormatter) -> None:
        """Show what is required; the usage of a command with many options would be a page of brackets."""
        either = [group for group in self._mutually_exclusive_groups if group.required]
        needed = [action for action in self._actions if action.required or not action.option_strings]
        needed += [action for group in either for action in group._group_actions]
        if any(action not in needed and not _asks_for_help(action) for action in self._actions):
            needed.append(_OTHER_OPTIONS)
        formatter.add_usage(self.usage, needed, either)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse, and expand ``~`` and ``$VARIABLE`` in every option that is a path according to :func:`names_path`.
        URLs are allowed where the metavar has the word URL, as in FILE|URL.

        ``parse_args`` and the parsers of subcommands call this method as well.
        """
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if names_path(action) and value is not None and value is not action.default:
                name = (action.option_strings or [str(action.metavar)])[-1]
                setattr(found, action.dest, _expanded(value, name, urls="URL" in _words(action)))
        return found, rest


class _Formatter(argparse.HelpFormatter):
    """Leaves more room for the names of options."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30)


class _HelpAll(argparse.Action):
    """Print the help with the rare options, and exit."""

    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, CommandParser)
        print(parser.format_help_all(), end="")
        parser.exit()


def _asks_for_help(action: argparse.Action) -> bool:
    return not {"--help", "--help-all"}.isdisjoint(action.option_strings)


def names_path(action: argparse.Action) -> bool:
    """Return whether an option's value is a path, or a name that can be one, by its type or its metavar.

    With the word URL in the metavar, the value may also be a URL, which is not changed.
    """
    return action.type is Path or not _words(action).isdisjoint(_PATH_WORDS)


def _words(action: argparse.Action) -> set[str]:
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar or "",)
    return {word for metavar in metavars for word in metavar.split("|")}


def _expanded(value: Any, name: str, urls: bool) -> Any:
    if isinstance(value, list):
        return [_expanded(each, name, urls) for each in value]
    return type(value)(expand_path(str(value), name, urls)) if isinstance(value, (str, Path)) else value
