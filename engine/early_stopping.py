"""End a run when a validation loss no longer falls.

The rule is that of transformers' ``EarlyStoppingCallback``: an evaluation counts as an improvement if its loss is more
than ``min_delta`` below the lowest loss so far, and ``patience`` evaluations in a row without one end the run
(Prechelt, 1998, "Early Stopping - But When?", https://doi.org/10.1007/3-540-49430-8_3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .config.settings import EarlyStoppingConfig
from .errors import UserError
from .schedule import Progress

if TYPE_CHECKING:
    from .evaluation import BestMetric, Validation


def is_stopped(config: EarlyStoppingConfig, state: Mapping[str, Any]) -> bool:
    """Return whether a run with this ``state`` in its progress or checkpoint has stopped early."""
    same = config.metric is None or state.get("name") == config.metric
    return config.patience is not None and same and state.get("evaluations", 0) >= config.patience


class EarlyStopping:
    """Counts evaluations without improvement. The count is part of the progress of the run, and of its checkpoints.

    All ranks hold the same losses, so they decide alike.

    Args:
        config: of the run.
        validation: the validation sets of the run.

    Raises:
        UserError: there is no validation set of that name.
    """

    def __init__(self, config: EarlyStoppingConfig, validation: Validation):
        self._config = config
        self._metric = None if config.patience is None else _metric(config, validation)

    def stopped(self, progress: Progress) -> bool:
        """Return whether the evaluations up to ``progress`` end the run."""
        state = progress.early_stopping
        return self._metric is not None and self._metric.matches(state) and is_stopped(self._config, state)

    def after(self, progress: Progress, losses: Mapping[str, float]) -> Progress:
        """Return ``progress`` with the evaluation of its step counted. A repeated evaluation is counted once.

        Args:
            progress: of the run.
            losses: of the validation sets by name; empty if the evaluation was interrupted.
        """
        state = progress.early_stopping
        if self._metric is None or not losses or progress.step == 0 or state.get("step") == progress.step:
            return progress
        return replace(progress, early_stopping=self._counted(state, progress.step, losses[self._metric.name]))

    def _counted(self, state: Mapping[str, Any], step: int, loss: float) -> dict[str, Any]:
        assert self._metric is not None
        lowest = state["loss"] if state and self._metric.matches(state) else None
        improves = lowest is None or lowest - loss > self._config.min_delta
        new = self._metric.record(step, loss if lowest is None else min(lowest, loss))
        return {**new, "evaluations": 0 if improves else state["evaluations"] + 1}

    def describe(self, progress: Progress) -> str:
        """Return why the run has stopped at ``progress``."""
        state, delta = progress.early_stopping, self._config.min_delta
        further = f" by more than {delta:g}" if delta else ""
        return (
            f"stopped early: the loss of {state['name']} did not fall{further} in the last {state['evaluations']:,} "
            f"evaluations, up to step {state['step']:,}; the lowest is {state['loss']:.4f}"
        )


def _metric(config: EarlyStoppingConfig, validation: Validation) -> BestMetric:
    metrics = {metric.name: metric for metric in validation.metrics}
    wanted = next(iter(metrics), None) if config.metric is None else config.metric
    if wanted not in metrics:
        raise UserError(
            f"training.early_stopping.metric is {config.metric}, but the validation sets are "
            f"{', '.join(metrics) or 'none'}; name one of them"
        )
    return metrics[wanted]
