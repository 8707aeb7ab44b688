"""Check before a run that its model fits in memory, and choose the settings with which it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from ...engine.config.settings import RunConfig
from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.parallel.layout import plan_layout
from ...engine.parallel.memory_check import device_memory, require_memory
from ...engine.parallel.precision import with_named_precision
from ..planning.command import without_gpu_features
from ..planning.gpus import GiB, Gpu, describe_gpu, find_gpu
from ..planning.layout_plan import LayoutPlan, gib, shown_layout
from ..planning.offload_choice import choose_offload
from ..planning.options import RESERVE, Assumptions, ClusterSpec
from ..planning.pool import DryRunPool
from ..planning.search import plan_briefly

CHANGEABLE = ("training.micro_batch_size", "parallel.recompute", "parallel.cpu_offload")
"""Settings that this module may choose."""
_OF_ADAPTER = ("adapter.kind", "adapter.rank", "adapter.alpha", "adapter.quantize_base", "optimizer.learning_rate")
"""Settings that it may choose if not all parameters can be trained."""
_Recompute = Literal["none", "selective", "full"]
_MORE_RECOMPUTATION: dict[_Recompute, tuple[_Recompute, ...]] = {
    "none": ("selective", "full"),
    "selective": ("full",),
    "full": (),
}
_UNKNOWN_GPU_TFLOPS = 100.0
"""Assumed for a GPU that is not in the table: it orders layouts, and does not decide whether they fit."""


@dataclass(frozen=True)
class Machine:
    """Where a run trains.

    Args:
        ranks: of the run, on one machine.
        gpu: None: a CPU.
        host_memory: bytes; None: of another machine, and unknown.
    """

    ranks: int
    gpu: Gpu | None
    host_memory: int | None = None

    @property
    def shown(self) -> str:
        """The machine in words."""
        if self.gpu is None:
            return (
                f"{self.ranks} {'rank' if self.ranks == 1 else 'ranks'} on the CPU, {gib(_host_memory())} GiB of memory"
            )
        return f"{self.ranks} x {self.gpu.name}"


def find_machine(ranks: int | None, gpu: str | None, device: str = "auto") -> Machine:
    """Return this machine, or one with ``ranks`` GPUs called ``gpu``.

    Args:
        ranks: None: one for each GPU.
        gpu: None: this machine.
        device: the setting of the run.

    Raises:
        UserError: there is no such GPU.
    """
    if gpu is not None:
        return Machine(ranks or 1, find_gpu(gpu))
    count = 0 if device == "cpu" else torch.cuda.device_count()
    if count == 0:
        return Machine(ranks or 1, None)
    if ranks is not None and ranks > count:
        raise UserError(f"--ranks {ranks}: this machine has {count} GPUs; use at most {count}, or device cpu")
    properties = torch.cuda.get_device_properties(0)
    return Machine(ranks or count, _known_gpu(properties.name, properties.total_memory), _host_memory())


def fit(
    config: RunConfig,
    architecture: Architecture,
    machine: Machine,
    auto: bool,
    fixed: Set[str],
    adapted: Sequence[RunConfig],
    say: Callable[[str], None],
) -> tuple[dict[str, dict[str, Any]], str]:
    """Return settings with which the model fits, by section, and a line that says how.

    Args:
        config: of the run.
        architecture: of its model.
        machine: where it trains.
        auto: whether settings may change; without it, none do.
        fixed: those of ``CHANGEABLE`` that never change, because the user has set them.
        adapted: the same with adapters, the first that fits of which is trained if all parameters cannot be.
        say: receives progress lines.

    Raises:
        UserError: it does not fit. Says which settings would.
    """
    if machine.gpu is None:
        return _fit_on_cpu(config, architecture, machine, adapted if auto else ())
    cluster = ClusterSpec(architecture, machine.gpu, 1, Assumptions(machine.ranks), RESERVE, machine.host_memory)
    plain, _ = without_gpu_features(config, cluster)
    smaller = [without_gpu_features(one, cluster)[0] for one in adapted]
    with DryRunPool() as pool:

        def dry_run(candidate: RunConfig) -> LayoutPlan:
            if choice := choose_offload(candidate, cluster, pool, say):
                return choice.plan
            layout = plan_layout(candidate.parallel, machine.ranks)
            say(f"dry run: {shown_layout(candidate, layout, architecture)}")
            return plan_briefly([(candidate, layout)], cluster, pool)[0]

        plan = dry_run(plain)
        best = plan if plan.fits else None
        if best is None:
            candidates = _smaller(plain, smaller, fixed, machine.ranks)
            best = next((other for each in candidates if (other := dry_run(each)).fits), None)
        elif auto and "training.micro_batch_size" not in fixed:
            best = _with_larger_micro_batch(plan, dry_run)
    if best is None:
        raise UserError(
            f"the model does not fit on {machine.shown}: it needs {plan.shortage}, and "
            "recomputation, an adapter and offload do not save as much; use more or larger GPUs, see retemper plan "
            "--search"
        )
    changes = _changes(best.config, config)
    if changes and not auto:
        shown = ", ".join(f"{section}.{key} {keys[key]}" for section, keys in changes.items() for key in keys)
        raise UserError(
            f"the model does not fit on {machine.shown}: it needs {plan.shortage}; it "
            f"fits with {shown}: add --auto, or set them"
        )
    return changes, _why_adapter(best.config, config) + _memory_line(best)


def _with_larger_micro_batch(plan: LayoutPlan, dry_run: Callable[[RunConfig], LayoutPlan]) -> LayoutPlan:
    """Return the fastest of ``plan`` and plans with 2, 4 and 8 times its micro-batch, as far as they fit."""
    best, config = plan, plan.config
    for factor in (2, 4, 8):
        micro_batch_size = factor * config.training.micro_batch_size
        if config.training.global_batch_size % (micro_batch_size * plan.layout.data_parallel):
            break
        larger = dry_run(replace(config, training=replace(config.training, micro_batch_size=micro_batch_size)))
        if not larger.fits:
            break
        best = max(best, larger, key=lambda one: one.tokens_per_second)
    return best


def _smaller(config: RunConfig, adapted: Sequence[RunConfig], fixed: Set[str], ranks: int) -> Iterator[RunConfig]:
    """Yield ``config`` with settings that need less memory on the GPU, in the order of their cost in speed.

    An adapter comes before offloading, which is many times slower.
    """
    yield from _with_fewer_activations(config, fixed)
    for one in adapted:
        yield one
        yield from _with_fewer_activations(one, fixed)
    if "parallel.cpu_offload" not in fixed and not config.parallel.cpu_offload:
        *_, smallest = config, *_with_fewer_activations(config, fixed)
        if ranks == config.parallel.pipeline:
            yield replace(smallest, parallel=replace(smallest.parallel, cpu_offload="optimizer"))
        yield replace(smallest, parallel=replace(smallest.parallel, cpu_offload=True))


def _with_fewer_activations(config: RunConfig, fixed: Set[str]) -> Iterator[RunConfig]:
    """Yield ``config`` with a smaller micro-batch, and with more recomputation."""
    if "training.micro_batch_size" not in fixed and config.training.micro_batch_size > 1:
        config = replace(config, training=replace(config.training, micro_batch_size=1))
        yield config
    if "parallel.recompute" not in fixed:
        for recompute in _MORE_RECOMPUTATION[config.parallel.recompute]:
            config = replace(config, parallel=replace(config.parallel, recompute=recompute))
            yield config


def _changes(chosen: RunConfig, config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the settings of ``chosen`` that may differ from those of ``config``, and do."""
    found: dict[str, dict[str, Any]] = {}
    for section, _, key in (name.partition(".") for name in (*CHANGEABLE, *_OF_ADAPTER)):
        value, configured = (getattr(getattr(one, section), key) for one in (chosen, config))
        if value != configured and configured != "auto":  # the run decides auto in the same way
            found.setdefault(section, {})[key] = value
    return found


def _fit_on_cpu(
    config: RunConfig, architecture: Architecture, machine: Machine, adapted: Sequence[RunConfig]
) -> tuple[dict[str, dict[str, Any]], str]:
    """Return settings and the line about memory; activations are not counted."""
    cpu, candidates = torch.device("cpu"), (config, *adapted)
    for chosen in candidates:
        try:
            require_memory(with_named_precision(chosen, "fp32"), architecture, cpu, machine.ranks)
            break
        except UserError:
            if chosen is candidates[-1]:
                raise
    line = (
        f"weights, gradients and optimizer states of {architecture.num_parameters:,} parameters fit in "
        f"{gib(_host_memory())} GiB; activations are not counted on a CPU"
    )
    return _changes(chosen, config), _why_adapter(chosen, config) + line


def _why_adapter(chosen: RunConfig, config: RunConfig) -> str:
    """Return why an adapter was chosen; empty if none was."""
    if chosen.adapter == config.adapter:
        return ""
    rank, format_ = chosen.adapter.rank, chosen.adapter.quantize_base
    if format_ == config.adapter.quantize_base:
        return f"training all parameters does not fit, so a LoRA adapter of rank {rank} is trained; "
    tried = "LoRA does not fit" if config.adapter.kind else "training all parameters does not fit, and LoRA neither"
    return f"{tried}, so a LoRA adapter of rank {rank} is trained on matrices in {format_} (QLoRA); "


def _memory_line(plan: LayoutPlan) -> str:
    room = plan.cluster.gpu.memory - plan.cluster.reserve
    return (
        f"fits: {gib(plan.peak_bytes)} of {gib(room)} GiB on the fullest GPU, predicted from a dry run "
        f"({plan.shown_layout})"
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
