"""Tiny random vision-language models, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 98,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_TOKENS = {"image_token_id": 97, "video_token_id": 96, "vision_start_token_id": 95, "vision_end_token_id": 94}
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "head_dim": 16, "sliding_window": 8},
        "vision_config": {**VISION, "model_type": "siglip_vision_model"},
        "mm_tokens_per_image": 4, "image_token_index": 97, "boi_token_index": 96, "eoi_token_index": 95,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 16},
        "image_token_index": 97,
    },
    "qwen2_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                          "intermediate_size": 64, "fullatt_block_indexes": [1]},
        **QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                          "intermediate_size": 64, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "llama4": {
        "text_config": {**TEXT, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 4},
        "vision_config": {**VISION, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64},
        "boi_token_index": 96, "eoi_token_index": 95, "image_token_index": 97,
    },
    "qwen3_5": {
        "text_config": {**TEXT, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                        "linear_key_head_dim": 16, "linear_value_head_dim": 16},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                          "intermediate_size": 64, "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {**TEXT, "head_dim": 16, "rope_parameters": {**MROPE, "mrope_interleaved": True},
                        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2,
                          "intermediate_size": 64, "deepstack_visual_indexes": [1], "num_position_embeddings": 16},
        **QWEN_TOKENS,
    },
}  # fmt: skip


def wrapped_model(model_type: str, **changes: Any) -> Any:
    """A random model of the type."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **WRAPPERS[model_type], **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model


def save_wrapped(folder: Path, model_type: str, **changes: Any) -> Path:
    """The folder of a random model, with an image processor's file."""
    wrapped_model(model_type, **changes).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder
