"""Floating-point operations of a training step, and what the machine could do at most."""

from __future__ import annotations

import re

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


def flops_per_token(architecture: Architecture, sequence_length: int, causal_halved: bool) -> float:
    """Model FLOPs per token, forward and backward, in a sequence that is one document.

    Every matrix weight costs 6 per token (2 forward, 4 backward; embeddings look up, the head multiplies). Scores and
    their product with the values cost ``12 * q * s`` per layer, q = heads x head size, when all s x s pairs are counted
    (PaLM appendix B, https://arxiv.org/abs/2204.02311), half of that when only causal pairs are (Megatron-LM).
    """
    h, d = architecture.hidden_size, architecture.head_dim
    q, kv = architecture.num_attention_heads * d, architecture.num_key_value_heads * d
    per_layer = h * (q + 2 * kv) + q * h + 3 * h * architecture.intermediate_size
    matrices = architecture.num_layers * per_layer + h * architecture.vocab_size
    scores = 12 * q * sequence_length * architecture.num_layers
    return 6 * matrices + scores * (0.5 if causal_halved else 1.0)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, by its reported name; None where it is not known."""
    for name in sorted(_DENSE_BF16_PEAKS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return _DENSE_BF16_PEAKS[name]
    return None


def device_peak_flops(device: torch.device) -> float | None:
    """:func:`peak_flops` of ``device``; None for a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
