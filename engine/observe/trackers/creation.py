"""Create the trackers of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...config.settings import RunConfig
from ..guarded import Guarded
from ..observer import Observer
from ..waiting import Say
from .all_trackers import Trackers
from .background import Background
from .client import TrackerClient
from .comet_client import Comet
from .csv_files import CsvFiles
from .curve import TrackedCurve
from .mlflow_client import MLflow
from .report_page import ReportPage
from .swanlab_client import SwanLab
from .trackio_client import Trackio
from .wandb_client import WeightsAndBiases

CLIENTS: dict[str, Callable[[], TrackerClient]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
    "swanlab": SwanLab,
    "comet": Comet,
}
"""Trackers with a library, which may need a network."""
_REMEDY = "metrics.jsonl has all numbers, and the next start of the run sends what is missing"


def create_trackers(config: RunConfig, say: Say) -> list[Observer]:
    """Return observers for ``logging.trackers``: one for those with a library, and one for csv.

    Args:
        config: of the run.
        say: prints a line for people; also called from threads.
    """
    names, report = config.logging.trackers, ReportPage(Path(config.run_folder))

    def background(name: str) -> Background:
        curve = TrackedCurve(name, CLIENTS[name](), report, say)
        return Background(name, Guarded(name, curve, _REMEDY, say), say)

    files = [Guarded("csv", CsvFiles(), _REMEDY, say)] if "csv" in names else []
    with_library = [background(name) for name in dict.fromkeys(names) if name in CLIENTS]
    return [*files, *([Trackers(with_library)] if with_library else [])]
