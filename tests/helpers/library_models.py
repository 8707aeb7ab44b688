"""Tiny random models of many types, as transformers makes and saves them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

TABLE = json.loads((Path(__file__).parents[1] / "fixtures" / "tiny_models.json").read_text())
OTHER_TYPES: dict[str, dict[str, Any]] = {
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
              "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "head_dim": 16},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 32},
}  # fmt: skip
"""Further types with experts, which are not in the table."""
WITHOUT_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
TYPES: dict[str, dict[str, Any]] = {
    **TABLE["types"],
    **OTHER_TYPES,
    "seed_oss": {**TABLE["types"]["seed_oss"], **WITHOUT_DROPOUT},
}


@functools.cache
def library_model(model_type: str, seed: int = 0) -> Any:
    """A random tiny model of the type, whose buffers have random values too. Not to be changed."""
    common = {} if model_type == "gpt2" else TABLE["common"]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**common, **TYPES[model_type]}))
    persistent = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name in sorted(persistent):
            model.get_buffer(name).normal_()
    return model


def own_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters and persistent buffers, without those that are tied to others."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
