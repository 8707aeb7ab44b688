"""Fixtures of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.tiny_tokenizer import train_tiny_tokenizer

from retemper.engine.errors import run_command
from retemper.tools import preprocess as command


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small byte-level BPE tokenizer whose config, like Qwen's, names <|im_end|> as EOS."""
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def refused(capsys, tiny_tokenizer):
    """Run the command line, require exit status 1 and one line on stderr, and return that line."""

    def check(*arguments: Path | str) -> str:
        full = ["--tokenizer", str(tiny_tokenizer), "--workers", "1", *map(str, arguments)]
        with pytest.raises(SystemExit) as exit_:
            run_command(lambda: command.main(full))
        lines = [
            line
            for line in capsys.readouterr().err.splitlines()
            if not line.endswith(" workers") and line[:6] != "note: "
        ]
        assert exit_.value.code == 1
        assert len(lines) == 1, lines
        return lines[0]

    return check
