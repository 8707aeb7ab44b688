"""Floating-point operations of a training step, and what the machine could do at most."""

from __future__ import annotations

import re
from typing import Literal

import torch

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
    architecture: Architecture, num_tokens: float, num_pairs: float, trainable: Trainable = "all"
) -> float:
    """Model FLOPs, forward and backward, of ``num_tokens`` tokens of which ``num_pairs`` pairs attend to each other.

    For each token a matrix weight W of a product y = W x costs a multiplication and an addition in each of three
    products: y itself, the gradient of x (W^T dy), and its own gradient (dy x^T). That is 6 (PaLM, appendix B,
    https://arxiv.org/abs/2204.02311; embeddings look up, the head multiplies). A frozen weight has no gradient of its
    own: 4. With ``embeddings`` the blocks are frozen, and the head is not; the gradients of activations still go
    through all blocks, as the embedding lies below them.

    Scores and their product with the values have no weights: ``12 * q`` per layer and pair, q = heads x head size,
    whatever learns. Pairs are counted in every layer, also beyond a sliding window; work that recomputation adds is not
    counted.

    Args:
        architecture: of the model.
        num_tokens, num_pairs: see above.
        trainable: which parameters learn.
    """
    h, d = architecture.hidden_size, architecture.head_dim
    q, kv = architecture.num_attention_heads * d, architecture.num_key_value_heads * d
    per_layer = h * (q + 2 * kv) + q * h + 3 * h * architecture.intermediate_size
    per_block_weight = 6 if trainable == "all" else 4
    matrices = per_block_weight * architecture.num_layers * per_layer + 6 * h * architecture.vocab_size
    return matrices * num_tokens + 12 * q * architecture.num_layers * num_pairs


def flops_per_token(
    architecture: Architecture, sequence_length: int, causal_halved: bool, trainable: Trainable = "all"
) -> float:
    """:func:`training_flops` per token, in a sequence that is one document.

    All s x s pairs are counted (PaLM appendix B, https://arxiv.org/abs/2204.02311), half of that when only causal pairs
    are (Megatron-LM).
    """
    return training_flops(architecture, 1, sequence_length * (0.5 if causal_halved else 1.0), trainable)


def named_peak(device_name: str) -> tuple[str, float] | None:
    """(name in the table above, dense bf16 peak in FLOP/s) of a GPU by its reported name; None where not known."""
    for name in sorted(_DENSE_BF16_PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return name, _DENSE_BF16_PEAKS[name]
    return None


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, by its reported name; None where it is not known."""
    found = named_peak(device_name)
    return found[1] if found else None


def device_peak_flops(device: torch.device) -> float | None:
    """:func:`peak_flops` of ``device``; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
