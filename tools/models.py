"""List the shipped configurations and the model families, with what each needs.

    python tools/models.py                 # all presets and families
    python tools/models.py qwen2_72b       # one preset: its file, and what it needs
    python tools/models.py gemma3_text     # one family
    python tools/models.py --json

The work is done by retemper.tools.model_list; this file is the command line.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.spelling import nearest
from retemper.engine.errors import UserError, run_command
from retemper.tools.model_list.families import find_family, list_families
from retemper.tools.model_list.presets import find_preset, read_presets
from retemper.tools.model_list.text import format_family, format_list, format_preset


def build_parser() -> CommandParser:
    """Return the parser of the command line."""
    parser = CommandParser(description="List the shipped configurations and the model families.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="a preset, or the model_type of a config.json")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, by default that of this process."""
    options = build_parser().parse_args(arguments)
    if options.name is None:
        _print_all(options.json)
    else:
        _print_one(options.name, options.json)


def _print_all(as_json: bool) -> None:
    presets, families = read_presets(), list_families()
    content = {
        "presets": [preset.to_dict() for preset in presets],
        "families": [family.to_dict() for family in families],
    }
    print(json.dumps(content, indent=2) if as_json else format_list(presets, families))


def _print_one(name: str, as_json: bool) -> None:
    if preset := find_preset(name):
        print(json.dumps(preset.to_dict(), indent=2) if as_json else format_preset(preset))
        return
    if family := find_family(name):
        print(json.dumps(family.to_dict(), indent=2) if as_json else format_family(family))
        return
    known = [*(preset.name for preset in read_presets()), *(family.model_type for family in list_families())]
    similar = nearest(name, known)
    hint = f"; did you mean {similar}?" if similar else ";"
    raise UserError(f"{name}: no preset and no checked model_type of that name{hint} `retemper models` lists all")


if __name__ == "__main__":
    run_command(main)
