"""Name the tokenizer class that transformers' ``AutoTokenizer`` uses for a folder, without importing transformers.

It depends on ``tokenizer_class`` in tokenizer_config.json and on the ``model_type`` in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_ALWAYS_PLAIN = ("mistral", "mixtral", "granite", "olmo2", "olmo3", "glm4", "glm4_moe")
_OF_MODEL_TYPE = {
    **dict.fromkeys(("llama", *_ALWAYS_PLAIN), "TokenizersBackend"),
    **dict.fromkeys(("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"), "Qwen2Tokenizer"),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp"), "Qwen3_5Tokenizer"),
    **dict.fromkeys(("gpt2", "phi", "opt", "gptj", "starcoder2", "hyperclovax_vision_v2"), "GPT2Tokenizer"),
    **dict.fromkeys(("gpt_neox", "olmo", "olmoe", "mamba"), "GPTNeoXTokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
}
"""The class of a folder that declares none, by model type."""
_FIXED_CLASS = frozenset(
    {*_ALWAYS_PLAIN, "qwen2", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen4_exp", "hyperclovax_vision_v2"}
)
"""Model types for which transformers uses the class above, whatever the folder declares."""


def loaded_class(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """Return the name of the class that ``AutoTokenizer`` chooses, without the suffix ``Fast``.

    It is the declared class, except for some model types.

    Args:
        config: content of tokenizer_config.json, empty where there is none.
        model_config: content of config.json, likewise.
    """
    model_type = str(model_config.get("model_type"))
    return _OF_MODEL_TYPE[model_type] if model_type in _FIXED_CLASS else declared_class(config, model_config)


def declared_class(config: Mapping[str, Any], model_config: Mapping[str, Any]) -> str:
    """Return the class that a folder declares, or the default of its model type."""
    model_type = str(model_config.get("model_type") or "")
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    name = declared or _OF_MODEL_TYPE.get(model_type, model_type and "unknown") or "TokenizersBackend"
    return str(name).removesuffix("Fast")
