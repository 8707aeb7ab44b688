"""docs/conversion.md runs as it stands: every ``bash`` block, in a folder with a model, prints what it says."""

from __future__ import annotations

import filecmp
import re
import runpy
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retemper.engine.weights.block_copy import BLOCK_BYTES
from retemper.engine.weights.conversion.logits import TOLERANCE
from retemper.engine.weights.workers import MAX_WORKERS

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "conversion.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the repository's commands and a tiny model in it."""
    (tmp_path / "checkpoint_convert").symlink_to(ROOT / "checkpoint_convert")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "models" / "base")
    return tmp_path


def run_line(line: str) -> None:
    """Run one command of a block in this process, which has imported what it needs."""
    program, *arguments = shlex.split(line)
    if program == "cmp":
        assert filecmp.cmp(*arguments, shallow=False), line
        return
    assert program == "python", line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(arguments[0], run_name="__main__")
    assert exit_.value.code == 0, line


def test_the_guide_runs_as_it_stands(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each line of a text block is in what the block before it printed, in that order."""
    found = re.findall(r"^```bash\n(.*?)^```$\n\n^```text\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    assert len(found) == GUIDE.count("```bash") == 3
    monkeypatch.chdir(folder)
    before = signal.getsignal(signal.SIGTERM)
    for block, expected in found:
        capfd.readouterr()
        for line in block.splitlines():
            run_line(line)
        printed = capfd.readouterr().out
        for line in expected.splitlines():
            skipped, there, printed = printed.partition(line)
            assert there, f"not printed: {line}\n{skipped}"
    signal.signal(signal.SIGTERM, before)


def test_options_that_the_guide_names_exist() -> None:
    commands = (ROOT / "checkpoint_convert" / name for name in ("hf_to_dcp.py", "dcp_to_hf.py"))
    shared = ROOT / "engine" / "weights" / "conversion" / "options.py"
    merging = ROOT / "tools" / "checkpoint.py"
    scripts = "".join(path.read_text("utf-8") for path in (*commands, shared, merging))
    options = set(re.findall(r"--[a-z][\w-]+", GUIDE))
    assert len(options) >= 8
    assert not [option for option in sorted(options) if f'"{option}"' not in scripts]


def test_numbers_that_the_guide_gives() -> None:
    assert f"blocks of {BLOCK_BYTES >> 20} MB" in GUIDE
    assert int(re.search(r"default: one per CPU, up to (\d+)", GUIDE)[1]) == MAX_WORKERS
    assert re.search(r"(\w+) of the largest\s+logit", GUIDE)[1] == {1e-3: "thousandth"}[TOLERANCE]
