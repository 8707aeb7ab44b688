r"""Define the layout of Megatron-LM's ``.idx`` file, and write an index.

All numbers are little endian, and nothing is padded, so the int64 arrays may be unaligned:

    offset 0   9 bytes   b"MMIDIDX\0\0"
    offset 9   uint64    version, 1
    offset 17  uint8     code of the token dtype (``DTYPES``)
    offset 18  uint64    N, number of sequences
    offset 26  uint64    D, length of document_indices = number of documents + 1
    offset 34  int32[N]  length of each sequence, in tokens
               int64[N]  pointer to each sequence: byte offset in .bin
               int64[D]  document_indices: document d is the sequences [indices[d], indices[d + 1]); first 0, last N
               int8[N]   modes, in multimodal datasets only; not read here

An empty document repeats an index and adds no sequence.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
import xxhash

from ..files.atomic import sync_file
from ..files.outputs import open_new

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D: 34 bytes
INT64 = struct.Struct("<q")

DTYPES: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
"""Token dtypes by their code in the header. Codes 6 and 7 are floating point and not used for token ids."""

MAX_LENGTH = 2**31 - 1
"""Maximum length of a sequence, in tokens: lengths are int32."""
ENTRIES_AT_ONCE = 1 << 20
"""Index entries processed at once: bounds memory to some tens of MB, whatever N."""


def best_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype that Megatron-LM uses for ids in [0, ``vocab_size``): uint16 below 65500, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


def dataset_prefix(path: str | os.PathLike[str]) -> str:
    """Return ``path`` without its ``.bin`` or ``.idx`` suffix: the name that both files share."""
    prefix = os.fspath(path)
    return prefix[:-4] if prefix.endswith((".bin", ".idx")) else prefix


def write_index(
    path: str | os.PathLike[str],
    dtype: npt.DTypeLike,
    lengths: npt.NDArray[np.integer],
    document_indices: npt.NDArray[np.integer] | None = None,
) -> str:
    """Write an ``.idx`` file and fsync it. Memory is bounded: the arrays may be memory-mapped files.

    Args:
        dtype: token dtype of the ``.bin`` file, one of ``DTYPES``.
        lengths: [N], tokens in each sequence.
        document_indices: [D], first 0, last N; None: each sequence is a document.

    Returns:
        xxh3-128 of the file, in hexadecimal.
    """
    dtype = np.dtype(dtype)
    count = len(lengths)
    num_indices = count + 1 if document_indices is None else len(document_indices)
    code = next(code for code, known in DTYPES.items() if known == dtype)
    digest = xxhash.xxh3_128()
    with open_new(path) as file:
        header = HEADER.pack(MAGIC, VERSION, code, count, num_indices)
        write_hashed(file, digest, header)
        for part in slices(count):
            write_hashed(file, digest, lengths[part].astype("<i4").tobytes())
        end = 0
        for part in slices(count):
            sizes = lengths[part].astype(np.int64) * dtype.itemsize
            ends = end + np.cumsum(sizes)
            write_hashed(file, digest, (ends - sizes).astype("<i8").tobytes())
            end = int(ends[-1])
        for part in slices(num_indices):
            indices = np.arange(part.start, part.stop) if document_indices is None else document_indices[part]
            write_hashed(file, digest, indices.astype("<i8").tobytes())
        sync_file(file)
    return digest.hexdigest()


def slices(count: int) -> Iterator[slice]:
    """Yield slices of at most ``ENTRIES_AT_ONCE`` entries that cover [0, ``count``)."""
    return (slice(first, min(first + ENTRIES_AT_ONCE, count)) for first in range(0, count, ENTRIES_AT_ONCE))


def write_hashed(file: IO[bytes], digest: xxhash.xxh3_128, block: bytes) -> None:
    """Write ``block`` to ``file`` and add it to ``digest``."""
    file.write(block)
    digest.update(block)
