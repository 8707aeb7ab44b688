"""Which parameters learn: all, or in a first stage with new tokens only those that belong to tokens.

Frozen parameters have no gradients, so no optimizer states either: a stage costs 4 bytes for each of them where a run
on all parameters costs 16. Gradients of activations still flow through every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import RunConfig, TrainingConfig
from ..errors import UserError
from ..model.architecture import Architecture
from ..model.decoder import Decoder

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
"""Where they are tied, there is only the first."""


def check(config: RunConfig) -> None:
    """Refuse layouts in which some rank would have nothing to train.

    Raises:
        UserError: naming the setting.
    """
    parallel = config.parallel
    if config.training.trainable == "all" or (parallel.pipeline <= 2 and parallel.pipeline_schedule == "1f1b"):
        return
    raise UserError(
        f"training.trainable is {config.training.trainable} with parallel.pipeline {parallel.pipeline} and "
        f"parallel.pipeline_schedule {parallel.pipeline_schedule}: stages between the two ends of the model would have "
        "nothing to train; use at most 2 stages with 1f1b, and other axes"
    )


def apply(model: Decoder, config: TrainingConfig) -> None:
    """Freeze what is not to learn; call before FSDP, which groups parameters by it."""
    if config.trainable == "all":
        return
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in EMBEDDINGS)


def count(architecture: Architecture, config: TrainingConfig) -> int:
    """Number of parameters that learn."""
    if config.trainable == "all":
        return architecture.num_parameters
    tables = 1 if architecture.tie_word_embeddings else len(EMBEDDINGS)
    return tables * architecture.vocab_size * architecture.hidden_size


def require_same(former: Mapping[str, Any], config: TrainingConfig, folder: str | Path) -> None:
    """Refuse to go on from a checkpoint that holds states of other parameters than those that learn.

    Args:
        former: configuration of the run that wrote the checkpoint ``folder``, as a nested dictionary.

    Raises:
        UserError: with both values.
    """
    there = former.get("training", {}).get("trainable", "all")
    if there != config.trainable:
        raise UserError(
            f"training.trainable is {config.trainable}, but {folder} was trained with {there} and holds optimizer "
            "states of these parameters only; set it back, or start a new run_folder with model.initialize_from"
        )
