"""Judge a layout: memory and work of its ranks, whether it fits, and how long a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...engine.config.settings import RunConfig
from ...engine.model.architecture import Architecture
from ...engine.model.attention_choice import context_kind
from ...engine.observe.flops import flops_per_token
from ...engine.parallel.layout import Layout
from ...engine.parallel.trainable import learning
from ...engine.schedule import BatchPlan, plan_batches
from ...engine.weights.checkpoint.destination import checkpoint_bytes
from .dry_run import RankUsage
from .gpus import GiB
from .memory import KINDS
from .options import ClusterSpec
from .orthogonalization import waited_flops
from .prediction import StepPrediction, predict

_ON_HOST = ("parameters", "gradients", "optimizer states")
"""Kinds of memory on the host with ``parallel.cpu_offload``."""


@dataclass(frozen=True)
class LayoutPlan:
    """The result for one layout."""

    config: RunConfig
    layout: Layout
    cluster: ClusterSpec
    ranks: list[RankUsage]
    """One rank of each place in the pipeline."""
    extrapolated: bool
    """True if only a few blocks were dry run."""

    @property
    def batches(self) -> BatchPlan:
        """Return the batches of a step."""
        return plan_batches(self.config.training, self.layout.data_parallel)

    @property
    def fullest(self) -> RankUsage:
        """Return the rank with the highest peak memory."""
        return max(self.ranks, key=lambda rank: sum(self.peak_of(rank).values()))

    def peak_of(self, rank: RankUsage) -> dict[str, float]:
        """Return the bytes on the GPU by kind at the peak."""
        left_out = _ON_HOST if self._offloads else ()
        on_gpu = [{k: v for k, v in kinds.items() if k not in left_out} for kinds in rank.peaks.values()]
        fullest = max(on_gpu, key=lambda kinds: sum(kinds.values()))
        return {kind: fullest.get(kind, 0.0) for kind in KINDS}

    @property
    def shown_layout(self) -> str:
        """Return the layout in a few words."""
        return shown_layout(self.config, self.layout, self.cluster.architecture)

    @property
    def peak_bytes(self) -> float:
        """Return the peak bytes on the GPU of the fullest rank."""
        return sum(self.peak_of(self.fullest).values())

    def host_bytes_of(self, rank: RankUsage) -> float:
        """Return the bytes of host memory that a rank needs for what is offloaded."""
        states = sum(rank.most[kind] for kind in _ON_HOST) + rank.host_rounding if self._offloads else 0.0
        return states + rank.host_activations

    @property
    def host_bytes(self) -> float:
        """Return the bytes of host memory that the ranks of a node need for what is offloaded, of the node with most.

        A place of the pipeline that was not dry run counts as the largest of the others.
        """
        per_node, per_place = self.cluster.assumptions.gpus_per_node, self.layout.world_size // self.layout.pipeline
        of_place = {rank.place: self.host_bytes_of(rank) for rank in self.ranks}
        most, world = max(of_place.values()), self.layout.world_size
        each = [of_place.get(rank // per_place, most) for rank in range(world)]
        return max(sum(each[start : start + per_node]) for start in range(0, world, per_node))

    @property
    def fits_host(self) -> bool:
        """Return whether the host memory of a node is enough, if it is known."""
        return self.cluster.host_memory is None or self.host_bytes <= self.cluster.host_memory

    @property
    def _offloads(self) -> bool:
        return bool(self.config.parallel.cpu_offload)

    @property
    def headroom(self) -> float:
        """Return the bytes left on the fullest GPU, after the reserve."""
        return self.cluster.gpu.memory - self.cluster.reserve - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Return whether there is headroom on the GPUs, and enough host memory if that is known."""
        return self.headroom >= 0 and self.fits_host

    @property
    def shortage(self) -> str:
        """Return what is missing if the layout does not fit."""
        missing = [f"{-self.headroom / GiB:.1f} GiB more on each GPU"] if self.headroom < 0 else []
        if self.cluster.host_memory is not None and not self.fits_host:
            more = self.host_bytes - self.cluster.host_memory
            missing.append(f"{more / GiB:.1f} GiB more host memory in each node")
        return " and ".join(missing)

    def prediction_of(self, rank: RankUsage) -> StepPrediction:
        """Return the predicted step of a rank."""
        return predict(
            self.config,
            self.layout,
            self.cluster.gpu,
            self.cluster.assumptions,
            self.batches.num_micro_batches,
            rank.flops,
            rank.collectives,
            rank.trained,
            rank.parameters,
            rank.sent_activations,
            rank.experts,
            waited_flops(rank.matrices, self._offloads),
        )

    @property
    def slowest(self) -> RankUsage:
        """Return the rank that all others wait for."""
        return max(self.ranks, key=lambda rank: self.prediction_of(rank).step)

    @property
    def prediction(self) -> StepPrediction:
        """Return the predicted step of the slowest rank."""
        return self.prediction_of(self.slowest)

    @property
    def tokens_per_second(self) -> float:
        """Return the tokens per second of one GPU."""
        return self.batches.tokens_per_step / (self.prediction.step * self.layout.world_size)

    def mfu(self, causal_halved: bool) -> float:
        """Return the model FLOPs over the GPUs' peak; recomputation does not count.

        Args:
            causal_halved: count the pairs of positions that causal attention computes, as the prediction does; the
                result is then at most the assumed efficiency. False: all pairs, as in the trainer's log.
        """
        architecture = self.cluster.architecture
        learned = learning(architecture, self.config.training, self.config.adapter)
        per_token = flops_per_token(architecture, self.batches.sequence_length, causal_halved, learned)
        return self.tokens_per_second * per_token / self.cluster.gpu.flops

    @property
    def hours(self) -> float:
        """Return the hours for the token budget, without evaluations, checkpoints and restarts."""
        return self.batches.steps_for(self.config.training.budget) * self.prediction.step / 3600

    @property
    def checkpoint_bytes(self) -> float:
        """Return the bytes of the tensors of one checkpoint; its index and its manifest are not included."""
        return checkpoint_bytes(self.config, self.cluster.architecture)


def shown_layout(config: RunConfig, layout: Layout, architecture: Architecture) -> str:
    """Describe a layout in a few words; context parallelism with the kind that ``context_kind: auto`` chooses."""
    parallel = config.parallel
    kind = {"context": f" ({context_kind(parallel, architecture)})"}
    sizes = layout._asdict().items()
    parts = [f"{axis} {size}{kind.get(axis, '')}" for axis, size in sizes if size > 1] or ["one rank"]
    if parallel.expert > 1:
        parts.append(f"expert {parallel.expert}")
    parts.append(f"micro batch {config.training.micro_batch_size}")
    every = f" every {parallel.recompute_every}" if parallel.recompute_every > 1 else ""
    parts.append(f"recompute {parallel.recompute}{every}")
    if layout.pipeline > 1 and parallel.pipeline_schedule != "1f1b":
        parts.append(parallel.pipeline_schedule)
    if config.adapter.kind is not None:
        parts.append(f"LoRA of rank {config.adapter.rank}")
    if not parallel.reshard_after_forward:
        parts.append("parameters kept gathered")
    if parallel.reduce_gradients == "step" and layout.pipeline == 1:
        parts.append("gradients reduced once")
    if parallel.cpu_offload:
        parts.append("offload" if parallel.cpu_offload is True else "optimizer on the host")
    if parallel.offload_activations:
        parts.append("activations on the host")
    return ", ".join(parts)


def dtypes(config: RunConfig) -> str:
    """Describe the dtypes of weights and optimizer states."""
    weights, states = config.training.weight_dtype, config.optimizer.states
    return f"{weights} weights and states" if weights == states else f"{weights} weights and {states} states"


def gib(size: float) -> str:
    """Format bytes as GiB."""
    return f"{size / GiB:.2f}" if abs(size) < 100 * GiB else f"{size / GiB:,.0f}"


def digits(value: float) -> str:
    """Format three or four digits, with thousands separated."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
