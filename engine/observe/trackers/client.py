"""The interface of a tracker's client: what differs between the libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..observer import Sample


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker sees it."""

    id: str
    """32 hexadecimal digits that we have chosen."""
    name: str
    project: str
    group: str | None
    tags: tuple[str, ...]
    offline: bool
    """Whether to write only files, and to use no network."""
    folder: Path
    """``{run_folder}/trackers``."""
    config: Mapping[str, Any]
    """The resolved configuration, nested, without secrets."""
    facts: Mapping[str, Any]
    """``model``, ``datasets``, ``code``, ``world_size``, and ``continues``: id of the run that this one is based on."""
    exists: bool
    """Whether an earlier start of the run has created it in the tracker."""


class TrackerClient:
    """Writes one run to a tracker. Its library is imported by :meth:`connect`.

    All methods are called from one thread, which is not the main thread. They may take long, and raise anything.
    """

    def connect(self, run: TrackedRun) -> str:
        """Create or continue ``run``, and return for the log where it is: a URL or a path."""
        raise NotImplementedError

    def key(self, name: str) -> str:
        """Return the name under which the tracker has the metric ``name``: some refuse characters."""
        return name

    def recorded(self) -> Mapping[str, int] | int | None:
        """Return the last step of every metric that the tracker has, by its key.

        An int is the last step of all, and None says that the tracker cannot tell.
        """
        raise NotImplementedError

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record finite numbers by name."""
        raise NotImplementedError

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Record generated text."""
        raise NotImplementedError

    def finish(self, summary: Mapping[str, float], finished: bool, report: Path | None) -> None:
        """Record the end of the run, and close it.

        Args:
            summary: numbers by name.
            finished: whether the token budget is used up. Otherwise the run was stopped and may continue.
            report: the page of the run's results.
        """
        raise NotImplementedError
