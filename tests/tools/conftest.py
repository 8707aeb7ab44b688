"""Fixtures of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.tiny_tokenizer import train_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small byte-level BPE tokenizer whose config, like Qwen's, names <|im_end|> as EOS."""
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
