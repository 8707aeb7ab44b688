"""One decoder for Llama, Mistral, Qwen2 and Qwen3.

Parameters carry their Hugging Face names (``model.layers.0.self_attn.q_proj.weight``), so weights map by name in both
directions. Inputs are packed: T tokens of one or more documents, without a batch dimension and without padding.

Shapes: T tokens, H hidden, F feed-forward, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from ...kernels.attention import attention
from ...kernels.elementwise import Implementation
from ...kernels.linear_cross_entropy import linear_cross_entropy
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import apply_rope_to_pair, rope_cos_sin
from ...kernels.swiglu import swiglu
from ...kernels.triton_support import triton_refusal
from ..errors import UserError
from .architecture import Architecture, inverse_frequencies
from .packing import Packing


def elementwise_implementation(setting: Literal["auto", "triton", "torch"], device_type: str) -> Implementation:
    """The implementation that ``training.fused_elementwise`` asks for.

    Raises:
        UserError: triton, where it cannot run.
    """
    # auto: no measurement on a GPU has shown yet that the Triton kernels beat torch.compile's fusion.
    if setting != "triton":
        return "torch"
    refusal = triton_refusal(device_type)
    if refusal is not None:
        raise UserError(f"training.fused_elementwise is triton, but {refusal}, or set it to torch")
    return "triton"


class Decoder(nn.Module):
    """The language model. With targets it returns the summed loss and never forms all logits; without, the logits.

    ``elementwise`` is the implementation of norms, rotary positions and SwiGLU.
    """

    def __init__(self, architecture: Architecture, elementwise: Implementation = "torch"):
        super().__init__()
        self.architecture = architecture
        self.model = Backbone(architecture, elementwise)
        # A tied head has no parameter of its own, so that nothing can untie it.
        if not architecture.tie_word_embeddings:
            self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, H] weight of the output head."""
        return self.model.embed_tokens.weight if self.architecture.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: Tensor, packing: Packing, targets_T: Tensor | None = None) -> Tensor:
        """Args:
            tokens_T: [T] int64 token ids.
            packing: the documents in ``tokens_T``.
            targets_T: [T] int64, the next token of each token, ``IGNORE_INDEX`` where there is none.

        Returns:
            [] fp32 sum of the losses when targets are given, else [T, V] logits.
        """
        hidden_TH = self.model(tokens_T, packing)
        if targets_T is None:
            return hidden_TH @ self.head_weight.t()
        return linear_cross_entropy(hidden_TH, self.head_weight, targets_T).loss_sum

    @torch.no_grad()
    def initialize_(self, seed: int, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """Random weights: normal with the architecture's ``initializer_range``, norms one, biases zero.

        Every parameter is drawn whole from its own stream (a function of the seed and its place in the model), so the
        values do not depend on how the parameters are sharded. ``copy_(parameter, values)`` writes a whole tensor into
        a parameter, of which this rank may hold a part.
        """
        for index, (name, parameter) in enumerate(self.named_parameters()):
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
                values = torch.empty(parameter.shape).normal_(
                    0.0, self.architecture.initializer_range, generator=generator
                )
                copy_(parameter, values)


class Backbone(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, architecture: Architecture, elementwise: Implementation):
        super().__init__()
        self.architecture = architecture
        self.embed_tokens = nn.Embedding(architecture.vocab_size, architecture.hidden_size)
        self.layers = nn.ModuleList(Block(architecture, window, elementwise) for window in architecture.sliding_windows)
        self.norm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, elementwise)

    def forward(self, tokens_T: Tensor, packing: Packing) -> Tensor:
        """[T] token ids -> [T, H] normalized hidden states."""
        frequencies = _frequencies_on(packing.position_ids.device, self.architecture)
        rope = rope_cos_sin(packing.position_ids, frequencies)
        hidden_TH = self.embed_tokens(tokens_T)
        for layer in self.layers:
            hidden_TH = layer(hidden_TH, rope, packing)
        return self.norm(hidden_TH)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, architecture: Architecture, window: int | None, elementwise: Implementation):
        super().__init__()
        self.input_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, elementwise)
        self.self_attn = Attention(architecture, window, elementwise)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps, elementwise)
        self.mlp = FeedForward(architecture, elementwise)

    def forward(self, hidden_TH: Tensor, rope: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        """[T, H] -> [T, H]."""
        mixed_TH = self.self_attn(self.input_layernorm(hidden_TH), rope, packing)
        normalized_TH, hidden_TH = self.post_attention_layernorm(mixed_TH, hidden_TH)
        return hidden_TH + self.mlp(normalized_TH)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalizes queries and keys per head."""

    def __init__(self, architecture: Architecture, window: int | None, elementwise: Implementation):
        super().__init__()
        self.elementwise = elementwise
        self.head_dim = architecture.head_dim
        self.window = window
        hidden, bias = architecture.hidden_size, architecture.qkv_bias
        query_width = architecture.num_attention_heads * self.head_dim
        key_width = architecture.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=architecture.output_bias)
        norm: Callable[[], nn.Module] = (
            (lambda: RMSNorm(self.head_dim, architecture.rms_norm_eps, elementwise))
            if architecture.qk_norm
            else nn.Identity
        )
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, hidden_TH: Tensor, rope: tuple[Tensor, Tensor], packing: Packing) -> Tensor:
        """[T, H] -> [T, H]."""
        q_TND, k_TKD, v_TKD = (
            projection(hidden_TH).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_TND, k_TKD = apply_rope_to_pair(
            self.q_norm(q_TND), self.k_norm(k_TKD), *rope, implementation=self.elementwise
        )
        mixed_TND = attention(
            q_TND,
            k_TKD,
            v_TKD,
            packing.cu_seqlens,
            packing.max_seqlen,
            window=self.window,
            plan=packing.attention,
        )
        return self.o_proj(mixed_TND.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, architecture: Architecture, elementwise: Implementation):
        super().__init__()
        self.elementwise = elementwise
        hidden, inner, bias = architecture.hidden_size, architecture.intermediate_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        gate, up = self.gate_proj(hidden_TH), self.up_proj(hidden_TH)
        return self.down_proj(swiglu(gate, up, implementation=self.elementwise))


class RMSNorm(nn.Module):
    """Learned scale over a root-mean-square normalization."""

    def __init__(self, width: int, eps: float, elementwise: Implementation):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.elementwise = elementwise

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """[..., width] -> [..., width]; with a residual, the norm of ``residual + x`` and that sum."""
        return rms_norm(x, self.weight, self.eps, residual, implementation=self.elementwise)


@functools.cache
def _frequencies_on(device: torch.device, architecture: Architecture) -> Tensor:
    """[D/2] rotary frequencies. A constant of the architecture rather than a buffer: sharding, construction on the meta
    device and checkpoints then have nothing to carry."""
    return torch.tensor(inverse_frequencies(architecture), dtype=torch.float32, device=device)
