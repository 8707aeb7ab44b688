"""Make a :class:`RunConfig` from the command line and its YAML files, or report all problems at once.

:mod:`~.options` merges files and options, :mod:`~.types_check` checks them against the declared types. ``jsonargparse``
is used only for the help.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .budget import TRAIN, as_written, conflicts_as_written, with_budget
from .checks import problems
from .command_line import CommandParser
from .files import find_config
from .import_paths import search_folders
from .options import Settings
from .settings import RunConfig, to_yaml
from .spelling import known_keys
from .types_check import build, is_path

if TYPE_CHECKING:
    import jsonargparse

USUAL_SETTINGS = (
    *("run_folder", "data.train", "data.validation", "data.validation_fraction", "model.initialize_from"),
    *("training.train_tokens", "training.warmup_tokens", "training.sequence_length", "training.global_batch_size"),
    *("training.micro_batch_size", "optimizer.learning_rate", "parallel.recompute", "parallel.cpu_offload"),
    *("checkpoint.save_interval", "checkpoint.export_hf", "resume"),
)
"""What ``--help`` shows. ``--help-all`` shows all settings."""
HELP_OPTIONS = {
    "--help-all": "--help",
    **{option: option for option in ("--data.train.help", "--data.stages.help")},
    "--data.stages.train.help": "--data.train.help",
}
"""Options that print help, mapped to the option of the parser that prints it. Those of lists explain the entries, which
``--help`` does not; the list ``train`` of a stage has the same entries as ``data.train``."""


def build_parser() -> jsonargparse.ArgumentParser:
    """Return the parser that prints the help of ``engine/pretrain.py``: one option for every field of
    :class:`RunConfig`.
    """
    import jsonargparse  # importing and building takes a second, and only the help needs it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description="Continue the pretraining of a language model. A YAML file describes the run, and options "
        "override it: --section.key VALUE, --data.train.0.weight 2 for an entry of a list, --data.train+ '{path: x}' "
        "to append an entry. --data.train.help and --data.stages.help explain the entries of these lists.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE|URL",
        help="YAML file that describes the run, the name of a file in megatron_configs, or a URL (https://, hf://)",
    )
    parser.add_argument("--print_config", action="store_true", help="print all settings of the run, and exit")
    parser.add_class_arguments(RunConfig)
    types = dict(known_keys())
    for action in parser._actions:
        if action.metavar == "CONFIG":  # a section; jsonargparse would take the path of a file there
            action.metavar, action.help = "YAML", "All keys of this section in one option: '{key: value, ...}'."
        elif is_path(types.get(action.dest)):
            action.metavar = "PATH"
    return parser


def usual_help() -> str:
    """Return the help of ``engine/pretrain.py`` with the usual settings, each with the first sentence of its help."""
    full = build_parser()
    settings = {action.dest: action for action in full._actions}
    parser = CommandParser(
        prog=full.prog,
        usage=f"{full.prog} --config FILE [--SECTION.KEY VALUE ...]",
        formatter_class=partial(argparse.HelpFormatter, max_help_position=34),
        description=full.description,
        epilog=f"{len(dict(known_keys())) - len(USUAL_SETTINGS)} more settings: {full.prog} --help-all",
    )
    for key in ("config", *USUAL_SETTINGS):
        action = settings[key]
        sentence = re.split(r"(?<=[.;])\s", str(action.help))[0].rstrip(".;").replace("``", "").replace("%", "%%")
        default = "" if action.default in (None, [], {}) else f" (default: {action.default})"
        metavar = "BOOL" if action.metavar == "{true,false}" else action.metavar or "X"
        parser.add_argument(f"--{key}", metavar=metavar, required=action.required, help=sentence + default)
    return parser.format_help()


def parse_config(arguments: Sequence[str] | None = None) -> RunConfig:
    """Read a run's configuration from the command line (default ``sys.argv[1:]``) and the YAML files that it names.

    Raises:
        UserError: unknown or duplicate keys, wrong types, missing values or impossible arithmetic; all problems, one
            line for each.
    """
    waiting = list(sys.argv[1:] if arguments is None else arguments)
    if not {"-h", "--help"}.isdisjoint(waiting):
        print(usual_help(), end="")
        raise SystemExit(0)
    for asked, option in HELP_OPTIONS.items():
        if asked in waiting:
            build_parser().parse_args([option])
    prints = "--print_config" in waiting
    settings = Settings()
    add_arguments(settings, [word for word in waiting if word != "--print_config"])
    run = build_config(settings)
    if prints:
        print(to_yaml(as_written(run)), end="")
        raise SystemExit(0)
    if "." in run.optimizer.name:  # a class, which every command that computes the memory of a run imports
        search_folders([*config_folders(waiting), Path.cwd()])
    return run


def config_folders(arguments: Sequence[str] | None = None) -> list[Path]:
    """Return the folders of the files that ``--config`` names in a valid command line (default ``sys.argv[1:]``)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    names = [after for word, after in pairwise(words) if word == "--config"]
    names += [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [found.parent for found in map(find_config, names) if isinstance(found, Path)]


def add_arguments(settings: Settings, arguments: Sequence[str]) -> None:
    """Merge the files and options of a command line into ``settings``, which collects the problems in them."""
    waiting = list(reversed(arguments))
    while waiting:
        argument = waiting.pop()
        option, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not option:
            settings.found.add(f"unexpected argument '{argument}'; every value follows its option, as in --seed 1")
        elif not equals and (not waiting or waiting[-1].startswith("--")):
            settings.found.add(_without_value(option), option)
        else:
            value = value if equals else waiting.pop()
            settings.add_file(value) if option == "config" else settings.add_option(option, value)
    settings.check_entries()


def build_config(settings: Settings) -> RunConfig:
    """Return the configuration, with its budget in tokens as far as it is known, and print the notes about it.

    Raises:
        UserError: all problems of ``settings``, one line for each.
    """
    missing: list[str] = []
    found = settings.found
    if settings.unreadable:
        found.raise_if_any()
    run = build(settings.tree, RunConfig, "", found, missing)
    if all(getattr(run.training, key) is None for key in TRAIN.keys):
        missing.append("training.train_tokens")
        found.add_key("training.train_tokens")
    if missing:
        found.add(f"missing: {', '.join(missing)}; set it in the file given with --config or as --{missing[0]}")
    found.add_consequences(conflicts_as_written(run))
    found.add_consequences(problems(run))
    found.raise_if_any()
    if os.environ.get("RANK", "0") == "0":
        for note in settings.notes:
            print(f"note: {note}", file=sys.stderr, flush=True)
    return with_budget(run)


def _without_value(option: str) -> str:
    settings = Settings()
    settings.add_option(option, "")
    unknown = [message for message in settings.found.messages if message.startswith("unknown option")]
    write = f"write --{option} VALUE, or --{option}=VALUE for one that begins with --"
    return unknown[0] if unknown else f"--{option}: its value is missing; {write}"
