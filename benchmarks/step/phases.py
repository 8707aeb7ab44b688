"""Split the time of a step into consecutive phases, whose sum is the step."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from ..timing import now, seconds_between

PHASES = ("data", "forward", "backward", "optimizer", "other")
"""Names in the order of a step; forward and backward alternate over the micro-batches. Clipping belongs to the
optimizer, the copy of a micro-batch to the GPU to forward."""


@dataclass(frozen=True)
class StepTime:
    """One step, in seconds."""

    seconds: float
    """From the moment the step requests its data to the moment the next step does."""
    phases: dict[str, float]
    """Seconds by name of :data:`PHASES`."""


class PhaseClock:
    """Marks moments without waiting for the device.

    On a GPU a moment is when the GPU reaches it (an event on the current stream). So a phase is the time that the GPU
    spends or waits in it. The events are read at the end. On a CPU a moment is the host's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Begin the phase ``phase``, and end the one before."""
        self._marks.append((phase, now(self._device)))

    def close(self) -> None:
        """End the last phase."""
        self.mark("")

    def steps(self) -> list[StepTime]:
        """Return the steps between the marks so far, each from one ``data`` to the next. Waits for the device once."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        starts = [place for place, (phase, _) in enumerate(self._marks) if phase in ("data", "")]
        return [self._step(first, last) for first, last in itertools.pairwise(starts)]

    def _step(self, first: int, last: int) -> StepTime:
        phases = dict.fromkeys(PHASES, 0.0)
        for place in range(first, last):
            phases[self._marks[place][0]] += self._between(place, place + 1)
        return StepTime(self._between(first, last), phases)

    def _between(self, first: int, last: int) -> float:
        return seconds_between(self._marks[first][1], self._marks[last][1])
