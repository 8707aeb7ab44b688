"""Trackio: https://huggingface.co/docs/trackio."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..observer import Sample
from .client import TrackedRun, TrackerClient
from .facts import SAMPLES

if TYPE_CHECKING:
    from trackio import Run

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio(TrackerClient):
    """Writes to a database in TRACKIO_DIR (offline: in the run folder), or to the Space or server of its variables."""

    def __init__(self) -> None:
        self._run: Run
        self._local = True
        self._last_step = 0

    def connect(self, run: TrackedRun) -> str:
        """See :class:`TrackerClient`."""
        if run.offline:
            os.environ["TRACKIO_DIR"] = str(run.folder / "trackio")  # read when the library is imported
        import trackio
        from trackio.utils import TRACKIO_DIR

        self._local = run.offline or not any(map(os.environ.get, _REMOTE))
        if run.offline and Path(TRACKIO_DIR) != run.folder / "trackio":
            raise RuntimeError(f"trackio was imported already and writes to {TRACKIO_DIR}")
        self._run = trackio.init(
            project=run.project,
            name=run.name,
            group=run.group,
            config={**run.config, "facts": run.facts, "tags": list(run.tags)},
            embed=False,
            auto_log_cpu=False,
        )
        self._run.id = run.id
        return f"run {run.name} of project {run.project} in {TRACKIO_DIR if self._local else 'the server'}"

    def recorded(self) -> Mapping[str, int] | None:
        """See :class:`TrackerClient`."""
        if not self._local:
            return None
        from trackio.sqlite_storage import SQLiteStorage

        rows = SQLiteStorage.get_logs(self._run.project, self._run.name, run_id=self._run.id)
        return {name: row["step"] for row in sorted(rows, key=lambda row: row["step"]) for name in row}

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`TrackerClient`."""
        self._last_step = step
        self._run.log(dict(values), step=step)

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """See :class:`TrackerClient`."""
        import trackio

        text = "\n\n".join(f"**{sample.prompt}**{sample.text}" for sample in samples)
        self._run.log({SAMPLES: trackio.Markdown(text)}, step=step)

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """See :class:`TrackerClient`."""
        self._run.log(dict(summary), step=self._last_step)
        self._run.finish()
