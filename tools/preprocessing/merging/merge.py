"""Joining indexed datasets: their documents one after another, copied by the kernel, checked while they are copied.

The shards of one run (``--shard I/N`` of the preprocess command) give the dataset that one machine would have made,
unless the run shuffled, deduplicated or limited its documents, which each shard did for itself.
"""

from __future__ import annotations

import glob
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from ....engine.data.index_format import HEADER, dataset_prefix
from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.data.sidecar import InputSource, Sidecar, require_same_dataset
from ....engine.errors import UserError
from ....engine.files.hashing import hash_file
from ....engine.files.outputs import Use
from ....engine.tokenizer.fingerprint import same_tokenizer
from ..dataset_files import BIN, IDX, JSON, MASK, METADATA, existing_outputs
from ..dataset_writer import FileArray, FileRange, IndexedDatasetWriter
from ..output.checks import require_free
from ..output.workspace import open_workspace
from ..progress import ProgressReport

_WITHIN_A_SHARD = ("dedup", "max_documents", "shuffle")
"""Options of a run that saw one shard at a time: the shards joined are not what one machine would have made."""
_TOKENS_AT_ONCE = 1 << 22
_SHARD_NAME = re.compile(r"(?P<stem>.*)\.shard-(?P<index>\d+)-of-(?P<count>\d+)(?P<side>(\.[^./]+)?)")


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
    """What was done."""

    inputs: int
    documents: int
    tokens: int
    dtype: str
    bytes: int
    """Copied: tokens, masks and metadata."""
    no_sidecar: str | None
    """The first input without a sidecar, for whose sake the output has none."""
    masks_filled: int
    """Inputs that had no loss mask and got one of ones."""
    seconds: float
    files: tuple[str, ...]
    """The files written."""


@dataclass(frozen=True)
class Shard:
    """Place of a dataset in a run that was divided."""

    run: str
    """``STEM.shard-*``, and of a split ``STEM.shard-*.SIDE``."""
    index: int
    count: int


@dataclass(frozen=True)
class Part:
    """One dataset to be joined; only facts, so that thousands of them need no open files."""

    prefix: str
    shard: Shard | None
    sidecar: Sidecar | None
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    sizes: dict[str, int]
    """Bytes of those of its .bin, mask and metadata that it has, by suffix."""


def merge(options: MergeOptions) -> MergeReport:
    """Join datasets to ``{output_prefix}.bin``, ``.idx``, and the sidecar, mask and metadata that they have.

    Raises:
        UserError: an input is missing, damaged or does not fit the others, or the output exists or cannot be written.
            Nothing stands under a final name, and an existing dataset is as it was.
    """
    started = time.monotonic()
    prefix = dataset_prefix(options.output_prefix)
    if not os.path.basename(prefix):
        raise UserError(
            f"--output-prefix {options.output_prefix}: names a folder; add a file name, such as {prefix}dataset"
        )
    parts = [_part(name) for name in expand_prefixes(options.inputs)]
    _check_paths(parts, prefix, options.overwrite)
    _check_alike(parts)
    without_mask = _without_mask(parts, options.fill_mask)
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
    """The short table that the command prints at the end."""
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


def expand_prefixes(arguments: Iterable[str]) -> list[str]:
    """The prefixes that ``arguments`` name: prefixes themselves in the order given, and patterns of them.

    What a pattern matches is ordered by path, and shards of one run by their number.

    Raises:
        UserError: a pattern matches nothing, or of a run not each shard is there once and in order.
    """
    prefixes: list[str] = []
    for argument in arguments:
        prefix = dataset_prefix(argument)
        if os.path.exists(f"{prefix}{IDX}") or not glob.has_magic(prefix):
            prefixes.append(prefix)
            continue
        matches = [dataset_prefix(path) for path in glob.glob(f"{prefix}{IDX}", recursive=True)]
        if not matches:
            raise UserError(f"--inputs {argument}: no dataset matches this pattern; looked for {prefix}{IDX}")
        prefixes += sorted(matches, key=_order)
    _check_runs(prefixes)
    return prefixes


def shard_of_name(prefix: str) -> Shard | None:
    """What the name ``STEM.shard-I-of-N``, or ``STEM.shard-I-of-N.SIDE`` of a split, says."""
    match = _SHARD_NAME.fullmatch(prefix)
    return match and Shard(f"{match['stem']}.shard-*{match['side']}", int(match["index"]), int(match["count"]))


def _order(prefix: str) -> tuple[str, int]:
    shard = shard_of_name(prefix)
    return (shard.run, shard.index) if shard else (prefix, -1)


def _check_runs(prefixes: Iterable[str]) -> None:
    """Require of each run all shards, once, in order: of all others the result would be no dataset of a run."""
    runs: dict[str, list[Shard]] = {}
    for shard in map(shard_of_name, prefixes):
        if shard is not None:
            runs.setdefault(shard.run, []).append(shard)
    for run, shards in runs.items():
        counts = sorted({shard.count for shard in shards})
        if len(counts) > 1:
            raise UserError(
                f"{run}: some are of {counts[0]} shards, some of {counts[1]}, so of different runs; name those of one: "
                f"'{run.replace('*', f'*-of-{counts[0]}')}'"
            )
        count = counts[0]
        found = [shard.index for shard in shards]
        missing = [index for index in range(count) if index not in set(found)]
        if missing:
            named = ", ".join(map(str, missing[:10])) + (f" and {len(missing) - 10} more" if missing[10:] else "")
            raise UserError(
                f"{run}: {'shards' if missing[1:] else 'shard'} {named} of {count} missing (they count from 0); make "
                f"what is missing with preprocess --shard {missing[0]}/{count}, and name all {count}"
            )
        if found != list(range(count)):
            raise UserError(
                f"{run}: named in the order {', '.join(map(str, found[:20]))}; name each of 0 to {count - 1} once, in "
                f"order, or all by a pattern in quotes: '{run.replace('*', f'*-of-{count}')}'"
            )


def _part(prefix: str) -> Part:
    """Open a dataset, and check what costs nothing: sizes, and its sidecar against its index."""
    dataset = IndexedDataset(prefix)
    if dataset.has_modes:
        raise UserError(
            f"{dataset.idx_path}: has the modes of a multimodal dataset, which cannot be joined here; use "
            "Megatron-LM's tools/merge_datasets.py"
        )
    paths = {suffix: f"{dataset.prefix}{suffix}" for suffix in (BIN, MASK, METADATA)}
    part = Part(
        prefix=dataset.prefix,
        shard=shard_of_name(dataset.prefix),
        sidecar=Sidecar.read(dataset.prefix),
        dtype=dataset.dtype,
        num_sequences=dataset.num_sequences,
        num_documents=dataset.num_documents,
        num_tokens=dataset.num_tokens,
        sizes={suffix: os.path.getsize(path) for suffix, path in paths.items() if os.path.exists(path)},
    )
    if part.sidecar is not None:
        require_same_dataset(part.sidecar, dataset)
        _check_sidecar(part, part.sidecar)
    return part


def _check_sidecar(part: Part, sidecar: Sidecar) -> None:
    """What only joining needs to fit."""
    facts: list[tuple[str, object, object]] = [
        ("metadata", sidecar.metadata_xxh3_128 != "", METADATA in part.sizes),
    ]
    if part.shard is not None:
        place = f"{part.shard.index}/{part.shard.count}"
        facts.append(("shard", sidecar.options.get("shard", place), place))
    for name, recorded, found in facts:
        if recorded != found:
            raise UserError(
                f"{part.prefix}{JSON}: says {name}: {recorded}, but the dataset's files say {found}; build or copy all "
                "files of the dataset again"
            )


def _check_paths(parts: Sequence[Part], output: str, overwrite: bool) -> None:
    """Refuse a dataset that is named twice, and an output that is an input or is not to be replaced."""
    seen: dict[str, str] = {}
    for part in parts:
        identity = os.path.realpath(f"{part.prefix}{BIN}")
        if identity in seen:
            raise UserError(
                f"--inputs {part.prefix}: is already an input, as {seen[identity]}; name each dataset once (to repeat "
                "data, give it a larger weight in training)"
            )
        seen[identity] = part.prefix
    reads = [Use("--inputs", path) for part in parts for path in existing_outputs(part.prefix)]
    require_free({output: [output]}, reads, overwrite)


def _check_alike(parts: Sequence[Part]) -> None:
    """Refuse datasets whose tokens mean different things, as far as their sidecars tell."""
    _check_equal("dtype", [(part.prefix, part.dtype.name) for part in parts], "the same tokenizer")
    known = [(part.prefix, part.sidecar) for part in parts if part.sidecar is not None]
    for name in ("tokenizer_sha256", "append_eod", "eod_id"):
        values = [(prefix, getattr(sidecar, name)) for prefix, sidecar in known]
        if name == "tokenizer_sha256":
            values = [(prefix, _tokenizer_of(sidecar, known[0][1])) for prefix, sidecar in known]
        _check_equal(name, values, "the same tokenizer, --eod-token and --append-eod")
    for name in ("bos_ids", "eos_ids"):
        # Datasets made before these were recorded have neither.
        framed = [(prefix, list(getattr(sidecar, name) or ())) for prefix, sidecar in known]
        _check_equal(name, framed, "the same tokenizer and --bos")


def _tokenizer_of(sidecar: Sidecar, first: Sidecar) -> str:
    """The tokenizer's hash; that of ``first`` where it is the same tokenizer, saved in another way."""
    same = same_tokenizer(sidecar.tokenizer_fingerprint, first.tokenizer_fingerprint)
    return first.tokenizer_sha256 if same else sidecar.tokenizer_sha256


def _without_mask(parts: Sequence[Part], fill: bool) -> int:
    """How many parts need a loss mask because others have one; refused unless ``fill``."""
    masked = [part for part in parts if MASK in part.sizes]
    plain = [part for part in parts if MASK not in part.sizes]
    if not masked or not plain:
        return 0
    if not fill:
        raise UserError(
            f"{plain[0].prefix}: has no loss mask, but {masked[0].prefix} has one; if all tokens of those without are "
            "to be predicted, pass --fill-mask; or keep them apart and mix them in training"
        )
    return len(plain)


def _check_equal(name: str, values: Sequence[tuple[str, Any]], remedy: str) -> None:
    for prefix, value in values:
        if value != values[0][1]:
            raise UserError(
                f"{prefix}: {name} is {value}, but of {values[0][0]} it is {values[0][1]}: their tokens do not mean "
                f"the same; preprocess both with {remedy}"
            )


def _append(part: Part, writer: IndexedDatasetWriter, on_bytes: Callable[[int], None], work: Path) -> None:
    """Check the index of ``part``, copy the rest of it in the index's order, and check what was copied.

    Raises:
        UserError: the index is damaged, or a file is not what its sidecar says.
    """
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
    """Write tokens and mask of ``dataset`` to temporary files, in the order of its index; their paths by suffix."""
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


def _check_hash(part: Part, suffix: str, found: str, recorded: str) -> None:
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


def merged_sidecar(parts: Sequence[Part]) -> Sidecar | None:
    """The sidecar of the datasets joined, but for what the writer fills in; None when one of them has none.

    Raises:
        UserError: the shards of a run were made from different inputs or with different options.
    """
    groups: dict[str, list[tuple[Part, Sidecar]]] = {}
    for part in parts:
        if part.sidecar is None:
            return None
        groups.setdefault(part.shard.run if part.shard else part.prefix, []).append((part, part.sidecar))
    sources: list[InputSource] = []
    options: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        sources += _sources_of_run(members)
        options[name] = _options_of_run(members)
    first = next(iter(options.values()))
    alike = all(others == first for others in options.values())
    return replace(
        next(iter(groups.values()))[0][1],
        sources=tuple(sources),
        options=first if alike else {"merged": options},
    )


def _sources_of_run(members: Sequence[tuple[Part, Sidecar]]) -> list[InputSource]:
    """The sources of one dataset, or of a run's shards: each names all inputs of the run, and counts its own documents.

    Raises:
        UserError: the inputs, or their files or bytes, were others for another shard.
    """
    first, merged = members[0][0], list(members[0][1].sources)
    for part, sidecar in members[1:]:
        names = [source.name for source in sidecar.sources]
        if names != [source.name for source in merged]:
            raise UserError(
                f"{part.prefix}{JSON}: made from {' '.join(names)}, but {first.prefix} from "
                f"{' '.join(source.name for source in merged)}: shards of different inputs; preprocess them again"
            )
        merged = [_joined(before, source, part) for before, source in zip(merged, sidecar.sources, strict=True)]
    return merged


def _joined(before: InputSource, source: InputSource, part: Part) -> InputSource:
    """The counts of ``source`` in the shard ``part`` added to those of the shards before it."""
    if (before.files, before.bytes) != (source.files, source.bytes):
        raise UserError(
            f"{part.prefix}{JSON}: {source.name} was {source.files} files of {source.bytes} bytes, but for the "
            f"shards before it {before.files} files of {before.bytes} bytes: shards of different inputs; "
            "preprocess all of them again"
        )
    return replace(
        before,
        documents=before.documents + source.documents,
        tokens=before.tokens + source.tokens,
        characters=before.characters + source.characters,
        text_bytes=before.text_bytes + source.text_bytes,
        left_out=dict(Counter(before.left_out) + Counter(source.left_out)),
    )


def _options_of_run(members: Sequence[tuple[Part, Sidecar]]) -> dict[str, Any]:
    """The options of one dataset, or those that a run's shards share: with the number of shards where that decides
    what is there.

    Raises:
        UserError: they differ.
    """
    first = members[0][1].options
    if members[0][0].shard is None:
        return first
    shared = {name: value for name, value in first.items() if name != "shard"}
    for part, sidecar in members[1:]:
        for name in sorted({*shared, *sidecar.options} - {"shard"}):
            if shared.get(name) != sidecar.options.get(name):
                raise UserError(
                    f"{part.prefix}{JSON}: made with {name} {sidecar.options.get(name, 'at its default')}, but "
                    f"{members[0][0].prefix} with {shared.get(name, 'its default')}: shards of one run have the same "
                    "options; preprocess them again"
                )
    return {**shared, "shards": len(members)} if any(name in shared for name in _WITHIN_A_SHARD) else shared
