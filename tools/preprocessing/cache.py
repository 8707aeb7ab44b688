"""Keep datasets in a folder under names that say what they are made from, so that a text is tokenized once.

The name is a hash of the contents of the input files, of the tokenizer's files, and of the options that decide the
documents and their tokens. Names and times of the files do not matter, and no dataset is ever replaced by another one.
Nothing is removed: delete folders of the cache that are no longer needed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ... import __version__
from ...engine.data.sidecar import Sidecar
from ...engine.errors import UserError
from ...engine.files.atomic import replace_file
from ...engine.files.hashing import hash_file, record_file
from ...engine.files.lock import exclusive_lock
from ...engine.files.paths import is_url
from ...engine.files.regular import read_regular
from ...engine.system import usable_cores
from ...engine.tokenizer.files import ADDED_TOKENS_FILE, CONFIG_FILES, MODEL_CONFIG, read_config
from ..tokenizer.finding import find_tokenizer_file
from .cleaning.held_out import held_out_files
from .cleaning.libraries import cleaning_libraries
from .inputs.files import STDIN, InputFile, expand_inputs
from .inputs.hub import pin_revisions
from .merging.merge import MergeOptions, merge
from .option_rules import check_options
from .options import NOT_CONTENTS, PreprocessOptions
from .pipeline import preprocess
from .progress import ProgressReport
from .tokenizer_choice import choose_tokenizer

_DATASET = "dataset"
_COMPLETE = "complete.json"
_HASHES = "hashes"
_REMEMBERED_BYTES = 16 << 20
"""Hashes of files of at least this size are remembered; smaller ones are read at every start."""
_MODEL_KEYS = ("model_type", "vocab_size", "bos_token_id", "eos_token_id", "tokenizer_class")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
_NOT_IN_NAME = frozenset(["shard", "max_expansion", "signatures", "exclude_documents"])
"""Options on which the contents of a complete dataset do not depend."""
_BUSY = "busy:"
_WAIT_SECONDS = 1.0


def preprocess_into_cache(options: PreprocessOptions) -> dict[str, Sidecar]:
    """Tokenize a corpus into ``options.cache_folder``, unless it is there; return its sidecars by prefix.

    With ``options.shard``, only that part is made. Without it, the complete parts of an earlier call are joined.

    Raises:
        UserError: as :func:`preprocess`.
    """
    options = replace(options, input=pin_revisions(options.input))
    entry = cache_entry(options)
    try:
        entry.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache-folder {options.cache_folder}: {error.filename}: {error.strerror}") from error
    part = _Completion(entry, options.shard)
    with _locked(part):
        if found := _Completion(entry).read() or part.read():
            return found
        if options.shard is None and (joined := _join_parts(entry)):
            return joined
        inside = replace(options, output_prefix=str(entry / _DATASET), cache_folder=None, overwrite=True)
        return part.write(list(preprocess(inside).sidecars))


@contextmanager
def _locked(part: _Completion) -> Iterator[None]:
    """Wait until no other process makes this dataset or part."""
    waits = False
    while True:
        try:
            with exclusive_lock(part.lock, lambda holder: f"{_BUSY} {holder}"):
                yield
                return
        except UserError as error:
            if not str(error).startswith(_BUSY):
                raise
            if not waits:
                print(f"waiting for {str(error)[len(_BUSY) + 1 :]}, which makes {part.lock.parent}", file=sys.stderr)
            waits = True
            time.sleep(_WAIT_SECONDS)


def find_in_cache(options: PreprocessOptions) -> dict[str, Sidecar]:
    """Return the sidecars of the dataset by prefix if the cache has it; empty otherwise."""
    return _Completion(cache_entry(options, remember=False)).read()


def cache_entry(options: PreprocessOptions, remember: bool = True) -> Path:
    """Return the folder of the dataset that ``options`` describe, which may not exist yet.

    Args:
        options: with ``cache_folder``.
        remember: whether to write the hashes of large files to the cache.
    """
    check_options(options)
    if STDIN in options.input:
        raise UserError("--input -: standard input cannot be cached; write it to a file, or leave --cache-folder out")
    folder = Path(str(options.cache_folder))
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"--cache-folder {folder}: not a folder (set also by data.cache_folder, or RETEMPER_CACHE)")
    hashes = folder / _HASHES if remember else None
    files = expand_inputs(options.input, options.inputs)
    facts = {
        "program": __version__,
        "files": [
            [file.source, file.format, file.compression, content]
            for file, content in zip(files, _contents(files, hashes), strict=True)
        ],
        "tokenizer": _tokenizer_facts(options),
        "options": _options_facts(options, hashes),
        "cleaning": cleaning_libraries(options),
    }
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=10).hexdigest()
    made = sorted((folder / "datasets").glob(f"*-{digest}"))  # perhaps when the text had another name
    return made[0] if made else folder / "datasets" / f"{_readable(options.input[0])}-{digest}"


class _Completion:
    """The record that a dataset of the cache, or a part of it, is complete: ``complete.json`` in its folder."""

    def __init__(self, entry: Path, shard: str | None = None) -> None:
        part = f"part-{shard.replace('/', '-of-')}-" if shard else ""
        self._path = entry / f"{part}{_COMPLETE}"
        self.lock = entry / f".{part}lock"

    def read(self) -> dict[str, Sidecar]:
        """Return the sidecars by prefix; empty if the dataset is not complete."""
        try:
            names = json.loads(read_regular(self._path))["datasets"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._path}: cannot be read ({error}); remove its folder") from None
        found = {str(self._path.with_name(name)): Sidecar.read(self._path.with_name(name)) for name in names}
        return {prefix: sidecar for prefix, sidecar in found.items() if sidecar} if all(found.values()) else {}

    def write(self, prefixes: Sequence[str]) -> dict[str, Sidecar]:
        """Record that the datasets ``prefixes`` are complete, and return their sidecars."""
        record = {"datasets": [os.path.basename(prefix) for prefix in prefixes]}
        replace_file(self._path, [json.dumps(record, indent=1).encode() + b"\n"])
        return self.read()


def _join_parts(entry: Path) -> dict[str, Sidecar]:
    """Join the parts that several calls with ``--shard`` have made; return nothing unless all are complete."""
    for first in sorted(entry.glob(f"part-0-of-*-{_COMPLETE}")):
        count = int(first.name.split("-")[3])
        parts = [_Completion(entry, f"{index}/{count}").read() for index in range(count)]
        if all(parts):
            prefixes = []
            for names in zip(*parts, strict=True):
                prefix = re.sub(rf"\.shard-0-of-{count}(?=$|\.)", "", names[0])
                merge(MergeOptions(names, prefix, overwrite=True))
                prefixes.append(prefix)
            joined = _Completion(entry).write(prefixes)
            _remove_parts(entry, count)
            return joined
    return {}


def _remove_parts(entry: Path, count: int) -> None:
    for path in entry.glob(f"part-*-of-{count}-{_COMPLETE}"):
        path.unlink()
    for name in glob.glob(f"{glob.escape(str(entry / _DATASET))}.shard-*-of-{count}.*"):
        os.unlink(name)


def _contents(files: Sequence[InputFile], hashes: Path | None) -> list[str]:
    """Return a hash of the content of every file; of a URL, what the server says of its version.

    Args:
        files: local ones and URLs.
        hashes: folder that remembers the hashes of large files.
    """
    total = sum(file.size for file in files if not is_url(file.path))
    with ProgressReport("reading the input", total) as progress, ThreadPoolExecutor(usable_cores()) as pool:
        done = 0
        contents = []
        for file, content in zip(files, pool.map(lambda file: _content(file, hashes), files), strict=True):
            contents.append(content)
            done += 0 if is_url(file.path) else file.size
            progress.show(done)
    return contents


def _content(file: InputFile, hashes: Path | None) -> str:
    path = os.path.abspath(file.path)
    if is_url(file.path):
        # A version need not be a hash of the content. A commit changes the paths of files that it does not change.
        return f"{re.sub('@[0-9a-f]{40}/', '/', file.path)} {file.size} {file.version}"
    try:
        if file.size < _REMEMBERED_BYTES:
            return hash_file(path)
        inode = os.stat(path).st_ino
        facts = f"{path}\0{file.size}\0{file.version}\0{inode}".encode("utf-8", "surrogateescape")
        known = None if hashes is None else hashes / hashlib.blake2b(facts, digest_size=16).hexdigest()
        if known is not None and known.exists():
            return known.read_text()
        content = record_file(path).xxh3_128
    except OSError as error:
        raise UserError(f"--input {file.path}: {error.strerror or error}") from error
    if known is not None:
        with suppress(OSError):  # a cache that cannot be written is reported with the dataset
            known.parent.mkdir(parents=True, exist_ok=True)
            replace_file(known, [content.encode()])
    return content


def _tokenizer_facts(options: PreprocessOptions) -> dict[str, Any]:
    """Return hashes of the files that decide how text is encoded, and what the model's config says about it."""
    choice = choose_tokenizer(options)
    file = find_tokenizer_file(choice.name)
    names = [file.name, file.with_suffix(".json").name, *CONFIG_FILES, ADDED_TOKENS_FILE, *_TEMPLATES]
    paths = [file.with_name(name) for name in dict.fromkeys(names)]
    model: Mapping[str, Any] = choice.model_config or read_config(file.with_name(MODEL_CONFIG))
    return {
        "files": {path.name: hash_file(path) for path in paths if path.is_file()},
        "model": {key: model[key] for key in _MODEL_KEYS if key in model},
    }


def _options_facts(options: PreprocessOptions, hashes: Path | None) -> dict[str, Any]:
    """Return the options that differ from their defaults and decide the contents; files by their hashes."""
    kept = {"append_eod", "eod_token", "bos"}
    given = asdict(options)
    facts = {
        field.name: given[field.name]
        for field in fields(options)
        if (field.name not in NOT_CONTENTS | _NOT_IN_NAME or field.name in kept) and given[field.name] != field.default
    }
    if options.held_out:
        facts["held_out"] = _contents(held_out_files(options.held_out, options.text_choice), hashes)
    if options.chat_template is not None:
        try:
            facts["chat_template"] = hash_file(options.chat_template)
        except OSError as error:
            raise UserError(f"--chat-template {options.chat_template}: {error.strerror or error}") from error
    return facts


def _readable(argument: str) -> str:
    """Return the last part of an ``--input`` argument that can be part of a file name."""
    parts = [part for part in re.split(r"[/\\]", argument) if part and not re.search(r"[*?\[]", part)]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", parts[-1] if parts else "text")[:40]
