"""Tiny random models of transformers for every native family, and the native decoder with their weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from retemper.engine.model.decoder import Decoder
from retemper.engine.model.families import parse_decoder_architecture

VOCAB = 211
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 6.0],
}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
GROWING = {**YARN, "llama_4_scaling_beta": 0.1, "max_position_embeddings": 512}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 40}
DEEPSEEK_EXPERTS = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "head_dim": 16,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama multi-head": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "yarn": ("llama", {"rope_parameters": YARN}),
    "dynamic rope": (
        "llama",
        {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "squared relu": ("llama", {"hidden_act": "relu2"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral with window": ("mistral", {"sliding_window": 5, "head_dim": 24}),
    "ministral3": ("ministral3", {"head_dim": 16, "rope_parameters": GROWING, "sliding_window": 9}),
    "qwen2 untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen2 unused window": ("qwen2", {"use_sliding_window": False, "sliding_window": 7}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": False}),
    "qwen3 with biases": ("qwen3", {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "olmo2 with biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "olmo3": ("olmo3", {"sliding_window": 7, "num_hidden_layers": 4, "rope_scaling": {**YARN, "rope_theta": 5e5}}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4}),
    "smollm3 with windows": (
        "smollm3",
        {"no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 6, "attention_bias": True},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
            "mlp_bias": True,
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3 with longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 20}),
    "gemma3_text": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 20},
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16, "attention_out_bias": True, **NO_DROPOUT}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "gpt_neox in sequence": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "glm4": ("glm4", {"head_dim": 16}),
    "cohere2": ("cohere2", {"sliding_window": 6, "num_hidden_layers": 4, "attention_bias": True}),
    "starcoder2": ("starcoder2", {"sliding_window": 9, "num_hidden_layers": 2}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm in parallel": ("stablelm", {"use_parallel_residual": True, "num_key_value_heads": 4}),
    "qwen2_moe": ("qwen2_moe", SHARED),
    "qwen2_moe in some layers": (
        "qwen2_moe",
        {**SHARED, "decoder_sparse_step": 2, "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe in some layers": (
        "qwen3_moe",
        {**EXPERTS, "head_dim": 16, "mlp_only_layers": [0, 2], "attention_bias": True, "tie_word_embeddings": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral with window": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 5}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe normalized": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 4, "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {**DEEPSEEK_EXPERTS, "use_qk_norm": True, "attention_bias": True}),
    "glm4_moe without groups": (
        "glm4_moe",
        {**DEEPSEEK_EXPERTS, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_shared_experts": 1},
    ),
    "dots1": ("dots1", {**DEEPSEEK_EXPERTS, "norm_topk_prob": True}),
    "dots1 with windows": (
        "dots1",
        {
            **DEEPSEEK_EXPERTS,
            "first_k_dense_replace": 0,
            "max_window_layers": 1,
            "sliding_window": 6,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
"""Models by name: the family, and what differs from :data:`SHAPE`."""


def hf_config(name: str) -> PreTrainedConfig:
    """The configuration of a model as transformers has it."""
    family, changes = MODELS[name]
    return AutoConfig.for_model(family, **json.loads(json.dumps({**SHAPE, **changes})))


def hf_model(config: PreTrainedConfig) -> torch.nn.Module:
    """A random model with eager attention, whose norms and biases are random too."""
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Gemma's norms add one to the weight.
                center = float("norm" in name and not config.model_type.startswith("gemma"))
                parameter.normal_(center if name.endswith("weight") else 0.0, 0.2)
            else:
                parameter.normal_(0.0, 0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model


def stored_state(hf: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """What ``hf`` writes to files, by name."""
    from safetensors.torch import load_file

    hf.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def parts_of(decoder: Decoder, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of files, or gradients with their names, cut into those of the decoder's parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in decoder.named_parameters()}
    pieces = decoder.architecture.stored_pieces(shapes)
    parts = {}
    for name, shape in shapes.items():
        if name in decoder.constants and name not in stored:  # it has no gradient
            continue
        if name not in pieces:
            parts[name] = stored[name]
            continue
        part = torch.full(shape, float("nan"))
        for piece in pieces[name]:
            source = stored[piece.tensor][_box(piece.offsets, piece.sizes)]
            box = _box(piece.at, piece.sizes)
            part[box] = source.view(part[box].shape)
        assert not part.isnan().any(), name
        parts[name] = part
    return parts


def _box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[slice, ...]:
    sizes = (*(1 for _ in offsets[len(sizes) :]), *sizes)
    return tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))


def renamed_as_stored(hf: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by names of transformers' module, such as gradients, as it writes them to files."""
    return dict(revert_weight_conversion(hf, dict(tensors)))


def our_model(hf: torch.nn.Module) -> Decoder:
    """The native decoder with the weights of ``hf``."""
    decoder = Decoder(parse_decoder_architecture(hf.config.to_dict()))
    state = renamed_as_stored(hf, dict(hf.state_dict()))
    decoder.load_state_dict(parts_of(decoder, state), strict=True)
    return decoder
