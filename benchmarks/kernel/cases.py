"""Define the benchmark cases: for each kernel and size its inputs, its float64 reference, and its providers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import providers, references

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One kernel at one size."""

    kernel: str
    name: str
    make_inputs: Callable[[torch.device, torch.dtype], Tensors]
    """Returns random inputs, new ones at every call."""
    leaves: tuple[str, ...]
    """Inputs that get gradients."""
    outputs: tuple[str, ...]
    reference: Callable[[Tensors, tuple[Tensor | None, ...]], Tensors]
    """(inputs, gradients of the outputs) -> float64 outputs by name and gradients by ``d`` + the leaf's name."""
    providers: dict[str, providers.Provider]
    bounds: dict[str, float] = field(default_factory=dict)
    """Maximum relative error of ours, by result; ``loss`` is absolute, in nats. See :func:`bound`."""
    flops: float = 0.0
    """Minimum floating-point operations, forward and backward; 0: bound by memory."""

    def bound(self, result: str, dtype: torch.dtype) -> float:
        """Return the largest error of ``result`` that counts as correct."""
        if dtype == torch.float32:
            return 1e-5
        return self.bounds.get(result, 1e-2)


def linear_cross_entropy(tokens: int, hidden: int, vocab: int, logit_std: float = 1.0) -> Case:
    """Return the case of a linear cross-entropy.

    With logits of large spread, most targets are those that the model predicts, as late in training.
    """

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
        # Each logit is a sum of `hidden` products, so this is its standard deviation.
        x = torch.randn(tokens, hidden, device=device).mul_(logit_std * hidden**-0.5).to(dtype)
        weight = torch.randn(vocab, hidden, device=device).to(dtype)
        targets = torch.randint(vocab, (tokens,), device=device)
        if logit_std > 2:
            for start in range(0, tokens, 1024):
                part = slice(start, start + 1024)
                best = (x[part] @ weight.t()).argmax(-1)
                targets[part] = torch.where(torch.rand(best.shape, device=device) < 0.6, best, targets[part])
        targets[torch.rand(tokens, device=device) < 0.05] = references.IGNORE_INDEX
        return {"x": x, "weight": weight, "targets": targets}

    return Case(
        "linear_cross_entropy",
        f"{tokens} x {hidden} x {vocab}" + (f", logit std {logit_std:g}" if logit_std != 1 else ""),
        make_inputs,
        ("x", "weight"),
        ("loss",),
        references.linear_cross_entropy,
        providers.LINEAR_CROSS_ENTROPY,
        {"loss": 1e-4, "dx": 5e-3, "dweight": 5e-3},
        flops=6.0 * tokens * hidden * vocab,
    )


def attention(sequence: int, batch: int, heads: int, kv_heads: int, head_dim: int, mean_document: int = 0) -> Case:
    """Return the case of attention over ``batch`` concatenated sequences of ``sequence`` tokens.

    With ``mean_document`` they are cut into documents of random length about that mean.
    """
    num_tokens = sequence * batch
    # The cuts are part of the case, so every provider and every draw of inputs has the same work.
    generator = torch.Generator().manual_seed(num_tokens + mean_document)
    cuts = set(range(0, num_tokens + 1, sequence))
    if mean_document:
        cuts |= set(torch.randint(1, num_tokens, (num_tokens // mean_document,), generator=generator).tolist())
    offsets = sorted(cuts)
    lengths = [stop - start for start, stop in itertools.pairwise(offsets)]

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
        def heads_of(number: int) -> Tensor:
            return torch.randn(num_tokens, number, head_dim, device=device).to(dtype)

        return {
            "q": heads_of(heads),
            "k": heads_of(kv_heads),
            "v": heads_of(kv_heads),
            "cu_seqlens": torch.tensor(offsets, dtype=torch.int32, device=device),
        }

    packed = f", documents of about {mean_document}" if mean_document else ""
    return Case(
        "attention",
        f"{batch} x {sequence}, {heads}/{kv_heads} heads of {head_dim}{packed}",
        make_inputs,
        ("q", "k", "v"),
        ("output",),
        references.attention,
        providers.ATTENTION,
        # Two products forward and five backward, over the causal half of each document's pairs.
        flops=sum(7.0 * length * length * heads * head_dim for length in lengths),
    )


def rms_norm(tokens: int, hidden: int, with_residual: bool) -> Case:
    """Return the case of a normalization, or of that of a sum with the residual stream, which is an output too."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
        inputs = {
            "x": torch.randn(tokens, hidden, device=device).to(dtype),
            "weight": (1 + 0.1 * torch.randn(hidden, device=device)).to(dtype),
        }
        return inputs | ({"residual": torch.randn(tokens, hidden, device=device).to(dtype)} if with_residual else {})

    return Case(
        "rms_norm",
        f"{tokens} x {hidden}" + (" + residual" if with_residual else ""),
        make_inputs,
        ("x", "weight", "residual") if with_residual else ("x", "weight"),
        ("output", "sum") if with_residual else ("output",),
        references.rms_norm,
        providers.RMS_NORM_RESIDUAL if with_residual else providers.RMS_NORM,
    )


def rope(tokens: int, heads: int, kv_heads: int, head_dim: int) -> Case:
    """Return the case of rotating queries and keys."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
        angles = torch.rand(tokens, head_dim // 2, device=device) * 100
        angles = torch.cat((angles, angles), -1)
        return {
            "q": torch.randn(tokens, heads, head_dim, device=device).to(dtype),
            "k": torch.randn(tokens, kv_heads, head_dim, device=device).to(dtype),
            "cos": angles.cos(),
            "sin": angles.sin(),
        }

    return Case(
        "rope",
        f"{tokens} tokens, {heads}/{kv_heads} heads of {head_dim}",
        make_inputs,
        ("q", "k"),
        ("q_out", "k_out"),
        references.rope,
        providers.ROPE,
    )


def swiglu(tokens: int, inner: int) -> Case:
    """Return the case of the gated activation."""

    def make_inputs(device: torch.device, dtype: torch.dtype) -> Tensors:
        return {name: torch.randn(tokens, inner, device=device).to(dtype) for name in ("gate", "up")}

    return Case(
        "swiglu", f"{tokens} x {inner}", make_inputs, ("gate", "up"), ("output",), references.swiglu, providers.SWIGLU
    )


def cases(sizes: str) -> list[Case]:
    """Return the cases: ``tiny`` for tests, ``small`` for seconds on a CPU, ``qwen2.5`` with
    those of Qwen2.5 0.5B and 7B.
    """
    if sizes == "tiny":
        return [
            linear_cross_entropy(33, 16, 131),
            attention(32, 2, 4, 2, 16, mean_document=9),
            rms_norm(33, 24, False),
            rms_norm(33, 24, True),
            rope(33, 4, 2, 16),
            swiglu(33, 24),
        ]
    if sizes == "small":
        return [
            linear_cross_entropy(1024, 256, 32000),
            linear_cross_entropy(1024, 256, 32000, logit_std=6.0),
            attention(512, 4, 4, 2, 64),
            attention(512, 4, 4, 2, 64, mean_document=128),
            rms_norm(2048, 256, False),
            rms_norm(2048, 256, True),
            rope(2048, 4, 2, 64),
            swiglu(2048, 704),
        ]
    return [
        linear_cross_entropy(8192, 896, 151936),
        linear_cross_entropy(8192, 3584, 152064),
        linear_cross_entropy(8192, 896, 151936, logit_std=6.0),
        linear_cross_entropy(16384, 896, 151936),
        attention(4096, 4, 14, 2, 64),
        attention(4096, 4, 14, 2, 64, mean_document=1024),
        attention(4096, 2, 28, 4, 128),
        attention(4096, 2, 28, 4, 128, mean_document=1024),
        rms_norm(16384, 896, False),
        rms_norm(16384, 896, True),
        rms_norm(8192, 3584, True),
        rope(16384, 14, 2, 64),
        rope(8192, 28, 4, 128),
        swiglu(16384, 4864),
        swiglu(8192, 18944),
    ]
