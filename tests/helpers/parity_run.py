"""A tiny run for comparing layouts: five steps, every gradient of the first, every parameter after the last."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.distributed.tensor import DTensor

from retemper.engine import pretrain
from retemper.engine.config.parser import parse_config
from retemper.engine.evaluation import count_targets
from retemper.engine.parallel.process_group import Ranks
from retemper.engine.weights.checkpoint.tensors import load_tensors, stored_tensors
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

VOCAB_SIZE = 96
STEPS = 5
GLOBAL_BATCH = 8
_SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_MULTIPLIERS = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0}
_LOCAL = {"head_dim": 8, "sliding_window": 9}
_NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
_GROWING = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
# Where positions do not rotate, a key bias adds the same score to all keys. Its gradient is then rounding noise, which
# AdamW normalizes: so families with partial rotation have no such bias here, or rotate everything.
_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "olmo2": {"attention_bias": True},
    "olmo3": {"sliding_window": 9},
    "smollm3": {},
    "granite": {"attention_multiplier": 0.2, **_MULTIPLIERS},
    "phi3": {},
    "gemma2": {**_LOCAL, "query_pre_attn_scalar": 10},
    "gemma3_text": {**_LOCAL, "sliding_window_pattern": 2, "query_pre_attn_scalar": 10},
    "seed_oss": {"head_dim": 8, "attention_out_bias": True, **_NO_DROPOUT},
    "ministral3": {"head_dim": 8, "rope_parameters": {**_GROWING, "llama_4_scaling_beta": 0.1}},
    "gpt_neox": {"rotary_pct": 1.0},
    "glm4": {"head_dim": 8, "attention_bias": False},
    "cohere2": {"sliding_window": 9},
    "starcoder2": {"sliding_window": 9},
    "stablelm": {"use_parallel_residual": True},
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    # Three experts of each of two ranks: FSDP divides them unevenly.
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "mlp_only_layers": [1],
    },
}
FAMILIES: dict[str, dict[str, Any]] = {
    family: {"model_type": family, **_SHAPE, **changes} for family, changes in _CHANGES.items()
}


class Model(NamedTuple):
    """What is trained: which family, whether its embedding is its head, whether documents are kept apart."""

    family: str
    tied: bool
    packed: bool

    def __str__(self) -> str:
        return f"{self.family} {'tied' if self.tied else 'untied'} {'packed' if self.packed else 'whole'}"


class Outcome(NamedTuple):
    """What one rank has to show."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    """After the first step's passes, before clipping."""
    parameters: dict[str, Tensor]
    """After the last step."""


def write_run(folder: Path, model: Model) -> Path:
    """The YAML file of a run, and its dataset of documents of 1 to 70 tokens."""
    generator = np.random.default_rng(7)
    with IndexedDatasetWriter(str(folder / "data"), np.uint16) as writer:
        for _ in range(80):
            length = int(generator.integers(1, 70))
            writer.add_document(generator.zipf(1.3, size=length).clip(0, VOCAB_SIZE - 1))
    config = {
        "run_folder": str(folder / "run"),
        "model": {"architecture": {**FAMILIES[model.family], "tie_word_embeddings": model.tied}},
        "data": {"train": [{"path": str(folder / "data")}], "attend_across_documents": not model.packed},
        "training": {
            "train_tokens": STEPS * GLOBAL_BATCH * 32,
            "warmup_tokens": 2 * GLOBAL_BATCH * 32,
            "sequence_length": 32,
            "global_batch_size": GLOBAL_BATCH,
            "micro_batch_size": 1,
            "precision": "fp32",
        },
        "optimizer": {"learning_rate": 1e-3, "min_learning_rate": 1e-4},
        "checkpoint": {"save_interval": 3, "model_folders": "off"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def five_steps(ranks: Ranks, path: Path, overrides: list[str]) -> Outcome:
    """Train on this rank with the others."""
    run = pretrain.build(parse_config(["--config", str(path), *overrides]), ranks)
    gradients: dict[str, Tensor] = {}
    accumulate_gradients = run.forward_backward.accumulate_gradients

    def train(*arguments: Any) -> Tensor:
        loss = accumulate_gradients(*arguments)
        if not gradients:
            gradients.update(_whole({name: p.grad for name, p in run.model.named_parameters() if p.requires_grad}))
        return loss

    run.forward_backward.accumulate_gradients = train  # type: ignore[method-assign]
    losses, norms = [], []
    for step in range(STEPS):
        batches = run.data.micro_batches(step * GLOBAL_BATCH)
        num_targets = ranks.all_reduce(count_targets(batches, run.mesh))
        result = pretrain.one_step(run, batches, num_targets)
        losses.append(ranks.all_reduce(result.loss.item()))
        norms.append(result.grad_norm.item())
    return Outcome(losses, norms, gradients, _whole(dict(run.model.named_parameters())))


def run_until(ranks: Ranks, path: Path, overrides: list[str], last_step: int) -> None:
    """The run, evaluations and checkpoints and all; left without ceremony when it begins a step after ``last_step``."""
    run = pretrain.build(parse_config(["--config", str(path), *overrides]), ranks)

    accumulate_gradients = run.forward_backward.accumulate_gradients

    class Left(BaseException):
        pass

    def train(*arguments: Any) -> Tensor:
        if run.progress.step == last_step:
            run.saver.wait()
            raise Left
        return accumulate_gradients(*arguments)

    run.forward_backward.accumulate_gradients = train  # type: ignore[method-assign]
    with contextlib.suppress(Left):
        pretrain.train(run)


def checkpoint(run_folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole."""
    folder = run_folder / "checkpoints" / f"step-{step:08}"
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in stored_tensors(folder).items()}
    load_tensors(folder, tensors, distributed=False)
    return tensors


def records(run_folder: Path) -> list[dict[str, Any]]:
    """The metric records of a run."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _whole(tensors: dict[str, Tensor | None]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        assert tensor is not None, f"{name} has no gradient"
        found[name] = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
    return found


def joined(outcomes: list[Outcome]) -> Outcome:
    """What all ranks have to show together. What several hold, they must hold alike, bit for bit."""
    first = outcomes[0]
    together = Outcome(first.losses, first.grad_norms, {}, {})
    for outcome in outcomes:
        assert outcome.losses == first.losses and outcome.grad_norms == first.grad_norms
        for field in ("gradients", "parameters"):
            known = getattr(together, field)
            for name, tensor in getattr(outcome, field).items():
                assert torch.equal(known.setdefault(name, tensor), tensor), f"{field} of {name} differ between ranks"
    return together
