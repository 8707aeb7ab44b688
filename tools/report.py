"""Report the results of a run: a page with its curves, and a summary in the terminal.

    python tools/report.py runs/x                              # prints a summary, writes runs/x/report.html
    python tools/report.py runs/x --compare runs/y --output x_and_y.html
    python tools/report.py runs/x --overwrite                  # again, while the run is training
    python tools/report.py runs/x --json                       # the same facts for a program

The page is self-contained. The run may still be training; only the page is written to its folder. This file is the
command line of retemper.tools.reports.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command
from retemper.engine.files.outputs import Use, finite, require_report, write_report
from retemper.tools.reports.run import RecordedRun, differences, read_run
from retemper.tools.reports.run_page import format_run, run_page
from retemper.tools.reports.text import visible

PAGE_FILE = "report.html"


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="Report the results of a run: a page with its curves, and a summary.")
    parser.add_argument("run_folder", type=Path, metavar="RUN_FOLDER", help="run_folder of the run's configuration")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="another run folder: curves, results, settings")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page (default: RUN_FOLDER/{PAGE_FILE})")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing report")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the summary")
    return parser


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line, by default that of this process."""
    return build_parser().parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = parse_arguments(arguments)
    run = read_run(options.run_folder)
    other = None if options.compare is None else read_run(options.compare)
    output = options.output or options.run_folder / PAGE_FILE
    _require_free(output, options.overwrite, options.run_folder, *filter(None, [options.compare]))
    write_report("--output", output, run_page(run, other))
    print(
        json.dumps(_record(run, other), indent=2)
        if options.json
        else f"{format_run(run, other)}\n\npage: {visible(str(output))}"
    )


def _require_free(output: Path, overwrite: bool, *folders: Path) -> None:
    """Refuse to overwrite a file of a run or a file that is not a report; without ``overwrite``, any file."""
    reads = [Use("RUN_FOLDER", path) for folder in folders for path in folder.iterdir() if path.name != PAGE_FILE]
    require_report("--output", output, reads)
    if output.is_file() and os.path.getsize(output) and not overwrite:
        raise UserError(f"--output {output}: already there; pass --overwrite to replace it, or name another file")


def _record(run: RecordedRun, other: RecordedRun | None) -> dict[str, Any]:
    compared = {} if other is None else {"compared": other.to_dict(), "differences": differences(run, other)}
    return finite(run.to_dict() | compared)


if __name__ == "__main__":
    run_command(main)
