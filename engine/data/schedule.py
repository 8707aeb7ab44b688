"""Who gives each sample of a run: stages of blends on one clock, and sources that leave when they have given enough.

A run is cut into *phases*, in each of which one blend is drawn from. A phase ends where a stage ends or where a source
reaches its cap; from there on the sources that are left share the stage in proportion to their weights, in a blend
that begins anew. Where a source reaches its cap follows from the blend's table in closed form, so all phases are known
at the start, whatever their length. Which window of a source comes next stands in sample_order.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from .blend import Blend


@dataclass(frozen=True)
class Share:
    """A source's part in a stage."""

    name: str
    weight: float = 1.0
    """Share of the samples, relative to the weights of the sources that are left."""
    max_samples: int | None = None
    """Cap: samples that the source may have given since the start of the run, former stages included. None: no cap."""


@dataclass(frozen=True)
class Stage:
    """A part of the run that draws from one list of sources."""

    shares: tuple[Share, ...]
    stop: int | None = None
    """Sample of the run before which the stage ends. None: it goes on for ever."""


@dataclass(frozen=True)
class Phase:
    """A part of a stage in which no source reaches its cap."""

    stage: int
    """Number of the stage."""
    start: int
    """First sample."""
    stop: int | None
    """Sample before which the phase ends. None: it goes on for ever."""
    shares: tuple[Share, ...]
    """The sources that are left, in the order of the stage."""
    blend: Blend
    given: dict[str, int]
    """Samples that each source of the run had given before ``start``."""


class Schedule:
    """Which source gives each sample, and how many it has given before: a pure function of the sample's number.

    Args:
        stages: one after another; only the last may have no ``stop``.
        start: sample at which these stages took over from former ones.
        cursors: samples that each source (by name) had given before ``start``.
    """

    def __init__(self, stages: Sequence[Stage], start: int = 0, cursors: Mapping[str, int] | None = None):
        self.stages = tuple(stages)
        self.start = start
        self._start_cursors = dict(cursors or {})
        self.names = list(dict.fromkeys(share.name for stage in self.stages for share in stage.shares))
        self._dry: Stage | None = None  # the stage in which every source reaches its cap
        self.phases = self._make_phases()
        self._phase_starts = [phase.start for phase in self.phases]

    @property
    def end(self) -> int | None:
        """Samples after which every source has reached its cap, or the last stage has ended. None: never."""
        return self.phases[-1].stop if self.phases else self.start

    def at(self, index: int) -> tuple[str, int]:
        """The source of sample ``index``, ``start <= index < end``, and how many samples it has given before."""
        phase = self._phase(index)
        assert phase is not None and (phase.stop is None or index < phase.stop)
        position, given = phase.blend.locate(index - phase.start)
        name = phase.shares[position].name
        return name, phase.given[name] + given

    def cursors(self, index: int) -> dict[str, int]:
        """Samples that each source has given among the first ``index`` samples of the run, former sources included."""
        phase = self._phase(index)
        if phase is None:
            return {**dict.fromkeys(self.names, 0), **self._start_cursors}
        given = dict(phase.given)
        for share, count in zip(phase.shares, phase.blend.counts(index - phase.start), strict=True):
            given[share.name] += count
        return given

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the number of consumed samples: plain JSON."""
        stages = [{"stop": stage.stop, "shares": [asdict(share) for share in stage.shares]} for stage in self.stages]
        return {"start": self.start, "cursors": dict(self._start_cursors), "stages": stages}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Schedule:
        """Return the schedule whose :meth:`state` a checkpoint holds."""
        return cls(_stages(state), state["start"], state["cursors"])

    def resumed(
        self, state: Mapping[str, Any], consumed_samples: int, former_length: int = 1, length: int = 1
    ) -> Schedule:
        """These stages continued from a checkpoint.

        Where they would have drawn the samples consumed so far as those of the checkpoint did, they go on as if the run
        had always had them: later stages, budgets and caps may change without a trace. Otherwise they take over at
        ``consumed_samples``, each source going on from its own cursor. So they do where samples had another
        ``former_length`` than their ``length`` now: places are converted then.
        """
        former = Schedule.from_state(state)
        if former_length != length:
            given = {name: count * former_length // length for name, count in former.cursors(consumed_samples).items()}
            return Schedule(self.stages, consumed_samples * former_length // length, given)
        unbroken = Schedule(self.stages, state["start"], state["cursors"])
        if unbroken._history(consumed_samples) == former._history(consumed_samples):
            return unbroken
        return Schedule(self.stages, consumed_samples, former.cursors(consumed_samples))

    def require(self, samples: int, sequence_length: int) -> None:
        """Refuse a run of more ``samples`` than the stages and caps allow.

        Raises:
            UserError: with both sides of the arithmetic.
        """
        if self.end is None or samples <= self.end:
            return
        if self._dry is not None:
            given = self.cursors(self.end)
            counts = ", ".join(f"{share.name} {given[share.name]:,} samples" for share in self._dry.shares)
            reason = f"all its sources have given what their caps allow ({counts})"
            remedy = "raise max_epochs or max_tokens, add data, or lower training.train_tokens"
        else:
            reason = "data.stages ends"
            remedy = "leave out the last stage's train_tokens, or lower training.train_tokens"
        raise UserError(
            f"training.train_tokens needs {samples:,} samples x {sequence_length:,} = {samples * sequence_length:,} "
            f"tokens in whole steps, but the data ends after {self.end:,} samples = {self.end * sequence_length:,} "
            f"tokens, where {reason}; {remedy}"
        )

    def _make_phases(self) -> list[Phase]:
        phases: list[Phase] = []
        position = self.start
        given = {**dict.fromkeys(self.names, 0), **self._start_cursors}
        for number, stage in enumerate(self.stages):
            while stage.stop is None or position < stage.stop:
                left = tuple(s for s in stage.shares if s.max_samples is None or given[s.name] < s.max_samples)
                if not left:
                    self._dry = stage
                    return phases
                blend = Blend([share.weight for share in left])
                lengths = [] if stage.stop is None else [stage.stop - position]
                for place, share in enumerate(left):
                    if share.max_samples is not None:
                        lengths.append(blend.samples_until(place, share.max_samples - given[share.name]))
                stop = position + min(lengths) if lengths else None
                phases.append(Phase(number, position, stop, left, blend, given))
                if stop is None:
                    return phases
                given = dict(given)
                for share, count in zip(left, blend.counts(stop - position), strict=True):
                    given[share.name] += count
                position = stop
        return phases

    def _phase(self, index: int) -> Phase | None:
        """The phase of sample ``index``; the last one for all that lie behind; None where there is none at all."""
        assert index >= self.start
        return self.phases[bisect.bisect_right(self._phase_starts, index) - 1] if self.phases else None

    def _history(self, stop: int) -> list[tuple[int, int, list[tuple[str, float]]]]:
        """What decides the samples in [``start``, ``stop``): the blends, in their order, and where each was drawn from.

        Blends are compared as lists: the order of the sources decides ties between slots.
        """
        return [
            (
                phase.start,
                stop if phase.stop is None else min(stop, phase.stop),
                [(share.name, share.weight) for share in phase.shares],
            )
            for phase in self.phases
            if phase.start < stop
        ]


def _stages(state: Mapping[str, Any]) -> list[Stage]:
    """The stages of a checkpoint's state. Before there were stages, states held the weights of the only one."""
    if "weights" in state:
        return [Stage(tuple(Share(name, weight) for name, weight in state["weights"].items()))]
    return [Stage(tuple(Share(**share) for share in stage["shares"]), stage["stop"]) for stage in state["stages"]]
