"""Folders of tiny mixtures of experts of transformers, whose routers are far from uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
_SIGMOID = {
    "head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "head_dim": 8,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    **dict.fromkeys(("dots1", "glm4_moe"), _SIGMOID),
}
TOKENS = torch.randint(0, VOCAB, (1, 24), generator=torch.Generator().manual_seed(1))


def save_mixture(folder: Path, family: str, dtype: torch.dtype = torch.float32, seed: int = 3, **changes: Any) -> Path:
    """Write a random model of a family."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**_SHAPE, **FAMILIES[family], "initializer_range": 0.1, **changes})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return folder


def architecture_options(family: str) -> list[str]:
    """The options that change the tiny run's model into a mixture."""
    values = {"model_type": family, **FAMILIES[family]}
    return [word for key, value in values.items() for word in (f"--model.architecture.{key}", str(value).lower())]


def logits(folder: Path) -> torch.Tensor:
    """[T, V] logits of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits[0]
