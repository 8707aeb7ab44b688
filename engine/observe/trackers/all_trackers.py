"""All trackers of a run: their ids, which checkpoints record, and the time they have at the end."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...schedule import Progress
from ..observer import Observer, RunDescription, Sample, StepRecord
from .background import Background

END_SECONDS = 60.0
"""How long the end of a run waits for all trackers together."""


class Trackers(Observer):
    """Passes events to trackers, and chooses the ids of the run in them.

    We choose the ids, so that they are known before the first checkpoint, whatever a tracker does. A rollback repeats
    steps with other samples, and trackers do not delete points. So the run continues in new runs of the trackers, which
    receive the curve so far, and the id of the former run.

    Args:
        trackers: one for each name.
        end_seconds: how long the end of the run waits for them.
    """

    def __init__(self, trackers: Sequence[Background], end_seconds: float = END_SECONDS):
        self._trackers, self._end_seconds = trackers, end_seconds
        self._run: RunDescription | None = None
        self._started = False
        self._run_ids: dict[str, str] = {}

    @property
    def run_ids(self) -> dict[str, str]:
        """Id of the run in each tracker that may have a part of it, by name of the tracker."""
        empty = {tracker.name for tracker in self._trackers if tracker.has_nothing}
        return {name: run_id for name, run_id in self._run_ids.items() if name not in empty}

    def open(self, run: RunDescription) -> None:
        """See :class:`Observer`."""
        self._run = run
        self._open(run.tracker_runs, run.former_tracker_runs)

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`Observer`."""
        if self._started:
            self._open({}, self.run_ids)
        self._started = True
        for tracker in self._trackers:
            tracker.start(after_step, evaluates_again)

    def step(self, record: StepRecord) -> None:
        """See :class:`Observer`."""
        for tracker in self._trackers:
            tracker.step(record)

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`Observer`."""
        for tracker in self._trackers:
            tracker.evaluation(progress, name, values)

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`Observer`."""
        for tracker in self._trackers:
            tracker.samples(progress, samples)

    def end(self, summary: Mapping[str, Any]) -> None:
        """See :class:`Observer`. Waits for the trackers, but not longer than ``end_seconds``."""
        for tracker in self._trackers:
            tracker.end(summary)
        deadline = time.monotonic() + self._end_seconds
        for tracker in self._trackers:
            tracker.wait(max(0.0, deadline - time.monotonic()))

    def _open(self, known: Mapping[str, str], former: Mapping[str, str]) -> None:
        assert self._run is not None
        self._run_ids = {tracker.name: known.get(tracker.name) or uuid.uuid4().hex for tracker in self._trackers}
        for tracker in self._trackers:
            name = tracker.name
            ids = {name: self._run_ids[name]}
            tracker.open(replace(self._run, tracker_runs=ids, former_tracker_runs=dict(former), resumed=name in known))
