"""Pack windows into micro-batches: document boundaries, the target of each token, and masked targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..batch import Batch
from .source import Window


def pack(windows: Sequence[Window | None], sequence_length: int, attend_across_documents: bool) -> Batch:
    """Concatenate windows into a micro-batch.

    A None in place of a window fills a place that must not count: all its targets are masked. The same applies to the
    rest of a place after a shorter window, which is a document of its own. With ``attend_across_documents`` a window is
    one document. Without, attention and positions restart at every document or piece of one. The target of a document's
    last token, which belongs to another document, is then masked. Tokens excluded by a dataset's loss mask are masked
    in both cases, and so is the BOS of the next document.
    """
    num_tokens = len(windows) * sequence_length
    tokens = np.zeros(num_tokens, dtype=np.int64)
    targets = np.full(num_tokens, IGNORE_INDEX, dtype=np.int64)
    starts: list[Sequence[int] | npt.NDArray[np.int64]] = []
    for index, window in enumerate(windows):
        offset = index * sequence_length
        starts.append([offset])
        if window is None:
            continue
        part = slice(offset, offset + len(window.tokens))
        tokens[part] = window.tokens
        targets[part] = window.targets
        if window.predicted is not None:
            targets[part][~window.predicted] = IGNORE_INDEX
        if not attend_across_documents:
            targets[offset + window.ends] = IGNORE_INDEX
            starts.append(offset + window.starts)
        elif window.bos_id is not None:
            # The beginning of a text cannot be predicted: its loss would lower the mean with every document in a
            # window.
            ends = offset + window.ends
            targets[ends[targets[ends] == window.bos_id]] = IGNORE_INDEX
        if len(window.tokens) < sequence_length:
            starts.append([part.stop])
    cu_seqlens = np.concatenate((*starts, [num_tokens]))
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    position_ids = np.arange(num_tokens) - np.repeat(cu_seqlens[:-1], lengths)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_targets=int(np.count_nonzero(targets != IGNORE_INDEX)),
    )
