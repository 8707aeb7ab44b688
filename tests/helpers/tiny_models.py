"""Tiny random models of every family, and how tests look at folders and commands."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
TOKENIZER = {"tokenizer.json": b'{"opaque": "to converters"}', "tokenizer_config.json": b"{ }", "merges.txt": b"a b\n"}


class Family(NamedTuple):
    """How one of the models is made and saved."""

    config: type
    model: type
    settings: dict[str, Any]
    dtype: torch.dtype
    shard_size: str


FAMILIES = {
    "llama": Family(LlamaConfig, LlamaForCausalLM, {"attention_bias": True}, torch.bfloat16, "8KB"),
    "mistral": Family(MistralConfig, MistralForCausalLM, {"sliding_window": 8}, torch.float32, "5GB"),
    "qwen2-tied": Family(Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}, torch.float32, "16KB"),
    "qwen3": Family(Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False}, torch.float16, "5GB"),
}


class RawTensor(NamedTuple):
    """A tensor as it stands in a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def read_safetensors(path: Path) -> tuple[dict[str, RawTensor], dict[str, str]]:
    """Tensors and metadata of a file, read after the published layout: 8 bytes of header length, JSON, data."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {
        name: RawTensor(item["dtype"], tuple(item["shape"]), data[slice(*item["data_offsets"])])
        for name, item in header.items()
    }
    return tensors, metadata


def read_folder(folder: Path) -> dict[str, RawTensor]:
    """All tensors of all safetensors files in ``folder``, each of which must be in one file only."""
    tensors: dict[str, RawTensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found, _ = read_safetensors(path)
        assert not tensors.keys() & found.keys()
        tensors.update(found)
    return tensors


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply ``change`` to the JSON object in ``path``."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


class Command(NamedTuple):
    """What a command did."""

    status: int
    stdout: str
    stderr: str


def assert_refused(command: Command, *fragments: str) -> None:
    """One line on stderr that contains all ``fragments``, and exit status 1."""
    assert command.status == 1, command
    lines = command.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), command.stderr
    for fragment in fragments:
        assert fragment in lines[0]
