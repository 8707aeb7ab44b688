"""Inspect some chunks and tokens of a dataset, without reading all of it, at the start of a run.

The samples are the same on every rank, so that all ranks come to the same result. Errors outside the samples are found
when the data is read (token ids), or by the count of steps without targets.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .indexed_dataset import IndexedDataset
from .packing import pack
from .sidecar import Sidecar
from .source import Source

CHUNKS_SAMPLED = 256
"""Chunks sampled from a source, evenly spread; takes some 10 ms if the file is cached. If one chunk in 70 has a
target, or an id outside the vocabulary, 256 samples miss all of them with a probability of 2.5 %."""
_TOKENS_SAMPLED = 4 << 20
_READERS = 16
"""Number of threads: a disk or a file server is slow for one read, but not for many at once."""
_RUNS_COMPARED, _RUN = 64, 64


def check_chunks(source: Source, vocab_size: int, attend_across_documents: bool, all_ids: bool) -> None:
    """Refuse a source whose sampled chunks have no targets, or that holds unknown token ids.

    Args:
        source: as in training. Its packer is not used: another order of documents has the same tokens.
        vocab_size: of the model.
        attend_across_documents: as in training.
        all_ids: read the whole sample for token ids, even if the first chunk has targets.

    Raises:
        UserError: names the dataset and the problem.
    """
    plain = dataclasses.replace(source, packer=None)

    def count_targets(number: int) -> float:
        return pack([plain.chunk(number, vocab_size)], plain.sequence_length, attend_across_documents).num_targets

    numbers = _spread(source.num_chunks, min(CHUNKS_SAMPLED, max(2, _TOKENS_SAMPLED // source.sequence_length)))
    if not all_ids and count_targets(numbers[0]):
        return
    with ThreadPoolExecutor(_READERS) as pool:
        found = sum(pool.map(count_targets, numbers))
    if not found:
        mask = "its loss mask leaves out every token" if source.dataset.has_loss_mask else ""
        single = "" if attend_across_documents else "every document has one token"
        reasons = " or ".join(filter(None, (mask, single)))
        raise UserError(
            f"{source.dataset.prefix}: training source '{source.name}' has no target in any of {len(numbers):,} "
            f"chunks, spread evenly over its {source.num_chunks:,}: {reasons}; build it again with targets, or "
            "remove it"
        )


class NamedDataset(NamedTuple):
    """A dataset and its role in a run."""

    role: str
    path: str
    dataset: IndexedDataset
    sidecar: Sidecar | None


def equal_datasets(datasets: Sequence[NamedDataset]) -> Iterator[str]:
    """Yield a line for each two datasets with the same tokens: the same files, copies of them, or links to them."""
    for one, other in itertools.combinations(datasets, 2):
        if not _equal(one, other):
            continue
        roles = {named.role.split()[0] for named in (one, other)}
        consequence = (
            "its loss measures data that the run trains on, and decides on the best checkpoint"
            if len(roles) == 2
            else "the same data is evaluated twice"
            if roles == {"validation"}
            else "its documents are drawn with both weights"
        )
        yield f"{other.role} ({other.path}) has the same tokens as {one.role} ({one.path}): {consequence}"


def _equal(one: NamedDataset, other: NamedDataset) -> bool:
    first, second = one.dataset, other.dataset
    if (first.num_tokens, first.num_sequences) != (second.num_tokens, second.num_sequences):
        return False
    if os.path.samefile(first.idx_path, second.idx_path) and os.path.samefile(first.bin_path, second.bin_path):
        return True
    if one.sidecar is not None and other.sidecar is not None and first.dtype == second.dtype:
        return one.sidecar.bin_xxh3_128 == other.sidecar.bin_xxh3_128
    for run in _spread(-(-first.num_tokens // _RUN), _RUNS_COMPARED):
        start, stop = run * _RUN, min((run + 1) * _RUN, first.num_tokens)
        if not np.array_equal(first.tokens(start, stop), second.tokens(start, stop)):
            return False
    return True


def _spread(total: int, count: int) -> list[int]:
    """Return up to ``count`` of the numbers below ``total``, evenly spread, the first and the last included."""
    if total <= count:
        return list(range(total))
    return [(total - 1) * step // (count - 1) for step in range(count)]
