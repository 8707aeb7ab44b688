"""Change the number of rows of embedding and head.

Rows are added to make a vocabulary divisible (by tensor-parallel ranks, by the width of matrix units), and cut off
again for an export. Added rows are the mean of the existing ones. An added token's logit is then the mean of the
others, and by Jensen's inequality its share of the softmax is at most the average share. So with n added to V tokens no
log-probability falls by more than log(1 + n / V). With zero rows, a logit of 0 could be above all real ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ...model.families import LARGEST_SIZE
from ..block_copy import BLOCK_BYTES
from ..checkpoint.assets import HfAssets
from ..tensor_source import ReadRows, StoredTensor, TensorSource


class ResizedVocabulary:
    """A source whose embedding and head have ``vocab_size`` rows (a ``TensorSource``).

    Args:
        source: has them with ``rows`` rows.
        tables: names of the tensors with one row for each token.
        rows: number of stored rows.
        vocab_size: number of rows of the result.
    """

    def __init__(self, source: TensorSource, tables: Collection[str], rows: int, vocab_size: int):
        self._source = source
        self._rows = rows
        self.vocab_size = vocab_size
        resized = [name for name in tables if rows != vocab_size]
        self.hashed_rows = dict.fromkeys(resized, min(rows, vocab_size))
        """For each tensor with another number of rows: how many come from the source."""
        self.tensors: Mapping[str, StoredTensor] = {
            name: StoredTensor((vocab_size, *tensor.shape[1:]), tensor.dtype) if name in resized else tensor
            for name, tensor in source.tensors.items()
        }
        self.record = self._describe(vocab_size) if resized else None
        """Record for ``conversion.json``."""

    def _describe(self, vocab_size: int) -> dict[str, Any]:
        return {
            "tensors": list(self.hashed_rows),
            "rows_before": self._rows,
            "rows": vocab_size,
            "added_rows_are": "mean of the rows before" if vocab_size > self._rows else None,
        }

    def describe(self) -> list[str]:
        """Return a line if the number of rows changes."""
        if not self.hashed_rows:
            return []
        return [f"vocabulary: {self._rows} rows become {self.vocab_size} ({', '.join(self.hashed_rows)})"]

    @contextmanager
    def rows(self, name: str) -> Iterator[ReadRows]:
        """Read rows, see :class:`~retemper.engine.weights.tensor_source.TensorSource`."""
        with self._source.rows(name) as read:
            if self.hashed_rows.get(name, 0) < self._rows or name not in self.hashed_rows:
                yield read
                return
            mean = mean_row(read, self._source.tensors[name], self._rows)

            def read_resized(first: int, rows: Tensor) -> None:
                num_stored = max(0, min(rows.shape[0], self._rows - first))
                if num_stored:
                    read(first, rows[:num_stored])
                rows[num_stored:] = mean

            yield read_resized


def mean_row(read: ReadRows, tensor: StoredTensor, num_rows: int) -> Tensor:
    """Return the mean of the first rows of ``tensor``, summed in float64, in the dtype of ``tensor``."""
    rest = tensor.shape[1:]
    block = torch.empty((max(1, BLOCK_BYTES // (math.prod(rest) * 8)), *rest), dtype=tensor.dtype)
    total = torch.zeros(rest, dtype=torch.float64)
    for first in range(0, num_rows, block.shape[0]):
        rows = block[: min(block.shape[0], num_rows - first)]
        read(first, rows)
        total += rows.double().sum(0)
    return (total / num_rows).to(tensor.dtype)


def resized_vocabulary(
    source: TensorSource,
    tables: Collection[str],
    rows: int,
    vocab_size: int | None,
    multiple_of: int | None,
    assets: HfAssets,
) -> ResizedVocabulary:
    """Return ``source`` with the vocabulary size of ``--vocab-size`` or ``--pad-vocab-to-multiple-of``.

    Args:
        source: of the weights.
        tables: names of its tensors with one row for each token.
        rows: their number of rows.
        vocab_size: the option.
        multiple_of: the option.
        assets: with the tokenizer, whose tokens must keep their rows.

    Raises:
        UserError: the number is invalid, or tokens of the tokenizer would lose their rows.
    """
    if vocab_size is not None and multiple_of is not None:
        raise UserError("--vocab-size and --pad-vocab-to-multiple-of: give one of them")
    if vocab_size is not None and vocab_size < 1:
        raise UserError(f"--vocab-size {vocab_size}: at least 1 is needed")
    if multiple_of is not None and multiple_of < 1:
        raise UserError(f"--pad-vocab-to-multiple-of {multiple_of}: at least 1 is needed")
    wanted = vocab_size or rows
    if multiple_of is not None:
        wanted = -(-rows // multiple_of) * multiple_of
    if wanted > LARGEST_SIZE and wanted != rows:
        option = f"--vocab-size {vocab_size}" if multiple_of is None else f"--pad-vocab-to-multiple-of {multiple_of}"
        raise UserError(f"{option}: {wanted:,} rows, at most {LARGEST_SIZE:,} are supported")
    if wanted < rows:
        try:
            tokenizer = assets.num_token_ids()
        except UserError as error:
            raise UserError(f"{error}: it cannot be read, so rows cannot be cut safely") from None
        if tokenizer is not None and wanted < tokenizer[1]:
            name, needed = tokenizer
            raise UserError(
                f"--vocab-size {wanted}: the tokenizer ({name}) has token ids up to {needed - 1:,}; use {needed} or "
                "more"
            )
    return ResizedVocabulary(source, tables, rows, wanted)
