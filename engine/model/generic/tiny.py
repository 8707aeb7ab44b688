"""Shrink a model: the same type and options, with tiny sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, HEAD_DIM, VOCABULARY, WINDOW = 64, 4, 16, 128, 8
_BLOCKS = 4
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "global_head_dim", "attention_head_dim"), HEAD_DIM),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH // 2),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_zero_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_selected_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "local_window"), WINDOW),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), HEAD_DIM),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "d_state"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "n_mamba_heads"), 2 * WIDTH // HEAD_DIM),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "linear_num_key_heads": 2,
    "linear_num_value_heads": HEADS,
    "hidden_size_per_layer_input": 8,
    "lru_width": WIDTH,
    "mamba_d_ssm": 2 * WIDTH,
    "mamba_dt_rank": 4,
    "time_step_rank": 4,
    "adapter_rank": 4,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mamba_chunk_size": WINDOW,
    "chunk_size": WINDOW,
}
"""Tiny values of the settings that are sizes. They replace only larger numbers."""
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_global_key_value_heads")
_NUM_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_BLOCK = ("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "block_types")
"""Lists with an element for each block."""
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
"""Number of blocks without experts at the beginning."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config``, all settings of a model by name, with tiny sizes."""
    tiny = dict(config)
    heads = next(
        (config[key] for key in ("num_attention_heads", "n_head", "num_heads", "n_heads") if config.get(key)), 0
    )
    for key, value in config.items():
        if key in _SIZES and _is_number(value):
            tiny[key] = min(value, _SIZES[key])
        elif key in _KV_HEADS and _is_number(value):
            tiny[key] = HEADS if value >= heads else min(value, 2)
        elif key in _TOKENS:
            tiny[key] = _token(value)
    if _is_number(tiny.get("rotary_dim")):
        tiny["rotary_dim"] = min(tiny["rotary_dim"], HEAD_DIM // 2)
    if tiny.get("kv_lora_rank") and "head_dim" in tiny:  # then it is the size of the rotary part of a head
        tiny["head_dim"] = tiny["qk_rope_head_dim"]
    return {**tiny, **_few_blocks(config)}


def _few_blocks(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model with one block of each kind, at least as many as there are on average."""
    lists = {key: list(config[key]) for key in _PER_BLOCK if isinstance(config.get(key), (list, tuple)) and config[key]}
    count = next((config[key] for key in _NUM_BLOCKS if _is_number(config.get(key))), _BLOCKS)
    kinds = list(zip(*(lists[key] for key in lists), strict=False)) if lists else []
    chosen = sorted({*(kinds.index(kind) for kind in kinds), *range(min(2, len(kinds)))})
    few = len(chosen) if kinds else min(count, _BLOCKS)
    changed: dict[str, Any] = {key: few for key in _NUM_BLOCKS if _is_number(config.get(key))}
    for key, values in lists.items():
        changed[key] = [values[index] for index in chosen]
    return changed


def with_num_blocks(config: Mapping[str, Any], count: int) -> dict[str, Any]:
    """Return ``config``, all settings of a model by name, with ``count`` of its blocks at equal distances."""
    changed = dict(config)
    before = next(config[key] for key in _NUM_BLOCKS if _is_number(config.get(key)))
    chosen = [index * before // count for index in range(count)]
    for key in _NUM_BLOCKS:
        if _is_number(config.get(key)):
            changed[key] = count
    for key in _PER_BLOCK:
        if isinstance(config.get(key), (list, tuple)) and len(config[key]) == before:
            changed[key] = [config[key][index] for index in chosen]
    for key in _FIRST_DENSE:
        if _is_number(config.get(key)):
            changed[key] = sum(index < config[key] for index in chosen[1:])
    return changed


def _token(value: Any) -> Any:
    return value % VOCABULARY if _is_number(value) else None if value is None else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
