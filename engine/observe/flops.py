"""Count the floating-point operations of a training step, and look up the peak of the GPU."""

from __future__ import annotations

import math
import re
from typing import Literal

import torch

from ..config.settings import AdapterConfig
from ..model.adapters import adapter_parameters
from ..model.architecture import Architecture

_DENSE_BF16_PEAKS = {
    # NVIDIA datasheets, dense bf16 with fp32 accumulation, SXM parts unless named otherwise, in FLOP/s.
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


Trainable = Literal["all", "embeddings"]
"""``training.trainable``."""


def training_flops(
    architecture: Architecture,
    num_tokens: float,
    num_pairs: float,
    trainable: Trainable = "all",
    adapter: AdapterConfig | None = None,
) -> float:
    """Return the model FLOPs, forward and backward, of ``num_tokens`` tokens with ``num_pairs`` attending pairs.

    Each element of a matrix W in y = W x costs a multiplication and an addition per token in three products: y, the
    gradient of x (W^T dy), and the gradient of W (dy x^T): 6 FLOPs (PaLM, appendix B,
    https://arxiv.org/abs/2204.02311). The embedding is looked up and costs none. A frozen weight has no gradient: 4.
    With ``embeddings`` the blocks are frozen and the head is not; activation gradients still pass through all blocks
    down to the embedding. With an adapter, all matrices of the base are frozen, except a head in
    ``adapter.modules_to_save``; those of the adapter are trained.

    Scores and their product with the values cost ``12 * q`` per layer and pair, q = heads x head size. Pairs are
    counted in every layer, also outside of a sliding window. Recomputation is not counted.

    Args:
        architecture: of the model.
        num_tokens, num_pairs: see above.
        trainable: which parameters are trained.
        adapter: that is trained instead, if it has a kind.
    """
    q = architecture.num_attention_heads * architecture.head_dim
    per_block_weight, per_head_weight, of_adapter = 6 if trainable == "all" else 4, 6, 0
    if adapter is not None and adapter.kind is not None:
        parameters = adapter_parameters(architecture, adapter)
        per_block_weight, per_head_weight = 4, 6 if parameters.trains_head(architecture) else 4
        of_adapter = 6 * sum(math.prod(shape) for shape in parameters.added.values() if len(shape) == 2)
    head = architecture.hidden_size * architecture.vocab_size
    matrices = per_block_weight * architecture.block_matrices + per_head_weight * head + of_adapter
    return matrices * num_tokens + 12 * q * architecture.num_layers * num_pairs


def flops_per_token(
    architecture: Architecture,
    sequence_length: int,
    causal_halved: bool,
    trainable: Trainable = "all",
    adapter: AdapterConfig | None = None,
) -> float:
    """Return :func:`training_flops` per token of a sequence that is one document.

    Counts all s x s pairs (PaLM, appendix B, https://arxiv.org/abs/2204.02311), or half of them with ``causal_halved``
    (Megatron-LM).
    """
    return training_flops(architecture, 1, sequence_length * (0.5 if causal_halved else 1.0), trainable, adapter)


def named_peak(device_name: str) -> tuple[str, float] | None:
    """Return (name in the table above, dense bf16 peak in FLOP/s) of a GPU by its reported name; None if unknown."""
    for name in sorted(_DENSE_BF16_PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return name, _DENSE_BF16_PEAKS[name]
    return None


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s by its reported name; None if unknown."""
    found = named_peak(device_name)
    return found[1] if found else None


def device_peak_flops(device: torch.device) -> float | None:
    """Return :func:`peak_flops` of ``device``; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
