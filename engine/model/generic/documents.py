"""Compute a block of transformers one document at a time.

Blocks that mix tokens outside of attention (state-space models, convolutions), or with an attention of their own, let
packed documents see each other. Here the backbone still computes all documents of a batch in one row, but each of its
blocks gets one document after the other. So a block is called once for a batch, as sharding requires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...batch import Batch


def one_document_at_a_time(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward of a block that calls ``forward`` for each document of the argument ``batch``.

    Args:
        forward: of the block, with the argument ``batch`` of :meth:`.attention.PackedAttention.during`. Its first
            argument is [1, T, H] hidden states, and so is its result, or the first one.
    """

    def by_document(hidden: Tensor, *arguments: Any, batch: Batch, **named: Any) -> Any:
        outputs, edges = [], list(document_edges(batch))
        if len(edges) == 1:
            return forward(hidden, *arguments, batch=batch, **named)
        for number, (first, last) in enumerate(edges):
            cut = slice(first, last)
            some = [_cut(argument, hidden.shape[1], cut, number) for argument in arguments]
            some_named = {name: _cut(argument, hidden.shape[1], cut, number) for name, argument in named.items()}
            outputs.append(forward(hidden[:, cut], *some, batch=_one_document(batch, cut), **some_named))
        return _join(outputs, [last - first for first, last in edges])

    return by_document


def document_edges(batch: Batch) -> Iterator[tuple[int, int]]:
    """Return the first token of each document, and the token after its last."""
    assert batch.attention is not None
    first = 0
    for length in batch.attention.lengths:
        yield first, first + length
        first += length


def _one_document(batch: Batch, cut: slice) -> Batch:
    assert batch.attention is not None
    length = cut.stop - cut.start
    offsets = torch.tensor([0, length], dtype=torch.int32, device=batch.cu_seqlens.device)
    return batch._replace(
        tokens=batch.tokens[cut],
        targets=batch.targets[cut],
        position_ids=batch.position_ids[cut],
        cu_seqlens=offsets,
        max_seqlen=length,
        attention=replace(batch.attention, lengths=(length,)),
        token_numbers=None if batch.token_numbers is None else batch.token_numbers[cut],
    )


def _cut(argument: Any, num_tokens: int, cut: slice, number: int) -> Any:
    """Return the part of an argument of a block that belongs to some of the tokens, those of document ``number``.

    The last two dimensions of masks are tokens. Of everything else, the dimension before the last one is (rotary
    embeddings, hidden states of another block), or the last one (positions, biases).
    """
    if isinstance(argument, _PerDocument):
        return argument.values[number]
    if isinstance(argument, (tuple, list)):
        return type(argument)(_cut(item, num_tokens, cut, number) for item in argument)
    if isinstance(argument, dict):
        return {key: _cut(item, num_tokens, cut, number) for key, item in argument.items()}
    if not isinstance(argument, Tensor):
        return argument
    shape = argument.shape
    if len(shape) >= 4 and shape[-1] == shape[-2] == num_tokens:
        return argument[..., cut, cut]
    if len(shape) >= 3 and shape[-2] == num_tokens:
        return argument[..., cut, :]
    if shape and shape[-1] == num_tokens:
        return argument[..., cut]
    return argument


@dataclass(frozen=True)
class _PerDocument:
    """An output of a block that is not one tensor for all documents; other blocks may have it as an argument."""

    values: Sequence[Any]
    """By document."""


def _join(outputs: Sequence[Any], lengths: Sequence[int]) -> Any:
    """Return the output of a block for all documents: tensors whose second dimension is tokens are joined there."""
    first = outputs[0]
    if isinstance(first, (tuple, list)):
        return type(first)(_join(items, lengths) for items in zip(*outputs, strict=True))
    if first is None:
        return None
    if isinstance(first, Tensor) and _have_tokens(outputs, lengths):
        return torch.cat(list(outputs), dim=1)
    return _PerDocument(outputs)


def _have_tokens(outputs: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    """Return whether the second dimension of all ``outputs`` is tokens, and the others are equal."""
    shapes = [output.shape for output in outputs]
    return all(
        len(shape) > 1 and shape[1] == length and shape[2:] == shapes[0][2:]
        for shape, length in zip(shapes, lengths, strict=True)
    )
