"""Models with several parts, such as vision-language models: their text model is trained, the rest is carried along.

Their ``config.json`` has the configuration of the text model under ``text_config``. In their files, the tensors of the
text model have other names than in a model of its own: ``language_model.model.layers...`` in Gemma 3.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UserError
from .architecture import Piece
from .config_file import CONFIG_FILE

TEXT_CONFIG = "text_config"
_TIE = "tie_word_embeddings"
_PARTS = (TEXT_CONFIG, "vision_config", "audio_config")
"""Keys of which a wrapper has one. Old Qwen2-VL files have no ``text_config``: its keys are next to vision_config."""
_PLAIN_TYPES = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Text models that are another type on text alone: they differ in the rotary positions of images."""
_MROPE = ("mrope_section", "mrope_interleaved")


def text_config_of(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the configuration of the text model, and whether ``config`` is that of a wrapper around it.

    Keys that a wrapper leaves out have the defaults of transformers. A configuration that is no wrapper is returned
    unchanged, as is one of a type that transformers does not know.
    """
    if not any(isinstance(config.get(key), dict) for key in _PARTS):
        return config, False
    made = _library_config(config)
    if made is None or made.get_text_config(decoder=True) is made:
        return config, False
    text = made.get_text_config(decoder=True)
    values = {key: value for key, value in text.to_dict().items() if value is not None}
    stated = [part[_TIE] for part in (config, config.get(TEXT_CONFIG) or {}) if _TIE in part]
    defaults = [getattr(part, _TIE) for part in (text, made) if getattr(part, _TIE, None) is not None]
    values[_TIE] = (stated or defaults or [False])[0]
    for key in ("quantization_config", "dtype", "torch_dtype"):
        if key in config:
            values[key] = config[key]
    return _plain(values), True


def context_length(config: dict[str, Any]) -> int | None:
    """Return the maximum number of tokens of a model according to its ``config.json``; None if that does not say.

    The types around GPT-2 name it ``n_positions``.
    """
    text, _ = text_config_of(config)
    value = text.get("max_position_embeddings", text.get("n_positions"))
    return value if type(value) is int and value > 0 else None


def with_vocab_size(config: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Return ``config``, of a wrapper or not, with another ``vocab_size`` of the text model."""
    text, changed = config.get(TEXT_CONFIG), dict(config)
    if isinstance(text, dict):
        changed[TEXT_CONFIG] = {**text, "vocab_size": vocab_size}
    if not isinstance(text, dict) or "vocab_size" in config:
        changed["vocab_size"] = vocab_size
    return changed


def names_in_wrapper(config: dict[str, Any], stored: Collection[str]) -> dict[str, str]:
    """Return the names in a wrapper's files of the tensors of its text model.

    Args:
        config: of the wrapper.
        stored: names in the files, which can be those that transformers saves or those of its modules.

    Returns:
        By the name in files of the text model alone.
    """
    choices = _names(json.dumps(config, sort_keys=True))
    return {name: next((each for each in forms if each in stored), forms[0]) for name, forms in choices.items()}


@functools.lru_cache(maxsize=4)
def _names(config_json: str) -> dict[str, tuple[str, ...]]:
    """Return the names that each tensor of the text model can have in the files of the wrapper.

    Raises:
        UserError: it is divided into other tensors there.
    """
    from .generic.stored_names import stored_pieces

    config = json.loads(config_json)
    text, wrapper = _meta_text(text_config_of(config)[0]), _meta_wrapper(config)
    inner, outer = _shapes(text), _shapes(wrapper)
    inside, outside = stored_pieces(text, inner, TEXT_CONFIG), stored_pieces(wrapper, outer, CONFIG_FILE)
    there = _places(text, inner, outer)
    names: dict[str, tuple[str, ...]] = {}
    for name, shape in inner.items():
        own, others = _pieces(name, shape, inside), _pieces(there[name], shape, outside)
        if [(piece.at, piece.sizes) for piece in own] != [(piece.at, piece.sizes) for piece in others]:
            raise _not_found(config, f"its files divide {there[name]} in another way")
        for piece, other in zip(own, others, strict=True):
            # Files may also have the names of the modules, if experts are not divided.
            names[piece.tensor] = (other.tensor, there[name]) if len(own) == 1 else (other.tensor,)
    return names


def _places(text: Any, inner: Collection[str], outer: Collection[str]) -> dict[str, str]:
    """Return the name in the wrapper of every tensor of the text model."""
    embedding = next(name for name, value in text.named_parameters() if value is text.get_input_embeddings().weight)
    prefix = embedding.partition(".")[0] + "."
    base = {name for name in inner if name.startswith(prefix)}
    telling = embedding.removeprefix(prefix)
    places = [name.removesuffix(telling) for name in outer if name.endswith(f".{telling}")]
    for place in places:
        there = {name: place + name.removeprefix(prefix) for name in base}
        others = {name: _ending(name, outer) for name in inner if name not in base}
        if all(name in outer for name in there.values()) and all(others.values()):
            return {name: there.get(name) or str(others[name]) for name in inner}
    raise _not_found(text.config.to_dict(), "its tensors are not those of a model of their own")


def _ending(name: str, outer: Collection[str]) -> str | None:
    """Return the name in the wrapper of a tensor outside the base model, such as the head."""
    return next((each for each in outer if each == name or each.endswith(f".{name}")), None)


def _not_found(config: Mapping[str, Any], problem: str) -> UserError:
    return UserError(
        f"{CONFIG_FILE}: the text model of model_type {config['model_type']} cannot be trained inside its wrapper: "
        f"{problem}; save the language model alone"
    )


def _pieces(name: str, shape: tuple[int, ...], pieces: Mapping[str, list[Piece]]) -> list[Piece]:
    begin = (0,) * len(shape)
    return sorted(pieces.get(name) or [Piece(name, begin, shape, begin)], key=lambda piece: piece.at)


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _plain(text: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the type that computes the same on text alone."""
    plain = _PLAIN_TYPES.get(text["model_type"])
    if plain is None:
        return text
    rope = {key: value for key, value in (text.get("rope_parameters") or {}).items() if key not in _MROPE}
    return {**text, "model_type": plain, "rope_parameters": rope}


def _library_config(config: dict[str, Any]) -> Any:
    """Return the configuration object of transformers; None for a type that it does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    values = {key: value for key, value in config.items() if key not in ("model_type", "auto_map")}
    return AutoConfig.for_model(config["model_type"], **copy.deepcopy(values))


def _meta_text(text_config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(_library_config(text_config))


def _meta_wrapper(config: dict[str, Any]) -> Any:
    import transformers

    made = _library_config(config)
    known = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
    classes = (transformers.AutoModelForMultimodalLM, transformers.AutoModelForImageTextToText)
    import torch

    with torch.device("meta"):
        if known and known[0] is not None:
            return known[0]._from_config(made)
        return next(each for each in classes if type(made) in each._model_mapping).from_config(made)
