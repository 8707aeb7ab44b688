"""The packed batch that the data loader makes and the model computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.attention import VARIABLE_LENGTH, AttentionPlan, pad_offsets, plan_attention
from ..kernels.linear_cross_entropy import IGNORE_INDEX


class Batch(NamedTuple):
    """Documents laid end to end: T tokens without padding.

    With context parallelism a rank has only its own tokens, targets and positions; the offsets are those of all ranks.
    """

    tokens: Tensor
    """[T] int64 token ids."""
    targets: Tensor
    """[T] int64: the next token, or ``IGNORE_INDEX``."""
    position_ids: Tensor
    """[T] int64 positions, from zero in every document."""
    cu_seqlens: Tensor
    """[documents + 1] int32, first 0, last T. Documents without tokens may follow the others."""
    max_seqlen: int
    """Length of the longest document."""
    num_targets: float
    """Number of targets that are not masked, or the sum of their ``loss_weights``: the divisor of the loss."""
    attention: AttentionPlan | None = None
    """The backend and its data; None for the backend that ``auto`` selects for the tensors' device."""
    token_numbers: Tensor | None = None
    """[T] int64, different for every token of a run: sample number x sequence length + place in the sample. Random
    numbers of training are functions of it. None: the batch is not for training."""
    loss_weights: Tensor | None = None
    """[T] fp32 factors of the losses of the targets. None: all are 1."""

    @classmethod
    def of_documents(cls, tokens: Tensor, lengths: Sequence[int], targets: Tensor | None = None) -> Batch:
        """Return a batch of documents of these ``lengths``; without ``targets`` all are masked."""
        targets = torch.full_like(tokens, IGNORE_INDEX) if targets is None else targets
        positions = torch.cat([torch.arange(length) for length in lengths]).to(tokens.device)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        num_targets = int((targets != IGNORE_INDEX).sum())
        return cls(tokens, targets, positions, cu_seqlens, max(lengths), num_targets)

    def to(self, device: torch.device) -> Batch:
        """Return the same batch on ``device``; copies from pinned memory are asynchronous."""
        if device.type == "cpu":
            return self
        return self._replace(**{name: value.to(device, non_blocking=True) for name, value in self._tensors()})

    def pin_memory(self) -> Batch:
        """Return the same batch in page-locked memory."""
        return self._replace(**{name: value.pin_memory() for name, value in self._tensors()})

    def tokens_in(self, *parts: slice) -> Batch:
        """Return the same batch with only the tokens in ``parts``; offsets and attention stay those of all tokens."""
        per_token = ("tokens", "targets", "position_ids", "token_numbers", "loss_weights")

        def taken(value: Any) -> Any:
            return value[parts[0]] if len(parts) == 1 else torch.cat([value[part] for part in parts])

        return self._replace(**{name: taken(value) for name, value in self._tensors() if name in per_token})

    def _tensors(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in self._asdict().items() if isinstance(value, Tensor))

    def without_targets(self) -> Batch:
        """Return the same batch with all targets masked."""
        return self._replace(targets=torch.full_like(self.targets, IGNORE_INDEX), num_targets=0)

    def prepare(
        self,
        device: torch.device,
        attention_backend: str,
        windows: Iterable[int | None],
        *,
        equal_lengths_backend: str | None = None,
        in_blocks: bool = False,
    ) -> Batch:
        """Return this batch, whose offsets are in host memory, on ``device`` with its attention planned.

        A batch that has a plan already keeps it.
        Neither this nor the attention waits for the device.

        Args:
            device: of the model.
            attention_backend: result of ``choose_attention``.
            windows: attention windows of the model's layers.
            equal_lengths_backend: see :func:`plan_attention`.
            in_blocks: see :func:`plan_attention`.
        """
        plan = self.attention or plan_attention(
            attention_backend,
            self.cu_seqlens,
            windows,
            device,
            equal_lengths_backend=equal_lengths_backend,
            in_blocks=in_blocks,
        )
        batch = self.to(device)
        # Padding needs only the shape, which the host knows.
        offsets = pad_offsets(batch.cu_seqlens) if plan.backend in VARIABLE_LENGTH else batch.cu_seqlens
        return batch._replace(cu_seqlens=offsets, attention=plan)
