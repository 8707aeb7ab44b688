"""Decide ``parallel.cpu_offload: auto`` by dry runs of a few blocks; a run starts this command to decide the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ...engine.config.checks import validate
from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.offload_choice import with_named_offload
from .layout_plan import LayoutPlan, gib
from .options import ClusterSpec
from .pool import DryRunPool
from .search import plan_briefly, require_possible

_CHOICES: tuple[bool | Literal["optimizer"], ...] = (False, "optimizer", True)
"""The fastest first."""


@dataclass(frozen=True)
class OffloadChoice:
    """What a run with ``parallel.cpu_offload: auto`` does."""

    plan: LayoutPlan
    """With the choice: the first one that fits, or the one with the lowest peak if none does."""
    reason: str
    """The arithmetic."""

    @property
    def config(self) -> RunConfig:
        """Return the configuration with the choice."""
        return self.plan.config

    @property
    def record(self) -> dict[str, Any]:
        """Return what a run reads from the JSON file."""
        return {"chosen": self.config.parallel.cpu_offload, "fits": self.plan.fits, "reason": self.reason}

    def __str__(self) -> str:
        chosen = _shown(self.config.parallel.cpu_offload)
        return f"parallel.cpu_offload auto: {chosen if self.plan.fits else 'nothing fits'}, {self.reason}"


def choose_offload(
    config: RunConfig, cluster: ClusterSpec, pool: DryRunPool, say: Callable[[str], None]
) -> OffloadChoice | None:
    """Return the choice of a run with ``parallel.cpu_offload: auto``; None for another value.

    ``optimizer`` is tried only where it is possible.

    Args:
        config: of the run.
        cluster: the cluster.
        pool: processes for dry runs.
        say: receives progress lines.

    Raises:
        UserError: the run is impossible without offload too.
    """
    if config.parallel.cpu_offload != "auto":
        return None
    plans: list[LayoutPlan] = []
    parts: list[str] = []
    for value in _CHOICES:
        other, name = with_named_offload(config, value), _shown(value)
        try:
            validate(other)
            layout = require_possible(other, cluster)
        except UserError:
            if value is False:
                raise
            parts.append(f"{name} is impossible here")
            continue
        say(f"parallel.cpu_offload auto: dry run of a few blocks with {name}")
        plans += plan_briefly([(other, layout)], cluster, pool)
        parts.append(f"{name} needs {gib(plans[-1].peak_bytes)} GiB{_host_need(plans[-1])}")
        if plans[-1].fits:
            break
    memory, reserve = cluster.gpu.memory, cluster.reserve
    room = f"{gib(memory)} GiB - {gib(reserve)} GiB reserve = {gib(memory - reserve)} GiB"
    reason = f"predicted for the fullest GPU: {', '.join(parts)}; it has {room}"
    best = plans[-1] if plans[-1].fits else min(plans, key=lambda plan: plan.peak_bytes)
    return OffloadChoice(best, reason)


def _host_need(plan: LayoutPlan) -> str:
    """Return the arithmetic of the host memory if that is known and not enough, as the end of a part of the reason."""
    memory = plan.cluster.host_memory
    if memory is None or plan.fits_host:
        return ""
    return f" but {gib(plan.host_bytes)} GiB of host memory in each node, which has {gib(memory)} GiB"


def _shown(value: object) -> str:
    return str(value).lower()
