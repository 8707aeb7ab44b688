"""A tiny run that trains in a second: its data, its configuration, and what its ranks are asked to do."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import yaml
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.config.settings import RunConfig
from retemper.engine.errors import UserError
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.run import Run
from retemper.engine.weights.checkpoint.manifest import with_checksum
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

VOCAB_SIZE = 97
EOD = VOCAB_SIZE - 1
ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def write_dataset(prefix: Path, seed: int, documents: int = 120, token: int | None = None) -> None:
    """A Megatron dataset of documents of 1 to 80 tokens."""
    generator = np.random.default_rng(seed)
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            length = int(generator.integers(1, 80))
            tokens = generator.zipf(1.3, size=length).clip(0, EOD - 1) if token is None else np.full(length, token)
            writer.add_document(np.append(tokens, EOD))


def write_config(folder: Path) -> Path:
    """The run's YAML file, with two training sources and one validation set in ``folder``."""
    for seed, name in enumerate(("first", "second", "validation")):
        write_dataset(folder / name, seed)
    config = {
        "run_folder": str(folder / "run"),
        "model": {"architecture": ARCHITECTURE},
        "data": {
            "train": [{"path": str(folder / "first"), "weight": 2.0}, {"path": str(folder / "second")}],
            "validation": {"validation": str(folder / "validation")},
        },
        "training": {
            "train_tokens": 20 * 8 * 32,
            "warmup_tokens": 4 * 8 * 32,
            "sequence_length": 32,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "precision": "fp32",
            "eval_interval": 5,
            "eval_tokens": 500,
        },
        "optimizer": {"learning_rate": 1e-2, "min_learning_rate": 1e-3},
        "checkpoint": {"save_interval": 4, "keep_best": False, "model_folders": "off"},
        "logging": {"tensorboard": False},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def configure(path: Path, *overrides: str) -> RunConfig:
    """The configuration with command-line overrides."""
    return parse_config(["--config", str(path), *overrides])


def train(ranks: Ranks, path: Path, overrides: list[str]) -> None:
    """The whole run."""
    pretrain.train(pretrain.build(configure(path, *overrides), ranks))


def train_until(ranks: Ranks, path: Path, overrides: list[str], step: int) -> None:
    """The run, left without ceremony after ``step`` steps (and what is saved by then)."""
    run = pretrain.build(configure(path, *overrides), ranks)

    class Left(BaseException):
        pass

    def leave_in_time():
        if run.progress.step == step:
            run.saver.wait()
            raise Left

    before_step(run, leave_in_time)
    with contextlib.suppress(Left):
        pretrain.train(run)


def before_step(run: Run, action: Callable[[], object]) -> None:
    """Call ``action`` in every step of ``run`` between its data and its passes."""
    accumulate_gradients = run.forward_backward.accumulate_gradients

    def train_after(*arguments):
        action()
        return accumulate_gradients(*arguments)

    run.forward_backward.accumulate_gradients = train_after


def refusal(ranks: Ranks, path: Path, overrides: list[str]) -> str:
    """What the run says when it refuses to go on."""
    try:
        train(ranks, path, overrides)
    except UserError as error:
        return str(error)
    raise AssertionError("the run went through")


def first_gradients(ranks: Ranks, path: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Full gradients of the first global batch, before clipping, by parameter name."""
    run = pretrain.build(configure(path, *overrides), ranks)
    batches = run.data.micro_batches(0)
    num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
    run.forward_backward.accumulate_gradients(batches, num_targets, lambda phase: None)
    return gradients(run)


def gradients(run: Run) -> dict[str, torch.Tensor]:
    """Full gradients of this rank's parameters, by name."""
    return {name: whole(p.grad) for name, p in run.model.named_parameters()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of a tensor, of which this rank may hold a part."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def records(run_folder: Path) -> list[dict]:
    """The metric records of a run."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def curve(run_folder: Path) -> list[tuple]:
    """(step, kind, loss, gradient norm, learning rate) of every record: what must not depend on the machine."""
    return [
        (r["step"], r.get("evaluation", "train"), r["loss"], r.get("grad_norm", 0.0), r.get("learning_rate", 0.0))
        for r in records(run_folder)
    ]


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored_tensors(checkpoint).items()}
    load_tensors(checkpoint, tensors, distributed=False)
    return tensors


def copy_of(run_folder: Path, target: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(run_folder, target)
    return target


def rewrite_manifest(path: Path, change: Callable[[dict], object]) -> None:
    """Let ``change`` edit the content of a manifest, and seal it again."""
    content = json.loads(path.read_text())
    del content["manifest_xxh3_128"]
    change(content)
    path.write_text(with_checksum(content))
