"""docs/vocabulary.md runs as it stands: every ``bash`` block in order, in an empty folder, and prints what it says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from retemper.tools.demo.bpe import train_tokenizer

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "vocabulary.md").read_text(encoding="utf-8")


def write_model(folder: Path, text: Path) -> Path:
    """A tiny Qwen2 whose tokenizer knows some English."""
    rows = -(-train_tokenizer([text], folder, 600) // 64) * 64
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_guide_runs_as_it_stands(tmp_path):
    """Each line of a text block is in what the block before it printed, in that order."""
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "%s"}\n' % (" ".join(re.findall(r"[a-z]+", GUIDE)) * 3))
    model = write_model(tmp_path / "model", text)
    guide = tmp_path / "guide"
    guide.mkdir()
    for name in ("tools", "engine", "checkpoint_convert"):
        (guide / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MODEL": str(model)}
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE, re.DOTALL | re.MULTILINE)
    ran = 0
    for (language, content), (after, expected) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if language != "bash":
            continue
        command = ["bash", "-eu", "-o", "pipefail", "-c", content]
        done = subprocess.run(command, cwd=guide, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{content}\n{done.stderr[-2000:]}"
        printed = " ".join((done.stdout + done.stderr).split())
        for line in expected.splitlines() if after == "text" else ():
            before, found, printed = printed.partition(" ".join(line.split()))
            assert found, f"{content}\nnot printed: {line}\n{before}"
        ran += 1
    assert ran == 5
    old, new = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (model, guide / "ckpt" / "extended" / "hf"))
    assert new.get_vocab_size() == old.get_vocab_size() + 300


def test_the_options_that_the_text_names_exist():
    known = (ROOT / "tools" / "extend_vocab.py").read_text("utf-8")
    prose = re.sub(r"^```.*?^```$", "", GUIDE, flags=re.DOTALL | re.MULTILINE)
    options = set(re.findall(r"--[a-z][\w-]+", prose))
    assert len(options) >= 3
    assert not [option for option in sorted(options) if f'"{option}"' not in known]
