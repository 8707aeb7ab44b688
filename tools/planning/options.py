"""Define the options of a plan: the cluster, and the assumptions of the prediction."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...engine.config.settings import ModelConfig
from ...engine.errors import UserError
from ...engine.model.architecture import Architecture
from ...engine.model.implementations import checked
from ...engine.weights.hugging_face.config_source import configured_architecture
from .gpus import GiB, Gpu, describe_gpu, find_gpu

RESERVE = 4 * GiB
"""Memory kept free: CUDA's context and libraries (about 0.5 GiB), buffers of NCCL's channels (about 1 GiB for some
groups), and fragmentation of the allocator."""

EFFICIENCY = 0.55
"""Fraction of the peak that a GPU reaches while it computes a transformer's blocks, including norms, launches and
unequal ranks. Megatron-LM reached 0.44 to 0.52 with all communication on A100s (Narayanan et al., 2021,
https://arxiv.org/abs/2104.04473); published runs on H100s are between 0.35 and 0.5."""

LINK_EFFICIENCY = 0.8
"""Fraction of the datasheet's bandwidth that links and memory reach."""

HOST_BANDWIDTH = 89.6e9
"""Bytes per second of host memory: two channels of DDR5-5600, 8 bytes wide each, as in a desktop. Servers have 8 to 12
channels for each processor."""

_MOST_RANKS = 1 << 16


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of a prediction, in addition to datasheets."""

    gpus_per_node: int
    efficiency: float = EFFICIENCY
    link_efficiency: float = LINK_EFFICIENCY
    host_bandwidth: float = HOST_BANDWIDTH
    """Bytes per second of host memory, for each GPU."""


@dataclass(frozen=True)
class ClusterSpec:
    """The common settings of all layouts of a plan."""

    architecture: Architecture
    gpu: Gpu
    nodes: int
    assumptions: Assumptions
    reserve: float = RESERVE
    host_memory: float | None = None
    """Bytes of host memory of each node; None: unknown, and not compared."""

    @property
    def world_size(self) -> int:
        """Total number of ranks."""
        return self.nodes * self.assumptions.gpus_per_node


@dataclass(frozen=True)
class PlanOptions:
    """The request, in addition to the run's configuration. The fields are the command's flags."""

    nodes: int
    gpus_per_node: int
    gpu: str | None
    efficiency: float
    reserve: float
    """GiB."""
    network: float | None
    """Gbit/s."""
    gpu_memory: float | None = None
    """GiB. With ``gpu_tflops`` instead of ``gpu``."""
    gpu_tflops: float | None = None
    gpu_bandwidth: float | None = None
    """GB/s of its memory."""
    gpu_link: float | None = None
    """GB/s to the other GPUs of a server."""
    host_bandwidth: float = HOST_BANDWIDTH / 1e9
    """GB/s of host memory, for each GPU."""
    host_memory: float | None = None
    """GiB of host memory of each node."""

    def chosen_gpu(self) -> Gpu:
        """Return the GPU by name, or as described.

        Raises:
            UserError: it is unknown, incompletely described, or both named and described.
        """
        names = ("memory", "tflops", "bandwidth", "link")
        described = [f"--gpu-{name}" for name in names if getattr(self, f"gpu_{name}") is not None]
        if self.gpu is not None and described:
            raise UserError(f"--gpu {self.gpu} and {', '.join(described)} both define the GPU; remove one of them")
        if self.gpu is not None:
            return find_gpu(self.gpu)
        if self.gpu_memory is None or self.gpu_tflops is None:
            raise UserError("name a GPU with --gpu, or describe it with --gpu-memory GIB and --gpu-tflops N")
        return describe_gpu(self.gpu_memory, self.gpu_tflops, self.gpu_bandwidth, self.gpu_link)

    def cluster(self, architecture: Architecture) -> ClusterSpec:
        """Return the cluster.

        Raises:
            UserError: names the flag, its value and the remedy.
        """
        for flag, count in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus_per_node)):
            if not 1 <= count <= _MOST_RANKS:
                raise UserError(f"{flag} {count}: must be at least 1 and at most {_MOST_RANKS:,}")
        if self.nodes * self.gpus_per_node > _MOST_RANKS:
            raise UserError(
                f"--nodes {self.nodes} x --gpus-per-node {self.gpus_per_node} = {self.nodes * self.gpus_per_node:,} "
                f"ranks; at most {_MOST_RANKS:,} can be planned"
            )
        if not 0 < self.efficiency <= 1:
            raise UserError(f"--efficiency {self.efficiency:g}: must be above 0 and at most 1")
        if self.network is not None and not 0 < self.network < math.inf:
            raise UserError(f"--network {self.network:g}: must be positive, in Gbit/s for each GPU")
        if not 0 < self.host_bandwidth < 1e6:
            raise UserError(f"--host-bandwidth {self.host_bandwidth:g}: must be above 0 and below 1,000,000 GB/s")
        if self.host_memory is not None and not 0 < self.host_memory < math.inf:
            raise UserError(f"--host-memory {self.host_memory:g}: must be above 0, in GiB for each node")
        gpu = self.chosen_gpu()
        if not 0 <= self.reserve * GiB < gpu.memory:
            raise UserError(
                f"--reserve {self.reserve:g}: must be from 0 to less than the GPU's {gpu.memory / GiB:.1f} GiB"
            )
        if self.network is not None:
            gpu = replace(gpu, inter_node=self.network * 1e9 / 8)
        assumptions = Assumptions(self.gpus_per_node, self.efficiency, host_bandwidth=self.host_bandwidth * 1e9)
        host_memory = None if self.host_memory is None else self.host_memory * GiB
        return ClusterSpec(architecture, gpu, self.nodes, assumptions, self.reserve * GiB, host_memory)


def read_architecture(model: ModelConfig) -> Architecture:
    """Return the architecture of a run, without its weights: see :func:`configured_architecture`.

    Raises:
        UserError: the model has no config, or cannot be trained.
    """
    return checked(configured_architecture(model))
