"""Judge a layout: memory and work of its ranks, whether it fits, and how long a step takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...engine.config.settings import RunConfig
from ...engine.observe.flops import flops_per_token
from ...engine.parallel.layout import Layout
from ...engine.parallel.trainable import learning
from ...engine.schedule import BatchPlan, plan_batches
from ...engine.weights.checkpoint.destination import checkpoint_bytes
from .dry_run import RankUsage
from .gpus import GiB
from .memory import KINDS
from .options import ClusterSpec
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
    def peak_bytes(self) -> float:
        """Return the peak bytes on the GPU of the fullest rank."""
        return sum(self.peak_of(self.fullest).values())

    @property
    def host_bytes(self) -> float:
        """Return the bytes of host memory that weights, gradients and states of the fullest rank take."""
        return max(sum(rank.most[kind] for kind in _ON_HOST) for rank in self.ranks) if self._offloads else 0.0

    @property
    def _offloads(self) -> bool:
        return bool(self.config.parallel.cpu_offload)

    @property
    def headroom(self) -> float:
        """Return the bytes left on the fullest GPU, after the reserve."""
        return self.cluster.gpu.memory - self.cluster.reserve - self.peak_bytes

    @property
    def fits(self) -> bool:
        """Return whether there is headroom."""
        return self.headroom >= 0

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


def shown_layout(config: RunConfig, layout: Layout) -> str:
    """Describe a layout in a few words."""
    parallel = config.parallel
    parts = [f"{axis} {size}" for axis, size in layout._asdict().items() if size > 1] or ["one rank"]
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
