"""Writes the documents of ``--to-jsonl``: a line of JSON each, and a record of how they were made."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from ....engine.data.sidecar import Sidecar
from ....engine.errors import UserError
from ....engine.files.atomic import sync_file, sync_path
from ....engine.files.outputs import open_new
from ..dataset_files import JSON, TEXT, refuse_existing, text_files
from ..hashed_file import FileRange, HashedFile, IntegerSlices

_COMPRESSION_LEVEL = 3
_BLOCK_BYTES = 1 << 20
"""Bytes compressed at once. The same blocks give the same file, so lines are collected to full blocks."""


class TextWriter:
    """Writes ``{prefix}.jsonl`` or ``.jsonl.zst``, which gets its name when it is complete.

    A context manager with the methods of IndexedDatasetWriter that the assembly of datasets uses. The lines come as
    metadata, and there are no tokens.

    Args:
        prefix: path without suffix; its folder is created if missing.
        suffix: .jsonl or .jsonl.zst.
        overwrite: replace an earlier text of that prefix, and nothing else of that name.
        scratch: folder to write in, on the same file system as the output.
    """

    dtype = np.dtype(np.uint16)

    def __init__(self, prefix: str, suffix: str, *, overwrite: bool, scratch: Path) -> None:
        self.prefix, self._suffix, self._overwrite, self._scratch = prefix, suffix, overwrite, scratch
        self.num_documents = 0
        self.sidecar: Sidecar | None = None
        """Set it inside the block; the count of documents and the hash are filled in at the end."""
        self._is_complete = self._is_discarded = False

    def __enter__(self) -> TextWriter:
        folder = os.path.dirname(os.path.abspath(self.prefix))
        try:
            os.makedirs(folder, exist_ok=True)
            self._scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written to: {error.strerror}; choose another place") from error
        self._file = HashedFile(self._scratch / "text")
        compressor = zstandard.ZstdCompressor(level=_COMPRESSION_LEVEL).compressobj()
        self._compressor: Any = compressor if self._suffix.endswith(".zst") else None
        self._waiting = bytearray()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and not self._is_discarded:
                self.prepare()
                self._publish()
        finally:
            self._file.close()
            shutil.rmtree(self._scratch, ignore_errors=True)

    def add_ranges(
        self,
        tokens: FileRange,
        lengths: IntegerSlices,
        *,
        mask: FileRange | None = None,
        metadata: FileRange | None = None,
    ) -> None:
        """Add documents whose lines are contiguous in a file; ``tokens`` is empty."""
        assert metadata is not None
        self.num_documents += len(lengths)
        if self._compressor is None:
            self._flush(len(self._waiting))
            self._file.append(metadata)
            return
        with open(metadata.path, "rb") as file:
            file.seek(metadata.start)
            for start in range(metadata.start, metadata.stop, _BLOCK_BYTES):
                self._write(file.read(min(_BLOCK_BYTES, metadata.stop - start)))

    def add_documents(
        self,
        tokens: npt.NDArray[Any],
        lengths: npt.NDArray[np.int64],
        *,
        mask: npt.NDArray[np.uint8] | None = None,
        metadata: Sequence[bytes] | None = None,
    ) -> None:
        """Add documents; ``metadata`` has their lines without line feeds, and ``tokens`` is empty."""
        assert metadata is not None
        self.num_documents += len(lengths)
        for line in metadata:
            self._write(line)
            self._write(b"\n")

    def _write(self, content: bytes) -> None:
        self._waiting += content
        while len(self._waiting) >= _BLOCK_BYTES:
            self._flush(_BLOCK_BYTES)

    def _flush(self, size: int) -> None:
        block = bytes(self._waiting[:size])
        del self._waiting[:size]
        self._file.write(block if self._compressor is None else self._compressor.compress(block))

    def discard(self) -> None:
        """Publish nothing when the block ends."""
        self._is_discarded = True

    def prepare(self) -> None:
        """Write everything to disk, so that only renames remain. Leaving the block calls it too."""
        if self._is_complete:
            return
        self._flush(len(self._waiting))
        if self._compressor is not None:
            self._file.write(self._compressor.flush())
        self._file.sync()
        assert self.sidecar is not None
        complete = replace(self.sidecar, documents=self.num_documents, text_xxh3_128=self._file.hexdigest)
        with open_new(self._scratch / "sidecar") as sidecar:
            sidecar.write(complete.to_json())
            sync_file(sidecar)
        refuse_existing(text_files(self.prefix), self._overwrite)
        self._is_complete = True

    def _publish(self) -> None:
        # Without its record, a half-replaced text is recognised as damaged, so the record is removed last, and the text
        # appears last.
        for path in text_files(self.prefix):
            Path(path).unlink(missing_ok=True)
        os.replace(self._scratch / "sidecar", f"{self.prefix}{TEXT}{JSON}")
        os.replace(self._file.path, f"{self.prefix}{self._suffix}")
        sync_path(Path(os.path.abspath(self.prefix)).parent)
