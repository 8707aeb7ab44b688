"""What the pages show of tools/plan.py is what the command prints."""

from __future__ import annotations

import re

import pytest
from documented_commands import ROOT, Documented, command_lines

from retemper.tools import plan


def shown(page: str, flag: str) -> tuple[list[str], str]:
    """The arguments of the only planning command of a page with ``flag``, and the text that follows it."""
    text = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    blocks = re.findall(r"((?:^    .*\n)+)\n```text\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    commands = [(line, block) for lines, block in blocks for line in command_lines(lines) if flag in line]
    [(line, block)] = commands
    program, script, *arguments = Documented(page, line).words
    assert (program, script) == ("python", "tools/plan.py")
    return arguments, block


@pytest.mark.slow
@pytest.mark.parametrize(("page", "flag"), [("profiling", "--savings"), ("planning", "--parallel.offload_activations")])
def test_a_page_shows_what_the_command_prints(page, flag, monkeypatch, capsys):
    arguments, block = shown(page, flag)
    monkeypatch.chdir(ROOT)
    plan.main(arguments)
    assert capsys.readouterr().out.strip() == block.strip()


@pytest.mark.parametrize(("page", "flag"), [("profiling", "--savings"), ("planning", "--parallel.offload_activations")])
def test_the_pages_have_these_commands(page, flag):
    arguments, block = shown(page, flag)
    assert "--config" in arguments and "GiB reserve of" in block
