"""Keep the curves of a run in a tracker the same as those in metrics.jsonl, across kills, resumes and rollbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...schedule import Progress
from ..curves import read_metrics
from ..observer import Observer, RunDescription, Sample, StepRecord
from ..waiting import Say
from .client import TrackerClient
from .facts import SAMPLES, flat, numbers, of_record, tracked_run


class TrackedCurve(Observer):
    """Sends the records of a run to a tracker, each step once.

    A killed run leaves a tracker behind or ahead of the checkpoint that the run continues from. Records that it has not
    received are read from metrics.jsonl. Steps that it has, and that the resumed run repeats, are not sent again.

    Args:
        name: of the tracker.
        client: of its library.
        report: returns the page of the run's results, if there is one.
        say: prints a line for people.
    """

    def __init__(self, name: str, client: TrackerClient, report: Callable[[], Path | None], say: Say):
        self._name, self._client, self._report, self._say = name, client, report, say
        self._folder, self._connected = Path(), False
        self._last: dict[str, int] = {}
        """Last step of each metric in the tracker."""
        self._at_least = -1
        """Last step of the other metrics."""

    def open(self, run: RunDescription) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`. Also called after a rollback, with a new run."""
        if self._connected:
            self._client.finish({}, False, None)
        self._folder = run.folder
        place = self._client.connect(tracked_run(run, self._name))
        self._connected = True
        self._say(f"{self._name:<12}{place}")
        known = self._client.recorded() if run.resumed else -1
        if known is None:
            known = -1 if run.recorded_step is None else run.recorded_step
        self._last, self._at_least = ({}, known) if isinstance(known, int) else (dict(known), -1)

    def start(self, after_step: int | None, evaluates_again: bool) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`. Sends records that the tracker does not have."""
        if after_step is not None:
            for record in read_metrics(self._folder, after_step):
                self._log(record["step"], of_record(record))

    def step(self, record: StepRecord) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._log(record.progress.step, numbers("train", {"tokens": record.progress.tokens, **record.values}))

    def evaluation(self, progress: Progress, name: str, values: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._log(progress.step, numbers(f"evaluation/{name}", {"tokens": progress.tokens, **values}))

    def samples(self, progress: Progress, samples: Sequence[Sample]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        if self._is_new(SAMPLES, progress.step):
            self._client.log_samples(progress.step, samples)

    def end(self, summary: Mapping[str, Any]) -> None:
        """See :class:`~retemper.engine.observe.observer.Observer`."""
        self._client.finish(numbers("summary", flat(summary)), bool(summary["finished"]), self._report())

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        named = {self._client.key(name): value for name, value in values.items()}
        new = {name: value for name, value in named.items() if self._is_new(name, step)}
        if new:
            self._client.log(step, new)

    def _is_new(self, name: str, step: int) -> bool:
        if step <= self._last.get(name, self._at_least):
            return False
        self._last[name] = step
        return True
