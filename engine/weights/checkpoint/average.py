"""Load the moving average of the weights, ``training.ema_decay``, from the checkpoint that a run continues from."""

from __future__ import annotations

from typing import Any

from ...optim import TrainingOptimizer, average_of
from ..parts import TensorParts
from .manifest import Manifest
from .tensors import AVERAGE_PREFIX, average_tensors, check_casts, load_tensors


def load_average(checkpoint: str | None, parts: TensorParts | None, optimizer: TrainingOptimizer) -> list[str]:
    """Load the average of a checkpoint, or let it begin with the weights, which are loaded. All ranks must call this.

    Args:
        checkpoint: folder of the checkpoint.
        parts: tensors of the checkpoint from which the run continues; None: it is a new run.
        optimizer: keeps the average, if there is one.

    Returns:
        Lines for the log.

    Raises:
        UserError: the average cannot be read, or would be rounded.
    """
    average = average_of(optimizer)
    stored = parts is not None and any(name.startswith(AVERAGE_PREFIX) for name in parts.tensors)
    if average is None:
        what = "holds a moving average of the weights, which is not continued: training.ema_decay is null"
        return [f"note: {checkpoint} {what}"] if stored else []
    if parts is not None and stored:
        assert checkpoint is not None
        wanted = average_tensors(optimizer)
        casts = check_casts(checkpoint, parts.tensors, wanted, resuming=True)
        load_tensors(checkpoint, wanted, opened=parts)
        return casts
    average.reset()
    if parts is None:
        return []
    return [f"note: {checkpoint} holds no moving average of the weights: that of training.ema_decay begins with them"]


def holds_average(manifest: Manifest) -> bool:
    """Return whether the training checkpoint of ``manifest`` holds the average of its weights."""
    return _training(manifest).get("ema_decay") is not None


def evaluates_average(manifest: Manifest) -> bool:
    """Return whether the run that wrote the training checkpoint of ``manifest`` evaluated the average."""
    return holds_average(manifest) and bool(_training(manifest).get("eval_ema"))


def _training(manifest: Manifest) -> dict[str, Any]:
    section = manifest.config.get("training")
    return section if isinstance(section, dict) else {}
