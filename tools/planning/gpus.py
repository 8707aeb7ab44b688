"""Tabulate the peak performance of GPUs from their makers' datasheets. Nothing here was measured.

``flops`` counts dense products in bf16 with accumulation in fp32: half of the datasheets' numbers "with sparsity".
GPUs before Ampere have none in bf16, so theirs are in fp16.
``memory`` is PyTorch's ``total_memory``: less than the product's name says, because error correction and the driver use
a part.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...engine.errors import UserError

GiB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in a typical server of eight."""

    name: str
    flops: float
    """Dense matrix products in bf16, or in fp16 without it, FLOP/s."""
    memory: int
    """Bytes that PyTorch may use (``total_memory``): less than the product's name says."""
    memory_bandwidth: float
    """Bytes per second."""
    intra_node: float
    """Links within a server (NVLink, Infinity Fabric or PCIe), bytes per second of one GPU in one direction."""
    inter_node: float
    """Network, bytes per second of one GPU in one direction."""
    capability: tuple[int, int]
    """Compute capability, as PyTorch reports it."""

    @property
    def host_link(self) -> float:
        """Return the bytes per second to the host in one direction: 16 lanes of PCIe 5 since Hopper, 4 since Ampere, or
        3.
        """
        if not self.has_bf16:
            return _PCIE3
        return _PCIE5 if self.capability >= (9, 0) else _PCIE4

    @property
    def has_bf16(self) -> bool:
        """Return whether it multiplies matrices in bf16: since Ampere."""
        return self.capability >= (8, 0)


_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9
"""Bytes per second of 16 lanes in one direction. Bridges that join pairs of cards are not counted."""
_SHARED_NETWORK = 100e9 / 8 / 8
"""Share of a GPU in a server whose eight cards share 100 Gbit/s; for other servers use ``--network``."""

GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA A100 datasheet (SXM): 312 TFLOP/s, 1,555 and 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: eight
        # 200 Gb/s HDR InfiniBand cards.
        Gpu("a100-40gb", 312e12, int(39.4 * GiB), 1.555e12, 300e9, 25e9, (8, 0)),
        Gpu("a100-80gb", 312e12, int(79.1 * GiB), 2.039e12, 300e9, 25e9, (8, 0)),
        # A800: an A100 with NVLink 400 GB/s both ways.
        Gpu("a800-80gb", 312e12, int(79.1 * GiB), 2.039e12, 200e9, 25e9, (8, 0)),
        # NVIDIA H100 datasheet (SXM): 989 TFLOP/s, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: eight
        # 400 Gb/s cards.
        Gpu("h100-80gb", 989e12, int(79.1 * GiB), 3.35e12, 450e9, 50e9, (9, 0)),
        # H800: an H100 with NVLink 400 GB/s both ways.
        Gpu("h800-80gb", 989e12, int(79.1 * GiB), 3.35e12, 200e9, 50e9, (9, 0)),
        # NVIDIA H200 datasheet (SXM): 141 GB at 4.8 TB/s, else as H100.
        Gpu("h200-141gb", 989e12, int(139.7 * GiB), 4.8e12, 450e9, 50e9, (9, 0)),
        # NVIDIA DGX B200 datasheet: 8 GPUs with 1,440 GB and 64 TB/s, 72 PFLOP/s sparse FP8, hence 2.25 PFLOP/s dense
        # bf16; NVLink 1.8 TB/s both ways, 400 Gb/s cards.
        Gpu("b200-180gb", 2250e12, int(178.3 * GiB), 8.0e12, 900e9, 50e9, (10, 0)),
        # NVIDIA A100 and H100 datasheets (PCIe): 312 TFLOP/s at 1,935 GB/s, 756 TFLOP/s at 2 TB/s.
        Gpu("a100-pcie-80gb", 312e12, int(79.1 * GiB), 1.935e12, _PCIE4, _SHARED_NETWORK, (8, 0)),
        Gpu("h100-pcie-80gb", 756e12, int(79.1 * GiB), 2.0e12, _PCIE5, _SHARED_NETWORK, (9, 0)),
        # NVIDIA H100 NVL datasheet: 835 TFLOP/s, 94 GB at 3.9 TB/s. Its bridge joins pairs only.
        Gpu("h100-nvl-94gb", 835e12, int(93.1 * GiB), 3.9e12, _PCIE5, _SHARED_NETWORK, (9, 0)),
        # NVIDIA H20 datasheet: 148 TFLOP/s, 96 GB at 4 TB/s, NVLink 900 GB/s both ways.
        Gpu("h20-96gb", 148e12, int(95.1 * GiB), 4.0e12, 450e9, 50e9, (9, 0)),
        # NVIDIA V100 (SXM2) datasheet: 125 TFLOP/s in fp16, 32 GB at 900 GB/s, NVLink 300 GB/s both ways; DGX-1: four
        # 100 Gb/s cards for eight GPUs. NVIDIA T4 datasheet: 65 TFLOP/s in fp16, 16 GB at 320 GB/s.
        Gpu("v100-32gb", 125e12, int(31.7 * GiB), 0.9e12, 150e9, 6.25e9, (7, 0)),
        Gpu("t4-16gb", 65e12, int(14.6 * GiB), 0.32e12, _PCIE3, _SHARED_NETWORK, (7, 5)),
        # NVIDIA A10, A30, A40, L4, L40 and L40S datasheets.
        Gpu("a10-24gb", 125e12, int(22.1 * GiB), 0.6e12, _PCIE4, _SHARED_NETWORK, (8, 6)),
        Gpu("a30-24gb", 165e12, int(23.5 * GiB), 0.933e12, _PCIE4, _SHARED_NETWORK, (8, 0)),
        Gpu("a40-48gb", 149.7e12, int(44.4 * GiB), 0.696e12, _PCIE4, _SHARED_NETWORK, (8, 6)),
        Gpu("l4-24gb", 121e12, int(22.0 * GiB), 0.3e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        Gpu("l40-48gb", 181e12, int(44.4 * GiB), 0.864e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        Gpu("l40s-48gb", 362e12, int(44.4 * GiB), 0.864e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        # NVIDIA RTX A6000 and RTX 6000 Ada datasheets: 154.8 and 364 TFLOP/s, 768 and 960 GB/s.
        Gpu("rtx-a6000-48gb", 154.8e12, int(47.4 * GiB), 0.768e12, _PCIE4, _SHARED_NETWORK, (8, 6)),
        Gpu("rtx-6000-ada-48gb", 364e12, int(47.4 * GiB), 0.96e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        # NVIDIA's GA102, AD102 and GB202 architecture papers, tensor cores with accumulation in fp32.
        Gpu("rtx-3090-24gb", 71e12, int(23.6 * GiB), 0.936e12, _PCIE4, _SHARED_NETWORK, (8, 6)),
        Gpu("rtx-4090-24gb", 165.2e12, int(23.6 * GiB), 1.008e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        Gpu("rtx-4080-16gb", 97.5e12, int(15.6 * GiB), 0.7168e12, _PCIE4, _SHARED_NETWORK, (8, 9)),
        Gpu("rtx-5090-32gb", 209.5e12, int(31.3 * GiB), 1.792e12, _PCIE5, _SHARED_NETWORK, (12, 0)),
        # AMD Instinct MI300X, MI325X and MI355X data sheets: seven links of 64 (MI355X: 76.8) GB/s in one direction.
        Gpu("mi300x-192gb", 1307.4e12, int(191.6 * GiB), 5.3e12, 448e9, 50e9, (9, 4)),
        Gpu("mi325x-256gb", 1307.4e12, int(255.6 * GiB), 6.0e12, 448e9, 50e9, (9, 4)),
        Gpu("mi355x-288gb", 2516e12, int(287.6 * GiB), 8.0e12, 537e9, 50e9, (9, 5)),
    )
}
"""By name."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU called ``name``.

    The memory, hyphens, spaces and ``rtx`` may be omitted if one GPU matches: ``h200``, ``rtx4090``, ``RTX A6000``,
    ``l40s``.

    Raises:
        UserError: no GPU matches, or several.
    """
    wanted = _plain(name)
    found = [gpu for key, gpu in GPUS.items() if _plain(key) == wanted]
    found = found or [gpu for key, gpu in GPUS.items() if _plain(key.rpartition("-")[0]) == wanted]
    if len(found) == 1:
        return found[0]
    near = [gpu.name for gpu in found] or [key for key in GPUS if wanted and _plain(key).startswith(wanted)]
    problem = f" is one of {', '.join(near)}; name one" if len(near) > 1 else ": unknown; use one of " + ", ".join(GPUS)
    raise UserError(f"--gpu {name}{problem}, or describe it with --gpu-memory and --gpu-tflops")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]|rtx", "", name.lower())


def describe_gpu(memory: float, tflops: float, bandwidth: float | None = None, link: float | None = None) -> Gpu:
    """Return a GPU that is not in the table.

    Args:
        memory: GiB that PyTorch may use.
        tflops: TFLOP/s of dense products in bf16.
        bandwidth: of its memory, in GB/s. None: in proportion to ``tflops`` as on an A100 of 80 GB.
        link: to the other GPUs of its server, in GB/s and one direction. None: 16 lanes of PCIe 4.

    Raises:
        UserError: a value is not positive and finite.
    """
    given = {"memory": memory, "tflops": tflops, "bandwidth": bandwidth, "link": link}
    for flag, value in given.items():
        if value is not None and not 0 < value < 1e6:
            raise UserError(f"--gpu-{flag} {value:g}: must be above 0 and below 1,000,000")
    a100 = GPUS["a100-80gb"]
    memory_bandwidth = bandwidth * 1e9 if bandwidth else tflops * 1e12 * a100.memory_bandwidth / a100.flops
    link_bandwidth = link * 1e9 if link else _PCIE4
    name = f"{memory:g} GiB, {tflops:g} TFLOP/s"
    return Gpu(name, tflops * 1e12, int(memory * GiB), memory_bandwidth, link_bandwidth, _SHARED_NETWORK, (8, 0))
