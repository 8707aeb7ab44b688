"""The command lines that the documentation shows, and a check of each by the parser of its own command."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from retemper.engine.config.command_line import CommandParser
from retemper.engine.config.files import find_config
from retemper.engine.config.parser import parse_config
from retemper.engine.errors import UserError
from retemper.tools.cli import commands as table

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
PROGRAMS = ("retemper", "python", "python3", "torchrun", "accelerate", "sbatch", "kubectl", "make", "pip")
CONFIG = """
run_folder: runs/x
model: {initialize_from: models/base}
data: {train: [{path: dataset}], validation_fraction: 0.01}
training: {train_tokens: 1_000_000_000, warmup_tokens: 10_000_000}
"""
"""Stands for a configuration that a page names without showing it."""
TAKE_SETTINGS = (
    *("engine.pretrain", "tools.train", "tools.plan", "tools.benchmark", "tools.doctor", "tools.evaluate_model"),
    "launch.over_ssh",
)
"""Modules that pass the options that they do not know to the configuration of a run."""


@dataclass(frozen=True)
class Documented:
    """A command line of a page."""

    page: str
    line: str

    @property
    def words(self) -> list[str]:
        """The words of the command, without the environment variables before it."""
        words = [os.path.expandvars(word) for word in shlex.split(self.line, comments=True)]
        while re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        return words


def documented_commands() -> list[Documented]:
    """Return every command line in blocks of all pages, and those with options in the text."""
    found = []
    for path in PAGES:
        page, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        found += [Documented(page, line) for line in command_lines(text)]
    return sorted(set(found), key=lambda one: (one.page, one.line))


def command_lines(text: str) -> Iterator[str]:
    """Yield the lines of a page that begin with a program."""
    shell = [content for _, language, content in FENCE.findall(text) if language in ("bash", "sh", "console")]
    prose = FENCE.sub("", text)
    shell += [re.sub(r"\s*\\\n\s*", " ", "\n".join(re.findall(r"^ {4}(.*)$", prose, re.MULTILINE)))]
    inline = [line for line in re.findall(r"`([^`\n]+)`", prose) if " --" in line and "..." not in line]
    shell += [line for line in inline if line != "torchrun --max-restarts"]
    for block in shell:
        without_input = re.sub(r"<<'?(\w+)'?.*?^\1$", "", block, flags=re.DOTALL | re.MULTILINE)
        for line in re.sub(r"\s*\\\n\s*", " ", without_input).splitlines():
            command = re.sub(r"^(?:[A-Z_]+=(?:\"[^\"]*\"|\S+) )*", "", line.strip()).split(" ")[0]
            if (command in PROGRAMS or re.match(r"launch/\w", command)) and not re.match(r"(\S+) -c ", line.strip()):
                yield re.split(r" (?:[|]|&&|;|&|\d?>>?|<)(?: |$)", line.strip())[0]


def check(words: list[str]) -> None:
    """Parse a command line as its command would.

    Raises:
        UserError, SystemExit: it does not accept it.
    """
    program, rest = words[0], words[1:]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert rest[0] in targets, rest[0]
    elif program == "pip":
        extras = re.search(r"\[([\w,]+)\]", " ".join(rest))
        packaging = (ROOT / "setup.py").read_text("utf-8")
        declared = re.findall(r'^(?: {4}"|EXTRAS\[")(\w+)"(?:: |\])', packaging, re.MULTILINE)
        assert extras is None or set(extras[1].split(",")) <= set(declared), extras[1]
    elif program == "kubectl":
        assert (ROOT / rest[-1]).is_file(), rest[-1]
    elif program == "accelerate":
        check(["python", *rest[next(i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py")) :]])
    elif program == "sbatch":
        check([word for word in rest if not word.startswith("--") or rest.index(word) > rest.index("launch/slurm.sh")])
    elif program == "torchrun":
        options = get_args_parser().parse_args(rest)
        module = ["-m", options.training_script] if options.module else [options.training_script]
        check(["python", *module, *options.training_script_args])
    elif program == "retemper":
        check_retemper(rest)
    elif rest[:2] == ["-m", "retemper"]:
        check_retemper(rest[2:])
    elif program.endswith(".sh"):
        assert (ROOT / program).is_file(), program
        check_arguments("tools.preprocess" if "preprocess" in program else "engine.pretrain", rest)
    elif rest[0].startswith(("tools/", "engine/", "checkpoint_convert/", "benchmarks/", "launch/")):
        check_arguments(rest[0].removesuffix(".py").replace("/", "."), rest[1:])
    elif rest[0].startswith("tests/"):
        assert (ROOT / rest[0]).is_file(), rest[0]


def check_retemper(arguments: list[str]) -> None:
    """Check a command line of ``retemper``, without its first word."""
    if arguments[0].startswith("--"):
        assert arguments in (["--help"], ["--help-all"], ["--version"]), arguments
        return
    command, *rest = arguments
    found = table.find(command)
    if found.subcommands:
        found, rest = table.find(rest[0], found.subcommands), rest[1:]
    check_arguments(found.module, rest)


def check_arguments(module: str, arguments: list[str]) -> None:
    """Parse the arguments of a command by its module."""
    if arguments in (["--help"], ["--help-all"]):
        return
    if module == "launch.preprocess_datatrove":
        check_arguments("tools.preprocess", arguments[arguments.index("--") + 1 :])
        arguments = arguments[: arguments.index("--")]
    if module == "engine.pretrain":
        check_settings(arguments)
        return
    parsed, rest = parser_of(importlib.import_module(f"retemper.{module}")).parse_known_args(arguments)
    if module not in TAKE_SETTINGS:
        assert not rest, f"unknown: {rest}"
        return
    configs = parsed.config if isinstance(getattr(parsed, "config", None), list) else []
    check_settings([word for name in configs for word in ("--config", name)] + rest)


def check_settings(arguments: list[str]) -> None:
    """Check options of a run; a configuration that the page does not show is replaced by a usual one."""
    words = [word for word in arguments if word != "--print_config"]
    if any(word.endswith(".help") for word in words):
        return
    if "--config" not in words:
        words = ["--config", "stands-for-all.yaml", *words]
    for number, word in enumerate(words):
        if word == "--config" and not known_config(words[number + 1]):
            Path(words[number + 1]).parent.mkdir(parents=True, exist_ok=True)
            Path(words[number + 1]).write_text(CONFIG, "utf-8")
    parse_config(words)


def known_config(name: str) -> bool:
    """Return whether a configuration is shipped, or was written from the page."""
    try:
        find_config(name)
    except UserError:
        return False
    return True


def write_configs(page: str, folder: Path) -> None:
    """Write the configurations that a page shows: blocks whose first line is ``# name.yaml``, and here-documents."""
    text = (ROOT / page).read_text("utf-8")
    shown = re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    shown += re.findall(r"cat > (\S+\.yaml) <<'END'\n(.*?)^END$", text, re.DOTALL | re.MULTILINE)
    for name, content in shown:
        (folder / name).write_text(content, "utf-8")


class _Found(Exception):
    pass


def parser_of(module: ModuleType) -> argparse.ArgumentParser:
    """Return the parser of a command, also of one without ``build_parser``."""
    if hasattr(module, "build_parser"):
        return module.build_parser()
    found: list[CommandParser] = []

    def keep(self: CommandParser, *_: Any, **__: Any) -> None:
        found.append(self)
        raise _Found

    with pytest.MonkeyPatch.context() as patch:
        original = CommandParser.parse_args, CommandParser.parse_known_args
        patch.setattr(CommandParser, "parse_args", keep)
        patch.setattr(CommandParser, "parse_known_args", keep)
        patch.setattr("sys.argv", [module.__name__])
        with pytest.raises(_Found):
            getattr(module, "parse_arguments", module.main)()
    assert original == (CommandParser.parse_args, CommandParser.parse_known_args)
    return found[0]
