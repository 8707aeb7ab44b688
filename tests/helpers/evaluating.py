"""Models with tokenizers and texts that are evaluated, and the evaluation itself on ranks that exist."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from oracles.tiny_tokenizer import sample_text

from retemper.engine.parallel import mesh
from retemper.engine.parallel.layout import plan_layout
from retemper.engine.parallel.process_group import Ranks
from retemper.tools.evaluation.command import evaluate_models
from retemper.tools.evaluation.options import EvaluateOptions, parse_sets
from retemper.tools.evaluation.plan import plan_evaluation
from retemper.tools.evaluation.scores import EvaluationResult
from retemper.tools.preprocessing.dataset_writer import IndexedDatasetWriter

FP32 = ("--training.precision", "fp32", "--device", "cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 416,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MORE_OF_TYPE: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma2": {"sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
}


def save_model(folder: Path, model_type: str, tokenizer: Path, seed: int = 0, **options: Any) -> Path:
    """Save a random model with the files of a tokenizer. Biases of routers are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **MORE_OF_TYPE[model_type], **options})
    model = AutoModelForCausalLM.from_config(config).float()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 17 words and more, each of which begins with a word of ASCII."""
    return [f"rain {sample_text(seed * 1000 + number, 16 + 3 * number)}" for number in range(count)]


def write_jsonl(path: Path, documents: Sequence[str]) -> Path:
    """Write documents as JSON lines."""
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    return path


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    """Write a dataset without a sidecar."""
    with IndexedDatasetWriter(str(prefix), np.uint16) as writer:
        for ids in documents:
            writer.add_document(np.array(ids))
    return str(prefix)


def request(model: Path | str, *data: Path | str, **options: Any) -> EvaluateOptions:
    """The request of a user, with ``NAME=PATH`` in ``data``."""
    return EvaluateOptions(str(model), parse_sets([str(one) for one in data]), **options)


def evaluate(ranks: Ranks, options: EvaluateOptions, words: Sequence[str] = FP32) -> EvaluationResult:
    """What ``retemper evaluate`` does on every rank of a process group."""
    plan = plan_evaluation(options, words, ranks.world_size)
    parallel = plan.config.parallel
    found = mesh.build_mesh(plan_layout(parallel, ranks.world_size), ranks.device.type, parallel.expert)
    return evaluate_models(plan, ranks, found, lambda *lines: None)
