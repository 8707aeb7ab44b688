"""Decide ``parallel.cpu_offload: auto`` before the model is built: the fastest choice that the planner says fits.

``tools/plan.py`` makes the decision in a process (:mod:`.planner_process`), so the command shows the same choice.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from .config.settings import RunConfig
from .errors import UserError
from .guards.background import run_in_background
from .observe.waiting import Say
from .parallel.memory_check import device_memory
from .parallel.process_group import Ranks
from .planner_process import plan_run

_SECONDS = 300.0
"""Time limit of the planner. With eight cores it needs some 20 seconds."""
_REMEDY = "set parallel.cpu_offload to false, optimizer or true"


def with_offload(config: RunConfig, ranks: Ranks, say: Say) -> tuple[RunConfig, str | None]:
    """Return ``config`` with ``parallel.cpu_offload`` decided, and why; None if it was set. All ranks must call this.

    Args:
        config: of the run, with its precision decided.
        ranks: all ranks. The main one runs the planner, for the memory of the smallest device.
        say: prints a line for people.

    Raises:
        UserError: on every rank: nothing fits, or the planner fails.
    """
    if config.parallel.cpu_offload != "auto":
        return config, None
    if ranks.device.type == "cpu":
        return with_named_offload(config, False), "auto: the run computes on the CPU"
    memory = min(ranks.all_gather(device_memory(ranks.device)))

    def decide() -> tuple[bool | Literal["optimizer"], str]:
        say(f"parallel.cpu_offload auto: tools/plan.py predicts the memory, for at most {_SECONDS:.0f} s")
        try:
            found = plan_run(config, ranks, memory, _SECONDS, "--quick")["cpu_offload"]
        except UserError as error:
            raise UserError(f"parallel.cpu_offload is auto, but the planner failed: {error}; {_REMEDY}") from None
        if not found["fits"]:
            raise UserError(
                f"parallel.cpu_offload is auto, but nothing fits, {found['reason']}; lower training.micro_batch_size, "
                f"set parallel.recompute to full or parallel.offload_activations to true, or {_REMEDY}"
            )
        return found["chosen"], found["reason"]

    chosen = ranks.broadcast(run_in_background(ranks, decide if ranks.is_main else None))
    assert chosen is not None
    return with_named_offload(config, chosen[0]), f"auto, {chosen[1]}"


def with_named_offload(config: RunConfig, value: bool | Literal["optimizer"]) -> RunConfig:
    """Return ``config`` with ``value`` in place of ``parallel.cpu_offload: auto``."""
    if config.parallel.cpu_offload != "auto":
        return config
    return replace(config, parallel=replace(config.parallel, cpu_offload=value))
