"""The memory of optimizer states, known before an optimizer is built."""

from __future__ import annotations

import json
from collections.abc import Collection

from ..config.settings import OptimizerConfig
from ..model.dtypes import DTYPES
from .groups import is_muons
from .imported import imported_class, require_storable

_OF_IMPORTED: dict[str, list[int]] = {}


def state_itemsizes(name: str, ndim: int, config: OptimizerConfig, tables: Collection[str]) -> list[int]:
    """Return the bytes per element of each state that has the shape of a parameter; counts of steps are left out.

    Args:
        name: of the parameter, which is trained.
        ndim: number of its dimensions.
        config: of the run.
        tables: names of embeddings and heads.

    Raises:
        UserError: the class that ``optimizer.name`` imports cannot be used.
    """
    size = DTYPES[config.state_dtype].itemsize
    if config.name == "adamw":
        return [size, size]
    if config.name == "lion":
        return [size]
    if config.name == "muon":
        return [size] if is_muons(name, ndim, config, tables) else [size, size]
    key = json.dumps([config.name, config.options])
    if key not in _OF_IMPORTED:
        states = require_storable(imported_class(config), config)
        _OF_IMPORTED[key] = [value.element_size() for value in states.values() if value.numel() > 1]
    return _OF_IMPORTED[key]
