"""List, print or copy the launch scripts and manifests that come with the package.

    retemper launch                                 # what there is
    retemper launch show slurm.sh
    retemper launch copy slurm.sh job.sh            # to edit it; a copy runs the installed package
    bash "$(retemper launch path one_node.sh)" --config run.yaml

docs/cluster.md explains the scripts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from retemper.engine.config.command_line import CommandParser
from retemper.engine.errors import UserError, run_command

FOLDER = Path(__file__).resolve().parents[1] / "launch"
_INTERNAL = ("retemper.py", "quiet_torchrun.py")
"""Files that the scripts use."""


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="List, print or copy the launch scripts and manifests of this package.")
    commands = parser.add_subparsers(dest="command", metavar="list|show|path|copy")
    commands.add_parser("list", help="name each file with its first line (the default)")
    for name, text in (("show", "print a file"), ("path", "print the path of a file"), ("copy", "copy a file")):
        command = commands.add_parser(name, help=text)
        command.add_argument("name", choices=sorted(files()), metavar="NAME", help="; ".join(sorted(files())))
    command.add_argument("target", nargs="?", default=".", metavar="PATH", help="folder, or new name (default: here)")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    if options.command in (None, "list"):
        print("\n".join(f"{name:28}{_summary(path)}" for name, path in files().items()))
        return
    path = files()[options.name]
    if options.command == "show":
        print(path.read_text(encoding="utf-8"), end="")
    elif options.command == "path":
        print(path)
    else:
        print(copy_file(path, Path(options.target)))


def files() -> dict[str, Path]:
    """Return the files that users start or edit, by name."""
    found = (path for path in sorted(FOLDER.iterdir()) if path.is_file() and path.name not in _INTERNAL)
    return {path.name: path for path in found}


def copy_file(path: Path, target: Path) -> Path:
    """Copy a file with its mode, and return the path of the copy.

    Raises:
        UserError: the copy exists, or its folder does not.
    """
    target = target / path.name if target.is_dir() else target
    if os.path.lexists(target):
        raise UserError(f"{target}: exists already and is not overwritten; remove it or name another file")
    if not target.parent.is_dir():
        raise UserError(f"{target}: the folder {target.parent} does not exist; make it first")
    shutil.copy(path, target)
    return target


def _summary(path: Path) -> str:
    """Return the first sentence of the comment or docstring at the beginning of a file."""
    text = path.read_text(encoding="utf-8")
    found = re.search(r'^(?:# |r?""")([A-Z].*?)[.:](?:\s|""")', text, re.MULTILINE | re.DOTALL)
    return "" if found is None else " ".join(found[1].replace("\n# ", " ").split())


if __name__ == "__main__":
    run_command(main)
