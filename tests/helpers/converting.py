"""How the tests of the converters run them, and spoil what they read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from forked import Program
from safetensors.torch import load_file, save_file
from tiny_models import Command
from transformers import AutoModelForCausalLM

from retemper.engine.weights.conversion import dcp_to_hf, hf_to_dcp

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
Run = Callable[..., Command]
Copy = Callable[[str], Path]
Start = Callable[..., Program]


def convert_there(hf: Path | str, output: Path, **options: object) -> list[str]:
    """Convert to a checkpoint; returns what was said."""
    said: list[str] = []
    hf_to_dcp.convert(str(hf), output, say=said.append, **options)
    return said


def convert_back(checkpoint: Path, output: Path, **options: object) -> list[str]:
    """Convert to a Hugging Face folder; returns what was said."""
    said: list[str] = []
    dcp_to_hf.convert(checkpoint, output, say=said.append, **options)
    return said


def logits(folder: Path) -> torch.Tensor:
    """What transformers computes from ``folder``, in the dtype that its config declares."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(40).view(2, 20) * 7 % 97
    with torch.no_grad():
        return model(tokens).logits


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Apply ``change`` to the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
