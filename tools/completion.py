"""Print a script for a shell that completes commands, options and file names.

    retemper completion bash > ~/.local/share/bash-completion/completions/retemper

The script is made from the parsers of all commands by shtab. It starts no Python when it completes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from retemper.engine.config.command_line import CommandParser, names_path
from retemper.engine.errors import run_command
from retemper.tools.cli.commands import Command, groups

SHELLS = ("bash", "zsh", "tcsh", "fish")


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(
        description="Print a script that completes commands, options and file names. Write it where the shell looks "
        "for such scripts, such as ~/.local/share/bash-completion/completions/retemper. It belongs to this version."
    )
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    print(completion_script(build_parser().parse_args(arguments).shell))


def completion_script(shell: str) -> str:
    """Return the script for ``shell``."""
    import shtab

    root = argparse.ArgumentParser(prog="retemper")
    for option in ("--help-all", "--version"):
        root.add_argument(option, action="store_true")
    _add_commands(root, [command for _, commands in groups() for command in commands])
    return str(shtab.complete(root, shell))


def _add_commands(parser: argparse.ArgumentParser, commands: Sequence[Command]) -> None:
    subparsers = parser.add_subparsers()
    for command in commands:
        if command.subcommands:
            _add_commands(subparsers.add_parser(command.name, help=command.summary), command.subcommands)
        else:
            completed = subparsers.add_parser(command.name, help=command.summary, add_help=False)
            _add_options(completed, command.load().build_parser())


def _add_options(completed: argparse.ArgumentParser, parser: Any) -> None:
    """Add the options of a command, and of the settings that it takes, except those of the same name."""
    build_settings = getattr(parser, "build_settings_parser", None)
    known: set[str] = set()
    for each in (parser, *([build_settings()] if build_settings else [])):
        _complete_values(each)
        for action in each._actions:
            if known.isdisjoint(action.option_strings):
                completed._add_action(action)
                known.update(action.option_strings)


def _complete_values(parser: Any) -> None:
    """Tell shtab which options take paths, and the choices that jsonargparse shows as the metavar only."""
    import shtab

    for action in parser._actions:
        if names_path(action):
            action.complete = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
        elif action.choices is None and str(action.metavar).startswith("{"):
            action.choices = action.metavar.strip("{}").split(",")


if __name__ == "__main__":
    run_command(main)
