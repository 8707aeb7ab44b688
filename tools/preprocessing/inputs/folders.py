"""Selects the documents among the files of a folder.

A folder of a data set also contains a card and a licence, JSON that describes the data, markers and caches of other
programs, and splits for evaluation. Each file that is not read is counted under a reason, which is printed once per
folder. Files that are named explicitly are always read.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ....engine.errors import UserError
from ....engine.files.paths import is_url
from ....engine.files.regular import read_regular
from ..dataset_files import JSON, METADATA, REJECTS, is_of_dataset
from ..formats import FORMATS, format_of, known_formats, split_compression
from ..storage import is_file, read_start
from .detection import detect, has_no_suffix
from .unsupported import most_common_remedy

_ABOUT = re.compile(
    r"readme([-_.].*)?|licen[cs]e([-_.](apache|mit|bsd|cc|gpl|lgpl|agpl|odc|data|code|third|\d).*)?|copying([-_.]lesser)?|"
    r"notice|third[-_]party[-_]notices|authors|contributors|contributing|code[-_]of[-_]conduct|changelog|changes|citation|"
    r"(data|model)[-_]?card|dataset[-_]card|datasheet|requirements([-_](dev|test|docs|train|gpu|cpu))?"
)
"""Names, without suffix, of texts that describe a folder."""
_INDEX_PAGES = frozenset(("index.html", "index.htm"))
_DESCRIPTIONS = frozenset(
    (
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "index.json",
        "stats.json",
        "croissant.json",
        "package.json",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
    )
)
_MARKERS = re.compile(r"_success|_(common_)?metadata|_(committed|started)_.*|.*\.(crc|lock|incomplete|part|tmp)")
_EVALUATION = frozenset(("test", "validation", "valid", "val", "dev", "eval", "evaluation"))
_SHARD = re.compile(r"(?:.*[-_.])?([a-z]+)[-._]\d{4,5}-of-\d{4,5}$")
_ARROW_SPLIT = re.compile(r".*-([a-z]+)$")
_SAME_FORMAT_IS_CORPUS = ("markdown", "html")
"""In a corpus of only these formats, a page named README or index is a document."""
_MOST_BYTES = 16 << 20
"""Of a file that describes a data set."""

DESCRIBES = "that describe the data"
MARKDOWN = "of Markdown next to data files"
SPLITS = "of splits for evaluation"
CACHES = "of caches and markers of other programs"
OTHERS = "of other formats"


def choose_files(
    root: str, paths: Sequence[str], keys: Sequence[str] | None = None, any_name: bool = False
) -> list[str]:
    """Return the documents among ``paths`` of the folder or pattern ``root``, and print what is left out.

    Args:
        paths: all files in it that are not hidden, in order.
        keys: see :func:`detect`.
        any_name: the format is given, so that names need not show it.

    Raises:
        UserError: there are no documents (the message says how to convert the files), or a table has a log.
    """
    _refuse_tables_with_a_log(root, paths)
    left_out: dict[str, list[str]] = defaultdict(list)

    def drop(chosen: Iterable[str], reason: str, unwanted: Callable[[str], bool]) -> list[str]:
        kept: list[str] = []
        for path in chosen:
            (left_out[reason] if unwanted(path) else kept).append(path)
        return kept

    formats = {path: _format_name(path, keys) or ("jsonl" if any_name else None) for path in paths}
    data = drop(paths, CACHES, _is_marker)
    data = drop(data, CACHES, _not_in_saved_dataset(data))
    data = drop(data, OTHERS, lambda path: formats[path] is None)
    data = drop(data, DESCRIBES, lambda path: _name(path) in _DESCRIPTIONS)
    data = drop(data, DESCRIBES, _is_record_of_preprocess)
    data = drop(data, SPLITS, _evaluation_splits(paths, data))
    others = {formats[path] for path in data if not _is_about(path)}
    if others:
        kept = others if len(others) == 1 and others <= set(_SAME_FORMAT_IS_CORPUS) else set()
        data = drop(data, DESCRIBES, lambda path: _is_about(path) and formats[path] not in kept)
    data = drop(data, MARKDOWN, _markdown_next_to_records(data, formats))
    if not data or (all(map(_is_about, data)) and most_common_remedy(left_out[OTHERS])):
        _refuse_empty(root, left_out)
    for reason, those in left_out.items():
        print(
            f"note: {root}: left out {_count(those)} {reason}, {those[0]} first{_hint(reason, those)}", file=sys.stderr
        )
    return data


def hub_snapshot(folder: str, folders: Sequence[str]) -> str | None:
    """Return the snapshot to read in a folder of the Hugging Face cache; None for other folders.

    Raises:
        UserError: it has several snapshots, and refs/main names none of them.
    """
    if not {"blobs", "snapshots"} <= set(folders):
        return None
    snapshots = sorted(entry.name for entry in os.scandir(os.path.join(folder, "snapshots")) if entry.is_dir())
    main = Path(folder, "refs", "main")
    revision = main.read_text().strip() if main.is_file() else ""
    if revision not in snapshots:
        if len(snapshots) != 1:
            raise UserError(
                f"{folder}: a folder of the Hugging Face cache with {len(snapshots)} snapshots; name one of "
                f"{os.path.join(folder, 'snapshots')}/*, or download it again with --local-dir"
            )
        (revision,) = snapshots
    print(f"note: {folder}: a folder of the Hugging Face cache; reading its snapshot {revision}", file=sys.stderr)
    return os.path.join(folder, "snapshots", revision)


def _is_record_of_preprocess(path: str) -> bool:
    """Return whether ``path`` is a sidecar, rejects or metadata that the preprocess command wrote."""
    return path.endswith((JSON, REJECTS, METADATA)) and is_of_dataset(path)


def _name(path: str) -> str:
    return os.path.basename(path).lower()


def _count(paths: Sequence[str]) -> str:
    return f"{len(paths):,} file{'s' if len(paths) > 1 else ''}"


def _hint(reason: str, paths: Sequence[str]) -> str:
    if reason == OTHERS:
        found = most_common_remedy(paths)
        return f" ({found})" if found else ""
    return "" if reason == CACHES else "; name them to read them"


def _format_name(path: str, keys: Sequence[str] | None) -> str | None:
    """Return the format of a file in a folder by its name or, without a suffix, its content."""
    if found := format_of(path):
        return found[0].name
    if not has_no_suffix(path) or _is_about(path) or not is_file(path):
        return None
    detected = detect(path, None, split_compression(path)[1], keys=keys)
    form = FORMATS.get(detected.format or "")
    return form.name if form and (form.compressible or not detected.compression) else None


def _is_marker(path: str) -> bool:
    return _MARKERS.fullmatch(_name(path)) is not None


def _is_about(path: str) -> bool:
    name = split_compression(_name(path))[0]
    stem = os.path.splitext(name)[0]
    if name in _INDEX_PAGES:
        return True
    found = format_of(name)
    return (found is None or not found[0].has_records) and _ABOUT.fullmatch(stem if found else name) is not None


def _markdown_next_to_records(data: Sequence[str], formats: Mapping[str, str | None]) -> Callable[[str], bool]:
    """Return a test for Markdown in folders that contain files of records, at any depth."""
    folders: set[str] = set()
    for path in data:
        if FORMATS[formats[path] or ""].has_records:
            folder = os.path.dirname(path)
            while folder not in folders:
                folders.add(folder)
                folder = os.path.dirname(folder)
    return lambda path: formats[path] == "markdown" and os.path.dirname(path) in folders


def _not_in_saved_dataset(paths: Sequence[str]) -> Callable[[str], bool]:
    """Return a test for Arrow files that are caches: ``datasets.save_to_disk`` lists its files in state.json."""
    listed: dict[str, frozenset[str]] = {}
    for path in paths:
        if _name(path) == "state.json":
            state = _read_json(path)
            state = state if isinstance(state, dict) else {}
            files = state.get("_data_files")
            if state.get("_indices_data_files") or state.get("_indices_files"):
                raise UserError(
                    f"{path}: the dataset is a selection of the rows in its files, as old versions of datasets saved "
                    "it; save it again: datasets.load_from_disk(folder).flatten_indices().save_to_disk(other)"
                )
            if isinstance(files, list) and all(isinstance(file, dict) for file in files):
                names = frozenset(str(file.get("filename")) for file in files)
                folder = os.path.dirname(path)
                absent = sorted(name for name in names if not is_file(os.path.join(folder, name)))
                if absent:
                    raise UserError(f"{path}: names {absent[0]}, which is not there; copy the folder again")
                listed[folder] = names

    def is_cache(path: str) -> bool:
        folder, name = os.path.split(path)
        if not name.endswith(".arrow"):
            return False
        return name not in listed[folder] if folder in listed else name.startswith(("cache-", "tmp"))

    return is_cache


def _evaluation_splits(paths: Sequence[str], data: Sequence[str]) -> Callable[[str], bool]:
    """Return a test for files of evaluation splits of a dataset that has a split named train."""
    folders: set[str] = set()
    listing: set[str] = set()
    for path in paths:
        if _name(path) == "dataset_dict.json":
            listing.add(os.path.dirname(path))
            content = _read_json(path)
            splits = content.get("splits") if isinstance(content, dict) else None
            if isinstance(splits, list) and "train" in splits:
                folders.update(os.path.join(os.path.dirname(path), str(name)) for name in splits if name in _EVALUATION)
    by_name = Counter(map(_split_name, data))
    # Next to train.jsonl or train/, names are splits, as for ``datasets.load_dataset``.
    next_to_train = {folder for path in data for folder, name in _steps(path) if name == "train"} - listing

    def is_evaluation(path: str) -> bool:
        if by_name["train"] and _split_name(path) in _EVALUATION:
            return True
        if any(name in _EVALUATION and folder in next_to_train for folder, name in _steps(path)):
            return True
        return bool(folders) and any(path.startswith(folder + os.sep) for folder in folders)

    return is_evaluation


def _steps(path: str) -> Iterator[tuple[str, str]]:
    """Yield (folder, name) for each part of a path; the file's name without suffixes."""
    folder, name = os.path.split(path)
    yield folder, os.path.splitext(split_compression(name.lower())[0])[0]
    while os.path.basename(folder):
        yield os.path.dirname(folder), os.path.basename(folder).lower()
        folder = os.path.dirname(folder)


def _split_name(path: str) -> str | None:
    """Return the split in a file name of the Hub or ``datasets``, such as train-00000-of-00002.parquet."""
    stem = split_compression(_name(path))[0]
    stem, suffix = os.path.splitext(stem)
    match = _SHARD.fullmatch(stem) or (_ARROW_SPLIT.fullmatch(stem) if suffix == ".arrow" else None)
    return match[1] if match else None


def _read_json(path: str) -> object:
    try:
        return json.loads(read_start(path, _MOST_BYTES) if is_url(path) else read_regular(path, _MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def _refuse_tables_with_a_log(root: str, paths: Sequence[str]) -> None:
    """Refuse tables with a log of valid files: outdated and deleted rows would be read too."""
    for path in paths:
        parts = Path(path).parts
        kind = "a Delta table" if "_delta_log" in parts else None
        if path.endswith(".metadata.json") and "metadata" in parts:
            kind = "an Iceberg table"
        if kind:
            raise UserError(
                f"{root}: {kind}, whose log ({path}) says which of its files are valid; export the table to Parquet, "
                "or name the files to read"
            )


def _refuse_empty(root: str, left_out: dict[str, list[str]]) -> None:
    others = left_out.get(OTHERS, [])
    if found := most_common_remedy(others):
        raise UserError(f"{root}: no file that can be read in this folder; {found}")
    if described := left_out.get(DESCRIBES) or left_out.get(SPLITS):
        raise UserError(f"{root}: only files that describe data in this folder, such as {described[0]}; name a file")
    unknown = (
        f" ({_count(others)} of other formats, {others[0]} first; --input-format names a format)" if others else ""
    )
    raise UserError(f"{root}: no {known_formats()} file in this folder{unknown}")
