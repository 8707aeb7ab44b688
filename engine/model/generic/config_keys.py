"""Account for every key of the ``config.json`` of a model that transformers computes.

transformers keeps keys that it does not know. The tables of :mod:`..config_keys` say which of them would change the
computation in other models.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ...errors import UserError
from ..config_keys import EXPERTS, HARMLESS, LATER_TOKENS, foreign_kind, refuse_foreign, refuse_misspelt, refuse_unknown
from ..config_reader import ConfigReader
from .library import library_config

_CONSUMED = {"rope_theta", "rope_scaling"}
"""Settings that every configuration class takes, although none declares them."""


def account_for_keys(config: dict[str, Any], made: Any, where: str, inline: bool) -> None:
    """Refuse unread keys that would change the computation, and keys that look misspelt.

    Args:
        config: content of a ``config.json``.
        made: the configuration object that transformers makes of it.
        where: names it in errors.
        inline: whether it was written for this program. Then all unknown keys are refused.

    Raises:
        UserError: names the first such key, or all unknown ones.
    """
    unread, names = _unread(config, made), _names(made) | _CONSUMED
    if inline and (unknown := [key for key in unread if foreign_kind(key) is None]):
        refuse_unknown(unknown, names, where)
    reader = ConfigReader(config, where)
    for key in unread:
        if foreign_kind(key) is not None and not _is_for_others(key, names):
            refuse_foreign(reader, key, made.model_type)
        refuse_misspelt(reader, key, names)


def unread_keys(config: dict[str, Any], made: Any) -> list[str]:
    """Return the keys of ``config`` without effect that no table explains."""
    names = _names(made)
    return [key for key in _unread(config, made) if foreign_kind(key) is None or _is_for_others(key, names)]


def _is_for_others(key: str, names: frozenset[str]) -> bool:
    """Return whether the key is for other programs that compute the same model."""
    has_experts = any(foreign_kind(name) == EXPERTS for name in names)
    return key in LATER_TOKENS or (has_experts and foreign_kind(key) == EXPERTS)


def _unread(config: dict[str, Any], made: Any) -> list[str]:
    config_class: Any = type(made)
    names, source = _names(made), _source(config_class)
    candidates = [key for key in config if key not in names and key not in HARMLESS]
    return [key for key in candidates if not _occurs(key, source) and not _is_consumed(key, config, made)]


def _is_consumed(key: str, config: dict[str, Any], made: Any) -> bool:
    """Return whether the configuration class makes something else of the key: it has another value without it."""
    try:
        without = library_config({name: value for name, value in config.items() if name != key}, "").to_dict()
    except UserError:
        return True
    return bool({**made.to_dict(), key: None} != {**without, key: None})


def _occurs(key: Any, source: str) -> bool:
    return re.search(rf"\b{re.escape(str(key))}\b", source) is not None


@functools.cache
def _source(config_class: Any) -> str:
    """Return the source of the modules that define a configuration and its model."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    modules = [sys.modules.get(each.__module__) for each in (config_class, MODEL_FOR_CAUSAL_LM_MAPPING[config_class])]
    texts = []
    for module in filter(None, modules):
        with suppress(OSError, TypeError):  # an installation without source files
            texts.append(inspect.getsource(module))
    return "\n".join(texts)


def _names(made: Any) -> frozenset[str]:
    """Return the names that the configuration class declares."""
    aliases: Mapping[str, str] = type(made).attribute_map
    declared = {*aliases, *aliases.values(), "model_type", "quantization_config", "torch_dtype"}
    for each in type(made).__mro__:
        if dataclasses.is_dataclass(each):
            declared |= {field.name for field in dataclasses.fields(each)}
        elif "__init__" in vars(each):  # of older versions of transformers
            declared |= set(inspect.signature(vars(each)["__init__"]).parameters)
    return frozenset(declared)
