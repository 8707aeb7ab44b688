"""Deduplication across the parts of a run, by the MinHash stages of datatrove.

A part writes the signatures of its documents (:func:`write_signatures`) in the format of datatrove's first stage, and
keeps its finished outputs. datatrove's next stages find documents with an equal signature, over all parts, and join
them to clusters. :func:`write_exclusions` chooses the documents to leave out: all of a cluster but the first, in the
order of the parts. Each part then completes its dataset without them (:func:`kept_documents`).

The signatures are those of a single machine: the bands of MinHash, or the hash of the text. Therefore the same
documents are removed, unless hashes are equal in the 61 bits that datatrove reads and differ in the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ....engine.errors import UserError
from ..options import PreprocessOptions
from ..workers.task_output import TaskOutput
from .minhash import MinHasher

_MAX_HASH = 2**61 - 1
"""datatrove ignores signatures that begin with this value or a larger one."""
_NUMBER = np.dtype("<u4")


def signature_shape(options: PreprocessOptions) -> tuple[int, int]:
    """Return the number of signatures of a document (datatrove's buckets), and of 64-bit hashes in each."""
    threshold = options.minhash_threshold
    return (1, 2) if threshold is None else (MinHasher(threshold).num_bands, 1)


def write_signatures(outputs: Sequence[TaskOutput], options: PreprocessOptions, folder: Path, part: int) -> None:
    """Write the signatures of the documents in ``outputs``, sorted, to a file of each bucket below ``folder``.

    A file is complete when it has its name. Memory holds 12 to 40 bytes for each document of the part.
    """
    num_buckets, num_hashes = signature_shape(options)
    record = np.dtype([("hashes", "<u8", (num_hashes,)), ("document", _NUMBER)])
    for bucket in range(num_buckets):
        hashes, documents = _hashes(outputs, None if options.dedup == "exact" else bucket, num_hashes)
        order = np.lexsort(hashes.T[::-1])  # stable: equal ones remain in the order of the documents
        records = np.empty(len(order), record)
        records["hashes"], records["document"] = hashes[order], documents[order]
        path = folder / f"bucket_{bucket:03d}" / f"{part:05d}.minhash.sig"
        path.parent.mkdir(parents=True, exist_ok=True)
        records.tofile(path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)


def write_exclusions(clusters: Path, folder: Path, num_parts: int) -> None:
    """Write for each part the numbers of the documents that are not the first of their cluster.

    Args:
        clusters: folder with datatrove's ``{part:06d}.clusters``: pairs of a document and its cluster, uint32 each.
        folder: for ``{part}.documents``, which :func:`kept_documents` reads.
    """
    folder.mkdir(parents=True, exist_ok=True)
    seen = np.zeros(0, np.bool_)
    for part in range(num_parts):
        path = clusters / f"{part:06d}.clusters"
        pairs = np.fromfile(path, _NUMBER).reshape(-1, 2) if path.exists() else np.empty((0, 2), _NUMBER)
        pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
        found, first = np.unique(pairs[:, 1], return_index=True)
        seen = np.concatenate([seen, np.zeros(max(int(found.max(initial=0)) + 1 - len(seen), 0), np.bool_)])
        is_first = np.zeros(len(pairs), np.bool_)
        is_first[first[~seen[found]]] = True
        seen[found] = True
        pairs[~is_first, 0].tofile(folder / f"{part}.documents")


def kept_documents(file: str, sizes: Sequence[int]) -> Iterator[npt.NDArray[np.bool_]]:
    """Yield for consecutive tables of documents which ones are kept.

    Args:
        file: the numbers of the documents to leave out, uint32, as :func:`write_exclusions` writes them.
        sizes: documents in each table.

    Raises:
        UserError: the file cannot be read, or was made for other documents.
    """
    try:
        excluded = np.fromfile(file, _NUMBER)
    except OSError as error:
        raise UserError(f"--exclude-documents {file}: cannot be read ({error.strerror})") from error
    total = sum(sizes)
    if excluded.max(initial=0) >= max(total, 1):
        raise UserError(
            f"--exclude-documents {file}: names document {excluded.max():,}, but this part has {total:,}; find the "
            "duplicates again"
        )
    keep = np.ones(total, np.bool_)
    keep[excluded] = False
    yield from np.split(keep, np.cumsum(sizes)[:-1])


def _hashes(
    outputs: Sequence[TaskOutput], band: int | None, num_hashes: int
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Return hashes uint64[n, num_hashes] and their documents.

    Args:
        band: of the MinHash signature, which a text without a word does not have; None: the hash of the text.
    """
    hashes = [np.empty((0, num_hashes), np.uint64)]
    documents = [np.empty(0, np.uint32)]
    before = 0
    for output in outputs:
        if band is None:
            new = np.load(output.documents)["digest"].copy()
            rows, size = np.arange(len(new)), len(new)
        else:
            bands = np.load(output.bands, mmap_mode="r")
            rows, size = np.flatnonzero(bands[:, band]), len(bands)
            new = np.asarray(bands[rows, band])[:, None]
        new[:, 0] %= np.uint64(_MAX_HASH)
        hashes.append(new)
        documents.append((before + rows).astype(np.uint32))
        before += size
    return np.concatenate(hashes), np.concatenate(documents)
