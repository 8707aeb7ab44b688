"""An adapter on the disk: the parameters of :mod:`~retemper.engine.model.adapters` in a checkpoint.

A linear layer with the weight W [out, in] computes with W + s B A (LoRA, Hu et al., 2021,
https://arxiv.org/abs/2106.09685). DoRA (Liu et al., 2024, https://arxiv.org/abs/2402.09353) then scales each row of the
sum to a trained length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ...config.settings import AdapterConfig
from ...errors import UserError
from ...model.adapters import AdapterParameters, adapter_parameters
from ...model.architecture import Architecture
from ..checkpoint.tensors import STATE_PREFIXES, describe_difference
from ..damage import DamagedCheckpoint
from ..parts import TensorParts
from .peft_config import WEIGHT


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on the disk."""

    parameters: AdapterParameters
    """Names, shapes and scaling."""
    tensors: TensorParts
    """Their values."""

    @classmethod
    def of_checkpoint(
        cls, folder: Path, settings: Mapping[str, Any], architecture: Architecture, stored: TensorParts
    ) -> StoredAdapter:
        """Return the adapter of the checkpoint ``folder``.

        Args:
            folder: of the checkpoint.
            settings: section ``adapter`` of the run that wrote it.
            architecture: of the base model.
            stored: all tensors of the checkpoint.

        Raises:
            UserError: its settings are not those of an adapter, or it holds other tensors than they say.
        """
        names = {field.name for field in fields(AdapterConfig)}
        try:
            parameters = adapter_parameters(architecture, AdapterConfig(**settings))
        except TypeError:
            raise DamagedCheckpoint(
                f"{folder}: its manifest has an adapter with {sorted(settings)}, known are {sorted(names)}; use the "
                "release that wrote it, or a newer one"
            ) from None
        found = {name: item for name, item in stored.tensors.items() if not name.startswith(STATE_PREFIXES)}
        if difference := describe_difference(found, parameters.trained):
            raise UserError(f"{folder}: the checkpoint belongs to another model or adapter: {difference}")
        return cls(parameters, stored.only(parameters.trained))

    @property
    def changed(self) -> list[str]:
        """The parameters of the base that differ in the merged model."""
        return [*(f"{module}{WEIGHT}" for module in self.parameters.modules), *self.parameters.saved]
