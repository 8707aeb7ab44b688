"""Add up what this start of a run does, for the table at its end."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from ..parallel.process_group import Ranks
from ..schedule import Progress
from .progress import duration, human, peak_memory_bytes


@dataclass
class LossRange:
    """First, lowest and last of some losses, each with its step."""

    first: tuple[float, int]
    lowest: tuple[float, int]
    last: tuple[float, int]

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {loss:.4f} (step {step})"
            for name, (loss, step) in (("first", self.first), ("lowest", self.lowest), ("last", self.last))
        )


@dataclass
class Totals:
    """Adds up steps, time and losses since the start or resume of a run."""

    start: Progress
    began: float = field(default_factory=time.perf_counter)
    step_seconds: float = 0.0
    """Time in steps, without evaluations, waits for checkpoints and profiled steps."""
    steps: int = 0
    losses: dict[str, LossRange] = field(default_factory=dict)

    def add_steps(self, seconds: float, steps: int) -> None:
        """Add ``steps`` steps that took ``seconds``."""
        self.step_seconds += seconds
        self.steps += steps

    @property
    def mean_step_seconds(self) -> float:
        """Return the mean over all steps; zero before the first one."""
        return self.step_seconds / max(1, self.steps)

    def add_loss(self, name: str, step: int, loss: float) -> None:
        """Add a loss of the training or of a validation set."""
        if not isfinite(loss):
            return
        new, known = (loss, step), self.losses.get(name)
        self.losses[name] = LossRange(new, new, new) if known is None else LossRange(
            known.first, min(known.lowest, new), new
        )  # fmt: skip

    def summary(self, end: Progress) -> dict[str, Any]:
        """Return the totals as plain values for JSON."""
        return {
            "step": end.step,
            "tokens": end.tokens,
            "tokens_of_this_start": max(0, end.tokens - self.start.tokens),
            "seconds": time.perf_counter() - self.began,
            "seconds_in_steps": self.step_seconds,
            "losses": {name: asdict(losses) for name, losses in self.losses.items()},
        }

    def table(self, end: Progress, tokens_per_step: int, ranks: Ranks) -> list[str]:
        """Return the lines of the table. All ranks must call this."""
        memory = max(ranks.all_gather(peak_memory_bytes(ranks.device)))
        seconds = time.perf_counter() - self.began
        speed = self.steps * tokens_per_step / self.step_seconds if self.step_seconds else 0.0
        tokens = max(0, end.tokens - self.start.tokens)  # negative after a rollback to before the start
        lines = [
            f"tokens      {tokens:,} ({human(tokens)}) in this start, {end.tokens:,} in all; step {end.step:,}",
            f"time        {duration(seconds)}, {duration(self.step_seconds)} of it in steps: {speed:,.0f} tokens/s, "
            f"{speed / ranks.world_size:,.0f} per rank",
            f"memory      {memory / 2**30:.2f} GiB at most on one rank",
        ]
        return lines + [f"loss        {name}: {losses}" for name, losses in self.losses.items()]
