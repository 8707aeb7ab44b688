"""A causal language model of the transformers library, on packed documents."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.linear_cross_entropy import linear_cross_entropy, token_losses
from ....kernels.linear_cross_entropy.any_head import chunked_cross_entropy, chunked_token_losses
from ...batch import Batch
from ..language_model import Attend, ChangeEmbeddings, LanguageModel, Loss
from .architecture import TransformersArchitecture
from .attention import PackedAttention, register
from .documents import one_document_at_a_time
from .head import HeadForm, LibraryHead
from .initialization import Initializer
from .library import ATTENTION, constructed_values, find_parts, library_attention, library_config, meta_library_model


class TransformersModel(LanguageModel):
    """The modules of transformers under their own names, with our attention and our loss.

    It is built on the meta device; only constants, such as rotary frequencies, have values.

    Args:
        architecture: of the model.
    """

    is_first = is_last = True

    def __init__(self, architecture: TransformersArchitecture):
        super().__init__()
        self.architecture: TransformersArchitecture = architecture
        register()
        config = library_config(dict(architecture.config), architecture.model_type)
        attention = library_attention(config) if architecture.documents == "library_attention" else ATTENTION
        parts = find_parts(meta_library_model(config, attention))
        for name, child in parts.model.named_children():
            self.add_module(name, child)
        self._parts, self._blocks = parts, list(parts.blocks)
        if architecture.tie_word_embeddings:
            del parts.head._parameters["weight"]
        self.constants = _turn_buffers_into_parameters(self)
        self._library_head = LibraryHead(parts)
        self._form = self._library_head.form()
        self._attentions = {block: self._prepare(block) for block in self._blocks}
        self._takes_positions = "position_ids" in inspect.signature(parts.backbone.forward).parameters
        self._batch: Batch | None = None
        self.loss: Loss = self._loss_sum
        self.token_losses: Loss = self._token_losses

    @property
    def blocks(self) -> list[nn.Module]:
        """See :class:`LanguageModel`."""
        return self._blocks

    @property
    def embedding(self) -> nn.Module | None:
        """See :class:`LanguageModel`."""
        return self._parts.embedding

    @property
    def head_weight(self) -> Tensor:
        """See :class:`LanguageModel`."""
        parts = self._parts
        return parts.embedding.weight if self.architecture.tie_word_embeddings else parts.head.weight

    def forward(self, batch: Batch, hidden_TH: Tensor | None = None) -> Tensor:
        """See :class:`LanguageModel`."""
        return self.loss(self.hidden_states(batch), self.head_weight, batch.targets, batch.loss_weights)

    def hidden_states(self, batch: Batch) -> Tensor:
        """See :class:`LanguageModel`."""
        self._batch = batch
        positions = {"position_ids": batch.position_ids[None]} if self._takes_positions else {}
        output = self._parts.backbone(input_ids=batch.tokens[None], use_cache=False, **positions)
        self._batch = None
        return output.last_hidden_state[0]

    def head_logits(self, hidden_TH: Tensor) -> Tensor:
        """See :class:`LanguageModel`."""
        return self._library_head(hidden_TH, self.head_weight)

    def wrap_attention(self, wrap: Callable[[Attend], Attend]) -> None:
        """See :class:`LanguageModel`."""
        for packed in self._attentions.values():
            packed.attend = wrap(packed.attend)

    def change_embeddings(self, change: ChangeEmbeddings) -> None:
        """See :class:`LanguageModel`."""

        def hook(module: nn.Module, inputs: Any, hidden_1TH: Tensor) -> Tensor:
            return hidden_1TH if self._batch is None else change(hidden_1TH, self._batch)

        self._parts.embedding.register_forward_hook(hook)

    def before_block(self, block: nn.Module, see: Callable[[Batch], object]) -> None:
        """See :class:`LanguageModel`. With one document at a time, ``see`` gets each document."""
        self._attentions[block].on_batch.append(see)

    @torch.no_grad()
    def initialize_(self, seed: int, copy_: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
        """See :class:`LanguageModel`: as transformers initializes each module."""
        whole, config = TransformersModel(self.architecture), self._parts.model.config
        constructed = constructed_values(config, seed, config._attn_implementation)
        mine = dict(self.named_parameters())
        for name, value in Initializer(whole, whole._parts, constructed, seed).values():
            copy_(mine[name], value)

    def materialize(self, device: torch.device, weights_device: torch.device | None = None) -> LanguageModel:
        """See :class:`LanguageModel`. Constants that are not stored keep their values."""
        kept = [(module._buffers, dict(module._buffers)) for module in self.modules()]
        super().materialize(device, weights_device)
        for buffers, values in kept:
            valued = {name: value for name, value in values.items() if value is None or not value.is_meta}
            buffers.update({name: value if value is None else value.to(device) for name, value in valued.items()})
        return self

    def _prepare(self, block: Any) -> PackedAttention:
        packed = PackedAttention()
        packed.attach(block.modules())
        block.forward = packed.during(block.forward)
        if self.architecture.documents != "packed":
            block.forward = one_document_at_a_time(block.forward)
        # A hook, because recomputation wraps the forward: its second call must see the batch of its first one.
        block.register_forward_pre_hook(self._pass_batch, with_kwargs=True)
        return packed

    def _pass_batch(self, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        return arguments, {**named, "batch": self._batch}

    def _loss_sum(
        self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor, weights_T: Tensor | None = None
    ) -> Tensor:
        form = self._form
        options: dict[str, Any] = {"weights_T": weights_T, "z_loss": self.active_z_loss}
        if form is None:
            size = self.architecture.vocab_size
            return self.training_loss(chunked_cross_entropy(self.head_logits, hidden_TH, targets_T, size, **options))
        options |= self._head_options(form)
        return self.training_loss(linear_cross_entropy(hidden_TH, weight_VH, targets_T, **options))

    def _token_losses(self, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        form = self._form
        if form is None:
            return chunked_token_losses(self.head_logits, hidden_TH, targets_T, self.architecture.vocab_size)
        return token_losses(hidden_TH, weight_VH, targets_T, **self._head_options(form))

    def _head_options(self, form: HeadForm) -> dict[str, Any]:
        return {"logit_scale": form.logit_scale, "logit_softcap": form.softcap, "bias": self._parts.head.bias}


def _turn_buffers_into_parameters(model: nn.Module) -> frozenset[str]:
    """Make parameters without gradients of the buffers that files store, and return their names."""
    names = []
    for prefix, module in model.named_modules():
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                del module._buffers[name]
                module.register_parameter(name, nn.Parameter(buffer.to("meta"), requires_grad=False))
                names.append(f"{prefix}.{name}")
    return frozenset(names)
