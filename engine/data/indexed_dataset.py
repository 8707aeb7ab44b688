"""Megatron-LM's indexed dataset, ``{prefix}.idx`` + ``{prefix}.bin``: the reader and the writer.

The ``.bin`` file is the tokens of all sequences, one after another, without a header. The ``.idx`` file says where each
sequence lies; its layout is in index_format.py. Files made by Megatron-LM are read, and Megatron-LM reads the files
made here. Opening is O(1) whatever the size; reading a range of tokens touches O(log N) of the index. Sample order,
packing and blending stand elsewhere: this module knows sequences, not samples.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from bisect import bisect_left, bisect_right
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from ..errors import UserError
from .index_format import (
    CHUNK,
    DTYPES,
    HEADER,
    INT64,
    MAGIC,
    MAX_LENGTH,
    VERSION,
    MappedPointers,
    best_dtype,
    dataset_prefix,
    sync,
    write_hashed,
    write_index,
)
from .sidecar import Sidecar

__all__ = [
    "IndexedDataset",
    "IndexedDatasetWriter",
    "best_dtype",
    "dataset_prefix",
    "refuse_existing_outputs",
    "write_index",
]

_COPY_BYTES = 8 << 20  # bytes of .bin copied, hashed and scanned at once


def existing_outputs(prefix: str | os.PathLike[str]) -> list[str]:
    """Those of ``{prefix}.bin``, ``.idx`` and ``.json`` that exist."""
    paths = [f"{dataset_prefix(prefix)}{end}" for end in (".bin", ".idx", ".json")]
    return [path for path in paths if os.path.exists(path)]


def refuse_existing_outputs(prefix: str | os.PathLike[str]) -> None:
    """Raise UserError when there is a dataset, or a part of one, of this prefix."""
    if existing := existing_outputs(prefix):
        raise UserError(
            f"{', '.join(existing)}: already there; pass --overwrite to replace, or choose another --output-prefix"
        )


class IndexedDataset:
    """A read-only indexed dataset, memory-mapped.

    Opening checks in O(1) that the two files belong together; :meth:`verify` checks every entry of the index. An
    instance may be used after ``fork``; a pickled one opens the files again.

    Args:
        prefix: path without suffix; with ``.bin`` or ``.idx`` it is accepted too.

    Raises:
        UserError: a file is missing, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = dataset_prefix(prefix)
        self.idx_path, self.bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        self._idx = _map_file(self.idx_path)
        self._bin = _map_file(self.bin_path)
        self.dtype, self._num_sequences, num_indices = self._read_header()
        lengths_at = HEADER.size
        pointers_at = lengths_at + 4 * self._num_sequences
        indices_at = pointers_at + 8 * self._num_sequences
        self._check_index_size(indices_at + 8 * num_indices, num_indices)
        self.sequence_lengths: npt.NDArray[np.int32] = np.frombuffer(
            self._idx, dtype="<i4", count=self._num_sequences, offset=lengths_at
        )
        """int32[N], tokens in each sequence: a read-only view of the file, unaligned, so that most uses copy."""
        self.document_indices: npt.NDArray[np.int64] = np.frombuffer(
            self._idx, dtype="<i8", count=num_indices, offset=indices_at
        )
        """int64[D], first sequence of each document and N at the end: a read-only unaligned view of the file."""
        self._pointers = MappedPointers(self._idx, pointers_at, self._num_sequences)
        self._check_ends()

    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def __repr__(self) -> str:
        return (
            f"IndexedDataset({self.prefix!r}, {self.num_documents} documents, {self.num_tokens} tokens, {self.dtype})"
        )

    @property
    def num_sequences(self) -> int:
        """N. Megatron-LM's training treats each sequence as a document."""
        return self._num_sequences

    @property
    def num_documents(self) -> int:
        """Documents, empty ones included."""
        return len(self.document_indices) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in ``.bin``."""
        return len(self._bin) // self.dtype.itemsize

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        """Tokens of sequence ``index``, in the file's dtype: a read-only view of the mapped file.

        Raises:
            IndexError: ``index`` is not in [0, N).
        """
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences} in {self.prefix}")
        length = int(self.sequence_lengths[index])
        return np.frombuffer(self._bin, dtype=self.dtype, count=length, offset=self._pointers[index])

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """A copy, int64[stop - start], of the tokens [``start``, ``stop``) of the whole stream of sequences.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        start, stop = self._checked_range(start, stop)
        raw = np.frombuffer(self._bin, dtype=self.dtype, count=stop - start, offset=start * self.dtype.itemsize)
        return raw.astype(np.int64)

    def sequence_start(self, index: int) -> int:
        """Position in tokens at which sequence ``index`` begins; ``num_tokens`` for ``index`` == N.

        Raises:
            IndexError: ``index`` is not in [0, N].
        """
        if not 0 <= index <= self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences} in {self.prefix}")
        return self.num_tokens if index == self._num_sequences else self._pointers[index] // self.dtype.itemsize

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Positions strictly inside (``start``, ``stop``) at which a new sequence begins, int64, ascending, each once.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        start, stop = self._checked_range(start, stop)
        itemsize = self.dtype.itemsize
        first = bisect_right(self._pointers, start * itemsize)
        last = bisect_left(self._pointers, stop * itemsize, lo=first)
        # Sequences of length zero, which other writers may leave, begin where their successor does.
        return np.unique(self._pointers[first:last] // itemsize)

    def next_boundary(self, position: int) -> int:
        """The first position >= ``position`` at which a sequence begins, or ``num_tokens`` when there is none."""
        return self.sequence_start(bisect_left(self._pointers, position * self.dtype.itemsize))

    def verify(self) -> None:
        """Check every length, pointer and document index: O(N) time, bounded memory.

        Raises:
            UserError: names the first sequence or document that does not fit.
        """
        end = 0
        for first in range(0, self._num_sequences, CHUNK):
            lengths = self.sequence_lengths[first : first + CHUNK].astype(np.int64)
            pointers = self._pointers[first : first + CHUNK]
            sizes = lengths * self.dtype.itemsize
            expected = end + np.cumsum(sizes) - sizes
            wrong = np.flatnonzero((lengths < 0) | (pointers != expected))
            if len(wrong):
                at = int(wrong[0])
                raise UserError(
                    f"{self.idx_path}: sequence {first + at} of length {lengths[at]} points to byte {pointers[at]}, "
                    f"but the sequences before it end at byte {expected[at]}: the index is damaged; build the dataset "
                    "again"
                )
            end = int(expected[-1] + sizes[-1])
        previous = 0
        for first in range(0, len(self.document_indices), CHUNK):
            indices = self.document_indices[first : first + CHUNK].astype(np.int64)
            wrong = np.flatnonzero(np.diff(indices, prepend=previous) < 0)
            if len(wrong):
                raise UserError(
                    f"{self.idx_path}: document index {first + int(wrong[0])} is {indices[wrong[0]]}, less than the "
                    "one before it: the index is damaged; build the dataset again"
                )
            previous = int(indices[-1])

    def _checked_range(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")
        return int(start), int(stop)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """dtype, N and D."""
        if self._idx[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self.idx_path}: begins with {bytes(self._idx[: len(MAGIC)])!r}, not with {MAGIC!r}: not an index of "
                "Megatron-LM's current format; build the dataset with tools/preprocess.py"
            )
        if len(self._idx) < HEADER.size:
            raise UserError(
                f"{self.idx_path}: {len(self._idx)} bytes, less than the header's {HEADER.size}: the file is "
                "truncated; build or copy the dataset again"
            )
        _, version, code, num_sequences, num_indices = HEADER.unpack_from(self._idx)
        if version != VERSION:
            raise UserError(f"{self.idx_path}: format version {version}, but only version {VERSION} is known here")
        if code not in DTYPES:
            known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
            raise UserError(f"{self.idx_path}: dtype code {code} is not one of a token dataset ({known})")
        return DTYPES[code], num_sequences, num_indices

    def _check_index_size(self, expected: int, num_indices: int) -> None:
        size, count = len(self._idx), self._num_sequences
        if size not in (expected, expected + count):  # the latter with int8 modes
            raise UserError(
                f"{self.idx_path}: {size} bytes, but {HEADER.size} + 12 x {count} sequences + 8 x {num_indices} "
                f"document indices = {expected}: the file is truncated or damaged; build or copy the dataset again"
            )

    def _check_ends(self) -> None:
        """Check the first and the last entries against each other and against the size of ``.bin``."""
        count, itemsize = self._num_sequences, self.dtype.itemsize
        indices = self.document_indices
        if len(indices) == 0 or indices[0] != 0 or indices[-1] != count:
            ends = f"{indices[0]} .. {indices[-1]}" if len(indices) else "none"
            raise UserError(
                f"{self.idx_path}: document indices are {ends}, but must run from 0 to the number of sequences, {count}"
                ": the index is damaged; build the dataset again"
            )
        if count and self._pointers[0] != 0:
            raise UserError(
                f"{self.idx_path}: the first sequence points to byte {self._pointers[0]}, not 0: the index is damaged; "
                "build the dataset again"
            )
        pointer, length = (self._pointers[count - 1], int(self.sequence_lengths[-1])) if count else (0, 0)
        if len(self._bin) != pointer + length * itemsize:
            raise UserError(
                f"{self.bin_path}: {len(self._bin)} bytes, but {self.idx_path} ends at {pointer} + {length} tokens x "
                f"{itemsize} bytes = {pointer + length * itemsize}: one of the two is truncated or belongs to another "
                "dataset; build or copy both again"
            )


def _map_file(path: str) -> mmap.mmap | bytes:
    """The file's contents, mapped read-only; an empty file, which cannot be mapped, as ``b""``."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name an indexed dataset by the prefix of its .bin and .idx, or build one with "
            "tools/preprocess.py"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class IndexedDatasetWriter:
    """Writes an indexed dataset that appears under its final names only when it is complete.

    A context manager: everything is written to a hidden folder beside the output. When the block ends without an
    exception the files are flushed to disk and renamed, ``.bin`` first, then ``.idx``, then the sidecar; otherwise, and
    in any case afterwards, the hidden folder is removed. An existing dataset stays whole until that moment.

    Args:
        prefix: path without suffix; its folder is created when missing.
        dtype: token dtype of the file; see :func:`best_dtype`.
        overwrite: replace an existing dataset of that prefix.

    Raises:
        UserError: on entry: the output exists and ``overwrite`` is false, or its folder cannot be written.
    """

    def __init__(self, prefix: str | os.PathLike[str], dtype: npt.DTypeLike, *, overwrite: bool = False) -> None:
        self.prefix = dataset_prefix(prefix)
        self.dtype = np.dtype(dtype)
        self.overwrite = overwrite
        self.num_sequences = 0
        self.num_documents = 0
        self.num_tokens = 0
        self.max_token_id = -1
        self.sidecar: Sidecar | None = None
        """Set it inside the block to have ``{prefix}.json`` written; counts, dtype and hashes are filled in here."""
        self._digest = xxhash.xxh3_128()

    def __enter__(self) -> IndexedDatasetWriter:
        if not self.overwrite:
            refuse_existing_outputs(self.prefix)
        folder, name = os.path.split(os.path.abspath(self.prefix))
        try:
            os.makedirs(folder, exist_ok=True)
            self.scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".partial", dir=folder))
        except OSError as error:
            raise UserError(
                f"{folder}: cannot write there: {error.strerror}; name another place for the dataset"
            ) from error
        self._bin = open(self.scratch / "tokens", "wb")
        self._lengths = open(self.scratch / "lengths", "wb")
        self._indices = open(self.scratch / "indices", "wb")
        self._indices.write(INT64.pack(0))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            for file in (self._bin, self._lengths, self._indices):
                file.close()
            shutil.rmtree(self.scratch, ignore_errors=True)

    def add_document(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike | None = None) -> None:
        """Add one document: ``tokens`` [T] as sequences of ``lengths`` tokens each, by default as one sequence.

        Raises:
            ValueError: a token does not fit the dtype, or ``lengths`` do not sum to T.
        """
        tokens = np.asarray(tokens)
        lengths = np.asarray([len(tokens)] if lengths is None else lengths, dtype=np.int64)
        self._add_tokens(tokens, lengths)
        lengths = lengths[lengths > 0]
        self._add_to_index(lengths, np.array([self.num_sequences + len(lengths)]))

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Add documents of one sequence each: ``tokens`` [T] laid end to end, ``lengths`` [documents] in tokens.

        Raises:
            ValueError: a token does not fit the dtype, or ``lengths`` do not sum to T.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        self._add_tokens(np.asarray(tokens), lengths)
        self._add_to_index(lengths[lengths > 0], self.num_sequences + np.cumsum(lengths > 0))

    def add_shard(self, path: str | os.PathLike[str], lengths: npt.NDArray[np.integer]) -> None:
        """Add documents of one sequence each whose tokens lie end to end in the file ``path``, in this dtype.

        Args:
            lengths: [documents], tokens in each.

        Raises:
            ValueError: the file's size does not fit ``lengths``.
        """
        lengths = np.asarray(lengths, dtype=np.int64)
        size, expected = os.path.getsize(path), int(lengths.sum()) * self.dtype.itemsize
        if size != expected:
            raise ValueError(f"{os.fspath(path)}: {size} bytes, but its documents' lengths sum to {expected} bytes")
        with open(path, "rb") as file:
            while block := file.read(_COPY_BYTES):
                self._write_tokens(np.frombuffer(block, dtype=self.dtype))
        self._add_to_index(lengths[lengths > 0], self.num_sequences + np.cumsum(lengths > 0))

    def _add_tokens(self, tokens: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64]) -> None:
        if len(tokens) != lengths.sum() or (lengths < 0).any():
            raise ValueError(f"{len(tokens)} tokens, but the lengths sum to {lengths.sum()}")
        if len(tokens):
            limits = np.iinfo(self.dtype)
            if tokens.min() < 0 or tokens.max() > limits.max:
                raise ValueError(f"token ids {tokens.min()} .. {tokens.max()} do not fit {self.dtype}")
            self._write_tokens(tokens.astype(self.dtype))

    def _write_tokens(self, tokens: npt.NDArray[np.integer]) -> None:
        """Append non-empty ``tokens``, which are of this dtype."""
        write_hashed(self._bin, self._digest, tokens.tobytes())
        self.num_tokens += len(tokens)
        self.max_token_id = max(self.max_token_id, int(tokens.max()))

    def _add_to_index(self, lengths: npt.NDArray[np.integer], indices: npt.NDArray[np.integer]) -> None:
        """Add sequences of ``lengths`` > 0, and documents that end before the sequences ``indices``."""
        if len(lengths) and lengths.max() > MAX_LENGTH:
            raise UserError(
                f"a sequence of {lengths.max()} tokens is longer than the format's limit of {MAX_LENGTH}; split "
                "the document"
            )
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._indices.write(indices.astype("<i8").tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(indices)

    def _commit(self) -> None:
        sync(self._bin)
        self._lengths.flush()
        self._indices.flush()
        index = self.scratch / "index"
        lengths = _map_array(self.scratch / "lengths", "<i4")
        index_digest = write_index(index, self.dtype, lengths, _map_array(self.scratch / "indices", "<i8"))
        renames = [(self.scratch / "tokens", f"{self.prefix}.bin"), (index, f"{self.prefix}.idx")]
        if self.sidecar is not None:
            complete = replace(
                self.sidecar,
                dtype=self.dtype.name,
                documents=self.num_documents,
                tokens=self.num_tokens,
                max_token_id=self.max_token_id,
                bin_xxh3_128=self._digest.hexdigest(),
                idx_xxh3_128=index_digest,
            )
            with open(self.scratch / "sidecar", "wb") as file:
                file.write(complete.to_json())
                sync(file)
            renames.append((self.scratch / "sidecar", f"{self.prefix}.json"))
        if not self.overwrite:
            refuse_existing_outputs(self.prefix)
        # Three renames are not one: without its old index a half-replaced dataset cannot be opened, rather than be
        # read as new tokens under old lengths.
        for end in (".json", ".idx"):
            Path(f"{self.prefix}{end}").unlink(missing_ok=True)
        for temporary, final in renames:
            os.replace(temporary, final)
        _sync_folder(os.path.dirname(os.path.abspath(self.prefix)))


def _map_array(path: Path, dtype: str) -> npt.NDArray[np.integer]:
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _sync_folder(folder: str) -> None:
    """Make renames in ``folder`` survive a power cut, where the platform lets a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
