"""The passes of a step: what the micro-batches of a rank do with its part of the model, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..model.decoder import Decoder
from . import fsdp
from .mesh import Mesh


class BatchPreparer:
    """Moves batches to the device, plans their attention, and takes this rank's tokens.

    Args:
        mesh: this rank's place.
        device: of the model.
        attention_backend: result of ``choose_attention``.
        windows: attention windows of the model's layers.
    """

    def __init__(self, mesh: Mesh, device: torch.device, attention_backend: str, windows: Iterable[int | None]):
        self.mesh, self.device = mesh, device
        self._backend, self._windows = attention_backend, tuple(windows)

    def __call__(self, batch: Batch) -> Batch:
        """Return ``batch`` as the model takes it. Does not wait for the device."""
        batch = batch.prepare(self.device, self._backend, self._windows)
        count = len(batch.tokens) // self.mesh.layout.context
        mine = slice(self.mesh.coordinate.context * count, (self.mesh.coordinate.context + 1) * count)
        return batch._replace(
            tokens=batch.tokens[mine], targets=batch.targets[mine], position_ids=batch.position_ids[mine]
        )


class ModelParts:
    """This rank's decoders: one, or with some pipelines several. Parameters bear their names in the whole model."""

    def __init__(self, decoders: list[Decoder]):
        self.decoders = decoders

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter of this rank, by name."""
        for decoder in self.decoders:
            yield from decoder.named_parameters()

    def parameters(self) -> Iterator[nn.Parameter]:
        """As :meth:`named_parameters`, without the names."""
        return (parameter for _, parameter in self.named_parameters())

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks of this rank."""
        return (block for decoder in self.decoders for block in decoder.model.blocks)

    def unique_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of which no former stage has a copy: an embedding that is also the head lies at both ends."""
        for decoder in self.decoders:
            copied = decoder.is_last and not decoder.is_first and decoder.architecture.tie_word_embeddings
            yield from (p for p in decoder.parameters() if not (copied and p is decoder.head_weight))


class ForwardBackward(Protocol):
    """How a rank computes a step. Losses are [] on the device and this rank's part: their sum over all ranks counts."""

    def accumulate_gradients(self, batches: list[Batch], num_targets: float, on_phase: Callable[[str], None]) -> Tensor:
        """Gradients of the sum of losses over ``num_targets``, added up over micro-batches and ranks; that loss, fp32.

        Dividing by the targets of the *global* batch makes every token count the same, however unevenly documents,
        ranks and micro-batches share them.
        """

    def evaluate(self, batches: list[Batch]) -> Tensor:
        """Sum of losses, fp64, without gradients."""


class NonPipelined:
    """Micro-batches one after the other: this rank has all layers."""

    def __init__(self, model: Decoder, prepare: BatchPreparer, reduce_every_micro_batch: bool):
        self._model, self._prepare, self._reduce_every = model, prepare, reduce_every_micro_batch

    def accumulate_gradients(self, batches: list[Batch], num_targets: float, on_phase: Callable[[str], None]) -> Tensor:
        """See :class:`ForwardBackward`."""
        loss = torch.zeros((), device=self._prepare.device)
        for number, batch in enumerate(batches, 1):
            fsdp.reduce_gradients(self._model, self._reduce_every or number == len(batches))
            on_phase("forward")
            part = self.loss_sum(batch) / num_targets
            on_phase("backward")
            part.backward()
            loss += part.detach()
        return counted_once(loss, self._prepare.mesh)

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> Tensor:
        """See :class:`ForwardBackward`."""
        total = torch.zeros((), dtype=torch.float64, device=self._prepare.device)
        for batch in batches:
            total += self.loss_sum(batch)
        fsdp.reshard(self._model)
        return counted_once(total, self._prepare.mesh)

    def loss_sum(self, batch: Batch) -> Tensor:
        """[] fp32, the losses of this rank's tokens."""
        return self._model(self._prepare(batch))


def counted_once(loss: Tensor, mesh: Mesh) -> Tensor:
    """``loss`` on one of the ranks that share matrices, which all know it; zero on the others."""
    return loss if mesh.coordinate.tensor == 0 else torch.zeros_like(loss)
