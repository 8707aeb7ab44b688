"""Reading Megatron-LM's indexed dataset, ``{prefix}.idx`` + ``{prefix}.bin``; dataset_writer.py writes it.

The ``.bin`` file is the tokens of all sequences, one after another, without a header. The ``.idx`` file says where each
sequence lies; its layout is in index_format.py. Files made by Megatron-LM are read, and Megatron-LM reads the files
made here. Opening is O(1) whatever the size; reading a range of tokens is one read of .bin and two or three of the
index (file_entries.py). Sample order, packing and blending stand elsewhere: this module knows sequences, not samples.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .file_entries import AscendingEntries, FileEntries
from .index_format import CHUNK, DTYPES, HEADER, MAGIC, VERSION, dataset_prefix


class IndexedDataset:
    """A read-only indexed dataset.

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
        self._pointers = AscendingEntries(self.idx_path, "<i8", pointers_at, self._num_sequences, len(self._bin))
        self._check_ends()
        self._tokens = FileEntries(self.bin_path, self.dtype, 0, self.num_tokens)
        self.mask_path = f"{self.prefix}.mask.bin"
        self._mask = self._open_mask() if os.path.exists(self.mask_path) else None

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
        return self._tokens[start:stop].astype(np.int64)

    @property
    def has_loss_mask(self) -> bool:
        """Whether ``{prefix}.mask.bin`` stands beside the tokens: one byte a token, 1 where it is to be predicted."""
        return self._mask is not None

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """A copy, bool[stop - start], of the mask of the tokens [``start``, ``stop``); None without a mask.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        start, stop = self._checked_range(start, stop)
        if self._mask is None:
            return None
        return self._mask[start:stop] != 0

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
        pointers = self._pointers.between(start * itemsize + 1, stop * itemsize)
        # Sequences of length zero, which other writers may leave, begin where their successor does.
        repeated = pointers[1:] == pointers[:-1]
        return (np.delete(pointers, np.flatnonzero(repeated)) if repeated.any() else pointers) // itemsize

    def next_boundary(self, position: int) -> int:
        """The first position >= ``position`` at which a sequence begins, or ``num_tokens`` when there is none."""
        return self.sequence_start(self._pointers.first_at_least(position * self.dtype.itemsize))

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
            _forget_pages(self._idx)
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
            _forget_pages(self._idx)

    def _open_mask(self) -> FileEntries:
        size = os.path.getsize(self.mask_path)
        if size != self.num_tokens:
            raise UserError(
                f"{self.mask_path}: {size} bytes, but {self.bin_path} holds {self.num_tokens} tokens: the mask belongs "
                "to another dataset; build or copy all files again, or remove it to train on every token"
            )
        return FileEntries(self.mask_path, "u1", 0, size)

    def _checked_range(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")
        return int(start), int(stop)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """dtype, N and D."""
        # Read like all that a run needs, not looked up in the map, where a disk that fails would end the process.
        header = FileEntries(self.idx_path, "u1", 0, min(HEADER.size, len(self._idx)))[:].tobytes()
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self.idx_path}: begins with {header[: len(MAGIC)]!r}, not with {MAGIC!r}: not an index of "
                "Megatron-LM's current format; build the dataset with tools/preprocess.py"
            )
        if len(header) < HEADER.size:
            raise UserError(
                f"{self.idx_path}: {len(self._idx)} bytes, less than the header's {HEADER.size}: the file is "
                "truncated; build or copy the dataset again"
            )
        _, version, code, num_sequences, num_indices = HEADER.unpack_from(header)
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
        lengths_at, indices_at = HEADER.size, HEADER.size + 12 * count
        indices = FileEntries(self.idx_path, "<i8", indices_at, len(self.document_indices))
        lengths = FileEntries(self.idx_path, "<i4", lengths_at, count)
        if len(indices) == 0 or indices[0] != 0 or indices[len(indices) - 1] != count:
            ends = f"{indices[0]} .. {indices[len(indices) - 1]}" if len(indices) else "none"
            raise UserError(
                f"{self.idx_path}: document indices are {ends}, but must run from 0 to the number of sequences, {count}"
                ": the index is damaged; build the dataset again"
            )
        if count and self._pointers[0] != 0:
            raise UserError(
                f"{self.idx_path}: the first sequence points to byte {self._pointers[0]}, not 0: the index is damaged; "
                "build the dataset again"
            )
        pointer, length = (self._pointers[count - 1], lengths[count - 1]) if count else (0, 0)
        if len(self._bin) != pointer + length * itemsize:
            raise UserError(
                f"{self.bin_path}: {len(self._bin)} bytes, but {self.idx_path} ends at {pointer} + {length} tokens x "
                f"{itemsize} bytes = {pointer + length * itemsize}: one of the two is truncated or belongs to another "
                "dataset; build or copy both again"
            )


def _forget_pages(mapped: mmap.mmap | bytes) -> None:
    """Let pages that were read no longer count as this process's memory; the page cache keeps them."""
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


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
