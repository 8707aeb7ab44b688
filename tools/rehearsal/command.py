"""The command: a configuration and a cluster in, a text and a record out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ...engine.checkpoint.assets import asset_folder
from ...engine.config import ModelConfig, RunConfig, to_dict
from ...engine.errors import UserError
from ...engine.model.architecture import Architecture, architecture_of
from .gpus import GiB, find_gpu
from .outcome import Outcome, Setting
from .pool import Pool
from .prediction import Assumptions
from .report import format_found, format_outcome, to_record
from .search import describe, judge, judge_short, require_possible, search

_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class Request:
    """What is asked, besides the run's configuration. The fields are the command's flags."""

    nodes: int
    gpus_per_node: int
    gpu: str
    efficiency: float
    reserve: float
    """GiB."""
    network: float | None
    """Gbit/s."""
    search: bool
    quick: bool

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
        gpu = find_gpu(self.gpu)
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
        if not request.search:
            outcome = _one(config, setting, pool, request.quick, say)
            return format_outcome(outcome), record | to_record(outcome)
        found = search(config, setting, pool, say)
        record["search"] = [to_record(outcome) for outcome in found.outcomes]
        best = found.outcomes[0] if found.outcomes else None
        if best is None or not best.fits:
            raise UserError(_nothing_fits(best, setting))
        text = format_found(found)
        if not request.quick:
            best = _one(best.config, setting, pool, False, say)
            text += f"\n\nThe fastest of them, rehearsed in full:\n\n{format_outcome(best)}"
        text += f"\n\nTo use it:\n\n{_settings(best)}"
        return text, record | to_record(best)


def read_architecture(model: ModelConfig) -> Architecture:
    """The model's shape. No weights are read.

    Raises:
        UserError: there is no config of the model.
    """
    source: Any = model.architecture
    if source is None:
        source = str(asset_folder(model.initialize_from or ""))
    return architecture_of(source)


def rehearsable(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run without what needs a GPU to be built, and the keys of that. None of it takes more memory."""
    training, parallel = config.training, config.parallel
    left_out = []
    if training.float8:
        left_out.append("training.float8")
    if training.fused_elementwise == "triton":
        left_out.append("training.fused_elementwise triton")
    if parallel.async_tensor:
        left_out.append("parallel.async_tensor")
    plain = replace(
        config,
        # The guard against spikes reads the loss, which has no value here.
        training=replace(training, float8=False, fused_elementwise="torch", loss_spike_zscore=None),
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


def _nothing_fits(smallest: Outcome | None, setting: Setting) -> str:
    room = f"{setting.gpu.name} on {setting.nodes} x {setting.assumptions.gpus_per_node} GPUs"
    if smallest is None:
        return f"--gpu {room}: no layout fits by formulas; use more or larger GPUs, or parallel.cpu_offload true"
    return (
        f"--gpu {room}: no layout fits; the smallest that was rehearsed ({describe(smallest)}) needs "
        f"{-smallest.headroom / GiB:.1f} GiB more on each GPU; use more or larger GPUs, or optimizer.state_dtype bf16"
    )


def _settings(outcome: Outcome) -> str:
    """The keys of the configuration that make the layout."""
    parallel, layout = outcome.config.parallel, outcome.layout
    lines = ["    training:", f"      micro_batch_size: {outcome.config.training.micro_batch_size}", "    parallel:"]
    lines += [f"      {axis}: {size}" for axis, size in layout._asdict().items() if size > 1 and axis != "shard"]
    lines += ["      shard: auto", f"      recompute: {parallel.recompute}"]
    return "\n".join(lines)
