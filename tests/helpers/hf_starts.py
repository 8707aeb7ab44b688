"""Hugging Face folders to start runs from, and what the ranks of a run make of them."""

from __future__ import annotations

import time
from pathlib import Path

import huggingface_hub
import tiny_run
import torch
import yaml
from safetensors import safe_open
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights import parts, raw_bytes
from retemper.engine.weights.hugging_face import initial as begin

ARCHITECTURE = {**tiny_run.ARCHITECTURE, "vocab_size": 98, "tie_word_embeddings": False}
"""With as many rows of the vocabulary as two ranks can share, and a head of its own."""


def save_model(folder: Path, dtype: torch.dtype = torch.bfloat16, **changes) -> Path:
    """A folder that transformers has written, in several files."""
    # Imported here, because ranks import this module: each of them would take two seconds more.
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**{**ARCHITECTURE, **changes})).to(dtype)
    with torch.no_grad():  # transformers begins with zeros for biases and ones for norms
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(folder, max_shard_size="12KB")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, by the safetensors library."""
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def start(ranks: Ranks, path: Path, overrides: list[str]) -> dict:
    """This rank's weights before the first step, whole, the size of its parts, and what it read of the folder."""
    num_bytes, read = 0, raw_bytes.read_into

    def counting_read(descriptor, offset, rest, file):
        nonlocal num_bytes
        num_bytes += len(rest)
        read(descriptor, offset, rest, file)

    block = parts.BLOCK_BYTES
    raw_bytes.read_into, parts.BLOCK_BYTES = counting_read, 200  # some rows of these small tensors
    try:
        run = pretrain.build(tiny_run.configure(path, *overrides), ranks)
    finally:
        raw_bytes.read_into, parts.BLOCK_BYTES = read, block
    parameters = dict(run.model.named_parameters())
    local = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters.items()}
    return {
        "weights": {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in parameters.items()},
        "elements": {name: part.numel() for name, part in local.items()},
        "read": num_bytes,
        "casts": run.remarks,
        "assets": run.start.assets.files,
    }


def train_from_hub(ranks: Ranks, path: Path, overrides: list[str], copy: str) -> tuple[list[tuple], list[float]]:
    """A run of four steps from a name; what was asked of the Hub, which gives ``copy``, and when."""
    asked: list[tuple] = []
    moments: list[float] = []

    def download(name: str, key: str, revision: str | None, check: object) -> Path:
        assert key == "model.initialize_from"
        asked.append((name, revision))
        moments.append(time.monotonic())
        if ranks.is_main and revision is None:
            time.sleep(0.2)
            moments.append(time.monotonic())
        return Path(copy)

    original, begin.find_model_folder = begin.find_model_folder, download
    try:
        tiny_run.train(ranks, path, [*overrides, "--training.train_tokens", str(4 * 8 * 32)])
    finally:
        begin.find_model_folder = original
    return asked, moments


def refusal_of_download(ranks: Ranks, path: Path, overrides: list[str], problem: Exception, failing_rank: int) -> str:
    """What the run says whose download fails on one rank, as snapshot_download does."""
    copy: str = yaml.safe_load(path.read_text())["model"]["initialize_from"]

    def download(name: str, **options: object) -> str:
        if ranks.rank == failing_rank:
            raise problem
        return copy

    original, huggingface_hub.snapshot_download = huggingface_hub.snapshot_download, download
    try:
        return tiny_run.refusal(ranks, path, overrides)
    finally:
        huggingface_hub.snapshot_download = original
