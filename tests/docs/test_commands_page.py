"""docs/commands.md and docs/installation.md have every command and every extra."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from retemper.tools.cli.commands import runnable

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_every_command_with_its_summary_and_file() -> None:
    page = (ROOT / "docs" / "commands.md").read_text("utf-8")
    rows = re.findall(r"^\| `retemper ([\w -]+)` \| (.+) \| `([\w/]+)\.py` \|$", page, re.MULTILINE)
    assert rows == [(name, command.summary, command.module.replace(".", "/")) for name, command in runnable()]


def test_the_table_has_every_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict = {}
    stand_in = SimpleNamespace(find_packages=lambda *_, **__: [], setup=lambda **keywords: given.update(keywords))
    for name in ("setuptools", "setuptools.command"):
        monkeypatch.setitem(sys.modules, name, stand_in)
    monkeypatch.setitem(sys.modules, "setuptools.command.build_py", SimpleNamespace(build_py=object))
    runpy.run_path(str(ROOT / "setup.py"))
    page = (ROOT / "docs" / "installation.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[\w`, ]+`) \| [\w`]", page, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"\w+", row)} == {*given["extras_require"]}
