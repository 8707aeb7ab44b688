"""The memory of optimizer states, known before an optimizer is built."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from ..config.settings import OptimizerConfig
from ..model.architecture import Architecture
from ..model.dtypes import DTYPES
from .groups import is_muons
from .imported import imported_class, require_storable


def state_itemsizes(name: str, parameter: Tensor, config: OptimizerConfig, tables: Collection[str]) -> list[int]:
    """Return the bytes per element of each state that has the shape of a parameter; counts of steps are left out.

    Args:
        name: of the parameter, which is trained.
        parameter: of any device.
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
        return [size] if is_muons(name, parameter, config, tables) else [size, size]
    states = require_storable(imported_class(config), config)
    return [value.element_size() for value in states.values() if value.numel() > 1]


def state_bytes(config: OptimizerConfig, architecture: Architecture) -> float:
    """Return the mean bytes of the states of a parameter if all are trained; of Muon, as if norms were matrices too."""
    size = DTYPES[config.state_dtype].itemsize
    if config.name == "muon":
        of_tables = len(architecture.tables) * architecture.vocab_size * architecture.hidden_size
        return size * (1 + of_tables / architecture.num_parameters)
    return sum(state_itemsizes("", Tensor(), config, ()))
