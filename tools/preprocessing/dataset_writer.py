"""Writes an indexed dataset: tokens, index, and optionally a loss mask and metadata, published together.

Tokens come from arrays, or from ranges of other files, which the kernel copies. index_format.py defines the format.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import cast

import numpy as np
import numpy.typing as npt

from ...engine.data.index_format import INT64, MAX_LENGTH, best_dtype, dataset_prefix, slices, write_index
from ...engine.data.sidecar import Sidecar
from ...engine.errors import UserError
from ...engine.files.atomic import sync_file, sync_path
from ...engine.files.outputs import open_new
from .dataset_files import BIN, IDX, JSON, MASK, METADATA, refuse_existing_outputs
from .hashed_file import FileArray, FileRange, HashedFile, IntegerSlices

__all__ = ["FileArray", "FileRange", "IndexedDatasetWriter", "best_dtype"]


class IndexedDatasetWriter:
    """Writes an indexed dataset whose files get their final names only when it is complete.

    A context manager: files are written to a hidden folder next to the output. If the block ends without an exception,
    they are flushed to disk and renamed. The hidden folder is always removed. An existing dataset stays until then.

    Args:
        prefix: path without suffix; its folder is created if missing.
        dtype: token dtype of the file; see :func:`best_dtype`.
        overwrite: replace an existing dataset of that prefix, and nothing else of that name.
        mask: write ``{prefix}.mask.bin``, one byte a token; documents without a mask get all ones.
        metadata: write ``{prefix}.metadata.jsonl``, one line a document; documents without metadata get ``{}``.
        longest: documents with more tokens get several sequences, all of this length but the last. None: a document is
            one sequence.
        scratch: folder to write in, on the same file system as the output, instead of the hidden one.

    Raises:
        UserError: on entry: the output exists and ``overwrite`` is false, or its folder cannot be written.
    """

    def __init__(
        self,
        prefix: str | os.PathLike[str],
        dtype: npt.DTypeLike,
        *,
        overwrite: bool = False,
        mask: bool = False,
        metadata: bool = False,
        longest: int | None = None,
        scratch: Path | None = None,
    ) -> None:
        self.prefix = dataset_prefix(prefix)
        self.dtype = np.dtype(dtype)
        self.overwrite = overwrite
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token_id = -1
        self.sidecar: Sidecar | None = None
        """Set it inside the block to write ``{prefix}.json``; counts, dtype and hashes are filled in at the end."""
        self._scratch = scratch
        self._with_mask, self._with_metadata = mask, metadata
        self._longest = longest
        self._renames: list[tuple[Path, str]] | None = None
        self._is_discarded = False

    def __enter__(self) -> IndexedDatasetWriter:
        refuse_existing_outputs(self.prefix, self.overwrite)
        folder, name = os.path.split(os.path.abspath(self.prefix))
        try:
            os.makedirs(folder, exist_ok=True)
            if self._scratch is None:
                self.scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=folder))
            else:
                self.scratch = self._scratch
                self.scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be written to: {error.strerror}; choose another place for the dataset"
            ) from error
        try:
            self._bin = HashedFile(self.scratch / "tokens", self._count_block)
            self._mask = HashedFile(self.scratch / "mask") if self._with_mask else None
            self._metadata = HashedFile(self.scratch / "metadata") if self._with_metadata else None
            self._lengths = open_new(self.scratch / "lengths")
            self._indices = open_new(self.scratch / "indices")
            self._indices.write(INT64.pack(0))
        except BaseException:
            shutil.rmtree(self.scratch, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._is_discarded:
                self.prepare()
                self._publish()
        finally:
            for file in (self._bin, self._mask, self._metadata, self._lengths, self._indices):
                # Everything to keep has been flushed before; on a full disk closing fails, and the rest is removed
                # anyway.
                with suppress(OSError):
                    if file is not None:
                        file.close()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def add_document(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Add one document: ``tokens`` [T] as sequences of ``lengths`` tokens each, by default as one sequence.

        Sequences without tokens are left out.

        Raises:
            ValueError: a token does not fit the dtype, or ``lengths`` do not sum to T.
        """
        tokens = np.asarray(tokens)
        lengths = np.asarray([len(tokens)] if lengths is None else lengths, dtype=np.int64)
        self._add_content(self._token_bytes(tokens, lengths), len(tokens), 1)
        kept = lengths[lengths > 0]
        self._add_index(kept, np.array([len(kept)]))

    def add_documents(
        self,
        tokens: npt.ArrayLike,
        lengths: npt.ArrayLike,
        *,
        mask: npt.ArrayLike | None = None,
        metadata: Sequence[bytes] | None = None,
    ) -> None:
        """Add documents ``tokens`` [T], concatenated, with one sequence each, or with none if they have no tokens.

        Args:
            lengths: [documents], in tokens.
            mask: [T], 0 or false for tokens that are not targets; only if the writer writes masks.
            metadata: for each document a JSON object without line feeds; only if the writer writes them.

        Raises:
            ValueError: a token does not fit the dtype, or ``lengths`` do not sum to T, or ``mask`` or ``metadata`` do
                not match them.
        """
        tokens = np.asarray(tokens)
        lengths = np.asarray(lengths, dtype=np.int64)
        mask_bytes = None if mask is None else (np.asarray(mask) != 0).astype(np.uint8).data
        lines = None if metadata is None else b"".join(line + b"\n" for line in metadata)
        if mask_bytes is not None and mask_bytes.shape != tokens.shape:
            raise ValueError(f"a mask of shape {mask_bytes.shape} for tokens of shape {tokens.shape}")
        if lines is not None and (num_lines := lines.count(b"\n")) != len(lengths):
            raise ValueError(f"{num_lines} lines of metadata for {len(lengths)} documents")
        content = self._token_bytes(tokens, lengths)
        self._add_content(content, len(tokens), len(lengths), mask_bytes, lines)
        self._add_single_sequences(lengths)

    def add_ranges(
        self,
        tokens: FileRange,
        lengths: IntegerSlices,
        *,
        ends: IntegerSlices | None = None,
        mask: FileRange | None = None,
        metadata: FileRange | None = None,
    ) -> None:
        """Add documents whose tokens, in this dtype, are contiguous in a file; the kernel copies them.

        ``lengths`` and ``ends`` are read a chunk at a time, so they may be a :class:`FileArray` of any length.

        Args:
            lengths: tokens in each sequence.
            ends: [documents], ascending: number of sequences up to the end of each document; the last entry is all of
                them. Sequences are written unchanged. None: each sequence is a document, or an empty document if it has
                no tokens.
            mask: the documents' mask, a byte a token.
            metadata: the documents' lines.

        Raises:
            ValueError: the size of a range does not match ``lengths``, or ``ends`` do not match them.
        """
        num_tokens = sum(int(lengths[part].sum(dtype=np.int64)) for part in slices(len(lengths)))
        _check_size(tokens, num_tokens * self.dtype.itemsize)
        if mask is not None:
            _check_size(mask, num_tokens)
        last = None if ends is None else int(ends[len(ends) - 1 :][0]) if len(ends) else 0
        if last is not None and last != len(lengths):
            raise ValueError(f"the documents end at sequence {last}, but there are {len(lengths)} lengths")
        self._add_content(tokens, num_tokens, len(lengths if ends is None else ends), mask, metadata)
        if ends is None:
            self._add_single_sequences(lengths)
        else:
            self._add_index(lengths, ends)

    def _token_bytes(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64]) -> memoryview:
        if len(tokens) != lengths.sum() or (lengths < 0).any():
            raise ValueError(f"{len(tokens)} tokens, but the lengths sum to {lengths.sum()}")
        if len(tokens):
            limits = np.iinfo(self.dtype)
            if tokens.min() < 0 or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()} .. {tokens.max()} do not fit {self.dtype}")
        return np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B") if len(tokens) else memoryview(b"")

    def _add_content(
        self,
        tokens: memoryview | FileRange,
        num_tokens: int,
        num_documents: int,
        mask: memoryview | FileRange | None = None,
        metadata: bytes | FileRange | None = None,
    ) -> None:
        """Append everything of these documents except their index entries."""
        assert mask is None or self._mask is not None
        assert metadata is None or self._metadata is not None
        self._bin.append(tokens)
        if self._mask is not None:
            if mask is None:
                self._mask.fill(b"\x01", num_tokens)
            else:
                self._mask.append(mask)
        if self._metadata is not None:
            if metadata is None:
                self._metadata.fill(b"{}\n", num_documents)
            else:
                self._metadata.append(metadata)
        self.num_tokens += num_tokens

    def _add_single_sequences(self, lengths: IntegerSlices) -> None:
        """Append documents to the index, with one sequence each, or those of ``longest``, or none without tokens."""
        for part in slices(len(lengths)):
            self._add_index(*_sequence_lengths(lengths[part], self._longest))

    def _add_index(self, lengths: IntegerSlices, ends: IntegerSlices) -> None:
        """Append sequences, and documents that end after ``ends`` of these, to the index."""
        for part in slices(len(lengths)):
            here = lengths[part]
            if here.max() > MAX_LENGTH:
                raise UserError(
                    f"a sequence of {here.max()} tokens is longer than the format's limit of {MAX_LENGTH}; split the "
                    "document"
                )
            self._lengths.write(here.astype("<i4").tobytes())
        for part in slices(len(ends)):
            self._indices.write((self.num_sequences + ends[part].astype("<i8")).tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(ends)

    def _count_block(self, block: memoryview) -> None:
        self.max_token_id = max(self.max_token_id, int(np.frombuffer(block, dtype=self.dtype).max()))

    def discard(self) -> None:
        """Publish nothing when the block ends."""
        self._is_discarded = True

    def prepare(self) -> None:
        """Write the index and the sidecar and flush everything to disk, so that only renames remain.

        Leaving the block calls it too. Call it first for datasets that must appear together.
        """
        if self._renames is not None:
            return
        self._bin.sync()
        self._lengths.flush()
        self._indices.flush()
        index = self.scratch / "index"
        # These stand in for arrays: write_index only takes slices of them.
        lengths = cast("npt.NDArray[np.integer]", FileArray(self.scratch / "lengths", "<i4"))
        indices = cast("npt.NDArray[np.integer]", FileArray(self.scratch / "indices", "<i8"))
        index_digest = write_index(index, self.dtype, lengths, indices)
        renames = [(self._bin.path, BIN)]
        for file, suffix in ((self._mask, MASK), (self._metadata, METADATA)):
            if file is not None:
                file.sync()
                renames.append((file.path, suffix))
        if self.sidecar is not None:
            complete = replace(
                self.sidecar,
                dtype=self.dtype.name,
                documents=self.num_documents,
                tokens=self.num_tokens,
                max_token_id=self.max_token_id,
                bin_xxh3_128=self._bin.hexdigest,
                idx_xxh3_128=index_digest,
                mask_xxh3_128=self._mask.hexdigest if self._mask else "",
                metadata_xxh3_128=self._metadata.hexdigest if self._metadata else "",
            )
            with open_new(self.scratch / "sidecar") as sidecar:
                sidecar.write(complete.to_json())
                sync_file(sidecar)
            renames.append((self.scratch / "sidecar", JSON))
        renames.append((index, IDX))
        refuse_existing_outputs(self.prefix, self.overwrite)
        self._renames = [(temporary, f"{self.prefix}{suffix}") for temporary, suffix in renames]

    def _publish(self) -> None:
        assert self._renames is not None
        # Several renames are not atomic. Without its old index, a half-replaced dataset cannot be opened; with it, new
        # tokens would be read with old lengths.
        for end in (IDX, JSON, MASK, METADATA):
            Path(f"{self.prefix}{end}").unlink(missing_ok=True)
        for temporary, final in self._renames:
            os.replace(temporary, final)
        sync_path(Path(os.path.abspath(self.prefix)).parent)


def _check_size(part: FileRange, expected: int) -> None:
    size = min(part.stop, os.path.getsize(part.path)) - part.start
    if size != expected:
        raise ValueError(f"{os.fspath(part.path)}: {size} bytes, but its documents' lengths sum to {expected} bytes")


def _sequence_lengths(
    lengths: npt.NDArray[np.integer], longest: int | None
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Return the lengths of the sequences of documents of ``lengths`` [documents], and where each document's end.

    A document is one sequence, or sequences of ``longest`` tokens and a last one of at most as many; one without tokens
    has none.
    """
    if longest is None:
        return lengths[lengths > 0], np.cumsum(lengths > 0)
    counts = -(-lengths // longest)
    ends = np.cumsum(counts)
    sequences = np.full(int(counts.sum()), longest, np.int64)
    filled = counts > 0
    sequences[ends[filled] - 1] = lengths[filled] - (counts[filled] - 1) * longest
    return sequences, ends
