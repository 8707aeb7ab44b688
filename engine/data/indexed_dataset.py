"""Read Megatron-LM's indexed dataset, ``{prefix}.idx`` + ``{prefix}.bin``; dataset_writer.py writes it.

The ``.bin`` file holds the tokens of all sequences, concatenated, without a header. The ``.idx`` file holds the place
of each sequence; its layout is in index_format.py. Files of Megatron-LM can be read here, and it can read files written
here. Opening checks every entry of the index (index_check.py); for a very large one, a thread does this later. Reading
a range of tokens takes one read of .bin and two or three of the index (file_entries.py). If sequences are not in file
order, it takes one read for each (scattered.py). This module handles sequences, not samples.
"""

from __future__ import annotations

import functools
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..files.regular import open_regular
from .file_entries import AscendingEntries, FileEntries
from .index_check import DAMAGED, IndexEntries, count_displaced, document_problem, require_token_size
from .index_format import DTYPES, HEADER, MAGIC, VERSION, dataset_prefix
from .scattered import ScatteredSequences

CHECKED_ON_OPENING = 1 << 23
"""Maximum number of sequences whose whole index is checked on opening, in up to 50 ms. In a larger index, opening
checks some blocks. A thread then checks all of them, for :meth:`IndexedDataset.finish_check`."""


class IndexedDataset:
    """A read-only indexed dataset.

    An instance may be used after ``fork``; a pickled one opens the files again.

    Args:
        prefix: path without suffix; ``.bin`` or ``.idx`` at its end is accepted.
        check_whole: check even a very large index before returning. False: leave that to :meth:`finish_check`.

    Raises:
        UserError: a file is missing, truncated, of another format, or the two do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str], check_whole: bool = False) -> None:
        self.prefix = dataset_prefix(prefix)
        self.idx_path, self.bin_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        self._idx = _map_file(self.idx_path)
        self._bin = _map_file(self.bin_path)
        self.dtype, self._num_sequences, num_indices = self._read_header()
        lengths_at = HEADER.size
        pointers_at = lengths_at + 4 * self._num_sequences
        self._indices_at = pointers_at + 8 * self._num_sequences
        self._check_index_size(self._indices_at + 8 * num_indices, num_indices)
        self.sequence_lengths: npt.NDArray[np.int32] = np.frombuffer(
            self._idx, dtype="<i4", count=self._num_sequences, offset=lengths_at
        )
        """int32[N], tokens in each sequence: a read-only view of the file, unaligned, so that most uses copy."""
        self._pointers = AscendingEntries(self.idx_path, "<i8", pointers_at, self._num_sequences, len(self._bin))
        self._entries = IndexEntries(
            self.idx_path,
            self.bin_path,
            FileEntries(self.idx_path, "<i4", lengths_at, self._num_sequences),
            self._pointers,
            FileEntries(self.idx_path, "<i8", self._indices_at, num_indices),
            len(self._bin),
            self.dtype.itemsize,
        )
        self.remarks: list[str] = []
        """Remarks for users about an unusual but readable index."""
        self._scattered: ScatteredSequences | None = None
        self._each_sequence = False
        """True if the document indices are unusable, so that each sequence is treated as a document."""
        self._check_thread: threading.Thread | None = None
        self._found_later: UserError | None = None
        self._check(check_whole)
        self._starts = self._scattered or self._pointers
        self._num_tokens = len(self._bin) // self.dtype.itemsize
        self._tokens = FileEntries(self.bin_path, self.dtype, 0, self._num_tokens)
        self.mask_path = f"{self.prefix}.mask.bin"
        self._mask = self._open_mask() if os.path.exists(self.mask_path) else None
        if self._scattered is not None:
            self._num_tokens = self._scattered.num_tokens

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
        """Number of documents, empty ones included."""
        return self._num_sequences if self._each_sequence else len(self._entries.document_indices) - 1

    @functools.cached_property
    def document_indices(self) -> npt.NDArray[np.int64]:
        """int64[D], the first sequence of each document, and N at the end: a read-only unaligned view of the file.

        0 .. N if the file's own indices are unusable.
        """
        if self._each_sequence:
            return np.arange(self._num_sequences + 1)
        return np.frombuffer(self._idx, dtype="<i8", count=self.num_documents + 1, offset=self._indices_at)

    def document_edges(self, first: int, stop: int) -> npt.NDArray[np.int64]:
        """Return a copy of ``document_indices[first:stop + 1]`` without reading the others."""
        if self._each_sequence:
            return np.arange(first, stop + 1)
        return self._entries.document_indices[first : stop + 1].astype(np.int64)

    @property
    def document_index_ignored(self) -> bool:
        """Whether the file's document indices are unusable, so that each sequence is a document."""
        return self._each_sequence

    @property
    def has_modes(self) -> bool:
        """Whether the index ends with the modes of a multimodal dataset, which are not read."""
        return len(self._idx) > self._indices_at + 8 * len(self._entries.document_indices)

    @property
    def in_file_order(self) -> bool:
        """Whether every sequence begins in ``.bin`` at the end of the previous one."""
        return self._scattered is None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return self._num_tokens

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> npt.NDArray[np.integer]:
        """Return the tokens of sequence ``index`` in the file's dtype: a read-only view of the mapped file.

        Raises:
            IndexError: ``index`` is not in [0, N).
        """
        if not 0 <= index < self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences} in {self.prefix}")
        length = self._entries.lengths[index]
        return np.frombuffer(self._bin, dtype=self.dtype, count=length, offset=self._pointers[index])

    def tokens(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return a copy, int64[stop - start], of the tokens [``start``, ``stop``) of the whole stream of sequences.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        return self.stored_tokens(start, stop).astype(np.int64)

    def stored_tokens(self, start: int, stop: int) -> npt.NDArray[np.integer]:
        """Return the same as :meth:`tokens`, in the file's dtype and read-only."""
        start, stop = self._checked_range(start, stop)
        if self._scattered is not None:
            return _read_runs(self._tokens, self._scattered.runs(start, stop))
        return self._tokens[start:stop]

    @property
    def has_loss_mask(self) -> bool:
        """Whether ``{prefix}.mask.bin`` exists: one byte a token, 1 if the token is a target."""
        return self._mask is not None

    def loss_mask(self, start: int, stop: int) -> npt.NDArray[np.bool_] | None:
        """Return a copy, bool[stop - start], of the mask of the tokens [``start``, ``stop``); None without a mask.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        stored = self.stored_mask(start, stop)
        return None if stored is None else stored != 0

    def stored_mask(self, start: int, stop: int) -> npt.NDArray[np.integer] | None:
        """Return the same as :meth:`loss_mask`, as the file's bytes."""
        start, stop = self._checked_range(start, stop)
        if self._mask is None:
            return None
        if self._scattered is not None:
            return _read_runs(self._mask, self._scattered.runs(start, stop))
        return self._mask[start:stop]

    def sequence_start(self, index: int) -> int:
        """Return the position in tokens at which sequence ``index`` begins; ``num_tokens`` for ``index`` == N.

        Raises:
            IndexError: ``index`` is not in [0, N].
        """
        if not 0 <= index <= self._num_sequences:
            raise IndexError(f"sequence {index} of {self._num_sequences} in {self.prefix}")
        return self.num_tokens if index == self._num_sequences else self._starts[index] // self.dtype.itemsize

    def boundaries(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """Return the positions strictly inside (``start``, ``stop``) at which a sequence begins: int64, ascending,
        unique.

        Raises:
            IndexError: not 0 <= start <= stop <= num_tokens.
        """
        start, stop = self._checked_range(start, stop)
        itemsize = self.dtype.itemsize
        pointers = self._starts.between(start * itemsize + 1, stop * itemsize)
        # Sequences of length zero, which other writers may produce, begin at the same place as the next one.
        repeated = pointers[1:] == pointers[:-1]
        return (np.delete(pointers, np.flatnonzero(repeated)) if repeated.any() else pointers) // itemsize

    def next_boundary(self, position: int) -> int:
        """Return the first position >= ``position`` at which a sequence begins, or ``num_tokens`` if there is none."""
        return self.sequence_start(self._starts.first_at_least(position * self.dtype.itemsize))

    def finish_check(self) -> None:
        """Wait for the check of a very large index that opening started; smaller ones are already checked.

        Raises:
            UserError: names the first inconsistent sequence or document.
        """
        if self._check_thread is not None:
            self._check_thread.join()
        if self._found_later is not None:
            raise self._found_later

    def _check(self, whole: bool) -> None:
        """Find out how sequences are arranged in ``.bin``, and refuse an unreadable dataset."""
        entries, later = self._entries, not whole and self._num_sequences > CHECKED_ON_OPENING
        self._check_end(may_leave_tokens=True)
        displaced = count_displaced(entries, entries.spread_blocks() if later else range(entries.num_blocks))
        problem = document_problem(entries, ends_only=later)
        if displaced and later:
            displaced = count_displaced(entries, range(entries.num_blocks))
        if displaced:
            require_token_size(entries)
            self._scattered = ScatteredSequences(entries.lengths, entries.pointers, entries.itemsize)
            self._check_whole_tokens()
            self.remarks.append(
                f"{self.idx_path}: {displaced:,} of {self._num_sequences:,} sequences do not begin in .bin at the end "
                "of the previous one (filtered or permuted): they are read one by one, as Megatron-LM does, "
                f"{self._scattered.num_tokens:,} tokens; {self.bin_path} holds "
                f"{len(self._bin) // self.dtype.itemsize:,}"
            )
        else:
            self._check_end()
        if problem:
            self._each_sequence = True
            self.remarks.append(
                f"{self.idx_path}: its list of documents {problem}, so it does not fit the {self._num_sequences:,} "
                "sequences and is ignored: each sequence is treated as a document, as in training (tools/merge.py "
                "writes a correct index)"
            )
        if later:
            self._check_thread = threading.Thread(target=self._check_rest, name="index-check", daemon=True)
            self._check_thread.start()

    def _check_rest(self) -> None:
        """Check the parts of the index that opening has only sampled.

        If most of a very large index is in file order, the rest is damaged, not filtered.
        """
        try:
            entries = self._entries
            if count_displaced(entries, range(entries.num_blocks)) and self._scattered is None:
                raise UserError(
                    f"{self.idx_path}: some sequences do not begin in .bin at the end of the previous one, though most "
                    "do; if that is intended, let tools/merge.py write the dataset in the order of its index; if not, "
                    f"{DAMAGED}"
                )
            if not self._each_sequence and (problem := document_problem(entries)):
                raise UserError(f"{self.idx_path}: its list of documents {problem}: {DAMAGED}")
        except UserError as error:
            self._found_later = error

    def _open_mask(self) -> FileEntries:
        size = os.path.getsize(self.mask_path)
        if size != len(self._tokens):
            raise UserError(
                f"{self.mask_path}: {size} bytes, but {self.bin_path} holds {len(self._tokens)} tokens: the mask "
                "belongs to another dataset; build or copy all files again, or remove it to train on every token"
            )
        return FileEntries(self.mask_path, "u1", 0, size)

    def _checked_range(self, start: int, stop: int) -> tuple[int, int]:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.num_tokens} in {self.prefix}")
        return int(start), int(stop)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        """Return dtype, N and D."""
        # Read with pread like everything that a run needs, because a failing disk would end the process on mapped
        # access.
        header = FileEntries(self.idx_path, "u1", 0, min(HEADER.size, len(self._idx)))[:].tobytes()
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(
                f"{self.idx_path}: begins with {header[: len(MAGIC)]!r} instead of {MAGIC!r}: not an index of "
                "Megatron-LM's current format; build the dataset with tools/preprocess.py"
            )
        if len(header) < HEADER.size:
            raise UserError(
                f"{self.idx_path}: {len(self._idx)} bytes, less than the header's {HEADER.size}: the file is "
                "truncated; build or copy the dataset again"
            )
        _, version, code, num_sequences, num_indices = HEADER.unpack_from(header)
        if version != VERSION:
            raise UserError(f"{self.idx_path}: format version {version}, but only version {VERSION} is supported")
        if code not in DTYPES:
            known = ", ".join(f"{code} {dtype.name}" for code, dtype in DTYPES.items())
            raise UserError(f"{self.idx_path}: dtype code {code} is not valid for a token dataset ({known})")
        return DTYPES[code], num_sequences, num_indices

    def _check_index_size(self, expected: int, num_indices: int) -> None:
        size, count = len(self._idx), self._num_sequences
        if size not in (expected, expected + count):  # the latter with int8 modes
            raise UserError(
                f"{self.idx_path}: {size} bytes, but {HEADER.size} + 12 x {count} sequences + 8 x {num_indices} "
                f"document indices = {expected}: the file is truncated or damaged; build or copy the dataset again"
            )

    def _check_end(self, may_leave_tokens: bool = False) -> None:
        """Check the end of the last sequence against the size of ``.bin``."""
        count, itemsize = self._num_sequences, self.dtype.itemsize
        pointer, length = (self._pointers[count - 1], self._entries.lengths[count - 1]) if count else (0, 0)
        past = pointer + length * itemsize - len(self._bin)
        if (past > 0 and pointer >= 0 and length >= 0) or (past and not may_leave_tokens):
            raise UserError(
                f"{self.bin_path}: {len(self._bin)} bytes, but {self.idx_path} ends at {pointer} + {length} tokens x "
                f"{itemsize} bytes = {pointer + length * itemsize}: one of the two is truncated or belongs to another "
                "dataset; build or copy both again"
            )

    def _check_whole_tokens(self) -> None:
        if len(self._bin) % self.dtype.itemsize:
            raise UserError(
                f"{self.bin_path}: {len(self._bin)} bytes are not a multiple of {self.dtype.itemsize}, the size of a "
                "token: the file is truncated; build or copy the dataset again"
            )


def _read_runs(entries: FileEntries, runs: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    parts = [entries[start:stop] for start, stop in runs.tolist()]
    return np.concatenate(parts) if parts else entries[0:0]


def _map_file(path: str) -> mmap.mmap | bytes:
    """Return the file's contents, mapped read-only; an empty file, which cannot be mapped, as ``b""``."""
    try:
        with open_regular(path) as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; name an indexed dataset by the prefix of its .bin and .idx, or build one with "
            "tools/preprocess.py"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
