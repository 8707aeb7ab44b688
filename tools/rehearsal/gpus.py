"""What GPUs can do at most, by their makers' datasheets. Nothing here was measured."""

from __future__ import annotations

from dataclasses import dataclass

from ...engine.errors import UserError

GiB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU in a usual server of eight."""

    name: str
    flops: float
    """Dense bf16 matrix products, FLOP/s."""
    memory: int
    """Bytes that PyTorch may use (``total_memory``): less than the product's name says."""
    memory_bandwidth: float
    """Bytes per second."""
    intra_node: float
    """NVLink, bytes per second of one GPU in one direction."""
    inter_node: float
    """Network, bytes per second of one GPU in one direction."""
    capability: tuple[int, int]
    """CUDA compute capability."""


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
    )
}
"""By name."""


def find_gpu(name: str) -> Gpu:
    """The GPU called ``name``, or by the beginning of its name where only one begins so.

    Raises:
        UserError: there is none, or several.
    """
    found = [gpu for key, gpu in GPUS.items() if key == name.lower()]
    found = found or [gpu for key, gpu in GPUS.items() if key.startswith(name.lower())]
    if len(found) != 1 or not name:
        raise UserError(f"--gpu {name}: use one of {', '.join(GPUS)}")
    return found[0]
