"""Assembles datasets from the outputs of all tasks: duplicates, limits of sources, split and shuffle.

These need the whole corpus. They run over the outputs in input order, in bounded memory; then the tokens of the kept
documents are copied.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ....engine.errors import UserError
from ..dataset_writer import FileRange, IndexedDatasetWriter
from ..dedup.across_parts import kept_documents
from ..dedup.duplicates import first_occurrences, near_duplicates
from ..options import PreprocessOptions
from ..workers.task_output import TaskOutput
from .bins import name_bins
from .shuffle import ExternalShuffle
from .split import DocumentSplit, within_limit
from .text_writer import TextWriter

DocumentWriter = IndexedDatasetWriter | TextWriter
"""What writes a dataset, or the text of its documents."""

_MAX_DATASETS = 128
"""Several files are open for each."""
_SHORT_RUN = 256 << 10  # bytes: shorter runs of kept documents are gathered in memory, not copied one by one

_SHUFFLE_BYTES = 256 << 20  # memory of all shuffles together


class DatasetName(NamedTuple):
    """The parts of a dataset's name after the prefix; empty ones are left out."""

    bin: str
    split: str

    def prefix(self, prefix: str) -> str:
        """Return the prefix of the dataset."""
        return ".".join(part for part in (prefix, *self) if part)


@dataclass
class SourceTotals:
    """What each source contributed to a dataset: int64 [sources]."""

    documents: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    characters: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]

    @staticmethod
    def zeros(num_sources: int) -> SourceTotals:
        """Return the totals before anything is counted."""
        return SourceTotals(*(np.zeros(num_sources, np.int64) for _ in range(4)))

    def add(self, table: np.ndarray) -> None:
        """Add the documents of ``table``."""
        size = len(self.documents)
        self.documents += np.bincount(table["source"], minlength=size)
        for name in ("tokens", "characters", "text_bytes"):
            # Floating point is exact up to 2^53.
            sums = np.bincount(table["source"], weights=table[name], minlength=size)
            getattr(self, name)[:] += sums.astype(np.int64)


@dataclass
class Assembly:
    """Makes the datasets of a run.

    Args:
        outputs: in input order.
        folder: for temporary files.
        num_sources: number of ``--input`` arguments.
    """

    outputs: Sequence[TaskOutput]
    options: PreprocessOptions
    folder: Path
    num_sources: int
    bins: Sequence[Sequence[str]] = ()
    """Of each output, the values of the key of ``--bins`` by number."""
    left_out: list[Counter[str]] = field(init=False)
    """Documents left out here, by source and reason."""

    def __post_init__(self) -> None:
        self.left_out = [Counter() for _ in range(self.num_sources)]
        self.split = None if self.options.split is None else DocumentSplit.parse(self.options.split)
        splits = ("",) if self.split is None else self.split.names
        key = self.options.bins
        self._bin_names = {"": ""} if key is None else name_bins((value for bins in self.bins for value in bins), key)
        self.sides = tuple(DatasetName(name, split) for name in self._bin_names.values() for split in splits)
        """Names of the datasets: a part for ``--bins``, and one for ``--split``."""
        if len(self.sides) > _MAX_DATASETS:
            raise UserError(
                f"--bins {key} and --split make {len(self.sides)} datasets, more than {_MAX_DATASETS}; use fewer of "
                "them"
            )

    def write(self, writers: Sequence[DocumentWriter], on_bytes: Callable[[int], None]) -> list[SourceTotals]:
        """Write all datasets, with a writer for each of ``sides``; report the bytes of tokens to ``on_bytes``."""
        totals = [SourceTotals.zeros(self.num_sources) for _ in self.sides]
        copy = self._shuffled if self.options.shuffle else self._in_order
        copy(writers, totals, on_bytes)
        return totals

    def _in_order(
        self, writers: Sequence[DocumentWriter], totals: Sequence[SourceTotals], on_bytes: Callable[[int], None]
    ) -> None:
        for output, table, side in self._decided():
            for number, writer in enumerate(writers):
                chosen = side == number
                totals[number].add(table[chosen])
                _copy(output, table, chosen, writer)
            on_bytes(output.tokens.stat().st_size)

    def _shuffled(
        self, writers: Sequence[DocumentWriter], totals: Sequence[SourceTotals], on_bytes: Callable[[int], None]
    ) -> None:
        columns = tuple(name for name in ("tokens", "mask", "metadata") if getattr(self.outputs[0], name).exists())
        size = sum(getattr(output, name).stat().st_size for output in self.outputs for name in columns)
        with contextlib.ExitStack() as stack:
            shuffles = [
                stack.enter_context(
                    ExternalShuffle(
                        self.folder / f"shuffle-{number}",
                        self.options.seed,
                        size,
                        columns,
                        _SHUFFLE_BYTES // len(writers),
                    )
                )
                for number in range(len(writers))
            ]
            for output, table, side in self._decided():
                lengths = _column_bytes(table, writers[0].dtype.itemsize)
                data = {
                    name: FileRange(getattr(output, name), 0, getattr(output, name).stat().st_size) for name in columns
                }
                for number, shuffle in enumerate(shuffles):
                    chosen = side == number
                    totals[number].add(table[chosen])
                    shuffle.add({name: lengths[name] for name in columns}, data, chosen)
            for shuffle, writer in zip(shuffles, writers, strict=True):
                for chunk in shuffle.drain():
                    tokens = np.frombuffer(chunk.data["tokens"], dtype=writer.dtype)
                    writer.add_documents(
                        tokens,
                        chunk.lengths["tokens"] // writer.dtype.itemsize,
                        mask=np.frombuffer(chunk.data["mask"], np.uint8) if "mask" in columns else None,
                        metadata=bytes(chunk.data["metadata"]).splitlines() if "metadata" in columns else None,
                    )
                    on_bytes(tokens.nbytes)

    def _decided(self) -> Iterator[tuple[TaskOutput, np.ndarray, npt.NDArray[np.int16]]]:
        """Yield each output with its table and the side of each document, -1 if it is left out."""
        kept_before = np.zeros(self.num_sources, np.int64)
        for number, (output, unique) in enumerate(zip(self.outputs, self._unique(), strict=True)):
            table = np.load(output.documents)
            keep = np.ones(len(table), np.bool_) if unique is None else unique
            self._note(table, ~keep, "duplicate" if self.options.dedup == "exact" else "near-duplicate")
            if self.options.max_documents is not None:
                within = within_limit(table["source"], keep, self.options.max_documents, kept_before)
                self._note(table, keep & ~within, "beyond --max-documents")
                keep = within
            yield output, table, np.where(keep, self._side(number, table), -1).astype(np.int16)

    def _side(self, number: int, table: np.ndarray) -> npt.NDArray[np.integer]:
        """Return the index in ``sides`` of each document of output ``number``."""
        side = (
            np.zeros(len(table), np.int64) if self.split is None else self.split.side(table["digest"]).astype(np.int64)
        )
        if self.options.bins is None:
            return side
        names = list(self._bin_names)
        places = np.array([names.index(value) for value in self.bins[number]], np.int64)
        return side + places[table["bin"]] * (1 if self.split is None else len(self.split.names))

    def _unique(self) -> Iterator[npt.NDArray[np.bool_] | None]:
        if self.options.exclude_documents is not None:
            sizes = [len(np.load(output.documents, mmap_mode="r")) for output in self.outputs]
            yield from kept_documents(self.options.exclude_documents, sizes)
        elif self.options.dedup == "exact":
            digests = (np.load(output.documents)["digest"] for output in self.outputs)
            yield from first_occurrences(digests, self.folder)
        elif self.options.dedup == "minhash":
            bands = (np.load(output.bands, mmap_mode="r") for output in self.outputs)
            yield from near_duplicates(bands, self.folder)
        else:
            yield from (None for _ in self.outputs)

    def _note(self, table: np.ndarray, out: npt.NDArray[np.bool_], reason: str) -> None:
        for source, count in enumerate(np.bincount(table["source"][out], minlength=self.num_sources).tolist()):
            if count:
                self.left_out[source][reason] += count


def _column_bytes(table: np.ndarray, itemsize: int) -> dict[str, npt.NDArray[np.int64]]:
    """Return the bytes of each document in each file of its output."""
    return {"tokens": table["tokens"] * itemsize, "mask": table["tokens"], "metadata": table["metadata_bytes"]}


def _copy(output: TaskOutput, table: np.ndarray, chosen: npt.NDArray[np.bool_], writer: DocumentWriter) -> None:
    """Append the ``chosen`` documents of ``output``: run by run, or gathered in memory if the runs are short."""
    if not chosen.any():
        return
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False)).reshape(-1, 2)
    ends = {
        name: np.concatenate([[0], np.cumsum(sizes)])
        for name, sizes in _column_bytes(table, writer.dtype.itemsize).items()
    }
    files = {name: getattr(output, name) for name in ends if getattr(output, name).exists()}
    if len(edges) == 1 or sum(int(ends[name][-1]) for name in files) > len(edges) * _SHORT_RUN:
        for first, last in edges.tolist():
            ranges: dict[str, Any] = {
                name: FileRange(path, int(ends[name][first]), int(ends[name][last])) for name, path in files.items()
            }
            writer.add_ranges(ranges.pop("tokens"), table["tokens"][first:last], **ranges)
        return
    lengths = table["tokens"]
    wanted = np.repeat(chosen, lengths)
    metadata = None
    if "metadata" in files:
        all_lines = files["metadata"].read_bytes().splitlines()
        metadata = [line for line, keep in zip(all_lines, chosen.tolist(), strict=True) if keep]
    writer.add_documents(
        np.fromfile(files["tokens"], dtype=writer.dtype)[wanted],
        lengths[chosen],
        mask=np.fromfile(files["mask"], dtype=np.uint8)[wanted] if "mask" in files else None,
        metadata=metadata,
    )
