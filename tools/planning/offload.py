"""Predict the time that transfers to host memory and an update on the host take.

FSDP2's ``CPUOffloadPolicy`` sends each shard in the dtype of the weights for every gather, and each reduced gradient
back in the same dtype (PyTorch's ``_fsdp_param.py`` and ``_fsdp_collectives.py``). ``cpu_offload: optimizer`` sends
weights once a step and gradients after each micro-batch, both in the compute dtype
(:mod:`retemper.engine.parallel.host_transfers`), as ZeRO-Offload does (Ren et al., 2021,
https://arxiv.org/abs/2101.06840, section 4). Both directions of PCIe work at the same time.
"""

from __future__ import annotations

from typing import NamedTuple

from ...engine.config.settings import RunConfig
from .gpus import Gpu
from .options import Assumptions


class Offload(NamedTuple):
    """Seconds of a step of one rank."""

    transfers: float
    """Concurrent with computing."""
    waiting: float
    """Transfers and work of the host for which the GPU waits: the update, and weights that are sent before a step."""


def offload_seconds(
    config: RunConfig,
    gpu: Gpu,
    assumptions: Assumptions,
    num_micro_batches: int,
    parameters: float,
    trained: float,
    activations: float,
    update_bytes: int,
) -> Offload:
    """Return what the transfers of a step cost.

    Args:
        config: of the run.
        gpu: whose link to the host is used.
        assumptions: of the prediction.
        num_micro_batches: of a step.
        parameters: number in this rank's share.
        trained: number of those that are not frozen.
        activations: bytes that a step sends to the host; as many come back.
        update_bytes: that the optimizer reads and writes for each parameter.
    """
    link = gpu.host_link * assumptions.link_efficiency
    memory = assumptions.host_bandwidth * assumptions.link_efficiency
    up = down = activations
    waiting = 0.0
    weight, compute = _BYTES[config.training.weight_dtype], _BYTES[config.training.precision]
    offload = config.parallel.cpu_offload
    if offload is True:
        passes = 2 if config.parallel.reshard_after_forward else 1
        up += parameters * weight * passes * num_micro_batches
        down += trained * weight * num_micro_batches
    elif offload == "optimizer":
        down += trained * compute * num_micro_batches
        # The host reads weights and writes them in the compute dtype, and then sends them.
        waiting += parameters * ((weight + compute) / memory + compute / link)
    if offload:
        # Of several micro-batches, each adds its gradients to an fp32 sum.
        added = (2 * 4 + compute) * num_micro_batches if num_micro_batches > 1 else 0
        waiting += trained * (update_bytes + added) / memory
    return Offload(max(up, down) / link, waiting)


_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
