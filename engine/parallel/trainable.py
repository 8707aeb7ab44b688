"""Select the trainable parameters: all, or only those of the tokens in a first stage with new tokens.

Frozen parameters have no gradients, and so no optimizer states either: each costs 4 bytes, a trained one 16. Gradients
of activations still flow through every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config.settings import RunConfig, TrainingConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.implementations import meta_model
from ..model.language_model import LanguageModel


def check(config: RunConfig) -> None:
    """Refuse layouts in which some rank would have no trainable parameters.

    Raises:
        UserError: names the setting.
    """
    parallel = config.parallel
    if config.training.trainable == "all" or (parallel.pipeline <= 2 and parallel.pipeline_schedule == "1f1b"):
        return
    raise UserError(
        f"training.trainable is {config.training.trainable} with parallel.pipeline {parallel.pipeline} and "
        f"parallel.pipeline_schedule {parallel.pipeline_schedule}: stages between the first and the last would have no "
        "trainable parameters; use at most 2 stages with 1f1b, and other axes"
    )


def apply(model: LanguageModel, config: TrainingConfig) -> None:
    """Freeze the parameters that are not trained; call before FSDP, which groups parameters by this."""
    if config.trainable == "all":
        return
    model.requires_grad_(False)
    for parameter in model.table_parameters():
        parameter.requires_grad_(True)


def parameters(architecture: Architecture, config: TrainingConfig) -> tuple[list[tuple[str, Tensor]], set[str]]:
    """Return the trainable parameters of the whole model by name, on the meta device, and the names of its tables."""
    model = meta_model(architecture)
    apply(model, config)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return named, model.table_names()


def count(architecture: Architecture, config: TrainingConfig) -> int:
    """Return the number of trainable parameters."""
    if config.trainable == "all":
        return architecture.num_parameters
    return len(architecture.tables) * architecture.vocab_size * architecture.hidden_size


def require_same(former: Mapping[str, Any], config: TrainingConfig, folder: str | Path) -> None:
    """Refuse to continue from a checkpoint with optimizer states of other parameters than the trainable ones.

    Args:
        former: configuration of the run that wrote the checkpoint ``folder``, as a nested dictionary.

    Raises:
        UserError: with both values.
    """
    there = former.get("training", {}).get("trainable", "all")
    if there != config.trainable:
        raise UserError(
            f"training.trainable is {config.trainable}, but {folder} was trained with {there} and holds optimizer "
            "states of those parameters only; set it back, or start a new run_folder with model.initialize_from"
        )
