"""Lengthen the context of a model: write ``model.rope`` into its ``config.json``, as transformers reads it.

The result is what the run trains with, keeps in its checkpoints and exports. A config that has the scaling or the base
already is unchanged, so a run that resumes is not lengthened twice.
"""

from __future__ import annotations

import math
from typing import Any

from ..config.settings import RopeConfig
from ..errors import UserError
from .family_table import FAMILIES
from .rope_settings import FULL, PARAMETERS, SCALING

_ORIGINAL, _LENGTH = "original_max_position_embeddings", "max_position_embeddings"
_TYPE, _THETA, _PLAIN = "rope_type", "rope_theta", "default"
_BASES = (_THETA, "rotary_emb_base")
"""Keys of the base at the top of a config: of nearly all types, and of GPT-NeoX."""
_BASES_OF_LAYERS = ("layer_rope_theta", "swa_rope_theta", "compress_rope_theta", "global_rope_theta")
"""Keys of further bases in types of transformers that are not native."""
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of the published Llama 3.1 models."""
_KEEPS_LENGTH = "dynamic"
"""The type whose scaling begins above the model's length, which therefore stays."""


def with_rope(config: dict[str, Any], rope: RopeConfig, where: str) -> dict[str, Any]:
    """Return a Hugging Face ``config`` with the rotary positions ``rope``.

    Args:
        config: content of a ``config.json``. If it is that of a wrapper, its ``text_config`` is changed.
        rope: ``model.rope`` of the run.
        where: names the config in errors.

    Raises:
        UserError: the model has no rotary positions, or has another scaling or a larger base already.
    """
    if rope.kind is None:
        return config
    text = config.get("text_config")
    if isinstance(text, dict) and _LENGTH not in config:
        return {**config, "text_config": with_rope(text, rope, where)}
    model_type = config.get("model_type")
    if not _rotates(model_type):
        raise UserError(f"model.rope: {where}: {model_type} models have no rotary positions; remove model.rope")
    settings = _settings(config)
    by_layer = FULL in settings or (model_type in FAMILIES and FAMILIES[str(model_type)].rope == "by_layer_type")
    full = dict(settings.get(FULL) or {}) if by_layer else dict(settings)
    length = config.get(_LENGTH)
    if not isinstance(length, int) or isinstance(length, bool):
        raise UserError(f"model.rope: {where}: {_LENGTH} is {length!r}; set it to the length that the model has now")
    present = full.get(_TYPE, full.get("type", _PLAIN))
    if present != _PLAIN:
        _require_present(full, rope, present, where)
        return config
    if rope.kind == _PLAIN and _has_base(config, rope, where):
        return config
    full.pop("type", None)
    full |= _parameters(rope, length)
    changed = {key: value for key, value in config.items() if key not in (SCALING, _ORIGINAL)}
    if rope.kind == _PLAIN:  # programs that do not know rope_parameters read the key at the top
        changed |= {key: rope.theta for key in _BASES if config.get(key) is not None}
    changed[PARAMETERS] = {**settings, FULL: full} if by_layer else full
    changed[_LENGTH] = length if rope.kind == _KEEPS_LENGTH else math.ceil(length * rope.factor)
    if rope.kind == _PLAIN and _base(changed, where) != rope.theta:
        raise UserError(f"model.rope: {where}: {model_type} models have no single rope_theta; change their config.json")
    return changed


def _parameters(rope: RopeConfig, length: int) -> dict[str, Any]:
    """Return the entries of ``rope_parameters`` for a model whose length was ``length``."""
    if rope.kind == _PLAIN:
        return {_TYPE: _PLAIN, _THETA: rope.theta}
    found = {_TYPE: rope.kind, "factor": rope.factor}
    if rope.kind == "llama3":
        found |= _LLAMA3
    if rope.kind in ("llama3", "yarn"):
        found[_ORIGINAL] = length
    return found


def _has_base(config: dict[str, Any], rope: RopeConfig, where: str) -> bool:
    """Return whether ``config`` has the base of ``rope`` already; refuse a smaller one."""
    before = _base(config, where)
    if before is not None and rope.theta is not None and rope.theta < before:
        raise UserError(
            f"model.rope.theta is {rope.theta:g}, but {where} has the larger rope_theta {before:g} already; set a "
            "larger theta, or remove model.rope"
        )
    return before == rope.theta


def _base(config: dict[str, Any], where: str) -> float | None:
    """Return the base of the layers with full attention, as transformers reads it; None if layers differ in it."""
    from .generic.library import library_config

    made = library_config(config, where)
    if any(getattr(made, key, None) is not None for key in _BASES_OF_LAYERS):
        return None
    parameters = made.rope_parameters
    value = parameters.get(FULL, parameters).get(_THETA)
    return None if value is None else float(value)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary settings of ``config``, whichever key they have."""
    settings = config.get(SCALING) or config.get(PARAMETERS) or {}
    return settings if isinstance(settings, dict) else {}


def _require_present(full: dict[str, Any], rope: RopeConfig, present: Any, where: str) -> None:
    """Refuse a scaling that differs from the one that the config has."""
    if present != rope.kind or full.get("factor") != rope.factor:
        raise UserError(
            f"model.rope is {rope.kind} with factor {rope.factor:g}, but {where} has {present} with factor "
            f"{full.get('factor')} already; remove model.rope, or start from a config.json without scaling"
        )


def _rotates(model_type: Any) -> bool:
    """Return whether models of this type have rotary positions."""
    if model_type in FAMILIES:
        return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return model_type in CONFIG_MAPPING and hasattr(CONFIG_MAPPING[model_type], PARAMETERS)
