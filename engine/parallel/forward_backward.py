"""Compute losses and gradients of a rank's micro-batches with its part of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from ...kernels.attention import Choice
from ..batch import Batch
from ..model.attention_choice import ContextKind
from ..model.language_model import LanguageModel, Loss
from ..model.quantized import QuantizedLoraLinear, quantized_layers
from .context import own_tokens
from .data_parallel import DataParallel
from .mesh import Mesh
from .router_losses import RouterLosses
from .z_loss import ZLoss


class BatchPreparer:
    """Moves batches to the device, plans their attention, and takes this rank's tokens.

    Args:
        mesh: this rank's place.
        device: of the model.
        attention: result of ``choose_attention``.
        windows: attention windows of the model's layers.
        kind: how context-parallel ranks compute attention.
    """

    def __init__(
        self,
        mesh: Mesh,
        device: torch.device,
        attention: Choice,
        windows: Iterable[int | None],
        kind: ContextKind = "heads",
    ):
        self.mesh, self.device, self._kind = mesh, device, kind
        self._attention, self._windows = attention, tuple(windows)

    def __call__(self, batch: Batch) -> Batch:
        """Return ``batch`` as the model takes it. Does not wait for the device."""
        batch = batch.prepare(
            self.device,
            self._attention.backend,
            self._windows,
            equal_lengths_backend=self._attention.equal_lengths_backend,
            in_blocks=self._kind == "ring",
        )
        return batch.tokens_in(*self.own_tokens(len(batch.tokens)))

    def own_tokens(self, num_tokens: int) -> tuple[slice, ...]:
        """Return which of a batch's tokens this rank computes, in its order."""
        return own_tokens(num_tokens, self.mesh.coordinate.context, self.mesh.layout.context, self._kind)


class ModelParts:
    """This rank's decoders: one, or several with some pipelines. Parameters have their names in the whole model.

    The parameters are those that optimizers and checkpoints need, also while the decoders show other tensors.

    Args:
        decoders: with memory for their parameters.
        routers: the losses of their routers; None: they have no experts.
        z_loss: that of their logits; None: they have none.
    """

    def __init__(self, decoders: list[LanguageModel], routers: RouterLosses | None = None, z_loss: ZLoss | None = None):
        self.decoders, self.routers, self.z_loss = decoders, routers, z_loss
        # Every step asks for them, and finding them in a model takes the host longer than to compute with them.
        self._named = [named for decoder in decoders for named in decoder.named_parameters()]
        self._unique = [parameter for decoder in decoders for parameter in _unique_parameters(decoder)]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return every parameter of this rank by name."""
        return iter(self._named)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return every parameter of this rank."""
        return (parameter for _, parameter in self._named)

    @property
    def constants(self) -> frozenset[str]:
        """The names of parameters that every rank holds whole, see :attr:`LanguageModel.constants`."""
        return frozenset().union(*(decoder.constants for decoder in self.decoders))

    @property
    def table_names(self) -> frozenset[str]:
        """The names of embeddings and heads, see :meth:`LanguageModel.table_names`."""
        return frozenset().union(*(decoder.table_names() for decoder in self.decoders))

    @property
    def base_names(self) -> frozenset[str]:
        """The names of parameters that checkpoints do not contain, see :attr:`LanguageModel.base_names`."""
        return frozenset().union(*(decoder.base_names for decoder in self.decoders))

    @property
    def quantized_layers(self) -> dict[str, QuantizedLoraLinear]:
        """Layers that hold a matrix of the base in few bits, by the name of the matrix; it is no parameter."""
        return {name: layer for decoder in self.decoders for name, layer in quantized_layers(decoder).items()}

    def begin_step(self, loss_scale: Tensor | None) -> None:
        """Prepare the backward passes of a step whose loss is multiplied by ``loss_scale``; None: one."""
        if self.routers is not None:
            self.routers.begin_step(loss_scale)
        if self.z_loss is not None:
            self.z_loss.begin_step()

    def end_step(self, skip: Tensor) -> None:
        """Update what no gradient does, unless ``skip``, [] fp32 on the device, is 1. All ranks must call this."""
        if self.routers is not None:
            self.routers.update(skip)

    def blocks(self) -> Iterator[nn.Module]:
        """Return the transformer blocks of this rank."""
        return (block for decoder in self.decoders for block in decoder.blocks)

    def unique_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters without those that an earlier stage has as well: a tied head."""
        return iter(self._unique)

    @contextmanager
    def other_losses(self, make: Callable[[LanguageModel], Loss]) -> Iterator[None]:
        """Inside, let forward passes call ``make`` of the decoder with the last block instead of its loss."""
        last = [decoder for decoder in self.decoders if decoder.is_last]
        former = [decoder.loss for decoder in last]
        try:
            for decoder in last:
                decoder.loss = make(decoder)
            yield
        finally:
            for decoder, loss in zip(last, former, strict=True):
                decoder.loss = loss


def _unique_parameters(decoder: LanguageModel) -> list[nn.Parameter]:
    copied = decoder.is_last and not decoder.is_first and decoder.architecture.tie_word_embeddings
    return [parameter for parameter in decoder.parameters() if not (copied and parameter is decoder.head_weight)]


class ForwardBackward(Protocol):
    """Computes the losses and gradients of a step.

    Losses are on the device and only this rank's part: the loss is their sum over all ranks.
    """

    def accumulate_gradients(
        self, batches: list[Batch], num_targets: float | Tensor, on_phase: Callable[[str], None]
    ) -> Tensor:
        """Accumulate gradients over micro-batches and ranks, and return the loss, [] fp32.

        The loss is divided by ``num_targets`` of the *global* batch, so that every token counts the same, however
        unevenly they are distributed to documents, ranks and micro-batches. With a scale of the loss, ``num_targets``
        is divided by it, and is [] fp32 on the device. ``on_phase`` is called with the name of each phase that begins.
        """

    def evaluate(self, batches: list[Batch]) -> Tensor:
        """Return the sum of losses of each micro-batch, [batches] fp64, without gradients."""


class NonPipelined:
    """Computes micro-batches one after the other on a rank with all layers."""

    def __init__(
        self, model: LanguageModel, wrapped: DataParallel, prepare: BatchPreparer, reduce_every_micro_batch: bool
    ):
        self._model, self._wrapped, self._prepare = model, wrapped, prepare
        self._reduce_every = reduce_every_micro_batch

    def accumulate_gradients(
        self, batches: list[Batch], num_targets: float | Tensor, on_phase: Callable[[str], None]
    ) -> Tensor:
        """See :class:`ForwardBackward`."""
        loss = torch.zeros((), device=self._prepare.device)
        with self._wrapped.computing():
            for number, batch in enumerate(batches, 1):
                self._wrapped.reduce_gradients(self._reduce_every or number == len(batches))
                on_phase("forward")
                part = self.loss_sum(batch) / num_targets
                on_phase("backward")
                part.backward()
                loss += part.detach()
        return counted_once(loss, self._prepare.mesh)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """See :class:`ForwardBackward`."""
        losses = torch.zeros(len(batches), dtype=torch.float64, device=self._prepare.device)
        with self._wrapped.computing():
            for number, batch in enumerate(batches):
                losses[number] = self.loss_sum(batch)
        return counted_once(losses, self._prepare.mesh)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Return [] fp32: the sum of the losses of this rank's tokens."""
        return self._model(self._prepare(batch))


def counted_once(loss: Tensor, mesh: Mesh) -> Tensor:
    """Return ``loss``, of any shape, on the first of the tensor-parallel ranks, which all have it, and zero on the
    others.
    """
    return loss if mesh.coordinate.tensor == 0 else torch.zeros_like(loss)
