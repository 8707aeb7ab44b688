"""The memory of optimizer states, known before an optimizer is built."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

from ..config.settings import OptimizerConfig
from ..model.dtypes import DTYPES
from .groups import BLOCK_SIZE, has_8bit_states, is_muons
from .imported import imported_class, require_storable

_OF_IMPORTED: dict[str, list[float]] = {}


def state_itemsizes(name: str, shape: Sequence[int], config: OptimizerConfig, tables: Collection[str]) -> list[float]:
    """Return the bytes of each state of a parameter, per element of the parameter; counts of steps are left out.

    Args:
        name: of the parameter, which is trained.
        shape: of the whole parameter.
        config: of the run.
        tables: names of embeddings and heads.

    Raises:
        UserError: the class that ``optimizer.name`` imports cannot be used.
    """
    size = DTYPES[config.state_dtype].itemsize
    if config.name == "adamw":
        return [size, size]
    if config.name == "adamw_8bit":
        return [1, 4 / BLOCK_SIZE] * 2 if has_8bit_states(shape) else [size, size]
    if config.name == "lion":
        return [size]
    if config.name == "muon":
        return [size] if is_muons(name, len(shape), config, tables) else [size, size]
    key = json.dumps([config.name, config.options])
    if key not in _OF_IMPORTED:
        states = require_storable(imported_class(config), config)
        _OF_IMPORTED[key] = [value.element_size() for value in states.values() if value.numel() > 1]
    return _OF_IMPORTED[key]
