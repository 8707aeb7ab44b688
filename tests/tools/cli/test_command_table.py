"""The command ``retemper``: its table, its help, and that it runs the code of the script files."""

from __future__ import annotations

import argparse
import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import retemper
from retemper.engine.errors import UserError, run_command
from retemper.tools.cli import commands
from retemper.tools.cli.main import dispatch

ROOT = Path(retemper.__file__).parent
RUNNABLE = dict(commands.runnable())


def output_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of ``retemper`` with ``arguments``."""
    with pytest.raises(SystemExit) as end:
        run_command(lambda: dispatch(arguments))
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.fixture(autouse=True)
def _keep_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retemper"])


def test_the_help_is_one_screen_of_all_commands(capsys):
    status, shown, _ = output_of(["--help"], capsys)
    assert status == 0 and len(shown.splitlines()) <= 24
    assert max(map(len, shown.splitlines())) <= 100
    assert {word for line in shown.splitlines() for word in line.split()} >= {name.split()[0] for name in RUNNABLE}
    assert output_of([], capsys) == (0, shown, "")


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_command_has_the_interface_of_the_table(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"retemper {name}"])
    module = RUNNABLE[name].load()
    parser = module.build_parser()
    assert isinstance(parser, argparse.ArgumentParser) and parser.prog == f"retemper {name}"
    arguments = inspect.signature(module.main).parameters["arguments"]
    assert arguments.default is None
    source = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    assert ast.unparse(source.body[-1]) == "if __name__ == '__main__':\n    run_command(main)"


@pytest.mark.parametrize("name", [name for name in RUNNABLE if name != "train"])
def test_the_help_of_a_command_is_a_screen(name, monkeypatch):
    """Of a wide terminal; test_config.py has that of train."""
    monkeypatch.setenv("COLUMNS", "100")
    parser = RUNNABLE[name].load().build_parser()
    usual, everything = parser.format_help(), parser.format_help_all()
    assert len(usual.splitlines()) <= 45
    options = {option for action in parser._actions for option in action.option_strings}
    assert {option for option in options if option not in everything} <= {"-h", "--help", "--help-all"}
    assert ("--help-all" in usual) == (len(usual) < len(everything))


def test_a_command_gets_the_arguments_and_its_name(monkeypatch, capsys):
    """The same answer as that of the script file, but for the name of the program."""
    status, out, error = output_of(["convert", "hf-to-dcp", "--hf", "x"], capsys)
    script = [sys.executable, str(ROOT / "checkpoint_convert" / "hf_to_dcp.py"), "--hf", "x"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    as_script = error.replace("retemper convert hf-to-dcp", "hf_to_dcp.py")
    assert (done.returncode, done.stdout, done.stderr) == (status, out, as_script)
    assert status == 1 and "--output" in error and error.endswith("see retemper convert hf-to-dcp --help\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["preproces"], "did you mean 'preprocess'?"),
        (["extend_vocab"], "did you mean 'extend-vocab'?"),
        (["convert", "hf-to-dpc"], "did you mean 'hf-to-dcp'?"),
        (["zzz"], "see retemper --help"),
        (["--config", "x"], "the command comes first"),
    ],
)
def test_an_unknown_command_is_a_line(arguments, said, capsys):
    status, out, error = output_of(arguments, capsys)
    assert (status, out, error.count("\n")) == (1, "", 1) and said in error


def test_help_of_everything_has_every_option(capsys):
    _, shown, _ = output_of(["--help-all"], capsys)
    for name, command in RUNNABLE.items():
        assert f" retemper {name}: {command.summary} " in shown
    assert "--training.sequence_length" in shown and "--dedup-threshold" in shown


def test_a_command_without_its_module_is_left_out(monkeypatch, capsys):
    absent = replace(commands.GROUPS["data"][0], name="absent", module="tools.absent")
    monkeypatch.setitem(commands.GROUPS, "data", (absent, *commands.GROUPS["data"]))
    assert "absent" not in output_of(["--help"], capsys)[1]
    with pytest.raises(UserError, match="unknown command 'absent'"):
        dispatch(["absent", "--help"])


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "retemper", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"retemper {retemper.__version__}\n"
