"""Give modules of transformers our attention over packed documents.

transformers calls an attention function by the name in ``config._attn_implementation``. Ours is registered there. It
finds the batch that is being computed in an attribute of the module that calls it, because some modules do not pass on
the keyword arguments of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.attention import attention
from ...batch import Batch
from ..language_model import Attend
from .library import ATTENTION

_ATTRIBUTE = "packed_attention"
_NAMES = """
    cache_position cu_seq_lens_k cu_seq_lens_q is_causal layer_idx max_length_k max_length_q output_attentions
    output_hidden_states output_router_logits past_key_value past_key_values position_bias position_embeddings
    position_ids return_dict target_dtype use_cache
"""
_WITHOUT_EFFECT = frozenset(_NAMES.split())
"""Keyword arguments that do not change the attention over whole documents (``is_causal`` and ``position_bias`` are
checked)."""


class UnsupportedAttention(Exception):
    """A module asks for an attention that ours is not: one line."""


class PackedAttention:
    """The attention of the modules of one block, over the documents of the batch that is being computed."""

    def __init__(self) -> None:
        self.batch: Batch | None = None
        self.attend: Attend = attention
        self.on_batch: list[Callable[[Batch], object]] = []
        """Called when the block begins to compute the tokens of a batch."""

    def attach(self, modules: Iterable[nn.Module]) -> None:
        """Make the attention of ``modules`` use this object."""
        for module in modules:
            setattr(module, _ATTRIBUTE, self)

    def during(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``forward`` with one more argument, ``batch``, whose documents its attention reads.

        Recomputation calls it again with the same arguments, when another batch may be the model's latest.
        """

        def with_batch(*arguments: Any, batch: Batch, **named: Any) -> Any:
            self.batch = batch
            for see in self.on_batch:
                see(batch)
            return forward(*arguments, **named)

        return with_batch


def register() -> None:
    """Register our attention in transformers. Doing so again has no effect."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attend)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of one block.

    Args:
        module: that calls it.
        query: [1, N, T, D], all documents of the batch in one row.
        key: [1, K, T, D].
        value: [1, K, T, E].
        attention_mask: None: documents, causality and the window are known here.
        scaling: factor on the scores; None for 1 / sqrt(D).
        dropout: 0.
        sliding_window: as ``window`` of :func:`~retemper.kernels.attention.attention`; so are the next two.
        softcap: of the scores.
        s_aux: [N] attention sinks.
        others: arguments without effect.

    Returns:
        [1, T, N, E], and no attention weights.

    Raises:
        UnsupportedAttention: an argument has an effect that is not implemented.
    """
    _refuse_others(attention_mask, dropout, others)
    packed: PackedAttention = getattr(module, _ATTRIBUTE)
    batch = packed.batch
    assert batch is not None
    options = {name: option for name, option in (("softcap", softcap), ("sinks", s_aux)) if option is not None}
    q_TND, k_TKD, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    mixed_TNE = packed.attend(
        q_TND,
        k_TKD,
        v_TKE,
        batch.cu_seqlens,
        batch.max_seqlen,
        softmax_scale=scaling,
        window=sliding_window,
        plan=batch.attention,
        **options,
    )
    return mixed_TNE[None].contiguous(), None  # modules view the result in other shapes


def _refuse_others(attention_mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise UnsupportedAttention("it makes an attention mask of its own")
    if dropout:
        raise UnsupportedAttention(f"it drops attention weights (dropout {dropout:g})")
    if others.get("is_causal") is False or others.get("position_bias") is not None:
        raise UnsupportedAttention("its attention is not causal, or has a position bias")
    for name, value in others.items():
        if name not in _WITHOUT_EFFECT and isinstance(value, (Tensor, torch.nn.Parameter)):
            raise UnsupportedAttention(f"its attention has an argument {name}")
