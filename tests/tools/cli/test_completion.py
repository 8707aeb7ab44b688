"""The script of ``retemper completion bash``, asked by bash as its completion does."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from retemper.tools.cli import commands
from retemper.tools.completion import SHELLS, completion_script

ASK = """
source retemper.bash
while read -r -a COMP_WORDS; do
  [ "${COMP_WORDS[-1]}" = . ] && COMP_WORDS[-1]=""
  COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE="${COMP_WORDS[*]}" COMPREPLY=()
  "$(complete -p retemper | sed 's/.*-F \\([^ ]*\\).*/\\1/')"
  echo "${COMPREPLY[*]}"
done
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for each of some command lines; a last word ``.`` is an empty one."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    folder = tmp_path_factory.mktemp("completion")
    (folder / "retemper.bash").write_text(completion_script("bash"))
    (folder / "corpus.jsonl").touch()
    (folder / "books").mkdir()

    def offered(*lines: str) -> list[set[str]]:
        given = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(["bash", "-c", ASK], input=given, cwd=folder, capture_output=True, text=True, check=True)
        assert not done.stderr
        return [set(line.split()) for line in done.stdout.splitlines()]

    return offered


def test_commands_and_subcommands_are_completed(complete):
    names = {name.split()[0] for name, _ in commands.runnable()}
    convert = {command.name for command in commands.CONVERT}
    lines = ("retemper .", "retemper prep", "retemper convert .", "retemper checkpoint pru")
    assert complete(*lines) == [names, {"preprocess"}, convert, {"prune"}]


def test_options_and_their_values_are_completed(complete):
    assert complete(
        "retemper preprocess --dedup",
        "retemper preprocess --dedup .",
        "retemper checkpoint prune --keep",
        "retemper train --training.tra",
        "retemper train --training.precision .",
    ) == [
        {"--dedup", "--dedup-threshold"},
        {"none", "exact", "minhash"},
        {"--keep-last", "--keep-every"},
        {f"--training.{key}" for key in ("trainable", "trainable+", "train_tokens", "train_steps", "train_epochs")},
        {"auto", "bf16", "fp16", "fp32"},
    ]


def test_file_names_are_completed(complete):
    assert complete(
        "retemper preprocess --input co",
        "retemper preprocess --input corpus.jsonl bo",
        "retemper report bo",
        "retemper train --run_folder bo",
        "retemper export --output c",  # takes folders only
    ) == [{"corpus.jsonl"}, {"books"}, {"books"}, {"books"}, set()]


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_has_a_script_with_the_commands(shell):
    script = completion_script(shell)
    assert all(name.split()[-1] in script for name, _ in commands.runnable())
