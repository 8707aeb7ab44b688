"""Shrink a model: the same type and options, with tiny sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH, HEADS, HEAD_DIM, VOCABULARY, WINDOW = 64, 4, 16, 128, 8
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "embedding_size"), WIDTH),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(("head_dim", "kv_channels", "v_head_dim", "global_head_dim", "attention_head_dim"), HEAD_DIM),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), WIDTH // 2),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts", "num_zero_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), HEAD_DIM),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), HEAD_DIM // 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "attention_window_size", "local_window"), WINDOW),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), HEAD_DIM),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "d_state"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), HEAD_DIM),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads", "n_mamba_heads"), 2 * WIDTH // HEAD_DIM),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    "linear_num_key_heads": 2,
    "linear_num_heads": HEADS,
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
_QUERY_HEADS = ("num_attention_heads", "n_head", "num_heads", "n_heads")
_NUM_BLOCKS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
"""Number of blocks without experts at the beginning."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def tiny_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config``, all settings of a model by name, with tiny sizes and one block of each kind."""
    count = next((config[key] for key in _NUM_BLOCKS if _is_number(config.get(key))), 0)
    chosen = _blocks_of_all_kinds(config, count)
    heads = next((config[key] for key in _QUERY_HEADS if _is_number(config.get(key))), 0)
    tiny = {key: _shrunk(key, _of_blocks(value, count, chosen), heads) for key, value in config.items()}
    tiny |= {key: len(chosen) for key in _NUM_BLOCKS if _is_number(config.get(key))}
    if kinds := config.get("attention_types"):  # [[kinds, repetitions], ...]
        tiny["attention_types"] = [[kinds[0][0], len(chosen) // len(kinds[0][0])]]
    return {**tiny, **_consistent(tiny)}


def with_num_blocks(config: Mapping[str, Any], num_blocks: int) -> dict[str, Any]:
    """Return ``config``, all settings of a model by name, with ``num_blocks`` of its blocks at equal distances."""
    before = next(config[key] for key in _NUM_BLOCKS if _is_number(config.get(key)))
    chosen = [index * before // num_blocks for index in range(num_blocks)]
    fewer = {key: _of_blocks(value, before, chosen) for key, value in config.items()}
    fewer |= {key: num_blocks for key in _NUM_BLOCKS if _is_number(config.get(key))}
    first = {key: config[key] for key in _FIRST_DENSE if _is_number(config.get(key))}
    return {**fewer, **{key: sum(index < dense for index in chosen[1:]) for key, dense in first.items()}}


def _blocks_of_all_kinds(config: Mapping[str, Any], count: int) -> list[int]:
    """Return the first two blocks, the first one of each kind, and the last one."""
    kinds = [repr([_of_block(value, count, number) for value in config.values()]) for number in range(count)]
    return sorted({kinds.index(kind) for kind in kinds} | {*range(min(2, count))} | ({count - 1} if count else set()))


def _of_block(value: Any, count: int, number: int) -> Any:
    """Return what a setting says about one block, if it says something about each of them."""
    if isinstance(value, (list, tuple)) and len(value) == count:
        return value[number]
    return _by_number(value).get(number) if isinstance(value, dict) else None


def _by_number(settings: dict[Any, Any]) -> dict[int, Any]:
    """Return settings by the number of a block; empty if their keys are something else."""
    if not all(str(key).isdigit() and isinstance(value, dict) for key, value in settings.items()):
        return {}
    return {int(key): value for key, value in settings.items()}


def _of_blocks(value: Any, count: int, chosen: list[int]) -> Any:
    """Return a setting for the ``chosen`` ones of ``count`` blocks only."""
    if isinstance(value, (list, tuple)) and value and len(value) == count:
        return [value[number] for number in chosen]
    blocks = _by_number(value) if isinstance(value, dict) else {}
    return {place: blocks[number] for place, number in enumerate(chosen) if number in blocks} if blocks else value


def _shrunk(key: str, value: Any, heads: int) -> Any:
    """Return a setting of a model with ``heads`` query heads, with tiny sizes."""
    if isinstance(value, dict) and _by_number(value):
        return {number: {name: _shrunk(name, item, heads) for name, item in value[number].items()} for number in value}
    if isinstance(value, list) and key not in _TOKENS:
        return [_shrunk(key.removesuffix("_per_layer"), item, heads) for item in value]
    if key in _TOKENS:
        return value % VOCABULARY if _is_number(value) else None if value is None else 0
    if not _is_number(value):
        return value
    if key in _KV_HEADS:
        return HEADS if value >= heads else min(value, 2)
    return min(value, _SIZES.get(key, value))


def _consistent(tiny: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings that follow from others."""
    derived: dict[str, Any] = {}
    if _is_number(tiny.get("rotary_dim")):
        derived["rotary_dim"] = min(tiny["rotary_dim"], HEAD_DIM // 2)
    if tiny.get("kv_lora_rank") and "head_dim" in tiny:  # then it is the size of the rotary part of a head
        derived["head_dim"] = tiny["qk_rope_head_dim"]
    if tiny.get("kv_lora_rank") and "qk_head_dim" in tiny:
        derived["qk_head_dim"] = tiny["qk_rope_head_dim"] + tiny["qk_nope_head_dim"]
    if _is_number(tiny.get("mamba_d_ssm")):
        derived["mamba_d_head"] = tiny["mamba_d_ssm"] // tiny["mamba_n_heads"]
    if "expand" in tiny and "state_size" in tiny and "num_heads" in tiny:
        derived["num_heads"] = WIDTH * tiny["expand"] // tiny["head_dim"]
    return derived


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
