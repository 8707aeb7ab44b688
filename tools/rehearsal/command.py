"""The command: a configuration and a cluster in, a text and a record out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...engine.config import ModelConfig, RunConfig, to_dict
from ...engine.errors import UserError
from ...engine.hugging_face.config_source import architecture_source
from ...engine.model.architecture import Architecture, architecture_of
from ...engine.precision import with_named_precision
from .gpus import GiB, Gpu, describe_gpu, find_gpu
from .outcome import Outcome, Setting, dtypes
from .pool import Pool
from .prediction import Assumptions
from .report import format_found, format_needless_recomputation, format_outcome, to_record
from .search import (
    calibrate,
    describe,
    judge,
    judge_short,
    narrower,
    require_possible,
    search,
    without_recomputation,
)

_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class Request:
    """What is asked, besides the run's configuration. The fields are the command's flags."""

    nodes: int
    gpus_per_node: int
    gpu: str | None
    efficiency: float
    reserve: float
    """GiB."""
    network: float | None
    """Gbit/s."""
    search: bool
    quick: bool
    gpu_memory: float | None = None
    """GiB. With ``gpu_tflops`` instead of ``gpu``."""
    gpu_tflops: float | None = None
    gpu_bandwidth: float | None = None
    """GB/s of its memory."""
    gpu_link: float | None = None
    """GB/s to the other GPUs of a server."""

    def chosen_gpu(self) -> Gpu:
        """The GPU by name, or as described.

        Raises:
            UserError: it is unknown, described by half, or both named and described.
        """
        names = ("memory", "tflops", "bandwidth", "link")
        described = [f"--gpu-{name}" for name in names if getattr(self, f"gpu_{name}") is not None]
        if self.gpu is not None and described:
            raise UserError(f"--gpu {self.gpu} and {', '.join(described)} both say what the GPU is; leave one out")
        if self.gpu is not None:
            return find_gpu(self.gpu)
        if self.gpu_memory is None or self.gpu_tflops is None:
            raise UserError("name a GPU with --gpu, or describe it with --gpu-memory GIB and --gpu-tflops N")
        return describe_gpu(self.gpu_memory, self.gpu_tflops, self.gpu_bandwidth, self.gpu_link)

    def setting(self, architecture: Architecture) -> Setting:
        """The cluster.

        Raises:
            UserError: naming the flag, its value and the remedy.
        """
        for flag, count in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if not 1 <= count <= _MOST_RANKS:
                raise UserError(f"{flag} {count}: must be at least 1 and at most {_MOST_RANKS:,}")
        if self.nodes * self.gpus_per_node > _MOST_RANKS:
            raise UserError(
                f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node} = {self.nodes * self.gpus_per_node:,} "
                f"ranks; at most {_MOST_RANKS:,} can be rehearsed"
            )
        if not 0 < self.efficiency <= 1:
            raise UserError(f"--efficiency {self.efficiency:g}: must be above 0 and at most 1")
        if self.network is not None and not 0 < self.network < math.inf:
            raise UserError(f"--network {self.network:g}: must be positive, in Gbit/s for each GPU")
        gpu = self.chosen_gpu()
        if not 0 <= self.reserve * GiB < gpu.memory:
            raise UserError(
                f"--reserve {self.reserve:g}: must be from 0 to less than the GPU's {gpu.memory / GiB:.1f} GiB"
            )
        if self.network is not None:
            gpu = replace(gpu, inter_node=self.network * 1e9 / 8)
        return Setting(
            architecture, gpu, self.nodes, Assumptions(self.gpus_per_node, self.efficiency), self.reserve * GiB
        )


def rehearse(config: RunConfig, request: Request, say: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """What ``request`` asks of ``config``, as a text and as a record.

    Args:
        config: of the run.
        request: the cluster, and what to do.
        say: told what is going on.

    Raises:
        UserError: the request or the layout is impossible, or no layout fits.
    """
    setting = request.setting(read_architecture(config.model))
    record: dict[str, Any] = {"config": to_dict(config)}
    config, left_out = rehearsable(config)
    if left_out:
        say(f"rehearsed without {', '.join(left_out)}: only a GPU can have them")
    if not request.search:
        require_possible(config, setting)
    with Pool() as pool:
        if request.search:
            text, best, outcomes = _search(config, request, setting, pool, say)
            record["search"] = [to_record(outcome) for outcome in outcomes]
            return text, record | to_record(best)
        outcome = _one(config, setting, pool, request.quick, say)
        text = format_outcome(outcome)
        if outcome.fits and (faster := without_recomputation(outcome, pool)):
            text += "\n\n" + format_needless_recomputation(outcome, faster)
        return text, record | to_record(outcome)


def _search(
    config: RunConfig, request: Request, setting: Setting, pool: Pool, say: Callable[[str], None]
) -> tuple[str, Outcome, list[Outcome]]:
    """(text, the layout to use, all that were rehearsed).

    Raises:
        UserError: no layout fits.
    """
    calibration = calibrate(config, setting, pool)
    found = search(config, setting, pool, say, calibration)
    outcomes, parts = list(found.outcomes), [format_found(found)]
    for other in narrower(config):
        if any(one.fits for one in outcomes) and other.training.weight_dtype != config.training.weight_dtype:
            continue  # far from what was asked for, and not needed
        say(f"with {dtypes(other)}")
        found = search(other, setting, pool, say, calibration, seconds=40.0, wanted=2)
        outcomes += found.outcomes
        parts += [f"With {dtypes(other)}, which is another run than the configured one:", format_found(found)]
    best = next((one for one in outcomes if one.fits), None)  # of the configured run, where one of its layouts fits
    if best is None:
        raise UserError(_nothing_fits(outcomes, setting))
    if not request.quick:
        kind = "of the configured run" if dtypes(best.config) == dtypes(config) else f"with {dtypes(best.config)}"
        best = _one(best.config, setting, pool, False, say)
        parts += [f"The fastest {kind}, rehearsed in full:", format_outcome(best)]
    parts += ["To use it:", _settings(best, config)]
    return "\n\n".join(parts), best, outcomes


def read_architecture(model: ModelConfig) -> Architecture:
    """The model's shape. No weights are read; of a model on the Hub, only ``config.json`` is fetched.

    Raises:
        UserError: there is no config of the model.
    """
    return architecture_of(architecture_source(model))


def rehearsable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run without what needs a GPU to be built, and the keys of that. None of it takes more memory."""
    config = with_named_precision(config, "bf16")  # what auto means on every GPU that is planned for
    training, parallel = config.training, config.parallel
    left_out = []
    if training.float8:
        left_out.append("training.float8")
    if parallel.async_tensor:
        left_out.append("parallel.async_tensor")
    plain = replace(
        config,
        # The guard against spikes reads the loss, which has no value here.
        training=replace(training, float8=False, loss_spike_zscore=None),
        parallel=replace(parallel, async_tensor=False),
    )
    return plain, left_out


def _one(config: RunConfig, setting: Setting, pool: Pool, quick: bool, say: Callable[[str], None]) -> Outcome:
    layout = require_possible(config, setting)
    if quick:
        say(f"rehearsing a few blocks: {layout}")
        return judge_short([(config, layout)], setting, pool)[0]
    places = f", {layout.pipeline} places of the pipeline" if layout.pipeline > 1 else ""
    say(f"rehearsing all {setting.architecture.num_layers} blocks on rank 0 of {layout.world_size}: {layout}{places}")

    def report(done: int, total: int) -> None:
        if total > 1:
            say(f"{done} of {total} places rehearsed")

    return judge(config, layout, setting, pool, report)


def _nothing_fits(outcomes: list[Outcome], setting: Setting) -> str:
    room = f"{setting.gpu.name} on {setting.nodes} x {setting.assumptions.gpus_per_node} GPUs"
    if not outcomes:
        return f"--gpu {room}: no layout fits by formulas; use more or larger GPUs, or parallel.cpu_offload true"
    smallest = min(outcomes, key=lambda one: one.peak_bytes)
    return (
        f"--gpu {room}: no layout fits; the smallest that was rehearsed ({describe(smallest)}, with "
        f"{dtypes(smallest.config)}) needs {-smallest.headroom / GiB:.1f} GiB more on each GPU; use more or larger "
        "GPUs, or parallel.cpu_offload true"
    )


def _settings(outcome: Outcome, configured: RunConfig) -> str:
    """The keys of the configuration that make the layout."""
    config, layout = outcome.config, outcome.layout
    parallel, training, optimizer = config.parallel, config.training, config.optimizer
    lines = ["    training:", f"      micro_batch_size: {training.micro_batch_size}"]
    if training.weight_dtype != configured.training.weight_dtype:
        lines.append(f"      weight_dtype: {training.weight_dtype}")
    if optimizer.state_dtype != configured.optimizer.state_dtype:
        lines += ["    optimizer:", f"      state_dtype: {optimizer.state_dtype}"]
    lines.append("    parallel:")
    lines += [f"      {axis}: {size}" for axis, size in layout._asdict().items() if size > 1 and axis != "shard"]
    lines += ["      shard: auto", f"      recompute: {parallel.recompute}"]
    return "\n".join(lines)
