"""Writes a task's output: tokens, the table of documents, and optionally mask, metadata, MinHash bands and rejects."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from ....engine.files.outputs import open_new
from ..dedup.minhash import MinHasher
from ..options import PreprocessOptions
from ..records.errors import Where
from .encoded import Documents
from .task_output import DOCUMENT, TaskOutput, TaskResult


class TaskWriter:
    """Writes the files of ``output``; a context manager. Without :meth:`finish` the output stays unfinished.

    Args:
        dtype: of the dataset.
        result: updated with what is written and what is left out.
    """

    def __init__(self, output: TaskOutput, options: PreprocessOptions, dtype: str, result: TaskResult) -> None:
        self._output, self._options, self._result = output, options, result
        self._dtype = np.dtype(dtype)
        self._digest = xxhash.xxh3_128()
        self._tables: list[np.ndarray] = []
        self._bands: list[np.ndarray] = []
        threshold = options.minhash_threshold
        self._hasher = None if threshold is None else MinHasher(threshold)

    def __enter__(self) -> TaskWriter:
        self._files = ExitStack()
        self._tokens = self._open("tokens")
        self._mask = self._open("mask") if self._options.writes_mask else None
        self._metadata = self._open("metadata") if self._options.writes_lines else None
        self._rejects: BinaryIO | None = None
        return self

    def _open(self, name: str) -> BinaryIO:
        return self._files.enter_context(open_new(getattr(self._output, name)))

    def __exit__(self, *error: object) -> None:
        self._files.close()

    def add(self, source: int, documents: Documents) -> None:
        """Write the documents with an accepted number of tokens; count the others."""
        keep = self._accepted(source, documents.own_lengths, documents.is_empty)
        if not keep.any():
            return
        if not keep.all():
            documents = documents.only(keep)
        table = np.zeros(len(documents.lengths), DOCUMENT)
        table["source"], table["tokens"] = source, documents.lengths
        table["characters"], table["text_bytes"] = documents.sizes()
        if self._options.needs_digests:
            table["digest"] = np.frombuffer(documents.digests(), dtype=">u8").reshape(-1, 2)
        if self._hasher is not None:
            self._bands.append(documents.bands(self._hasher))
        if self._metadata is not None:
            table["metadata_bytes"] = documents.line_sizes()
            self._metadata.write(b"".join(documents.lines))
        if self._options.bins:
            table["bin"] = documents.bins
        if self._mask is not None:
            assert documents.mask is not None
            self._mask.write(documents.mask.tobytes())
        self.write_tokens(documents.ids)
        self._tables.append(table)
        self._result.documents += len(table)

    @contextmanager
    def undone_unless_added(self) -> Iterator[None]:
        """Remove the tokens and lines written in this context, unless their document is added in it."""
        start, digest, tokens = self._tokens.tell(), self._digest.copy(), self._result.tokens
        start_of_line = 0 if self._metadata is None else self._metadata.tell()
        documents = self._result.documents
        try:
            yield
        finally:
            if self._result.documents == documents:
                self._tokens.seek(start)
                self._tokens.truncate()
                self._digest, self._result.tokens = digest, tokens
                if self._metadata is not None:
                    self._metadata.seek(start_of_line)
                    self._metadata.truncate()

    def write_tokens(self, ids: npt.NDArray[np.integer]) -> None:
        """Write ids of a document that is added later."""
        content = np.ascontiguousarray(ids, dtype=self._dtype).data
        self._tokens.write(content)
        self._digest.update(content)
        self._result.tokens += len(ids)

    def write_line(self, content: bytes) -> None:
        """Write a part of the line of a document that is added later."""
        assert self._metadata is not None
        self._metadata.write(content)

    def _accepted(
        self, source: int, lengths: npt.NDArray[np.int64], empty: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.bool_]:
        """Return which documents are kept by their number of tokens; count the others."""
        options = self._options
        short = lengths < options.min_tokens
        if options.min_tokens <= 1 and options.max_tokens is None and not empty.any():
            return ~empty
        long = lengths > (options.max_tokens if options.max_tokens is not None else np.iinfo(np.int64).max)
        for reason, where in (
            ("empty", empty),
            ("below --min-tokens", short & ~empty),
            ("above --max-tokens", long & ~empty),
        ):
            if count := int(where.sum()):
                self._result.count(source, reason, count)
        return ~(empty | short | long)

    def reject(self, where: Where, reason: str, raw: bytes | str | None) -> None:
        """Write down a record that was skipped."""
        if self._rejects is None:
            self._rejects = self._open("rejects")
        text = raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw
        record = {"where": where._asdict(), "reason": reason, "record": text}
        self._rejects.write(json.dumps(record).encode() + b"\n")

    def finish(self) -> None:
        """Close all files, then write the result, which marks the output as finished."""
        self._files.close()
        with open_new(self._output.documents) as table:
            np.save(table, np.concatenate([np.empty(0, DOCUMENT), *self._tables]))
        if self._hasher is not None:
            empty = np.empty((0, self._hasher.num_bands), np.uint64)
            with open_new(self._output.bands) as table:
                np.save(table, np.concatenate([empty, *self._bands]))
        self._result.tokens_xxh3_128 = self._digest.hexdigest()
        self._result.sizes = self._output.sizes()
        temporary = self._output.result.with_suffix(".unfinished")
        with open_new(temporary) as record:
            record.write(self._result.to_json().encode())
        os.replace(temporary, self._output.result)
