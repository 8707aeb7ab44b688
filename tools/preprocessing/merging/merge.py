"""Joins indexed datasets: their documents one after another, copied by the kernel and checked while they are copied.

The shards of a run (``--shard I/N`` of the preprocess command) give the dataset that one machine would have made,
unless the run shuffled, deduplicated or limited its documents, which each shard does on its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from ....engine.data.index_format import HEADER, dataset_prefix
from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.errors import UserError
from ....engine.files.hashing import hash_file
from ..dataset.workspace import open_workspace
from ..dataset_files import BIN, IDX, JSON, MASK, METADATA, existing_outputs
from ..dataset_writer import FileArray, FileRange, IndexedDatasetWriter
from ..progress import ProgressReport
from .inputs import MergeInput, check_alike, check_paths, count_without_mask, expand_prefixes, open_input
from .sidecar import merged_sidecar

_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class MergeOptions:
    """The options of the command; the fields are its flags."""

    inputs: Sequence[str]
    output_prefix: str
    overwrite: bool = False
    fill_mask: bool = False
    """If some datasets have a loss mask, give the others one of ones, so that every token of theirs is a target."""


@dataclass(frozen=True)
class MergeReport:
    """Results of a merge."""

    inputs: int
    documents: int
    tokens: int
    dtype: str
    bytes: int
    """Copied bytes of tokens, masks and metadata."""
    no_sidecar: str | None
    """The first input without a sidecar; because of it the output has none."""
    masks_filled: int
    """Inputs that had no loss mask and got one of ones."""
    seconds: float
    files: tuple[str, ...]
    """The files written."""


def merge(options: MergeOptions) -> MergeReport:
    """Join datasets to ``{output_prefix}.bin``, ``.idx``, and the sidecar, mask and metadata that they have.

    Raises:
        UserError: an input is missing, damaged or does not fit the others, or the output exists or cannot be written.
            An existing dataset is then unchanged.
    """
    started = time.monotonic()
    prefix = dataset_prefix(options.output_prefix)
    if not os.path.basename(prefix):
        raise UserError(
            f"--output-prefix {options.output_prefix}: names a folder; add a file name, such as {prefix}dataset"
        )
    parts = [open_input(name) for name in expand_prefixes(options.inputs)]
    check_paths(parts, prefix, options.overwrite)
    check_alike(parts)
    without_mask = count_without_mask(parts, options.fill_mask)
    sidecar = merged_sidecar(parts)
    total = sum(sum(part.sizes.values()) for part in parts)
    itemsize = parts[0].dtype.itemsize
    try:
        with (
            open_workspace(prefix) as work,
            IndexedDatasetWriter(
                prefix,
                parts[0].dtype,
                overwrite=options.overwrite,
                mask=any(MASK in part.sizes for part in parts),
                metadata=any(METADATA in part.sizes for part in parts),
                scratch=work / "dataset",
            ) as writer,
            ProgressReport("merging", total) as progress,
        ):
            done = 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                progress.show(done, done // itemsize)

            for part in parts:
                _append(part, writer, on_bytes, work)
            writer.sidecar = sidecar
    except OSError as error:
        raise UserError(f"{error.filename or prefix}: {error.strerror or error}; nothing was written") from error
    return MergeReport(
        len(parts),
        writer.num_documents,
        writer.num_tokens,
        writer.dtype.name,
        total,
        next((part.prefix for part in parts if part.sidecar is None), None),
        without_mask,
        time.monotonic() - started,
        tuple(existing_outputs(prefix)),
    )


def format_report(report: MergeReport) -> str:
    """Return the table that the command prints at the end."""
    rows = {
        "datasets joined": f"{report.inputs:,}",
        "documents": f"{report.documents:,}",
        "tokens": f"{report.tokens:,} ({report.dtype})",
        "speed": f"{report.bytes / 1e6 / max(report.seconds, 1e-9):,.1f} MB/s, {report.seconds:,.1f} s",
        "files": " ".join(report.files),
    }
    if report.masks_filled:
        rows["loss mask"] = f"all ones for the datasets without one, {report.masks_filled:,} of {report.inputs:,}"
    if report.no_sidecar is not None:
        rows["sidecar"] = f"none, since {report.no_sidecar} has none"
    return "\n".join(f"{name:<25} {value}" for name, value in rows.items())


def _append(part: MergeInput, writer: IndexedDatasetWriter, on_bytes: Callable[[int], None], work: Path) -> None:
    """Copy ``part`` in the order of its index. Raise UserError if the index or a file's hash is wrong."""
    dataset = IndexedDataset(part.prefix, check_whole=True)
    if part.sidecar is not None:
        _check_hash(part, IDX, hash_file(dataset.idx_path), part.sidecar.idx_xxh3_128)
    paths = {suffix: f"{part.prefix}{suffix}" for suffix in part.sizes}
    if not dataset.in_file_order:
        paths |= _put_in_order(dataset, work)
    files = {suffix: _CopiedFile(path, os.path.getsize(path), on_bytes) for suffix, path in paths.items()}
    after_pointers = HEADER.size + 12 * part.num_sequences
    ends = FileArray(dataset.idx_path, "<i8", after_pointers + 8, part.num_documents)
    writer.add_ranges(
        files[BIN].range,
        FileArray(dataset.idx_path, "<i4", HEADER.size, part.num_sequences),
        ends=None if dataset.document_index_ignored else ends,
        mask=files[MASK].range if MASK in files else None,
        metadata=files[METADATA].range if METADATA in files else None,
    )
    if part.sidecar is not None:
        recorded = {
            BIN: part.sidecar.bin_xxh3_128,
            MASK: part.sidecar.mask_xxh3_128,
            METADATA: part.sidecar.metadata_xxh3_128,
        }
        for suffix, file in files.items():
            _check_hash(part, suffix, file.digest.hexdigest(), recorded[suffix])
    if METADATA in files and (files[METADATA].lines != part.num_documents or not files[METADATA].ends_with_line):
        raise UserError(
            f"{part.prefix}{METADATA}: {files[METADATA].lines} lines, but the dataset has {part.num_documents} "
            "documents, each of which has one; build or copy the dataset again"
        )


def _put_in_order(dataset: IndexedDataset, work: Path) -> dict[str, str]:
    """Write tokens and mask of ``dataset`` to temporary files in the order of its index; return paths by suffix."""
    paths = {BIN: str(work / "in_order.bin")}
    if dataset.has_loss_mask:
        paths[MASK] = str(work / "in_order.mask.bin")
    for suffix, path in paths.items():
        read = dataset.stored_tokens if suffix == BIN else dataset.stored_mask
        with open(path, "wb") as file:
            for start in range(0, dataset.num_tokens, _TOKENS_AT_ONCE):
                block = read(start, min(start + _TOKENS_AT_ONCE, dataset.num_tokens))
                assert block is not None
                file.write(block.tobytes())
    return paths


def _check_hash(part: MergeInput, suffix: str, found: str, recorded: str) -> None:
    if found != recorded:
        raise UserError(
            f"{part.prefix}{suffix}: its hash is {found}, but {part.prefix}{JSON} says {recorded}: it was changed or "
            "damaged after it was written; build or copy the dataset again; nothing was written"
        )


class _CopiedFile:
    """A whole file, hashed and its lines counted while it is copied."""

    def __init__(self, path: str, size: int, on_bytes: Callable[[int], None]) -> None:
        self.range = FileRange(path, 0, size, self._see)
        self.digest = xxhash.xxh3_128()
        self.lines = 0
        self.ends_with_line = True
        self._count_lines = path.endswith(METADATA)
        self._on_bytes = on_bytes

    def _see(self, block: memoryview) -> None:
        self.digest.update(block)
        if self._count_lines:
            self.lines += int(np.count_nonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")))
            self.ends_with_line = block[-1] == ord("\n")
        self._on_bytes(len(block))
