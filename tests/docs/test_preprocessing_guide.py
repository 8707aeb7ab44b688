"""Run every ``bash`` block of docs/preprocessing.md in order, in an empty folder, and compare what it prints."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from oracles.tiny_tokenizer import train_tiny_tokenizer

from retemper.engine.config.parser import parse_config

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "preprocessing.md").read_text(encoding="utf-8")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Block(NamedTuple):
    """A fenced block."""

    language: str
    content: str
    line: int


def blocks() -> list[Block]:
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    return [Block(one[1], one[2], GUIDE.count("\n", 0, one.start()) + 2) for one in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with nothing but the repository's commands in it, and a tokenizer elsewhere."""
    folder = tmp_path_factory.mktemp("guide")
    for name in ("tools", "launch", "engine"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    special = ("<|endoftext|>", "<|im_end|>", "<|im_start|>")
    tokenizer = train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), special=special)
    config = tokenizer / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": CHATML}))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "TOKENIZER": str(tokenizer)}


def squeezed(text: str) -> str:
    """``text`` without the widths of columns."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines())


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(folder, environment):
    """Each line of a text block is in what the block before it printed, in that order."""
    ran = 0
    for block, after in zip(blocks(), [*blocks()[1:], None], strict=True):
        if block.language != "bash":
            continue
        expected = after.content.splitlines() if after is not None and after.language == "text" else []
        command = ["bash", "-eu", "-o", "pipefail", "-c", block.content]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        fails = any(line.startswith("error:") for line in expected)
        assert done.returncode == int(fails), f"docs/preprocessing.md:{block.line}\n{done.stderr}"
        printed = squeezed(done.stdout + done.stderr)
        for line in expected:
            before, found, printed = printed.partition(squeezed(line))
            assert found, f"docs/preprocessing.md:{block.line}: not printed: {line}\n{before}"
        ran += 1
    assert ran >= 12


def test_commands_that_need_a_cluster_have_the_options_that_are_shown():
    shown = "\n".join(block.content.replace("\\\n", " ") for block in blocks() if block.language == "sh")
    preprocess = (ROOT / "tools" / "preprocess.py").read_text("utf-8")
    scripts = re.findall(r"(launch/\w+\.\w+)(.*)", shown)
    assert {script for script, _ in scripts} == {"launch/preprocess_slurm.sh", "launch/preprocess_datatrove.py"}
    for script, arguments in scripts:
        text = (ROOT / script).read_text("utf-8")
        own, separator, theirs = arguments.partition(" -- ")
        for option in re.findall(r"--[\w-]+", own if separator else ""):
            assert f'"{option}"' in text, f"{script} {option}"
        for option in re.findall(r"--[\w-]+", theirs if separator else arguments):
            assert f'"{option}"' in preprocess, f"{script} {option}"


def test_the_options_that_the_text_names_exist():
    commands = (
        *("tools/preprocess", "tools/merge", "tools/show_dataset", "tools/export_packed"),
        "launch/preprocess_datatrove",
    )
    known = "".join((ROOT / f"{name}.py").read_text("utf-8") for name in commands)
    prose = re.sub(r"^```.*?^```$", "", GUIDE, flags=re.DOTALL | re.MULTILINE)
    options = set(re.findall(r"--[a-z][\w-]+", prose)) - {"--help", "--no-append-eod"}  # made by argparse
    assert len(options) > 20
    assert not [option for option in sorted(options) if f'"{option}"' not in known]


def test_every_reason_that_is_counted_is_named_as_the_code_names_it():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "tools" / "preprocessing").rglob("*.py"))
    rows = [line.rsplit("|", 2)[1] for line in GUIDE.splitlines() if line.startswith(("| `--", "| (always)"))]
    reasons = {reason for cell in rows for reason in re.findall(r"`([^`]+)`", cell)}
    assert len(reasons) == 19
    assert not [reason for reason in sorted(reasons) if f'"{reason}"' not in code]


def test_configurations_that_are_shown_are_valid(tmp_path):
    rest = {"run_folder": "runs/x", "training": {"train_tokens": 100_000_000}, "model": {"architecture": "a folder"}}
    shown = [block.content for block in blocks() if block.language == "yaml"]
    assert len(shown) == 2
    for content in shown:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(rest) + content, encoding="utf-8")
        config = parse_config(["--config", str(path)])
        assert config.data.train or config.data.stages
