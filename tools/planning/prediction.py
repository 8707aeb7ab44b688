"""Predict the time of a step from the work of its ranks: a roofline of stated assumptions, not a measurement.

The time of a rank for its micro-batches has two parts. One is its floating-point operations over the achievable part of
the GPU's peak. The other is exchanges that computing waits for: activations between tensor, context and pipeline ranks.
Gathering parameters and
reducing gradients run concurrently, and count only as far as they take longer. A pipeline's idle time and the
optimizer,
which is bound by memory, are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...engine.config.settings import RunConfig
from ...engine.optim.groups import BLOCK_SIZE
from ...engine.parallel.layout import Layout
from .gpus import Gpu
from .offload import offload_seconds
from .options import Assumptions
from .work import NO_EXPERTS, Collective, CollectiveTotal, ExpertWork

_WAITED_FOR = ("tensor", "pipeline")


@dataclass(frozen=True)
class StepPrediction:
    """Seconds of a step by purpose."""

    computing: float
    waiting: float
    """Waiting for activations of other ranks."""
    weights: float
    """Gathering parameters, reducing gradients and transfers to host memory, concurrent with computing."""
    idle: float
    """Idle time in the pipeline."""
    optimizer: float
    """The update; with ``parallel.cpu_offload`` on the host, and transfers for which it waits."""
    products: float = 0.0
    """Products that orthogonalize Muon's matrices."""

    @property
    def exposed(self) -> float:
        """The part of ``weights`` that is not hidden by computing."""
        return max(0.0, self.weights - self.computing - self.waiting - self.idle)

    @property
    def step(self) -> float:
        """The whole step."""
        return self.computing + self.waiting + self.idle + self.exposed + self.optimizer + self.products


def predict(
    config: RunConfig,
    layout: Layout,
    gpu: Gpu,
    assumptions: Assumptions,
    num_micro_batches: int,
    flops: float,
    collectives: dict[Collective, CollectiveTotal],
    trained: float,
    parameters: float | None = None,
    sent_activations: float = 0.0,
    experts: ExpertWork = NO_EXPERTS,
    product_flops: float = 0.0,
) -> StepPrediction:
    """Predict the step of the rank with ``flops``, ``collectives`` and ``trained`` parameters.

    ``parameters`` are all of them, if some are frozen; ``sent_activations`` are the bytes of activations that go to
    host memory in a step; ``experts`` is the work of experts, whose operations are also in ``flops``;
    ``product_flops`` are the operations of Muon's products.
    """
    speed = gpu.flops * assumptions.efficiency
    computing = flops / speed + expert_seconds(experts, gpu, assumptions)
    waiting = weights = 0.0
    for collective, sent in collectives.items():
        seconds = sent.sent / (bandwidth(collective, gpu) * assumptions.link_efficiency)
        if collective.kind == "all-to-all" or set(collective.axes) & set(_WAITED_FOR):
            waiting += seconds
        else:
            weights += seconds
    update_bytes = optimizer_bytes(config, num_micro_batches)
    optimizer = trained * update_bytes / (gpu.memory_bandwidth * assumptions.link_efficiency)
    moved = offload_seconds(
        config,
        gpu,
        assumptions,
        num_micro_batches,
        trained if parameters is None else parameters,
        trained,
        sent_activations,
        update_bytes,
    )
    return StepPrediction(
        computing,
        waiting,
        weights + moved.transfers,
        (computing + waiting) * idle_share(config, layout, num_micro_batches),
        moved.waiting if config.parallel.cpu_offload else optimizer,
        product_flops / speed,
    )


def expert_seconds(experts: ExpertWork, gpu: Gpu, assumptions: Assumptions) -> float:
    """Return what experts take longer than their operations alone.

    A grouped product of few rows for each expert is bound by reading the experts: it takes as long as its operations,
    or as its factors and results pass the memory once, if that is longer. Rows that are sorted pass it as well.
    """
    memory = gpu.memory_bandwidth * assumptions.link_efficiency
    computing = experts.flops / (gpu.flops * assumptions.efficiency)
    return max(0.0, experts.bytes / memory - computing) + experts.moved / memory


def bandwidth(collective: Collective, gpu: Gpu) -> float:
    """Return the bytes per second that each rank of a group can send.

    Between nodes, rings use the network cards of all the group's ranks in a node, and each carries its part of the
    traffic. In an all-to-all, the network card of each rank carries what this rank sends to other nodes.
    """
    if collective.per_node == collective.ranks:
        return gpu.intra_node
    if collective.kind == "all-to-all":
        share = (collective.ranks - collective.per_node) / (collective.ranks - 1)
        return min(gpu.inter_node / share, gpu.intra_node / (1 - share) if share < 1 else math.inf)
    between = gpu.inter_node * collective.per_node
    if collective.kind == "send":  # of two neighbours in different nodes
        return gpu.inter_node
    return between if collective.per_node == 1 else min(gpu.intra_node, between)


def idle_share(config: RunConfig, layout: Layout, num_micro_batches: int) -> float:
    """Return a pipeline's idle time over its busy time.

    Filling and draining takes as long as ``pipeline - 1`` micro-batches (Narayanan et al., 2021), over the number of
    stages on a rank if these alternate. Zero-bubble schedules leave a third of that (Qi et al., 2023,
    https://arxiv.org/abs/2401.10241).
    """
    parallel = config.parallel
    share = (layout.pipeline - 1) / (num_micro_batches * parallel.pipeline_stages_per_rank)
    return share / 3 if "zero_bubble" in parallel.pipeline_schedule else share


def optimizer_bytes(config: RunConfig, num_micro_batches: int) -> int:
    """Return the bytes read and written for each parameter.

    Clipping reads the gradient. The optimizer reads it, and reads and writes the weight and the states: two moments of
    AdamW, the momentum of Lion and Muon. PyTorch's fused AdamW, for fp32, also writes the clipped gradient. The
    products of Muon are not here (:mod:`.orthogonalization`), and all states of ``adamw_8bit`` count as 8-bit ones. An
    average reads the weight, and is read and written.
    """
    weight = bytes_of(config.training.weight_dtype)
    state = 1 + 4 / BLOCK_SIZE if config.optimizer.name == "adamw_8bit" else bytes_of(config.optimizer.state_dtype)
    passes = 3 if weight == state == 4 and config.optimizer.name == "adamw" else 2
    num_states = 1 if config.optimizer.name in ("lion", "muon") else 2
    average = config.training.average_bytes
    averaging = weight + 2 * average if average else 0
    moved = round(2 * (weight + num_states * state))
    return passes * gradient_bytes(config, num_micro_batches) + moved + averaging


def gradient_bytes(config: RunConfig, num_micro_batches: int) -> int:
    """Bytes of a parameter's reduced gradient, see ``training.weight_dtype``."""
    return 4 if num_micro_batches > 1 else bytes_of(config.training.weight_dtype)


def bytes_of(dtype: str) -> int:
    """Bytes of a number: fp32, bf16 or fp16."""
    return {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]
