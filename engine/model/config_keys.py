"""Account for every key of a ``config.json``: it is read, known to change nothing, or refused.

transformers silently keeps unknown keys, so a misspelt key, or one of another architecture, would train another model
than the file describes. The tables were made from the configuration classes of transformers 5.23 (all decoders with
rotary positions) and from published files.

A key in no table is an error in a config that was written for this program (``model.architecture`` inline). A published
file may contain keys for other programs, so there it only gets a note.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import UserError
from .config_reader import ConfigReader, shown
from .family_table import FAMILIES, Family

_READ = """
    attention_bias attention_dropout bos_token_id dtype eos_token_id head_dim hidden_act hidden_size initializer_range
    intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias model_type num_attention_heads
    num_hidden_layers num_key_value_heads original_max_position_embeddings partial_rotary_factor quantization_config
    rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings torch_dtype
    use_sliding_window vocab_size
"""
READ = frozenset(_READ.split())
"""Keys that take effect in all families, or are refused by name in those without them."""

_HARMLESS_BY_REASON = {
    "says where the file comes from": """
        _attn_implementation_autoset _commit_hash _name_or_path architectures auto_map finetuning_task library_name
        license model_name name_or_path tags task task_specific_params transformers.js_config transformers_version
        unsloth_fixed unsloth_version
    """,
    "names tokens, a tokenizer or a template": """
        additional_special_tokens chat_template cls_token_id eod_token_id image_token_id mask_token_id pad_token
        pad_token_id sep_token_id tokenizer_class tokenizer_name unk_token_id video_token_id vision_end_token_id
        vision_start_token_id vision_token_id
    """,
    "chooses between implementations of the same computation": """
        _attn_implementation _experts_implementation attention_implementation attn_implementation
        chunk_size_feed_forward experts_implementation fused_kernels gradient_checkpointing low_cpu_mem_usage
        pretraining_tp tensor_parallel_size torchscript use_bfloat16 use_cache use_flash_attention use_flash_attention_2
        use_flash_attn use_fused_ops use_memory_efficient_attention use_sdpa
    """,
    "says what a call returns": """
        _output_attentions keep_logits num_logits_to_keep output_attentions output_hidden_states output_past
        output_router_logits return_dict tie_last_hidden_states use_return_dict
    """,
    "belongs to other heads than the language model's": """
        classifier_bias classifier_dropout classifier_pooling id2label is_decoder label2id num_labels pooling
        problem_type summary_type tf_legacy_loss tie_encoder_decoder
    """,
    "is a setting of text generation": """
        assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation
        decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
        encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id
        forced_eos_token_id length_penalty max_length max_new_tokens min_length min_p no_repeat_ngram_size
        num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores
        penalty_alpha prefix remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
        target_lookbehind temperature top_k top_p typical_p
    """,
}
HARMLESS = {key: reason for reason, keys in _HARMLESS_BY_REASON.items() for key in keys.split()}
"""Keys that do not change the computation, and the reason."""

_MULTIPLIERS = """
    attention_in_multiplier attention_out_multiplier embedding_multiplier key_multiplier lm_head_multiplier logit_scale
    logits_scale logits_scaling mup_width_multiplier output_multiplier residual_multiplier residual_scale rope_ratio
    rope_scaling_factor rotary_pct rotary_percent scale_emb width_scale
"""
_NORMALLY_ON = """
    causal gated_mlp is_causal scale_attn_weights swiglu use_glu use_gqa use_rms_norm use_rmsnorm use_rope use_rotary
    use_rotary_embeddings use_swiglu
"""
EXPERTS = "a mixture of experts"
_NORMALLY_OFF_BY_KIND = {
    EXPERTS: """
        enable_moe_block first_k_dense_replace is_moe mlp_layer_types mlp_only_layers n_routed_experts n_shared_experts
        num_experts num_experts_per_tok num_local_experts num_shared_experts shared_expert_intermediate_size
        shared_intermediate_size top_k_experts
    """,
    "another kind of attention": """
        alibi attention_chunk_size attention_k_eq_v attention_multiplier attention_scale attention_sink
        attention_value_scale attention_window_pattern attn_layer_indices attn_layer_offset attn_layer_period
        attn_logit_softcapping attn_scale attn_sinks attn_temperature_tuning block_types clip_qkv cross_attention_layers
        full_attn_idxs global_attn_every_n_layers hybrid_override_pattern indexer_types kv_lora_rank layers_block_type
        linear_conv_kernel_dim linear_num_key_heads llama_4_scaling multi_query num_kv_shared_layers o_lora_rank
        prefix_lm q_lora_rank qk_nope_head_dim qk_rope_head_dim query_pre_attn_scalar reorder_and_upcast_attn
        scale_attn_by_inverse_layer_idx sliding_window_pattern softmax_scale use_alibi use_attention_gate
        use_attention_sinks use_bidirectional_attention v_head_dim window_pattern
    """,
    "other position settings": """
        compress_rope_theta global_rope_theta layer_rope_theta local_rope_theta mrope_section no_rope_freq
        no_rope_layer_interval no_rope_layers nope_layer_interval rope_interleave rope_interleaved rope_local_base_freq
        rope_scaling_layers rotary_interleaved swa_rope_theta use_learned_positions use_mrope
    """,
    "other norms, biases or residuals": """
        add_bias_linear add_unit_offset apply_residual_connection_post_layernorm attention_out_bias attn_bias bias
        lm_head_bias norm_after norm_bias o_bias parallel_attn parallel_residual qk_layer_norms qk_layernorm qk_norm
        qk_norm_type qkv_bias residual_gate_temperature rms_norm_bias rms_norm_offset use_bias use_parallel_residual
        use_post_norm use_qk_layernorm use_qk_norm use_qkv_bias use_sandwich_norm
    """,
    "scaled or capped embeddings or logits": """
        embedding_scale final_logit_softcapping logit_softcapping logits_soft_cap mup_enabled scale_depth
        scale_embedding scale_embeddings swiglu_alpha swiglu_limit swiglu_limits use_mup
    """,
    "dropout": """
        activation_dropout attention_probs_dropout_prob attn_dropout attn_dropout_prob attn_pdrop dropout emb_dropout
        emb_dropout_prob embd_pdrop embedding_dropout ffn_dropout hidden_dropout hidden_dropout_prob layerdrop
        mlp_dropout resid_dropout resid_pdrop residual_dropout
    """,
    "layers that differ from each other": """
        block_configs hidden_size_per_layer_input intermediate_size_per_layer num_attention_heads_per_layer
        num_key_value_heads_per_layer per_layer_config pruned_heads use_double_wide_mlp
    """,
    "other parts": """
        adapter_rank add_cross_attention audio_config is_encoder_decoder lora_r lora_rank num_mtp_layers
        num_nextn_predict_layers speech_config text_config use_lora vision_config
    """,
    "quantized or compressed weights": "compression_config quantization sparsity_config",
}
LATER_TOKENS = ("num_nextn_predict_layers", "num_mtp_layers")
"""Number of layers that predict later tokens. Files hold them; the model leaves them out."""
_PREFIXES = {"mamba_": "a state-space model", "ssm_": "a state-space model", "moe_": EXPERTS}
_ON_BY_FAMILY = {
    ("qwen2", "qkv_bias"),
    ("qwen2", "use_qkv_bias"),
    ("qwen3", "qk_norm"),
    ("qwen3", "qk_layernorm"),
    ("qwen3", "use_qk_norm"),
}
"""Foreign keys for something that the family always does."""

_OTHER_NAMES = {
    "head_dim": "attention_head_dim d_head head_size kv_channels rotary_dim",
    "hidden_act": "act_fn activation activation_function hidden_activation",
    "hidden_size": "d_model dim n_embd n_embed",
    "initializer_range": "init_method_std init_std initializer_std",
    "intermediate_size": "d_ff ffn_dim ffn_hidden_size hidden_dim intermediate_dim n_inner",
    "num_attention_heads": "n_head n_heads num_heads",
    "num_hidden_layers": "n_layer n_layers num_layers",
    "num_key_value_heads": "n_kv_heads num_groups num_kv_heads num_query_groups",
    "rms_norm_eps": "layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_eps norm_epsilon rms_norm_epsilon",
    "rope_theta": "rope_base rotary_base rotary_emb_base theta",
    "sliding_window": "attention_window attention_window_size sliding_window_size window_size",
    "tie_word_embeddings": "share_embeddings tie_embeddings tie_weights tied_embeddings",
    "vocab_size": "n_vocab padded_vocab_size",
}
OTHER_NAMES = {other: key for key, others in _OTHER_NAMES.items() for other in others.split()}
"""Names that other architectures and programs use for our keys. They are accepted if they repeat our value."""
_LENGTH_NAMES = """
    context_length max_seq_len max_seq_length max_sequence_length model_max_length n_ctx n_positions seq_length
"""
_FORGIVABLE = dict.fromkeys(_LENGTH_NAMES.split(), "max_position_embeddings")
"""Other names of a key that does not affect the computation: not worth refusing a published file."""

_ONE, _ON = frozenset(_MULTIPLIERS.split()), frozenset(_NORMALLY_ON.split())
_OFF = {key: kind for kind, keys in _NORMALLY_OFF_BY_KIND.items() for key in keys.split()}
_NEARLY_EQUAL = 0.9
"""Threshold of difflib's ratio: matches ``rope_thetta`` and ``tie_word_embedding``, but not
``sliding_window_pattern``."""
_SIMILAR = 0.6
"""Threshold for a suggestion about a key that is refused anyway."""
_MOST_NAMED = 10


def account_for_keys(config: dict[str, Any], where: str, model_type: str) -> None:
    """Refuse unread keys that would change the computation, and keys that look misspelt.

    Args:
        config: content of a ``config.json``.
        where: names it in errors.
        model_type: the family that it is read as.

    Raises:
        UserError: names the first such key.
    """
    reader = ConfigReader(config, where)
    family = FAMILIES[model_type]
    # These settings have other names in some families, under which the usual ones have no effect.
    renamed = {"hidden_act": family.activation, "rms_norm_eps": family.norm_eps}
    others = {**OTHER_NAMES, **renamed}
    read, ignored = READ.difference(renamed) | family.read_keys, family.ignored.split()
    for key, value in config.items():
        if key in read or key in HARMLESS or key in ignored:
            continue
        if key in others:
            _refuse_other_name(reader, key, value, renamed.get(others[key], others[key]))
        elif family.experts is not None and is_of_mixtures(key):
            continue
        elif foreign_kind(key) is not None:
            refuse_foreign(reader, key, model_type)
        else:
            refuse_misspelt(reader, key, read)


def unread_keys(config: dict[str, Any]) -> list[str]:
    """Return the keys of ``config`` that are in no table, and therefore have no effect."""
    family, known = _family(config), _known_in_family(config)
    has_experts = family is not None and family.experts is not None
    unread = [key for key in config if key not in known]
    return [key for key in unread if not _is_known(key) or (has_experts and is_of_mixtures(key))]


def require_known_keys(config: dict[str, Any], where: str) -> None:
    """Refuse keys in no table, for a config that was written for this program.

    Raises:
        UserError: names all of them, each with the nearest key.
    """
    family = READ | _known_in_family(config)
    unknown = [key for key in config if key not in family and (not _is_known(key) or key in OTHER_NAMES)]
    if unknown:
        refuse_unknown(unknown, family, where)


def refuse_unknown(unknown: list[str], names: frozenset[str], where: str) -> NoReturn:
    """Refuse keys, each with the nearest of the known ``names``.

    Raises:
        UserError: names all of them.
    """
    hints = []
    for key in unknown[:_MOST_NAMED]:
        other = OTHER_NAMES.get(key) or _FORGIVABLE.get(key)
        near = other if other in names else _near(key, names, _SIMILAR)
        hints.append(f"{shown(key)} (did you mean {near}?)" if near else shown(key))
    raise UserError(f"{where}: unknown settings: {_list(hints, len(unknown))}; correct or remove them")


def refuse_misspelt(reader: ConfigReader, key: Any, names: Iterable[str]) -> None:
    """Refuse a key with a value whose name is nearly one of ``names``."""
    value = reader.config[key]
    if value is not None and (near := _near(key, names, _NEARLY_EQUAL)):
        reader.fail(key, value, f"unknown setting; did you mean {near}?")


def refuse_foreign(reader: ConfigReader, key: str, model_type: str) -> None:
    """Refuse a key of other models unless its value means what ``model_type`` does anyway."""
    if not _is_neutral(key, reader.config[key], model_type):
        reader.fail(key, reader.config[key], _foreign_remedy(key, model_type))


def describe_unread(keys: list[str], where: str) -> list[str]:
    """Return a note that names unread keys, if there are any."""
    if not keys:
        return []
    named = _list([shown(key) for key in keys[:_MOST_NAMED]], len(keys))
    return [f"note: {where} has keys without effect, which are not read: {named}"]


def _known_in_family(config: dict[str, Any]) -> frozenset[str]:
    """Return the keys that the config's family reads or ignores, besides those of all families."""
    family = _family(config)
    return family.read_keys.union(family.ignored.split()) if family else frozenset()


def _family(config: dict[str, Any]) -> Family | None:
    model_type = config.get("model_type")
    return FAMILIES.get(model_type) if isinstance(model_type, str) else None


def _list(named: list[str], count: int) -> str:
    return ", ".join(named) + (f" and {count - len(named)} more" if count > len(named) else "")


def foreign_kind(key: Any) -> str | None:
    """Return what a key of other models sets; empty if its name says that, None if it is in no table."""
    if not isinstance(key, str):  # YAML has other types of keys as well
        return None
    if key in _OFF:
        return _OFF[key]
    if key in _ONE or key in _ON:
        return ""
    return next((kind for prefix, kind in _PREFIXES.items() if key.startswith(prefix)), None)


def is_of_mixtures(key: Any) -> bool:
    """Return whether configs of mixtures of experts have the key for other programs that compute the same model."""
    return key in LATER_TOKENS or foreign_kind(key) == EXPERTS


def _is_known(key: Any) -> bool:
    return key in READ or key in HARMLESS or key in OTHER_NAMES or foreign_kind(key) is not None


def _is_neutral(key: str, value: Any, model_type: str) -> bool:
    """Return whether the value of the foreign ``key`` means what the decoder does anyway."""
    if value is None:
        return True
    if key in _ON or (model_type, key) in _ON_BY_FAMILY:
        return value is True
    if key in _ONE:
        return type(value) in (int, float) and value == 1
    return value in (False, 0, "", [], {})


def _foreign_remedy(key: str, model_type: str) -> str:
    kind = foreign_kind(key)
    reason = f" ({kind})" if kind else ""
    return (
        f"{model_type} models have no such setting{reason} and would compute something else; remove the key if the "
        "model does not need it"
    )


def _refuse_other_name(reader: ConfigReader, key: str, value: Any, ours: str) -> None:
    """Refuse ``key``, another name of the setting ``ours``, unless it repeats the value."""
    here = reader.config.get(ours)
    if value is None or (type(here) is type(value) and here == value):
        return
    there = f", which is {shown(here)} here" if here is not None else ""
    reader.fail(key, value, f"it has no effect: the setting is called {ours}{there}; rename or remove it")


def _near(name: Any, names: Iterable[str], cutoff: float) -> str | None:
    key = str(name)
    found = difflib.get_close_matches(key.lower().replace("-", "_"), names, n=1, cutoff=cutoff) if len(key) < 80 else []
    return found[0] if found else None
