"""Choose the most likely next tokens with the model in training, in any layout: to look at its texts, not to serve it.

There is no key/value cache: every token computes the whole sequence again, by the forward pass of an evaluation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..batch import Batch
from ..model.decoder import scaled_logits
from ..model.families import DecoderArchitecture
from ..model.language_model import LanguageModel, NextTokens
from .forward_backward import ForwardBackward, ModelParts

_Chosen = list[tuple[Tensor, Tensor]]


def next_tokens(model: ModelParts, forward_backward: ForwardBackward, batches: list[Batch]) -> dict[int, int]:
    """Return the most likely tokens after some positions. All ranks must call this.

    Args:
        model: this rank's part.
        forward_backward: its passes.
        batches: whose ``targets`` are masked, except those of the positions: they hold the number of the position.

    Returns:
        the token of each number that this rank has computed: with context parallelism some of them, and in a pipeline
        none on ranks without the last block.
    """
    chosen: _Chosen = []
    with _choosing(model, chosen):
        forward_backward.evaluate(batches)
    return {
        number: token
        for numbers, tokens in chosen
        for number, token in zip(numbers.tolist(), tokens.tolist(), strict=True)
    }


@contextmanager
def _choosing(model: ModelParts, chosen: _Chosen) -> Iterator[None]:
    """Let every forward pass inside append (numbers, tokens) to ``chosen`` instead of computing losses."""
    last = [decoder for decoder in model.decoders if decoder.is_last]
    former = [decoder.loss for decoder in last]
    try:
        for decoder in last:
            decoder.loss = functools.partial(_choose, decoder, chosen)
        yield
    finally:
        for decoder, loss in zip(last, former, strict=True):
            decoder.loss = loss


def _choose(decoder: LanguageModel, chosen: _Chosen, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    numbers = targets_T[targets_T != IGNORE_INDEX]
    if len(numbers):
        chosen.append((numbers, decoder.next_tokens(hidden_TH, weight_VH, targets_T)))
    return hidden_TH.new_zeros((), dtype=torch.float32)


def vocabulary_parallel(mesh: DeviceMesh, architecture: DecoderArchitecture) -> NextTokens:
    """Return :attr:`LanguageModel.next_tokens` for ranks that each hold some rows of the head."""
    group = mesh.get_group()

    def next_tokens(hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
        """Choose among all rows: ``hidden_TH`` are this rank's tokens, ``weight_VH`` a DTensor, ``targets_T`` all."""
        assert isinstance(weight_VH, DTensor)
        tokens = DTensor.from_local(hidden_TH, mesh, [Shard(0)], run_check=False)
        hidden_NH = tokens.redistribute(placements=[Replicate()]).to_local()[targets_T != IGNORE_INDEX]
        rows_VH = weight_VH.to_local()
        highest_N, tokens_N = scaled_logits(architecture, hidden_NH, rows_VH).float().max(-1)
        highest_RN, tokens_RN = (
            torch.stack(_all_gather(each, group))
            for each in (highest_N, tokens_N + mesh.get_local_rank() * len(rows_VH))
        )
        return tokens_RN.gather(0, highest_RN.argmax(0, keepdim=True))[0]

    return next_tokens


def _all_gather(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts
