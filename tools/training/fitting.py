"""Check before a run that its model fits in memory, and choose the settings with which it fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.parallel.layout import plan_layout
from ...engine.parallel.memory_check import device_memory, require_memory
from ..planning.command import without_gpu_features
from ..planning.gpus import GiB, Gpu, describe_gpu, find_gpu
from ..planning.layout_plan import LayoutPlan, gib, shown_layout
from ..planning.options import RESERVE, Assumptions, ClusterSpec
from ..planning.pool import DryRunPool
from ..planning.search import plan_briefly, search

_UNKNOWN_GPU_TFLOPS = 100.0
"""Assumed for a GPU that is not in the table: it orders layouts, and does not decide whether they fit."""
_AXES = ("pipeline", "replicate", "context", "tensor")


@dataclass(frozen=True)
class Machine:
    """Where a run trains.

    Args:
        ranks: of the run, on one machine.
        gpu: None: a CPU.
    """

    ranks: int
    gpu: Gpu | None

    @property
    def shown(self) -> str:
        """The machine in words."""
        if self.gpu is None:
            return (
                f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} on the CPU, {gib(_host_memory())} GiB of memory"
            )
        return f"{self.ranks} x {self.gpu.name}"


def find_machine(ranks: int | None, gpu: str | None) -> Machine:
    """Return this machine, or one with ``ranks`` GPUs called ``gpu``.

    Raises:
        UserError: there is no such GPU.
    """
    if gpu is not None:
        return Machine(ranks or 1, find_gpu(gpu))
    count = torch.cuda.device_count()
    if count == 0:
        return Machine(ranks or 1, None)
    properties = torch.cuda.get_device_properties(0)
    return Machine(ranks or count, _known_gpu(properties.name, properties.total_memory))


def fit(
    config: RunConfig, architecture: Architecture, machine: Machine, auto: bool, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Return settings with which the model fits, by section, and a line that says how.

    Args:
        config: of the run.
        architecture: of its model.
        machine: where it trains.
        auto: whether settings may change; without it, none do.
        say: receives progress lines.

    Raises:
        UserError: it does not fit. Says which settings would.
    """
    if machine.gpu is None:
        return {}, _fit_on_cpu(config, architecture, machine)
    plain, _ = without_gpu_features(config)
    cluster = ClusterSpec(architecture, machine.gpu, 1, Assumptions(machine.ranks), RESERVE)
    with DryRunPool() as pool:
        plan = plan_briefly([(plain, plan_layout(plain.parallel, machine.ranks))], cluster, pool)[0]
        if plan.fits and not auto:
            return {}, _memory_line(plan)
        say("searching for settings with which the model fits")
        best = _best(plain, cluster, pool, say)
    if best is None:
        raise UserError(
            f"the model does not fit on {machine.shown}: it needs {-plan.headroom / GiB:.1f} GiB more on each GPU, and "
            "no layout, recomputation or offload is small enough; use more or larger GPUs, or optimizer.state_dtype "
            "bf16 and training.weight_dtype bf16"
        )
    changes = _changes(best, config)
    if not auto:
        shown = ", ".join(
            f"{section}.{key} {value}" for section, keys in changes.items() for key, value in keys.items()
        )
        raise UserError(
            f"the model does not fit on {machine.shown}: it needs {-plan.headroom / GiB:.1f} GiB more on each GPU; it "
            f"fits with {shown}: add --auto, or set them"
        )
    return changes, _memory_line(best)


def _best(config: RunConfig, cluster: ClusterSpec, pool: DryRunPool, say: Callable[[str], None]) -> LayoutPlan | None:
    """Return the fastest plan that fits: without offload if possible."""
    found = search(config, cluster, pool, say, wanted=2)
    fitting = next((plan for plan in found.plans if plan.fits), None)
    if fitting is not None:
        return fitting
    parallel = replace(config.parallel, cpu_offload=True, recompute="full")
    offloaded = replace(config, parallel=parallel, training=replace(config.training, micro_batch_size=1))
    plan = plan_briefly([(offloaded, plan_layout(parallel, cluster.world_size))], cluster, pool)[0]
    return plan if plan.fits else None


def _changes(plan: LayoutPlan, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of ``plan`` that differ from those of ``config``."""
    parallel = {
        **{axis: getattr(plan.layout, axis) for axis in _AXES},
        **{key: getattr(plan.config.parallel, key) for key in _CHOSEN_BY_SEARCH},
    }
    found: Mapping[str, dict[str, Any]] = {
        "training": {"micro_batch_size": plan.config.training.micro_batch_size},
        "parallel": parallel,
    }
    return {
        section: changed
        for section, keys in found.items()
        if (changed := {key: value for key, value in keys.items() if value != getattr(getattr(config, section), key)})
    }


_CHOSEN_BY_SEARCH = (
    "pipeline_schedule",
    "pipeline_stages_per_rank",
    "recompute",
    "recompute_every",
    "reshard_after_forward",
    "reduce_gradients",
    "cpu_offload",
)


def _fit_on_cpu(config: RunConfig, architecture: Architecture, machine: Machine) -> str:
    """Return the line about memory; activations are not counted."""
    cpu = torch.device("cpu")
    require_memory(config, architecture, cpu, machine.ranks)
    return (
        f"weights, gradients and optimizer states of {architecture.num_parameters:,} parameters fit in "
        f"{gib(_host_memory())} GiB; activations are not counted on a CPU"
    )


def _memory_line(plan: LayoutPlan) -> str:
    room = plan.cluster.gpu.memory - plan.cluster.reserve
    return (
        f"fits: {gib(plan.peak_bytes)} of {gib(room)} GiB on the fullest GPU, predicted from a dry run "
        f"({shown_layout(plan.config, plan.layout)})"
    )


def _host_memory() -> int:
    return device_memory(torch.device("cpu"))


def _known_gpu(name: str, memory: int) -> Gpu:
    """Return the GPU of the table whose name PyTorch's ``name`` contains, with the memory that it really has."""
    words = name.lower().replace("nvidia", "").replace("amd", "").split()
    for size in range(len(words), 0, -1):
        try:
            return replace(find_gpu("".join(words[:size])), memory=memory)
        except UserError:
            continue
    return describe_gpu(memory / GiB, _UNKNOWN_GPU_TFLOPS)
