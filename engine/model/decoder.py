"""One decoder for all families of :mod:`.family_table`.

Parameters have the names of Llama's Hugging Face files (``model.layers.0.self_attn.q_proj.weight``); where a family's
files differ, ``DecoderArchitecture.stored_pieces`` maps them. Inputs are packed: T tokens of one or more documents,
without a batch dimension and without padding.

The number of ranks is unknown here. If ranks share the work, ``engine/parallel`` replaces ``Decoder.loss`` or
``Attention.attend``. It can also pass linear layers that hold a part of their matrix, or make a decoder of some of the
layers.

Shapes: T tokens, H hidden, F feed-forward, N query heads, K key/value heads, D head size, R rotating part of it, V
vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.activations import ACTIVATIONS, gated
from ...kernels.attention import attention
from ...kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from ...kernels.rms_norm import rms_norm
from ...kernels.rope import apply_rope_to_pair, rope_cos_sin
from ..batch import Batch
from .architecture import LayerRange
from .expert_settings import ExpertSettings
from .experts import Experts, Router
from .families import DecoderArchitecture
from .language_model import Attend, ChangeEmbeddings, LanguageModel, Loss, SameInput
from .local_copy import local_copy
from .rope_settings import DynamicScaling, RopeSettings, growth_exponents, inverse_frequencies


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
        self.constants = architecture.float32_tensors.intersection(name for name, _ in self.named_parameters())
        self.loss: Loss = self._loss_sum
        self.token_losses: Loss = functools.partial(token_losses, **architecture.head_options)

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
        if not self.is_last:
            return hidden_TH
        return self.loss(hidden_TH, self.head_weight, batch.targets, batch.loss_weights)

    def hidden_states(self, batch: Batch) -> Tensor:
        """See :class:`LanguageModel`."""
        return self.model(batch)

    def head_logits(self, hidden_TH: Tensor) -> Tensor:
        """See :class:`LanguageModel`."""
        return scaled_logits(hidden_TH, self.head_weight, **self.architecture.head_options)

    def _loss_sum(
        self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        options = {"weights_T": weights_T, "z_loss": self.active_z_loss, **self.architecture.head_options}
        return self.training_loss(linear_cross_entropy(hidden_TH, weight_VH, targets_T, **options))

    def wrap_attention(self, wrap: Callable[[Attend], Attend]) -> None:
        """See :class:`LanguageModel`."""
        for block in self.model.blocks:
            block.self_attn.attend = wrap(block.self_attn.attend)

    def change_embeddings(self, change: ChangeEmbeddings) -> None:
        """See :class:`LanguageModel`."""
        self.model.change_embeddings = change

    def before_block(self, block: nn.Module, see: Callable[[Batch], object]) -> None:
        """See :class:`LanguageModel`."""
        block.forward = functools.partial(_seeing, see, block.forward)

    @torch.no_grad()
    def initialize_(self, seed: int, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """See :class:`LanguageModel`: normal with the architecture's ``initializer_range``, norms one, biases zero."""
        with torch.device("meta"):
            whole = Decoder(self.architecture)
        places = {name: place for place, (name, _) in enumerate(whole.named_parameters())}
        for name, parameter in self.named_parameters():
            if name not in places:  # of an adapter, see lora.initialize_
                continue
            if name.endswith("bias"):
                parameter.zero_()
            elif name.endswith("norm.weight"):
                parameter.fill_(0.0 if self.architecture.norm == "rms_plus_one" else 1.0)
            else:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + places[name]) % 2**63)
                values = torch.empty(parameter.shape).normal_(
                    0.0, self.architecture.initializer_range, generator=generator
                )
                copy_(parameter, values)


def _seeing(
    see: Callable[[Batch], object],
    forward: Callable[..., Tensor],
    hidden_TH: Tensor,
    rotation: Rotation | None,
    batch: Batch,
) -> Tensor:
    """Run the forward of a block after ``see(batch)``."""
    see(batch)
    return forward(hidden_TH, rotation, batch)


def scaled_logits(
    hidden_TH: Tensor, weight_VH: Tensor, *, logit_scale: float = 1.0, logit_softcap: float | None = None
) -> Tensor:
    """Map [T, H] hidden states to the [T, V] logits of some rows of the head."""
    logits_TV = hidden_TH @ weight_VH.t()
    if logit_scale != 1.0:
        logits_TV = logits_TV * logit_scale
    return logits_TV if logit_softcap is None else logit_softcap * torch.tanh(logits_TV / logit_softcap)


class Rotation(NamedTuple):
    """What the positions of a batch's tokens mean to the attention of some layers."""

    cos_TR: Tensor
    sin_TR: Tensor
    query_scale_T: Tensor | None
    """Factor of the queries by position; None: one."""

    def rotate(self, q_TND: Tensor, k_TKD: Tensor, rope: RopeSettings) -> tuple[Tensor, Tensor]:
        """Return queries and keys turned by their positions."""
        dtype = q_TND.dtype
        if rope.in_fp32:
            q_TND, k_TKD = q_TND.float(), k_TKD.float()
        q_TND, k_TKD = apply_rope_to_pair(q_TND, k_TKD, self.cos_TR, self.sin_TR, rope.interleaved)
        if rope.in_fp32:
            q_TND, k_TKD = q_TND.to(dtype), k_TKD.to(dtype)
        if self.query_scale_T is not None:
            q_TND = q_TND * self.query_scale_T[:, None, None].to(dtype)
        return q_TND, k_TKD


class Backbone(nn.Module):
    """Embeddings, blocks and the final norm, or the part of them that belongs to some of the layers."""

    def __init__(self, architecture: DecoderArchitecture, layers: LayerRange, has_embedding: bool):
        super().__init__()
        self.architecture = architecture
        width = architecture.hidden_size
        self.embeds = layers.start == 0
        self.embed_tokens = nn.Embedding(architecture.vocab_size, width) if has_embedding else None
        # By number, as in the parameters' names, because the first layer may have any number.
        self.layers = nn.ModuleDict({str(number): Block(architecture, number) for number in range(*layers)})
        is_last = layers.stop == architecture.num_layers
        self.norm = Norm(architecture, width) if is_last else None
        self.change_embeddings: ChangeEmbeddings | None = None
        """See :meth:`LanguageModel.change_embeddings`."""

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks in their order."""
        return cast("list[Block]", list(self.layers.values()))

    def forward(self, batch: Batch, hidden_TH: Tensor | None = None) -> Tensor:
        """Map the tokens of ``batch``, or [T, H] hidden states, to [T, H] hidden states.

        The result is normalized after the last block.
        """
        ropes = {block.rope for block in self.blocks}
        rotations = {rope: _rotation(rope, batch) for rope in ropes if rope is not None}
        if self.embeds:
            hidden_TH = self._embed(batch)
        assert hidden_TH is not None
        for block in self.blocks:
            hidden_TH = block(hidden_TH, rotations[block.rope] if block.rope else None, batch)
        return hidden_TH if self.norm is None else self.norm(hidden_TH)

    def _embed(self, batch: Batch) -> Tensor:
        assert self.embed_tokens is not None
        hidden_TH = self.embed_tokens(batch.tokens)
        scale, inside = self.architecture.embedding_scale, self.architecture.rounds_embedding_scale
        if inside:  # transformers scales inside of the embedding module
            scale = torch.tensor(scale, dtype=hidden_TH.dtype, device="cpu").item()
        change = self.change_embeddings
        if change is not None and not inside:
            hidden_TH = change(hidden_TH, batch)
        if scale != 1.0:
            hidden_TH = hidden_TH * scale
        return change(hidden_TH, batch) if change is not None and inside else hidden_TH


class Block(nn.Module):
    """Transformer block: attention and a feed-forward layer, with norms before or after them, or both."""

    def __init__(self, architecture: DecoderArchitecture, number: int):
        super().__init__()
        self.rope = architecture.ropes[number]
        self._names, self._parallel = architecture.block_norms, architecture.parallel
        self._residual_scale = architecture.residual_scale
        # In the order of the computation, which is also that of the parameters.
        self._add_norm(architecture, self._names.before_attention)
        self.self_attn = Attention(architecture, number)
        self._add_norm(architecture, self._names.after_attention)
        self._add_norm(architecture, self._names.before_mlp)
        self.mlp = _feed_forward(architecture, number)
        self._add_norm(architecture, self._names.after_mlp)

    def _add_norm(self, architecture: DecoderArchitecture, name: str | None) -> None:
        if name is not None:
            self.add_module(name, Norm(architecture, architecture.hidden_size))

    def forward(self, hidden_TH: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        """Map [T, H] to [T, H]."""
        names = self._names
        normalized_TH = self._norm(names.before_attention, hidden_TH)
        mixed_TH = self._scaled(self._norm(names.after_attention, self.self_attn(normalized_TH, rotation, batch)))
        if self._parallel:
            if names.before_mlp is not None:
                normalized_TH = self._norm(names.before_mlp, hidden_TH)
            return hidden_TH + mixed_TH + self._scaled(self.mlp(normalized_TH))
        if names.before_mlp is None:
            normalized_TH = hidden_TH = hidden_TH + mixed_TH
        else:
            normalized_TH, hidden_TH = getattr(self, names.before_mlp)(mixed_TH, hidden_TH)
        return hidden_TH + self._scaled(self._norm(names.after_mlp, self.mlp(normalized_TH)))

    def _norm(self, name: str | None, x_TH: Tensor) -> Tensor:
        return x_TH if name is None else getattr(self, name)(x_TH)

    def _scaled(self, x_TH: Tensor) -> Tensor:
        return x_TH if self._residual_scale == 1.0 else x_TH * self._residual_scale


class Attention(SameInput):
    """Grouped-query attention. Queries and keys may be normalized, then rotate by their positions."""

    def __init__(self, architecture: DecoderArchitecture, number: int):
        super().__init__()
        self.head_dim = architecture.head_dim
        self.window, self.rope = architecture.sliding_windows[number], architecture.ropes[number]
        hidden, bias = architecture.hidden_size, architecture.qkv_bias
        query_width = architecture.num_attention_heads * self.head_dim
        key_width = architecture.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, query_width, bias=bias)
        self.k_proj = nn.Linear(hidden, key_width, bias=bias)
        self.v_proj = nn.Linear(hidden, key_width, bias=bias)
        self.o_proj = nn.Linear(query_width, hidden, bias=architecture.output_bias)
        self._full_norm = architecture.qk_norm == "full"
        widths = (query_width, key_width) if self._full_norm else (self.head_dim, self.head_dim)
        self.q_norm, self.k_norm = (
            Norm(architecture, width) if architecture.qk_norm else nn.Identity() for width in widths
        )
        self._options = architecture.attention_options
        self.attend: Attend = attention

    @property
    def layers_with_same_input(self) -> list[nn.Linear]:
        """See :class:`~.language_model.SameInput`."""
        return [self.q_proj, self.k_proj, self.v_proj]

    def forward(self, hidden_TH: Tensor, rotation: Rotation | None, batch: Batch) -> Tensor:
        """Map [T, H] to [T, H]."""
        q, k, v = self.project(hidden_TH)
        q_TND, k_TKD = self._heads(q, self.q_norm), self._heads(k, self.k_norm)
        v_TKD = v.unflatten(-1, (-1, self.head_dim))
        if rotation is not None and self.rope is not None:
            q_TND, k_TKD = rotation.rotate(q_TND, k_TKD, self.rope)
        mixed_TND = self.attend(
            q_TND,
            k_TKD,
            v_TKD,
            batch.cu_seqlens,
            batch.max_seqlen,
            window=self.window,
            plan=batch.attention,
            **self._options,
        )
        return self.o_proj(mixed_TND.flatten(-2))

    def _heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        """Normalize queries or keys [T, N * D], and return them as [T, N, D]."""
        if self._full_norm:
            return norm(x).unflatten(-1, (-1, self.head_dim))
        return norm(x.unflatten(-1, (-1, self.head_dim)))


class FeedForward(SameInput):
    """Feed-forward layer; the activation of a gate may multiply the inner features."""

    def __init__(self, architecture: DecoderArchitecture, inner: int):
        super().__init__()
        hidden, bias = architecture.hidden_size, architecture.mlp_bias
        self.gate_proj = nn.Linear(hidden, inner, bias=bias) if architecture.gated else None
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self._activation = architecture.activation

    @property
    def layers_with_same_input(self) -> list[nn.Linear]:
        """See :class:`~.language_model.SameInput`."""
        return [self.up_proj] if self.gate_proj is None else [self.gate_proj, self.up_proj]

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Map [T, H] to [T, H]."""
        if self.gate_proj is None:
            return self.down_proj(ACTIVATIONS[self._activation](self.up_proj(hidden_TH)))
        gate, up = self.project(hidden_TH)
        return self.down_proj(gated(gate, up, self._activation))


class MixtureOfExperts(nn.Module):
    """Feed-forward layers of which a router chooses some for each token, and in some families one for all tokens."""

    def __init__(self, architecture: DecoderArchitecture, settings: ExpertSettings):
        super().__init__()
        hidden = architecture.hidden_size
        self.gate = Router(settings, hidden)
        self.experts = Experts(settings, hidden, architecture.activation)
        shared = settings.shared_intermediate_size
        self.shared_expert = FeedForward(architecture, shared) if shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if settings.shared_gate else None

    def forward(self, hidden_TH: Tensor) -> Tensor:
        """Map [T, H] to [T, H]."""
        shared_TH = None if self.shared_expert is None else self.shared_expert(hidden_TH)
        if self.shared_expert_gate is not None:
            shared_TH = self.shared_expert_gate(hidden_TH).sigmoid() * shared_TH
        # Last in the forward pass is first in the backward pass: FSDP then knows that a recomputed block is in it, and
        # does not gather the experts once more. Recomputation stops before the last product of the forward pass.
        chosen_TH = self.experts(hidden_TH, self.gate(hidden_TH))
        return chosen_TH if shared_TH is None else chosen_TH + shared_TH


def _feed_forward(architecture: DecoderArchitecture, number: int) -> FeedForward | MixtureOfExperts:
    """Return the feed-forward layer of the block ``number``."""
    settings = architecture.experts
    if settings is not None and settings.layers[number]:
        return MixtureOfExperts(architecture, settings)
    return FeedForward(architecture, architecture.intermediate_size)


_RMS_WEIGHT_OFFSETS = {"rms": None, "rms_fp32": 0.0, "rms_plus_one": 1.0}


class Norm(nn.Module):
    """Root-mean-square or layer normalization with a learned scale, and optionally a bias."""

    def __init__(self, architecture: DecoderArchitecture, width: int):
        super().__init__()
        self.kind, self.eps = architecture.norm, architecture.norm_eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if architecture.norm_bias else None
        self.average: Callable[[Tensor], Tensor] | None = None
        """Averages the mean square over ranks that each have a part of the width; set by tensor parallelism."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Map [..., width] to [..., width]; with a residual, return the norm of ``residual + x`` and that sum."""
        weight = local_copy(self.weight)
        if self.kind == "layer_norm":
            x = x if residual is None else residual + x
            bias = None if self.bias is None else local_copy(self.bias)
            normalized = F.layer_norm(x, weight.shape, weight, bias, self.eps)
            return normalized if residual is None else (normalized, x)
        offset = _RMS_WEIGHT_OFFSETS[self.kind]
        return rms_norm(x, weight, self.eps, residual, weight_offset=offset, average=self.average)


def _rotation(rope: RopeSettings, batch: Batch) -> Rotation:
    """Return the rotation of the tokens of ``batch`` in the layers with these rotary settings."""
    positions_T = batch.position_ids
    frequencies = _frequencies_on(positions_T.device, rope)
    if rope.unscaled_length is not None:
        frequencies = _frequencies_by_length(rope, frequencies, batch)
    cos_TR, sin_TR = rope_cos_sin(positions_T, frequencies, rope.interleaved, rope.attention_factor)
    if not rope.query_growth:
        return Rotation(cos_TR, sin_TR, None)
    periods_T = torch.floor(positions_T / rope.query_period)
    return Rotation(cos_TR, sin_TR, 1 + rope.query_growth * torch.log(1 + periods_T))


def _frequencies_by_length(rope: RopeSettings, frequencies: Tensor, batch: Batch) -> Tensor:
    """Return [T, R/2] frequencies of documents, some of which are longer than ``rope.unscaled_length``."""
    lengths_T = batch.cu_seqlens.diff().repeat_interleave(batch.cu_seqlens.diff(), output_size=len(batch.position_ids))
    assert rope.unscaled_length is not None
    if isinstance(rope.scaling, DynamicScaling):
        factor = rope.scaling.factor
        growth_T = (factor * lengths_T / rope.unscaled_length - (factor - 1)).clamp(min=1.0)
        exponents = torch.tensor(growth_exponents(len(frequencies)), device=frequencies.device)
        return frequencies * growth_T[:, None] ** exponents
    long = _frequencies_on(frequencies.device, rope, rope.unscaled_length + 1)
    return torch.where(lengths_T[:, None] > rope.unscaled_length, long, frequencies)


@functools.cache
def _frequencies_on(device: torch.device, rope: RopeSettings, length: int = 1) -> Tensor:
    """Return [R/2] rotary frequencies for documents of ``length`` tokens.

    They are a constant of the architecture and not a buffer, so that sharding, meta construction and checkpoints can
    ignore them.
    """
    return torch.tensor(inverse_frequencies(rope, length), dtype=torch.float32, device=device)
