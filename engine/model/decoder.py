"""One decoder for Llama, Mistral, Qwen2 and Qwen3.

Parameters carry their Hugging Face names (``model.layers.0.self_attn.q_proj.weight``), so weights map by name in both
directions. Inputs are packed: T tokens of one or more documents, without a batch dimension and without padding.

The number of ranks is unknown here. If ranks share the work, ``engine/parallel`` replaces ``Decoder.loss`` or
``Attention.attend``. It can also pass linear layers that hold a part of their matrix, or make a decoder of some of the
layers.

Shapes: T tokens, H hidden, F feed-forward, N query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

from ...kernels.attention import attention
from ...kernels.linear_cross_entropy import linear_cross_entropy
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import apply_rope_to_pair, rope_cos_sin
from ...kernels.swiglu import swiglu
from ..batch import Batch
from .families import DecoderArchitecture, inverse_frequencies
from .language_model import Attend, LanguageModel, LayerRange


class Decoder(LanguageModel):
    """The language model. It returns the summed loss of a batch and never forms all logits.

    Args:
        architecture: of the whole model.
        layers: the blocks that this one has; None for all. One without the first block takes hidden states, one without
            the last returns them.
    """

    def __init__(self, architecture: DecoderArchitecture, layers: LayerRange | None = None):
        super().__init__()
        self.architecture: DecoderArchitecture = architecture
        layers = layers or LayerRange(0, architecture.num_layers)
        self.is_first, self.is_last = layers.start == 0, layers.stop == architecture.num_layers
        # A tied head has no parameter of its own, so that the two cannot diverge.
        tied = architecture.tie_word_embeddings
        self.model = Backbone(architecture, layers, self.is_first or (self.is_last and tied))
        if self.is_last and not tied:
            self.lm_head = nn.Linear(architecture.hidden_size, architecture.vocab_size, bias=False)
        self.loss: Callable[[Tensor, Tensor, Tensor], Tensor] = _loss_sum

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`LanguageModel`."""
        return list(self.model.layers.values())

    @property
    def embedding(self) -> nn.Module | None:
        """See :class:`LanguageModel`."""
        return self.model.embed_tokens

    @property
    def head_weight(self) -> Tensor:
        """See :class:`LanguageModel`."""
        if not self.architecture.tie_word_embeddings:
            return self.lm_head.weight
        assert self.model.embed_tokens is not None
        return self.model.embed_tokens.weight

    def forward(self, batch: Batch, hidden_TH: Tensor | None = None) -> Tensor:
        """See :class:`LanguageModel`."""
        hidden_TH = self.model(batch, hidden_TH)
        return self.loss(hidden_TH, self.head_weight, batch.targets) if self.is_last else hidden_TH

    def hidden_states(self, batch: Batch) -> Tensor:
        """See :class:`LanguageModel`."""
        return self.model(batch)

    def head_logits(self, hidden_TH: Tensor) -> Tensor:
        """See :class:`LanguageModel`."""
        return hidden_TH @ self.head_weight.t()

    def wrap_attention(self, wrap: Callable[[Attend], Attend]) -> None:
        """See :class:`LanguageModel`."""
        for block in self.model.blocks:
            block.self_attn.attend = wrap(block.self_attn.attend)

    @torch.no_grad()
    def initialize_(self, seed: int, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """See :class:`LanguageModel`: normal with the architecture's ``initializer_range``, norms one, biases zero."""
        with torch.device("meta"):
            whole = Decoder(self.architecture)
        places = {name: place for place, (name, _) in enumerate(whole.named_parameters())}
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + places[name]) % 2**63)
                values = torch.empty(parameter.shape).normal_(
                    0.0, self.architecture.initializer_range, generator=generator
                )
                copy_(parameter, values)


def _loss_sum(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_TH, weight_VH, targets_T).loss_sum


class Backbone(nn.Module):
    """Embeddings, blocks and the final norm, or the part of them that belongs to some of the layers."""

    def __init__(self, architecture: DecoderArchitecture, layers: LayerRange, has_embedding: bool):
        super().__init__()
        self.architecture = architecture
        width = architecture.hidden_size
        self.embeds = layers.start == 0
        self.embed_tokens = nn.Embedding(architecture.vocab_size, width) if has_embedding else None
        # By number, as in the parameters' names, because the first layer may have any number.
        self.layers = nn.ModuleDict(
            {str(number): Block(architecture, architecture.sliding_windows[number]) for number in range(*layers)}
        )
        is_last = layers.stop == architecture.num_layers
        self.norm = RMSNorm(width, architecture.rms_norm_eps) if is_last else None

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks in their order."""
        return cast("list[Block]", list(self.layers.values()))

    def forward(self, batch: Batch, hidden_TH: Tensor | None = None) -> Tensor:
        """Map the tokens of ``batch``, or [T, H] hidden states, to [T, H] hidden states.

        The result is normalized after the last block.
        """
        rope = rope_cos_sin(batch.position_ids, _frequencies_on(batch.position_ids.device, self.architecture))
        if self.embeds:
            assert self.embed_tokens is not None
            hidden_TH = self.embed_tokens(batch.tokens)
        assert hidden_TH is not None
        for block in self.blocks:
            hidden_TH = block(hidden_TH, rope, batch)
        return hidden_TH if self.norm is None else self.norm(hidden_TH)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, architecture: DecoderArchitecture, window: int | None):
        super().__init__()
        self.input_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.self_attn = Attention(architecture, window)
        self.post_attention_layernorm = RMSNorm(architecture.hidden_size, architecture.rms_norm_eps)
        self.mlp = FeedForward(architecture)

    def forward(self, hidden_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Map [T, H] to [T, H]."""
        mixed_TH = self.self_attn(self.input_layernorm(hidden_TH), rope, batch)
        normalized_TH, hidden_TH = self.post_attention_layernorm(mixed_TH, hidden_TH)
        return hidden_TH + self.mlp(normalized_TH)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; Qwen3 normalizes queries and keys per head."""

    def __init__(self, architecture: DecoderArchitecture, window: int | None):
        super().__init__()
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
            (lambda: RMSNorm(self.head_dim, architecture.rms_norm_eps)) if architecture.qk_norm else nn.Identity
        )
        self.q_norm, self.k_norm = norm(), norm()
        self.attend: Attend = attention

    def forward(self, hidden_TH: Tensor, rope: tuple[Tensor, Tensor], batch: Batch) -> Tensor:
        """Map [T, H] to [T, H]."""
        q_TND, k_TKD, v_TKD = (
            projection(hidden_TH).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_TND, k_TKD = apply_rope_to_pair(self.q_norm(q_TND), self.k_norm(k_TKD), *rope)
        mixed_TND = self.attend(
            q_TND,
            k_TKD,
            v_TKD,
            batch.cu_seqlens,
            batch.max_seqlen,
            window=self.window,
            plan=batch.attention,
        )
        return self.o_proj(mixed_TND.flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, architecture: DecoderArchitecture):
        super().__init__()
        hidden, inner, bias = architecture.hidden_size, architecture.intermediate_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Map [T, H] to [T, H]."""
        gate, up = self.gate_proj(hidden_TH), self.up_proj(hidden_TH)
        return self.down_proj(swiglu(gate, up))


class RMSNorm(nn.Module):
    """Learned scale over a root-mean-square normalization."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map [..., width] to [..., width]; with a residual, return the norm of ``residual + x`` and that sum."""
        return rms_norm(x, _local_copy(self.weight), self.eps, residual)


def _local_copy(weight: Tensor) -> Tensor:
    """Return the weight as a plain tensor.

    With tensor parallelism, ranks with copies of it see different tokens or heads, so its gradient is the sum of
    theirs.
    """
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight


@functools.cache
def _frequencies_on(device: torch.device, architecture: DecoderArchitecture) -> Tensor:
    """Return [D/2] rotary frequencies.

    They are a constant of the architecture and not a buffer, so that sharding, meta construction and checkpoints can
    ignore them.
    """
    return torch.tensor(inverse_frequencies(architecture), dtype=torch.float32, device=device)
