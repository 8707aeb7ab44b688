"""Count the floating-point operations of a training step, and look up the peak of the GPU."""

from __future__ import annotations

import re

import torch

from ..model.architecture import Architecture
from ..parallel.trainable import ALL, Learning

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


def training_flops(architecture: Architecture, num_tokens: float, num_pairs: float, learning: Learning = ALL) -> float:
    """Return the model FLOPs, forward and backward, of ``num_tokens`` tokens with ``num_pairs`` attending pairs.

    Each element of a matrix W in y = W x costs a multiplication and an addition per token in three products: y, the
    gradient of x (W^T dy), and the gradient of W (dy x^T): 6 FLOPs (PaLM, appendix B,
    https://arxiv.org/abs/2204.02311). The embedding is looked up and costs none. A frozen weight has no gradient: 4.
    Below the first trained parameter nothing is computed backward: 2. The matrices of an adapter are trained. Of a
    mixture of experts, the experts count to which a token is routed.

    Scores and their product with the values cost ``12 * q`` per layer and pair, q = heads x head size, 4 of them
    forward. Pairs are counted in every layer, also outside of a sliding window. Recomputation is not counted.

    Args:
        architecture: of the model.
        num_tokens, num_pairs: see above.
        learning: which parameters are trained.
    """
    q = architecture.num_attention_heads * architecture.head_dim
    head = architecture.hidden_size * architecture.vocab_size
    of_blocks = (2 + 2 * learning.inputs + 2 * learning.weights) * architecture.block_matrices
    of_head = (2 + 2 * learning.head_input + 2 * learning.head_weight) * head
    of_attention = (4 + 8 * learning.backward) * q * architecture.num_layers
    return (of_blocks + of_head + 6 * learning.added) * num_tokens + of_attention * num_pairs


def flops_per_token(
    architecture: Architecture, sequence_length: int, causal_halved: bool, learning: Learning = ALL
) -> float:
    """Return :func:`training_flops` per token of a sequence that is one document.

    Counts all s x s pairs (PaLM, appendix B, https://arxiv.org/abs/2204.02311), or half of them with ``causal_halved``
    (Megatron-LM).
    """
    return training_flops(architecture, 1, sequence_length * (0.5 if causal_halved else 1.0), learning)


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
