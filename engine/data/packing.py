"""Pack chunks into micro-batches: document boundaries, the target of each token, and masked targets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from ...kernels.linear_cross_entropy import IGNORE_INDEX
from ..batch import Batch
from .source import Chunk


def pack(
    chunks: Sequence[Chunk | None],
    sequence_length: int,
    attend_across_documents: bool,
    loss_weights: Sequence[float] | None = None,
) -> Batch:
    """Concatenate chunks into a micro-batch.

    A None in place of a chunk fills a place that must not count: all its targets are masked. The same applies to the
    rest of a place after a shorter chunk, which is a document of its own. With ``attend_across_documents`` a chunk is
    one document. Without, attention and positions restart at every document or span of one. The target of a document's
    last token, which belongs to another document, is then masked. Tokens excluded by a dataset's loss mask are masked
    in both cases, and so is the BOS of the next document. ``loss_weights`` are factors of the losses of each chunk;
    None: all are 1.
    """
    num_tokens = len(chunks) * sequence_length
    tokens = np.zeros(num_tokens, dtype=np.int64)
    targets = np.full(num_tokens, IGNORE_INDEX, dtype=np.int64)
    starts: list[Sequence[int] | npt.NDArray[np.int64]] = []
    for index, chunk in enumerate(chunks):
        offset = index * sequence_length
        starts.append([offset])
        if chunk is None:
            continue
        part = slice(offset, offset + len(chunk.tokens))
        tokens[part] = chunk.tokens
        targets[part] = chunk.targets
        if chunk.predicted is not None:
            targets[part][~chunk.predicted] = IGNORE_INDEX
        if not attend_across_documents:
            targets[offset + chunk.ends] = IGNORE_INDEX
            starts.append(offset + chunk.starts)
        elif chunk.bos_id is not None:
            # The beginning of a text cannot be predicted: its loss would lower the mean with every document in a
            # chunk.
            ends = offset + chunk.ends
            targets[ends[targets[ends] == chunk.bos_id]] = IGNORE_INDEX
        if len(chunk.tokens) < sequence_length:
            starts.append([part.stop])
    cu_seqlens = np.concatenate((*starts, [num_tokens]))
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    position_ids = np.arange(num_tokens) - np.repeat(cu_seqlens[:-1], lengths)
    is_target = targets != IGNORE_INDEX
    weights = None if loss_weights is None else np.repeat(np.array(loss_weights, np.float32), sequence_length)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        num_targets=int(is_target.sum()) if weights is None else float(weights[is_target].sum(dtype=np.float64)),
        loss_weights=None if weights is None else torch.from_numpy(weights),
    )
