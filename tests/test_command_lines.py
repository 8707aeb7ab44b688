"""Every command's options: those that name a path are expanded, and none that takes a text is left out by mistake."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

import retemper
from retemper.engine.config.command_line import CommandParser, names_path
from retemper.engine.errors import UserError

ROOT = Path(retemper.__file__).parent
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("tools", "checkpoint_convert", "benchmarks", "launch")
    for path in (ROOT / folder).rglob("*.py")
    if "CommandParser(" in path.read_text(encoding="utf-8")
)
TEXTS = {
    *(
        "--json-key",
        "--metadata",
        "--stdin-format",
        "--input-format",
        "--sheet",
        "--chat-date",
        "--eod-token",
        "--fim-tokens",
    ),
    *("--data", "--replay", "--tokens", "--evaluate", "--hf-split", "--hf-subset"),
    *("--languages", "--bins", "--bin-weights", "--lm-eval", "--lm-eval-batch-size", "--stop", "--system"),
    *("--split", "--shard", "--prompt", "--device", "--max-shard-size", "--sweep", "--launch", "--documents", "--gpu"),
    *(
        "--kernels",
        "--cases",
        "--providers",
        "NAME",
        "--hosts",
        "--revision",
        "--push-to-hub",
        "--commit-message",
        "--export",
        "--ssh-option",
        "--engines",
        "--dtype",
        "--engine",
        "--ours",
        "--partition",
        "COMMAND",
        "--qos",
        "--time",
        "--measure",
    ),
}
"""Options of all commands whose values are texts that are not paths. A new option is either here, or tells by its
metavar or type that it names a path."""


class _Found(Exception):
    pass


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> CommandParser:
    """The parser that a command makes."""
    spec = importlib.util.spec_from_file_location(f"command_{Path(command).stem}", ROOT / command)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    found: list[CommandParser] = []

    def keep(self: CommandParser, *_: Any, **__: Any) -> None:
        found.append(self)
        raise _Found

    with monkeypatch.context() as patch:
        patch.syspath_prepend(str((ROOT / command).parent))
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        patch.setattr(CommandParser, "parse_args", keep)
        patch.setattr(CommandParser, "parse_known_args", keep)
        patch.setattr(sys, "argv", [command])
        with pytest.raises(_Found):
            getattr(module, "parse_arguments", module.main)()
    return found[0]


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All options, of subcommands too."""
    actions = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [each for sub in action.choices.values() for each in actions_of(sub)]
        elif not isinstance(action, argparse._HelpAction) and action.nargs != 0:
            actions.append(action)
    return actions


def test_there_are_commands():
    assert {"tools/preprocess.py", "tools/merge.py", "checkpoint_convert/hf_to_dcp.py", "tools/demo/run.py"} <= {
        *COMMANDS
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_that_names_a_path_expands(command, monkeypatch):
    monkeypatch.setenv("DATA_HERE", "/some/where")
    monkeypatch.delenv("UNSET_HERE", raising=False)
    for action in actions_of(parser_of(command, monkeypatch)):
        name = action.option_strings[-1] if action.option_strings else str(action.metavar)
        if action.choices is None and action.type in (None, str) and name not in TEXTS:
            assert names_path(action), f"{command} {name}: neither a path by its metavar nor a known text"
        if not names_path(action):
            continue
        # The option alone in a parser, which is how argparse would treat it in the command's own.
        alone = CommandParser()
        alone._add_action(action)
        given = ["$DATA_HERE/a", "~"] if action.nargs == "+" else ["$DATA_HERE/a"]
        found = getattr(alone.parse_args([*action.option_strings[-1:], *given]), action.dest)
        found = found if isinstance(found, list) else [found]
        assert list(map(str, found)) == ["/some/where/a", str(Path.home())][: len(given)]
        assert all(isinstance(each, Path if action.type is Path else str) for each in found)
        with pytest.raises(UserError, match=f"^{name} .*UNSET_HERE is not set"):
            alone.parse_args([*action.option_strings[-1:], "${UNSET_HERE}/x"])
        names = getattr(alone.parse_args([*action.option_strings[-1:], "Qwen/Qwen2-72B"]), action.dest)
        assert str(names[0] if isinstance(names, list) else names) == "Qwen/Qwen2-72B"


def test_standard_input_and_defaults_are_left_alone():
    parser = CommandParser()
    parser.add_argument("--input", nargs="+", metavar="FILE|-")
    parser.add_argument("--output", default="~default", metavar="PATH")
    parser.add_argument("--key", default="$x", metavar="KEY")
    assert vars(parser.parse_args(["--input", "-", "a~b", "--key", "$y"])) == {
        "input": ["-", "a~b"],
        "output": "~default",
        "key": "$y",
    }
