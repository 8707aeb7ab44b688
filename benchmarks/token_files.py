"""Write datasets of made-up tokens, in Megatron's format."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.data.index_format import write_index
from ..engine.files.atomic import sync_file


def write_dataset(
    prefix: Path, dtype: npt.DTypeLike, lengths: npt.NDArray[np.integer], tokens: Iterable[npt.NDArray[np.integer]] = ()
) -> str:
    """Write a dataset without a sidecar, and flush it to disk; return the hash of its index.

    Args:
        prefix: path without suffix.
        dtype: of the tokens in the file.
        lengths: [documents].
        tokens: blocks of tokens, all documents in a row. None are given: the file is sparse, and reads as zeros.
    """
    dtype = np.dtype(dtype)
    index_hash = write_index(f"{prefix}.idx", dtype, lengths)
    with open(f"{prefix}.bin", "wb") as file:
        for block in tokens:
            file.write(block.astype(dtype.newbyteorder("<")).tobytes())
        file.truncate(int(lengths.sum(dtype=np.int64)) * dtype.itemsize)
        sync_file(file)
    return index_hash
