"""The command ``retemper``: runs the command that its first argument names.

    retemper preprocess --input corpus.jsonl        # the same as python tools/preprocess.py --input corpus.jsonl
    retemper --help-all                             # all options of all commands

``python -m retemper`` is the same. The module of a command is imported when the command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

import retemper
from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import run_command
from retemper.tools.cli.commands import Command, find, groups, runnable

_USAGE = "usage: retemper COMMAND [OPTIONS]"
_FOOTER = """\
retemper COMMAND --help explains a command. --help-all: all options of all commands. --version"""
_WIDTH = 15
"""Width of the column of names."""


def main() -> NoReturn:
    """Run the command line of this process."""
    run_command(lambda: dispatch(sys.argv[1:]))


def dispatch(arguments: Sequence[str]) -> int | None:
    """Run the command that ``arguments`` name, and return its exit status."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--help-all":
        print(full_help(), end="")
    elif name == "--version":
        print(f"retemper {retemper.__version__}")
    else:
        return _run(find(name), ["retemper", name], rest)
    return None


def _run(command: Command, called: list[str], arguments: list[str]) -> int | None:
    if command.subcommands:
        if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
            print(_subcommands(command))
            return None
        name, *rest = arguments
        return _run(find(name, command.subcommands), [*called, name], rest)
    # Help and errors name the command by this.
    sys.argv = [" ".join(called), *arguments]
    status: int | None = command.load().main()
    return status


def overview() -> str:
    """Return the help: all commands by group."""
    lines = [_USAGE, ""]
    for group, commands in groups():
        column = [group, *[""] * len(commands)]
        lines += [f"{label:9}{_row(command)}" for label, command in zip(column, commands, strict=False)]
    return "\n".join([*lines, _FOOTER])


def full_help() -> str:
    """Return the help of ``retemper`` and of all commands, with their rare options."""
    return "\n".join([overview(), *(page for name, command in runnable() for page in _page(name, command))])


def _page(name: str, command: Command) -> Iterator[str]:
    sys.argv[0] = f"retemper {name}"  # the parser's name of the program
    yield f"\n\n{f' retemper {name}: {command.summary} ':=^100}\n"
    parser = command.load().build_parser()
    yield parser.format_help_all() if isinstance(parser, CommandParser) else parser.format_help()


def _subcommands(command: Command) -> str:
    usage = f"usage: retemper {command.name} {'|'.join(each.name for each in command.subcommands)} [OPTIONS]"
    return "\n".join([usage, "", *(f"  {_row(each)}" for each in command.subcommands)])


def _row(command: Command) -> str:
    return f"{command.name:{_WIDTH}}{command.summary}"
