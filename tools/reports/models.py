"""Read the model folders of a run, ``final_model`` and ``best_model``, without PyTorch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...engine.files.disk_space import format_bytes
from ...engine.files.regular import read_regular
from ...engine.weights.checkpoint.names import BEST_MODEL, CONVERSION_FILE, FINAL_MODEL
from .metrics import Curves

COLUMNS = ("model", "step", "loss", "evaluation", "size", "weights")


@dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder that a run wrote at its end."""

    name: str
    step: int
    """Of the checkpoint of which it is an export."""
    loss: float | None
    """Training loss of that step, if it was logged."""
    evaluation: float | None
    """Loss on the first validation set at that step, if there was an evaluation."""
    bytes: int
    """Size of all files."""
    is_average: bool
    """Whether its weights are the average of the weights."""

    @property
    def cells(self) -> tuple[str, ...]:
        """Return the cells under :data:`COLUMNS`."""
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (self.loss, self.evaluation))
        weights = "the average" if self.is_average else "of the step"
        return (self.name, f"{self.step:,}", *losses, format_bytes(self.bytes), weights)


def read_model_folders(run_folder: Path, curves: Curves, remarks: list[str]) -> Iterator[ModelFolder]:
    """Yield the model folders of a run; add a remark for one that cannot be read.

    Args:
        run_folder: of the run.
        curves: of the run.
        remarks: receives remarks.
    """
    for folder in (run_folder / FINAL_MODEL, run_folder / BEST_MODEL):
        if not folder.is_dir():
            continue
        try:
            record = json.loads(read_regular(folder / CONVERSION_FILE))
            step, is_average = int(record["source"]["step"]), bool(record["options"].get("ema"))
            size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            remarks.append(f"{folder.name} is not shown: its {CONVERSION_FILE}: {error!r:.100}")
            continue
        loss = dict(zip(curves.steps, curves.columns["loss"], strict=True)).get(step)
        loss = None if loss is None or loss != loss else loss  # NaN: not recorded
        found = curves.evaluations.get(next(iter(curves.sets), ""), [])
        evaluation = next((one.loss for one in reversed(found) if one.step == step), None)
        yield ModelFolder(folder.name, step, loss, evaluation, size, is_average)
