"""Errors that are the user's to mend, and how a command reports them.

A :class:`UserError` says in one line what is wrong (the file or key, the value) and the remedy. Commands print that
line without a traceback and exit with status 1; everything else is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

_MOST_PROBLEMS = 20
"""Shown of one error. More come from one cause, such as a file of another program."""


class UserError(ValueError):
    """Wrong configuration, data or files: one line that names the file or key, the value and the remedy.

    Args:
        problems: usually one. Several independent ones, such as all of a configuration, are printed one to a line.
    """

    def __init__(self, *problems: object) -> None:
        super().__init__(*problems)
        self.problems = tuple(map(str, problems))

    def __str__(self) -> str:
        return " | ".join(self.problems)


class CommandParser(argparse.ArgumentParser):
    """Reports a wrong command line like every other :class:`UserError`, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def report_user_error(error: UserError) -> None:
    """Print ``error`` on stderr, one line for each problem, naming the rank when there are several."""
    several = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    rank = f"[rank {os.environ['RANK']}] " if several else ""
    more = len(error.problems) - _MOST_PROBLEMS
    lines = [*error.problems[:_MOST_PROBLEMS], *([f"and {more} more problems"] if more > 0 else [])]
    # A path may hold bytes that are no text.
    messages = [" ".join(line.split()).encode("utf-8", "backslashreplace").decode() for line in lines]
    # In one write: ranks share the stream, and lines of others must not come between a line and its end.
    sys.stderr.write("".join(f"{rank}error: {message}\n" for message in messages))
    sys.stderr.flush()


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main``, turning a :class:`UserError` into one line and exit status 1."""
    try:
        status = main()
    except UserError as error:
        report_user_error(error)
        status = 1
    except BrokenPipeError:
        # The reader of our output has gone (head, less): nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status or 0)
