"""The datasets to join: which ones the arguments name, and whether they belong together."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ....engine.data.index_format import dataset_prefix
from ....engine.data.indexed_dataset import IndexedDataset
from ....engine.data.sidecar import Sidecar, require_same_dataset
from ....engine.errors import UserError
from ....engine.files.outputs import Use
from ....engine.tokenizer.fingerprint import same_tokenizer
from ..dataset.checks import require_free
from ..dataset_files import BIN, IDX, JSON, MASK, METADATA, dataset_files, existing_outputs

_SHARD_NAME = re.compile(r"(?P<stem>.*)\.shard-(?P<index>\d+)-of-(?P<count>\d+)(?P<side>(\.[^./]+)?)")


@dataclass(frozen=True)
class Shard:
    """A dataset's place in a run with ``--shard``."""

    run: str
    """``STEM.shard-*``, and of a split ``STEM.shard-*.SIDE``."""
    index: int
    count: int


@dataclass(frozen=True)
class MergeInput:
    """A dataset to join, without open files, so that there can be thousands."""

    prefix: str
    shard: Shard | None
    sidecar: Sidecar | None
    dtype: np.dtype
    num_sequences: int
    num_documents: int
    num_tokens: int
    sizes: dict[str, int]
    """Bytes of its .bin, mask and metadata, if they exist, by suffix."""


def expand_prefixes(arguments: Iterable[str]) -> list[str]:
    """Return the prefixes that ``arguments`` (prefixes and patterns of them) name.

    The matches of a pattern are ordered by path, shards of a run by their number.

    Raises:
        UserError: a pattern matches nothing, or a run does not have each shard once and in order.
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
    """Parse the name ``STEM.shard-I-of-N``, or ``STEM.shard-I-of-N.SIDE`` of a split."""
    match = _SHARD_NAME.fullmatch(prefix)
    return match and Shard(f"{match['stem']}.shard-*{match['side']}", int(match["index"]), int(match["count"]))


def _order(prefix: str) -> tuple[str, int]:
    shard = shard_of_name(prefix)
    return (shard.run, shard.index) if shard else (prefix, -1)


def _check_runs(prefixes: Iterable[str]) -> None:
    """Require all shards of each run, once and in order."""
    runs: dict[str, list[Shard]] = {}
    for shard in map(shard_of_name, prefixes):
        if shard is not None:
            runs.setdefault(shard.run, []).append(shard)
    for run, shards in runs.items():
        counts = sorted({shard.count for shard in shards})
        if len(counts) > 1:
            raise UserError(
                f"{run}: some are of {counts[0]} shards, some of {counts[1]}, so they are shards of different "
                f"runs; name those of one: '{run.replace('*', f'*-of-{counts[0]}')}'"
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


def open_input(prefix: str) -> MergeInput:
    """Open a dataset, and check what is cheap: sizes, and its sidecar against its index."""
    dataset = IndexedDataset(prefix)
    if dataset.has_modes:
        raise UserError(
            f"{dataset.idx_path}: has the modes of a multimodal dataset, which cannot be joined here; use "
            "Megatron-LM's tools/merge_datasets.py"
        )
    paths = {suffix: f"{dataset.prefix}{suffix}" for suffix in (BIN, MASK, METADATA)}
    part = MergeInput(
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


def _check_sidecar(part: MergeInput, sidecar: Sidecar) -> None:
    """Check what only merging requires."""
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


def check_paths(parts: Sequence[MergeInput], output: str, overwrite: bool) -> None:
    """Refuse a dataset that is named twice, and an output that is an input or may not be replaced."""
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
    require_free({output: dataset_files(output)}, reads, overwrite)


def check_alike(parts: Sequence[MergeInput]) -> None:
    """Refuse datasets whose tokens have different meanings, according to their sidecars."""
    _check_equal("dtype", [(part.prefix, part.dtype.name) for part in parts], "the same tokenizer")
    known = [(part.prefix, part.sidecar) for part in parts if part.sidecar is not None]
    for name in ("tokenizer_sha256", "append_eod", "eod_id"):
        values = [(prefix, getattr(sidecar, name)) for prefix, sidecar in known]
        if name == "tokenizer_sha256":
            values = [(prefix, _tokenizer_of(sidecar, known[0][1])) for prefix, sidecar in known]
        _check_equal(name, values, "the same tokenizer, --eod-token and --append-eod")
    for name in ("bos_ids", "eos_ids"):
        # Old datasets have not recorded them.
        framed = [(prefix, list(getattr(sidecar, name) or ())) for prefix, sidecar in known]
        _check_equal(name, framed, "the same tokenizer and --bos")


def _tokenizer_of(sidecar: Sidecar, first: Sidecar) -> str:
    """Return the tokenizer's hash; that of ``first`` if it is the same tokenizer, saved differently."""
    same = same_tokenizer(sidecar.tokenizer_fingerprint, first.tokenizer_fingerprint)
    return first.tokenizer_sha256 if same else sidecar.tokenizer_sha256


def count_without_mask(parts: Sequence[MergeInput], fill: bool) -> int:
    """Count the parts that need a loss mask because others have one; refuse them without ``fill``."""
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
                f"{prefix}: {name} is {value}, but of {values[0][0]} it is {values[0][1]}: their token ids have "
                f"different meanings; preprocess both with {remedy}"
            )
