"""docs/configuration_reference.md: every setting is in it, and it is what the code says now."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import retemper
from retemper.engine.config.checks import RANGES, problems
from retemper.engine.config.settings import (
    DataConfig,
    ParameterGroupConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainingConfig,
)
from retemper.engine.config.spelling import known_keys
from retemper.engine.config.types_check import accepts, hints_of
from retemper.tools import config_reference

ROOT = Path(retemper.__file__).parent
RUN = RunConfig("runs/x", DataConfig(train=[SourceConfig("x")]), TrainingConfig(train_tokens=1))
CHECKED_WITH_OTHER_SETTINGS = {
    "data.train[].max_tokens",
    "data.stages[].train_tokens",
    "optimizer.decay_tokens",
    "optimizer.schedule_start_tokens",
    "parallel.shard",
}


def every_key() -> dict[str, Any]:
    keys = {name: hint for name, hint in known_keys() if not is_dataclass(hint)}
    keys |= {f"data.train[].{name}": hint for name, hint in hints_of(SourceConfig).items()}
    keys |= {f"optimizer.groups[].{name}": hint for name, hint in hints_of(ParameterGroupConfig).items()}
    return keys | {f"data.stages[].{name}": hint for name, hint in hints_of(StageConfig).items()}


def test_the_page_is_current():
    assert config_reference.PAGE.read_text("utf-8") == config_reference.render(), "run `make docs`"


def test_every_key_has_an_entry_with_a_default_and_a_text():
    entries = re.findall(r"^### `([^`]+)`\n\n(.+)\n\n(.+)$", config_reference.render(), re.MULTILINE)
    assert [name for name, *_ in entries] == list(dict.fromkeys(name for name, *_ in entries))
    assert {name for name, *_ in entries} == every_key().keys()
    for name, facts, text in entries:
        assert re.search(r"; (default `|required)", facts), name
        assert len(text.split()) >= 2, name


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("training.train_tokens", "int or null; default `null`; at least 1 and at most 1e+15"),
        ("training.precision", "`auto` or `bf16` or `fp16` or `fp32`; default `auto`"),
        ("training.compile", "`auto` or `on` or `off`; default `auto`; `true` means `on`, `false` means `off`"),
        ("model.tokenizer", "text or null (a path); default `null`"),
        ("optimizer.eps", "float; default `1e-08`; positive and finite"),
        ("data.stages[].train", "a list of entries `data.train[]`; required"),
    ],
)
def test_facts(key, facts):
    assert f"### `{key}`\n\n{facts}\n" in config_reference.render()


def test_numbers_have_a_range_or_are_checked_with_other_settings():
    numbers = {name for name, hint in every_key().items() if accepts(1, hint) and not accepts(True, hint)}
    assert numbers == RANGES.keys() | CHECKED_WITH_OTHER_SETTINGS


def with_value(key: str, value: float, settings: Any = RUN) -> Any:
    first, _, rest = key.partition(".")
    return replace(settings, **{first: with_value(rest, value, getattr(settings, first)) if rest else value})


@pytest.mark.parametrize("key", [key for key in RANGES if "[]" not in key])
@pytest.mark.parametrize("wrong", [-1, float("nan")])
def test_values_outside_the_range_are_refused(key, wrong):
    assert f"{key} is {wrong}; it must be {RANGES[key].words}" in list(problems(with_value(key, wrong)))


def test_the_command_writes_the_page_without_torch(tmp_path):
    program = (
        "import runpy, sys; sys.argv = ['x', '--output', sys.argv[2]] ; "
        f"runpy.run_path({str(ROOT / 'tools' / 'config_reference.py')!r}, run_name='x')['main'](); "
        "assert 'torch' not in sys.modules"
    )
    page = tmp_path / "page.md"
    command = [sys.executable, "-c", program, "--output", str(page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert page.read_text("utf-8") == config_reference.render()
