"""Change the ``config.json`` of a model as the settings of a run ask for.

The run builds the changed config, keeps it in its checkpoints and exports it, so changing it again changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..config.settings import ModelConfig
from .family_table import FAMILIES
from .longer_context import with_rope

_DROPOUT = ("dropout", "pdrop", "layerdrop", "jitter")
"""Parts of the names of keys. Jitter multiplies the input of a router by random factors."""
_OTHER_HEADS = ("classifier", "summary")
_NOT_ONLY_NOISE = {"phimoe": ("router_jitter_noise",)}
"""Keys with such names that evaluation uses as well, by type, so that 0 is another model: the router of Phi-3.5-MoE
masks experts whose scores are further than this from the highest one (https://arxiv.org/abs/2409.12136)."""


def with_settings(config: dict[str, Any], model: ModelConfig, where: str) -> dict[str, Any]:
    """Return a Hugging Face ``config`` with the changes of ``model.rope`` and ``model.dropout``.

    ``where`` names the config in errors.

    Raises:
        UserError: see :func:`with_rope`.
    """
    config = with_rope(config, model.rope, where)
    return config if model.dropout is None else without_dropout(config, where)


def without_dropout(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return ``config`` with every dropout probability 0, also those that the type has without being stated."""
    text = config.get("text_config")
    if isinstance(text, dict):
        return {**config, "text_config": without_dropout(text, where)}
    changed = dict(config)
    for key in dropouts(config, where):
        *sections, name = key.split(".")
        section = changed
        for part in sections:
            section[part] = dict(section.get(part) or {})
            section = section[part]
        section[name] = 0.0
    return changed


def dropouts(config: dict[str, Any], where: str) -> dict[str, float]:
    """Return the positive dropout probabilities of a config, stated or by default, by key.

    Keys of sections, such as those of DBRX and MPT, have their names: ``ffn_config.moe_jitter_eps``.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None:
        settings = {**family.defaults, **config}
    else:
        from .generic.library import library_config

        settings = library_config(config, where).to_dict()
    kept = _NOT_ONLY_NOISE.get(str(config.get("model_type")), ())
    return dict(_positive(settings, kept))


def _positive(settings: Mapping[str, Any], kept: Collection[str]) -> Iterator[tuple[str, float]]:
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("_config"):
            yield from ((f"{key}.{name}", inner) for name, inner in _positive(value, kept))
        elif _is_dropout(key) and key not in kept and _is_positive(value):
            yield key, value


def _is_dropout(key: str) -> bool:
    return any(part in key for part in _DROPOUT) and not any(part in key for part in _OTHER_HEADS)


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
