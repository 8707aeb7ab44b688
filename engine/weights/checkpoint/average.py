"""Load the moving average of the weights, ``training.ema_decay``, from the checkpoint that a run continues from."""

from __future__ import annotations

from ...optim import TrainingOptimizer, average_of
from .tensors import AVERAGE_PREFIX, average_tensors, check_casts, load_tensors, open_tensors


def load_average(checkpoint: str | None, optimizer: TrainingOptimizer) -> list[str]:
    """Load the average of ``checkpoint``, or let it begin with the weights, which are loaded. All ranks must call this.

    Args:
        checkpoint: that the run continues from; None: it is a new run.
        optimizer: keeps the average, if there is one.

    Returns:
        Lines for the log.

    Raises:
        UserError: the average cannot be read, or would be rounded.
    """
    average = average_of(optimizer)
    parts = None if checkpoint is None else open_tensors(checkpoint)
    stored = parts is not None and any(name.startswith(AVERAGE_PREFIX) for name in parts.tensors)
    if average is None:
        what = "holds a moving average of the weights, which is not continued: training.ema_decay is null"
        return [f"note: {checkpoint} {what}"] if stored else []
    if checkpoint is not None and parts is not None and stored:
        wanted = average_tensors(optimizer)
        casts = check_casts(checkpoint, parts.tensors, wanted, resuming=True)
        load_tensors(checkpoint, wanted, opened=parts)
        return casts
    average.reset()
    if checkpoint is None:
        return []
    return [f"note: {checkpoint} holds no moving average of the weights: that of training.ema_decay begins with them"]
