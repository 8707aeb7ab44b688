"""Map a sample number to a data source: mixture weights for each curriculum stage, with caps for each source.

A run is divided into *phases*; each phase draws from one mixture. A phase ends at the end of a stage, or when a source
reaches its cap. The remaining sources then share the rest of the stage in proportion to their weights, in a new
mixture. The sample at which a source reaches its cap follows in closed form from the mixture's table. So all phases are
known at the start, whatever their length. The choice of a chunk within a source is in sample_order.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import UserError
from .mixture import Mixture


@dataclass(frozen=True)
class SourceWeight:
    """A source and its weight in a stage."""

    name: str
    weight: float = 1.0
    """Weight, relative to those of the other sources that have not reached their caps."""
    max_samples: int | None = None
    """Cap on the samples of this source since the start of the run, earlier stages included. None: no cap."""


@dataclass(frozen=True)
class CurriculumStage:
    """A part of the run with one list of sources."""

    sources: tuple[SourceWeight, ...]
    stop: int | None = None
    """Number of the first sample after the stage. None: the stage does not end."""


@dataclass(frozen=True)
class MixturePhase:
    """A part of a stage with a fixed mixture, because no source reaches its cap in it."""

    stage: int
    """Number of the stage."""
    start: int
    """First sample."""
    stop: int | None
    """Number of the first sample after the phase. None: the phase does not end."""
    sources: tuple[SourceWeight, ...]
    """The sources below their caps, in the order of the stage."""
    mixture: Mixture
    given: dict[str, int]
    """Number of samples that each source of the run has given before ``start``."""


class Curriculum:
    """Map a sample number to its source and the number of earlier samples from that source, as a pure function.

    Args:
        stages: in their order; only the last may have no ``stop``.
        start: number of the first sample of these stages, after earlier ones.
        cursors: number of samples that each source (by name) had given before ``start``.
    """

    def __init__(self, stages: Sequence[CurriculumStage], start: int = 0, cursors: Mapping[str, int] | None = None):
        self.stages = tuple(stages)
        self.start = start
        self._start_cursors = dict(cursors or {})
        self.names = list(dict.fromkeys(source.name for stage in self.stages for source in stage.sources))
        self._dry: CurriculumStage | None = None  # the stage in which every source reaches its cap
        self.phases = self._make_phases()
        self._phase_starts = [phase.start for phase in self.phases]

    @property
    def end(self) -> int | None:
        """Number of samples until every source has reached its cap, or the last stage has ended. None: no end."""
        return self.phases[-1].stop if self.phases else self.start

    def lookup(self, index: int) -> tuple[str, int]:
        """Return the source of sample ``index``, ``start <= index < end``, and how many samples it has given before."""
        phase = self._phase(index)
        assert phase is not None and (phase.stop is None or index < phase.stop)
        position, given = phase.mixture.lookup(index - phase.start)
        name = phase.sources[position].name
        return name, phase.given[name] + given

    def cursors(self, index: int) -> dict[str, int]:
        """Return the samples that each source has given among the first ``index`` of the run, earlier sources
        included.
        """
        phase = self._phase(index)
        if phase is None:
            return {**dict.fromkeys(self.names, 0), **self._start_cursors}
        given = dict(phase.given)
        for source, count in zip(phase.sources, phase.mixture.counts(index - phase.start), strict=True):
            given[source.name] += count
        return given

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint stores, apart from the number of consumed samples, as plain JSON."""
        stages = [{"stop": stage.stop, "shares": [asdict(source) for source in stage.sources]} for stage in self.stages]
        return {"start": self.start, "cursors": dict(self._start_cursors), "stages": stages}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Curriculum:
        """Return the curriculum whose :meth:`state` a checkpoint holds."""
        return cls(_stages(state), state["start"], state["cursors"])

    def resumed(
        self, state: Mapping[str, Any], consumed_samples: int, former_length: int = 1, length: int = 1
    ) -> Curriculum:
        """Return these stages continued from a checkpoint.

        If they had drawn the same consumed samples as the checkpoint's stages, they continue as if the run had always
        used them. So later stages, budgets and caps may change freely. Otherwise they begin at ``consumed_samples``,
        and each source continues from its own cursor. The same happens if the sample length has changed from
        ``former_length`` to ``length``; numbers of samples are then converted.
        """
        former = Curriculum.from_state(state)
        if former_length != length:
            given = {name: count * former_length // length for name, count in former.cursors(consumed_samples).items()}
            return Curriculum(self.stages, consumed_samples * former_length // length, given)
        unbroken = Curriculum(self.stages, state["start"], state["cursors"])
        if unbroken._history(consumed_samples) == former._history(consumed_samples):
            return unbroken
        return Curriculum(self.stages, consumed_samples, former.cursors(consumed_samples))

    def require(self, samples: int, sequence_length: int, budget_key: str = "training.train_tokens") -> None:
        """Refuse a run of more ``samples`` than the stages and caps allow. ``budget_key`` names its length in errors.

        Raises:
            UserError: with both sides of the arithmetic.
        """
        if self.end is None or samples <= self.end:
            return
        if self._dry is not None:
            given = self.cursors(self.end)
            counts = ", ".join(f"{source.name} {given[source.name]:,} samples" for source in self._dry.sources)
            reason = f"all its sources have reached their caps ({counts})"
            remedy = f"raise max_epochs or max_tokens, add data, or lower {budget_key}"
        else:
            reason = "data.stages ends"
            remedy = f"leave out the last stage's train_tokens, or lower {budget_key}"
        raise UserError(
            f"{budget_key} needs {samples:,} samples x {sequence_length:,} = {samples * sequence_length:,} "
            f"tokens in whole steps, but the data ends after {self.end:,} samples = {self.end * sequence_length:,} "
            f"tokens, because {reason}; {remedy}"
        )

    def _make_phases(self) -> list[MixturePhase]:
        phases: list[MixturePhase] = []
        position = self.start
        given = {**dict.fromkeys(self.names, 0), **self._start_cursors}
        for number, stage in enumerate(self.stages):
            while stage.stop is None or position < stage.stop:
                left = tuple(s for s in stage.sources if s.max_samples is None or given[s.name] < s.max_samples)
                if not left:
                    self._dry = stage
                    return phases
                mixture = Mixture([source.weight for source in left])
                lengths = [] if stage.stop is None else [stage.stop - position]
                for place, source in enumerate(left):
                    if source.max_samples is not None:
                        lengths.append(mixture.samples_until(place, source.max_samples - given[source.name]))
                stop = position + min(lengths) if lengths else None
                phases.append(MixturePhase(number, position, stop, left, mixture, given))
                if stop is None:
                    return phases
                given = dict(given)
                for source, count in zip(left, mixture.counts(stop - position), strict=True):
                    given[source.name] += count
                position = stop
        return phases

    def _phase(self, index: int) -> MixturePhase | None:
        """Return the phase of sample ``index``: the last phase for later samples, None if there are no phases."""
        assert index >= self.start
        return self.phases[bisect.bisect_right(self._phase_starts, index) - 1] if self.phases else None

    def _history(self, stop: int) -> list[tuple[int, int, list[tuple[str, float]]]]:
        """Return what determines the samples in [``start``, ``stop``): the mixtures in order, and the start of each.

        Mixtures are compared as lists: the order of the sources decides ties between slots.
        """
        return [
            (
                phase.start,
                stop if phase.stop is None else min(stop, phase.stop),
                [(source.name, source.weight) for source in phase.sources],
            )
            for phase in self.phases
            if phase.start < stop
        ]


def _stages(state: Mapping[str, Any]) -> list[CurriculumStage]:
    """Return the stages in a checkpoint's state. The oldest states hold the weights of a single stage."""
    if "weights" in state:
        return [CurriculumStage(tuple(SourceWeight(name, weight) for name, weight in state["weights"].items()))]
    return [
        CurriculumStage(tuple(SourceWeight(**source) for source in stage["shares"]), stage["stop"])
        for stage in state["stages"]
    ]
